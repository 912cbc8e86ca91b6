"""The training programs as commands: settings first, then the imports that take seconds, then the training.

``--help`` and a mistake in the settings are answered before torch and diffusers are imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ether_diffusion.first_imports import first_imports
from ether_diffusion.logs import is_first_process, show_logs
from ether_diffusion.terminal import may_close
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.interrupts import LAUNCHED

LAUNCHER_NOTE = "(a traceback below is of accelerate's launcher and says no more; accelerate launch --quiet has none)"


def dreambooth(arguments: Sequence[str] | None = None) -> None:
    """Teach the base a subject: parse the settings, train, and say where the result is.

    Raises:
        SystemExit: one clear line for what a user can mend; 128 + signal after Ctrl-C or SIGTERM, as shells do.
    """
    show_logs()
    with may_close(), explained_to_launchers():
        config = parse_config(DreamBoothConfig, arguments)
        with first_imports():
            from ether_diffusion.training.dreambooth import run
            from ether_diffusion.training.program import run_program
        run_program(config, run)


def control(arguments: Sequence[str] | None = None) -> None:
    """Teach the base a control: parse the settings, train, and say where the result is.

    Raises:
        SystemExit: one clear line for what a user can mend; 128 + signal after Ctrl-C or SIGTERM, as shells do.
    """
    show_logs()
    with may_close(), explained_to_launchers():
        config = parse_config(ControlConfig, arguments)
        with first_imports():
            from ether_diffusion.training.control import run
            from ether_diffusion.training.program import run_program
        run_program(config, run)


@contextmanager
def explained_to_launchers() -> Iterator[None]:
    """Say below an error's line what ``accelerate launch`` adds to it, where that started the program.

    The launcher is another process: it answers every exit status but 0 with a traceback of its own, which nothing in
    this process can keep from following, unless it was started with ``--quiet``.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str) and LAUNCHED in os.environ and is_first_process():
            error.code = f"{error.code}\n{LAUNCHER_NOTE}"
        raise
