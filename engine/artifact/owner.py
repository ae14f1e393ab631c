"""Who owns an attempt: a process on a host, told apart from a later process with the same number.

Two machines, or containers of one, may share a host name, so whether a process lives is judged only where it can be:
under the same boot and the same process-number namespace by looking, and under an earlier boot of this very machine
without. A boot's identity alone does not tell an earlier boot from another machine, so the machine's own is kept too.
That says nothing inside of containers, which have the machine's, their image's or none, so an earlier boot is seen only
by processes in the namespace that a machine starts with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path

UNKNOWN_S = 7 * 24 * 3600
"""How long a process of which nothing can be known from here is taken to live after what it wrote last."""
_FIRST_NAMESPACE = "pid:[4026531836]"
"""The namespace of a machine's first process; Linux gives it this number on every machine (PROC_PID_INIT_INO)."""


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

    machine: str = ""
    """Of the machine over all its boots, hashed; empty in what older versions wrote."""

    @classmethod
    def current(cls) -> Owner:
        """Return this process."""
        return cls(socket.gethostname(), _boot(), _namespace(), os.getpid(), _started(os.getpid()), _machine())

    @classmethod
    def parse(cls, content: object) -> Owner | None:
        """Return the owner whose ``to_dict`` is ``content``, of an older or a newer version too; else None."""
        known = [field.name for field in fields(cls)]
        found = {name: content[name] for name in known if name in content} if isinstance(content, dict) else {}
        if any(isinstance(value, int) != (name == "pid") for name, value in found.items()):
            return None
        try:
            return cls(**found)
        except TypeError:
            return None

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields for JSON."""
        return asdict(self)

    def is_dead(self) -> bool | None:
        """Tell whether the process has ended; None where that cannot be known from here."""
        if self.host != socket.gethostname() or self.namespace != _namespace() or not self.boot:
            return None
        if self.boot != _boot():
            return True if self._is_of_this_machine() else None
        return not _alive(self.pid) or (bool(self.started) and _started(self.pid) != self.started)

    def _is_of_this_machine(self) -> bool:
        return bool(self.machine) and self.machine == _machine() and self.namespace == _FIRST_NAMESPACE


def read_owner(path: Path) -> Owner | None:
    """Return the owner that ``path`` names, None where the file is missing or not an owner's."""
    try:
        return Owner.parse(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):
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


def _machine() -> str:
    """Return systemd's identity of the machine, hashed, as it is not to be shown around; see machine-id(5)."""
    try:
        text = Path("/etc/machine-id").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
    return hashlib.sha256(f"dfmpc {text}".encode()).hexdigest()[:16] if re.fullmatch("[0-9a-f]{32}", text) else ""


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
