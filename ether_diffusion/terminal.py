"""A terminal that is closed while a program runs: what is written to it from then on goes nowhere.

The program goes on where it was told to (``disown``, or a hangup that is ignored), or ends as a hangup says: a line on
a screen that is gone is no reason to lose a training.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


def leave_terminal() -> None:
    """Let what is written to a closed terminal go nowhere: otherwise the next line would be an error."""
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere.fileno(), descriptor)


class Closable:
    """A stream to a terminal; writing to one that is closed is no error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, as far as there is a terminal."""
        try:
            return self.stream.write(text)
        except OSError as error:
            _left(error)
            return len(text)

    def flush(self) -> None:
        """Write what is held back, as far as there is a terminal."""
        try:
            self.stream.flush()
        except OSError as error:
            _left(error)


def _left(error: OSError) -> None:
    """Leave a terminal that is closed.

    Raises:
        OSError: something else is the matter.
    """
    if error.errno != errno.EIO:
        raise error
    leave_terminal()


@contextmanager
def may_close() -> Iterator[None]:
    """Within this, the terminal of the standard output and error may be closed."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is not None and not isinstance(stream, Closable) and stream.isatty():
            setattr(sys, name, cast(TextIO, Closable(stream)))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
