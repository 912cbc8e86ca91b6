"""The drawn world as pairs for controllable generation: scenes, their semantic maps or edges, and captions.

    python -m ether_diffusion.playground.pairs pairs --count 64

writes such pairs as an image folder: what ``train_controlnet.py --train_data_dir`` and ``eval.control_accuracy --data``
read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.control.conditions import colour_map, palette_map
from ether_diffusion.data.pairs import Pair
from ether_diffusion.files import atomic_path
from ether_diffusion.playground.world import draw, random_caption, random_scene
from ether_diffusion.ranges import COUNT, SEED

HELD_OUT = 7_000_003
"""Seed of scenes to evaluate on: far from those of trainings, which take their own seed, and of the base's build."""


def draw_pair(seed: int, index: int, with_map: bool = True) -> Pair:
    """The pair number ``index`` of the endless series ``seed``: 64 x 64 pixels, the map in its colours.

    Args:
        seed: of the series.
        index: of the pair.
        with_map: whether the condition is the semantic map; None otherwise, to be made from the picture.
    """
    scene = random_scene(seed, index)
    drawing = draw(scene)
    condition = colour_map(drawing.semantic_map) if with_map else None
    return Pair(drawing.image, condition, random_caption(scene, seed, index))


def write_pairs(folder: Path, count: int, seed: int = HELD_OUT) -> None:
    """Write pairs as an image folder: ``images/``, ``maps/`` (palette PNGs of class ids) and ``metadata.jsonl``.

    Raises:
        FileExistsError: the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it, or name another folder")
    with atomic_path(folder) as temporary:
        for name in ("images", "maps"):
            (temporary / name).mkdir(parents=True)
        lines = []
        for index in range(count):
            scene, name = random_scene(seed, index), f"{index:05d}.png"
            drawing = draw(scene)
            drawing.image.save(temporary / "images" / name)
            palette_map(drawing.semantic_map).save(temporary / "maps" / name)
            row = {"file_name": f"images/{name}", "conditioning_image": f"maps/{name}"}
            lines.append(json.dumps(row | {"text": random_caption(scene, seed, index)}) + "\n")
        (temporary / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write pairs of the drawn world."""
    parser = Parser(prog="python -m ether_diffusion.playground.pairs", description=write_pairs.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=COUNT.of(int), default=64, help="number of pairs (default: %(default)s)")
    parser.add_argument("--seed", type=SEED.of(int), default=HELD_OUT, help="of the scenes (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        write_pairs(given.folder, given.count, given.seed)
    except OSError as error:
        parser.error(str(error))
    print(f"{given.count} pairs: {given.folder}")


if __name__ == "__main__":
    main()
