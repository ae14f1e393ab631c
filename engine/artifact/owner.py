"""Who owns an attempt: a process on a host, told apart from a later process with the same number."""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process. What the system does not tell is an empty string."""

    host: str
    boot: str
    """Identity of the host's boot."""
    namespace: str
    """The process-number namespace: containers of one host may share host names but not numbers."""
    pid: int
    started: str
    """Start of the process, in clock ticks since boot."""

    @classmethod
    def current(cls) -> Owner:
        """Return this process."""
        return cls(socket.gethostname(), _boot(), _namespace(), os.getpid(), _started(os.getpid()))

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields for JSON."""
        return asdict(self)

    def is_dead(self) -> bool | None:
        """Tell whether the process has ended; None where that cannot be known from this host."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot():
            return True
        if self.namespace != _namespace():
            return None
        return not _alive(self.pid) or (bool(self.started) and _started(self.pid) != self.started)


def read_owner(path: Path) -> Owner | None:
    """Return the owner that ``path`` names, None where the file is missing or not an owner's."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**fields)
    except (FileNotFoundError, ValueError, TypeError):
        return None


_DRAFT = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-(\d+)-(\d+)-[0-9a-f]{12}\.tmp")


def draft_of(path: Path) -> Path:
    """Return a hidden name beside ``path`` for this process to write it under first; it tells whose it is."""
    me = Owner.current()
    who = f"{me.boot[:8]}-{_digits(me.namespace)}-{me.pid}-{me.started}-{uuid.uuid4().hex[:12]}"
    return path.with_name(f".{path.name}.{who}.tmp")


def draft_is_dead(draft: Path) -> bool | None:
    """Tell whether the process that wrote ``draft`` has ended; None where that cannot be known from here."""
    found = _DRAFT.fullmatch(draft.name)
    if found is None or found[1] != _boot()[:8] or found[2] != _digits(_namespace()):
        return None
    return Owner(socket.gethostname(), _boot(), _namespace(), int(found[3]), found[4]).is_dead()


def _digits(text: str) -> str:
    return "".join(letter for letter in text if letter.isdigit())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a running process started, nothing for one that ended and only waits for its parent."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # the command's name stands in parentheses and may itself hold spaces and parentheses
    fields = status.rpartition(")")[2].split()
    ended = fields[0] in "ZX"
    return "" if ended else fields[19]
