"""SIGUSR1, which batch systems send some time before they end a job: save and stop, to be resumed in the next one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Whether the signal came; it only sets a mark, which the loop looks at between two steps."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, _: int, __: FrameType | None) -> None:
        self.came = True


@contextmanager
def listening() -> Iterator[StopSignal]:
    """Listen while the block runs; only a process's main thread can."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGUSR1, before)
