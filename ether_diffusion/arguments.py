"""The argument parser of the programs without a config: a mistake is answered in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the two dozen lines of usage before it."""

    def error(self, message: str) -> NoReturn:
        """End the program with one line on the standard error.

        Raises:
            SystemExit: always, with 2.
        """
        self.exit(2, f"{self.prog}: error: {message} (--help shows all settings)\n")
