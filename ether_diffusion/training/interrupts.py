"""Ctrl-C and SIGTERM: let the step finish, save, leave."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupts:
    """Within the context the first SIGINT or SIGTERM is noted in ``received``; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
