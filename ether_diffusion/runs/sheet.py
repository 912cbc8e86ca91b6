"""One picture of a run to show around: references, the base's samples, the finetuned ones, in three rows.

``python -m ether_diffusion.runs.sheet runs/dog sheet.png``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ether_diffusion.arguments import Parser
from ether_diffusion.files import atomic_path
from ether_diffusion.ranges import COUNT
from ether_diffusion.runs.record import read_run

SIDE, GAP, TITLE = 128, 6, 22
"""Pixels: side of a picture, space between two, height of a row's title."""


def draw_sheet(run_dir: str | Path, columns: int = 8) -> Image.Image:
    """The sheet of a run folder; a row that has no pictures is left out.

    Small pictures are magnified by pixels, not smoothed. Samples stand in the order of ``samples/prompts.json``, so
    that a base's and a finetuned one below it have the same prompt and seed.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
        ValueError: it has no pictures at all.
    """
    run = read_run(run_dir)
    rows = {"references": [path for path in map(Path, run.provenance.instance_images) if path.is_file()]}
    for title, step in (("base", 0), (run.method_name, run.finetuned_step)):
        if step in run.sample_steps:
            rows[title] = [run.folder / run.sample(step, prompt["file"]) for prompt in run.prompts]
    rows = {title: paths[:columns] for title, paths in rows.items() if paths}
    if not rows:
        raise ValueError(f"{run.folder} has neither references nor samples to show")
    width = max(map(len, rows.values())) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (TITLE + SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (title, paths) in enumerate(rows.items()):
        top = number * (TITLE + SIDE + GAP)
        pen.text((GAP, top + 3), title, fill="#444444", font=font)
        for column, path in enumerate(paths):
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
            small = max(picture.size) < SIDE
            method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.fit(picture, (SIDE, SIDE), method), (GAP + column * (SIDE + GAP), top + TITLE))
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sheet of the run folder named on the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run folder, such as runs/dog")
    parser.add_argument("picture", type=Path, help="the file to write, such as sheet.png")
    parser.add_argument("--columns", type=COUNT.of(int), default=8, help="at most so many pictures in a row")
    given = parser.parse_args(arguments)
    try:
        sheet = draw_sheet(given.run, given.columns)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    with atomic_path(given.picture) as temporary:
        sheet.save(temporary, given.picture.suffix.removeprefix(".") or "png")
    print(given.picture)


if __name__ == "__main__":
    main()
