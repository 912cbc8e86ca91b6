"""The main job from end to end on a laptop: draw a subject, learn it, load the result, score it.

``ether demo FOLDER`` needs neither the Hub nor a GPU: the base and its judges are the playground's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion import playground
from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.recipes import find_config

BASES = {playground.NAME: "demo", playground.FLOW: "dreambooth_playground_flow"}
"""How the subject is learnt on each embedded base."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo in the folder that the command line names.

    Raises:
        SystemExit: 2 if the folder cannot be written or the config does not exist, the training's status if it
            failed, 1 if the saved adapter does not draw the same picture again.
    """
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the photos and the run are written")
    parser.add_argument(
        "--base", choices=list(BASES), default=playground.NAME, help="the embedded base (default: %(default)s)"
    )
    parser.add_argument("--config", help="a YAML file or a recipe's name (default: the base's own)")
    given = parser.parse_args(arguments)
    try:
        config = find_config(given.config or BASES[given.base])
    except OSError as error:
        parser.error(str(error))

    with first_imports():
        from ether_diffusion.demo import draw_photos, show_result, train
    try:
        draw_photos(given.folder / "subject")
    except OSError as error:
        parser.error(str(error))
    try:
        run = train(given.folder, config)
    except subprocess.CalledProcessError as failed:
        raise SystemExit(failed.returncode) from None
    raise SystemExit(0 if show_result(run) else 1)
