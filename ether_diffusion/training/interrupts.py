"""Ctrl-C, SIGTERM and SIGHUP: let the step finish, save, leave."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from ether_diffusion.logs import is_first_process
from ether_diffusion.terminal import leave_terminal

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP is not None else [])]

LAUNCHED = "ACCELERATE_DYNAMO_BACKEND"
"""Of the environment: ``accelerate launch`` sets it, and nobody else does."""


class Interrupts:
    """Within the context the first SIGINT, SIGTERM or SIGHUP is noted in ``received``; a second SIGINT stops at once.

    SIGHUP comes when the terminal closes; under ``nohup`` it is ignored, and stays so.

    ``accelerate launch`` with one process dies of a SIGTERM without passing it on; its death counts as one.
    """

    def __init__(self) -> None:
        self._received = 0
        self._launcher = os.getppid() if LAUNCHED in os.environ else None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def received(self) -> int:
        """Number of the signal, 0 while there was none."""
        if not self._received and self._launcher is not None and os.getppid() != self._launcher:
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets no other thread handle signals
        for number in SIGNALS:
            if number == HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if number == HANGUP:
            leave_terminal()
        if is_first_process():
            print(f"\n{signal.Signals(number).name}: stopping after this step …", file=sys.stderr, flush=True)
