"""The imports that take seconds, torch's and diffusers', in a program: as fast as they can be, and ended by Ctrl-C."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def first_imports() -> Iterator[None]:
    """Import what a program needs, without Python's garbage collector; Ctrl-C meanwhile ends the process at once."""
    with ended_by_ctrl_c(), _collector_paused():
        yield


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once, unless somebody else handles it.

    A library could catch the exception of Ctrl-C and go on half imported. There is nothing to save yet.
    """
    main_thread = threading.current_thread() is threading.main_thread()  # no other may handle signals
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    print("stopped", file=sys.stderr, flush=True)
    os._exit(128 + number)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the collector, and leave what the imports made out of its later collections.

    Imports make a million objects that stay. The collector would look through them again and again, which takes a fifth
    of the time, and once more when the process ends. A process that has imported torch already may hold garbage of its
    own, which would stay for ever: there nothing changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if "torch" in sys.modules:
            gc.freeze()
        gc.enable()
