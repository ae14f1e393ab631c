"""Ray brought in, and a cluster connected to and left again."""

from __future__ import annotations

import importlib
import io
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ...errors import UsageError
from .ray_cluster import RayCluster, first_line

_CONNECT_S = 10.0
_LONGEST = 400


class _Remarks(io.TextIOBase):
    """What Ray prints, on stderr: the first line of each remark, without the dumps of its logs that follow."""

    def write(self, text: str) -> int:
        """Pass on the lines that are not indented."""
        for line in text.splitlines():
            if line.strip() and not line[0].isspace():
                print(line[:_LONGEST], file=sys.stderr)
        return len(text)


@contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """Connect to the cluster at ``address`` (``auto`` or HOST:PORT) while entered. Raises UsageError.

    What Ray prints goes to stderr meanwhile: stdout may be a JSON document.
    """
    _check_address(address)
    ray = _import_ray()
    with redirect_stdout(_Remarks()):
        ours = not ray.is_initialized()
        if ours:
            _init(ray, address)
        cluster = RayCluster(ray)
        try:
            yield cluster
        finally:
            cluster.close()
            if ours:
                ray.shutdown()


def _import_ray() -> Any:
    try:
        importlib.import_module("ray.exceptions")
        return importlib.import_module("ray")
    except ImportError as error:
        raise UsageError(f"--executor ray needs Ray ({error}): pip install 'dfmpc[ray]'") from error


def _init(ray: Any, address: str) -> None:
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UsageError(
            f"--ray-address {address}: {first_line(error)}; start one with 'ray start --head', or give its HOST:PORT"
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)  # Ray takes it for itself


def _check_address(address: str) -> None:
    """Try to connect: Ray itself waits for minutes where nobody answers."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UsageError(
            f"--ray-address {address}: give auto or HOST:PORT of the cluster's head; "
            "the command must run on one of its nodes"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray-address {address}: nobody answers ({error}); is the cluster up?") from error
