"""What the control groups of this process (Linux, version 1 and 2) leave it of memory and cores.

A batch system or a container sets its limit on some group above the process's own, so all of them count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def memory_limit(root: Path = _ROOT, groups: str | None = None) -> float | None:
    """Return the least limit of memory in bytes; None where there is none.

    ``root`` is where control groups are mounted, ``groups`` what /proc/self/cgroup says.
    """
    return _least("memory", _memory, root, groups)


def core_limit(root: Path = _ROOT, groups: str | None = None) -> float | None:
    """Return the least quota in cores, such as 1.5; None where there is none. Arguments as of ``memory_limit``."""
    return _least("cpu", _cores, root, groups)


def _least(controller: str, limit: Callable[[Path], float | None], root: Path, groups: str | None) -> float | None:
    text = _own_groups() if groups is None else groups
    found = (limit(folder) for folder in _folders(controller, root, text))
    return min((each for each in found if each is not None), default=None)


def _own_groups() -> str:
    try:
        return _OWN.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _folders(controller: str, root: Path, groups: str) -> Iterator[Path]:
    """Return the folders of the process's groups and of all above; some may not be there.

    A container may see the host's path and yet have its own group mounted as the root.
    """
    for line in groups.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        names = controllers.split(",")
        if number == "0" and not controllers:
            bases = [root, root / "unified"]
        elif controller in names:
            bases = [root / name for name in dict.fromkeys([controllers, *names])]
        else:
            continue
        below = PurePosixPath(*[part for part in PurePosixPath(path).parts if part not in ("/", "..")])
        for base in bases:
            yield from (base / group for group in (below, *below.parents))


def _memory(folder: Path) -> float | None:
    limits = [_number(_word(folder / name)) for name in ("memory.max", "memory.limit_in_bytes")]
    return next((limit for limit in limits if limit is not None), None)


def _cores(folder: Path) -> float | None:
    quota, period = _number(_word(folder / "cpu.max")), _number(_word(folder / "cpu.max", 1))
    if quota is None:
        quota, period = (_number(_word(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return quota / period if quota and period and quota > 0 else None


def _word(file: Path, index: int = 0) -> str:
    try:
        return (*file.read_text(encoding="ascii").split(), "", "")[index]
    except (OSError, ValueError):
        return ""


def _number(word: str) -> float | None:
    return float(word) if word.lstrip("-").isdigit() else None  # else absent, or the word max
