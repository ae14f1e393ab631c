"""Factories that take as long as a test wants, and that leave what a worker's owner must not trip over."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

from torch import nn


def _plain(width: int) -> nn.Module:
    spec = importlib.util.spec_from_file_location("beside", Path(__file__).with_name("tiny_networks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.plain(width)
    return network


def works_while(file: str, width: int = 8) -> nn.Module:
    """Be at work, with signs of it, until ``file`` is gone; ``<file>.pid`` says which process is."""
    if Path(file).exists():
        said = Path(f"{file}.{os.getpid()}")  # several may be at it
        said.write_text(str(os.getpid()))
        said.replace(f"{file}.pid")
    while Path(file).exists():
        sum(range(100_000))
        time.sleep(0.02)
    return _plain(width)


def forks_and_dies_once(marker: str) -> nn.Module:
    """The first time, be killed while a child by fork lives on with all that this process had open."""
    if not Path(marker).exists():
        Path(marker).touch()
        if os.fork() == 0:
            threading.Event().wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return _plain(8)
