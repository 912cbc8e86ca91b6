"""What programs say while they run: the console, its levels, and messages of libraries that are silenced by name."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PACKAGE = "ether_diffusion"
TRAINING = f"{PACKAGE}.training"


@dataclass(frozen=True)
class Silenced:
    """A message of a library that is not shown, because nothing that the user can do changes it.

    Attributes:
        logger: that says it.
        text: part of the message.
        why: it does not matter.
    """

    logger: str
    text: str
    why: str


SILENCED = (
    Silenced(
        "transformers.utils.import_utils",
        "requires torchvision (not installed)",
        "nothing here needs torchvision: image processors work with Pillow",
    ),
    Silenced(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "an optional kernel for 4-bit models on CPUs; bitsandbytes has another one, and says this unless it is used",
    ),
)
"""All messages that are silenced; every other one is shown."""


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Within this, a logger and those below it say errors alone.

    Args:
        name: of the logger, such as ``diffusers``.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_first_process() -> bool:
    """Whether this is the process that prints: the only one, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def silence_libraries() -> None:
    """Leave out the messages of :data:`SILENCED`; call it before the libraries are imported."""
    for name in {each.logger for each in SILENCED}:
        logger = logging.getLogger(name)
        if _is_shown not in logger.filters:
            logger.addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(each.logger == record.name and each.text in message for each in SILENCED)


class Console(logging.Handler):
    """Prints to the standard error: above a progress bar, and each message once.

    Information has no prefix, anything else its level.

    Args:
        lowest: of other processes than the first this level and higher ones are printed.
    """

    def __init__(self, lowest: int = logging.ERROR) -> None:
        super().__init__(logging.NOTSET if is_first_process() else lowest)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message, unless it has been printed before."""
        from tqdm import tqdm  # not for --help

        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = prefix + self.format(record)
        if text not in self.said:
            self.said.add(text)
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()


def show_logs(level: str = "info", quiet: bool = False) -> None:
    """Print what a program says: of this package from ``level`` on, of libraries warnings and errors.

    A second call begins anew: with another level, and what was said before may be said again.

    Args:
        level: debug, info, warning or error.
        quiet: at least warning.
    """
    lowest = getattr(logging, level.upper())
    _print_to(Console())
    logging.getLogger(PACKAGE).setLevel(max(lowest, logging.WARNING) if quiet else lowest)
    logging.getLogger(TRAINING).setLevel(logging.NOTSET)


def show_study_logs() -> None:
    """As :func:`show_logs` for a study, which makes many trainings and says itself how far it is.

    Of trainings warnings and errors alone are printed; of every process, since each has jobs of its own.
    """
    _print_to(Console(logging.WARNING))
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    logging.getLogger(TRAINING).setLevel(logging.WARNING)


def _print_to(console: Console) -> None:
    """Put a console in the place of an earlier one."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, Console)]:
        root.removeHandler(handler)
    root.addHandler(console)
    silence_libraries()


def informs() -> bool:
    """Whether this process shows how far it is: it is the first, and no program has asked for warnings alone."""
    return is_first_process() and logging.getLogger(PACKAGE).level <= logging.INFO


def hide_loading_bars() -> None:
    """Turn off the bars of diffusers and transformers for parts of a model that they load; downloads keep theirs.

    The bars of downloads are shown on a terminal alone, and not where nothing but warnings is.
    """
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as of_transformers

    unwanted = are_progress_bars_disabled() or not informs()
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()  # which turns off those of downloads as well
    (disable_progress_bars if unwanted else enable_progress_bars)()
