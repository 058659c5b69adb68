"""Ctrl-C as a wish: the work in hand is finished first, so nothing is left half done."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Ctrl-C sets `asked`; a second one raises KeyboardInterrupt at once."""
    stop = Stop()

    def ask(_signal: int, _frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
