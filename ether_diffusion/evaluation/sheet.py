"""One picture of a benchmark to show around: a row per subject, its reference, then every method for one prompt.

``python -m ether_diffusion.evaluation.sheet runs/playground sheet.png --prompt 1``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ether_diffusion.evaluation.collection import read_benchmark
from ether_diffusion.images import load_image
from ether_diffusion.page.pictures import picture_grid, save_picture


def draw_sheet(folder: Path, subjects: Sequence[str] = (), prompt: int = 0) -> Image.Image:
    """The sheet of a benchmark's folder; every method at its best learning rate.

    Args:
        folder: where ``eval/dreambench.py`` wrote.
        subjects: rows; all where none is named.
        prompt: the number of the subject's prompt that is shown, of its first image.

    Raises:
        FileNotFoundError: it is no benchmark's folder, or pictures are gone.
        ValueError: a subject is not in it, or has no such prompt.
    """
    benchmark = read_benchmark(folder, folder.name)
    arms, rows = benchmark.shown_arms, []
    for subject in subjects or benchmark.subjects:
        if subject not in benchmark.subjects:
            raise ValueError(f"{folder} has no subject {subject!r}; it has {', '.join(benchmark.subjects)}")
        found = [results[0] for row in arms if (results := benchmark.results_of(row, subject))]
        prompts = list(dict.fromkeys(image["prompt"] for image in found[0]["images"]))
        if not 0 <= prompt < len(prompts):
            raise ValueError(f"{subject} has the prompts 0 to {len(prompts) - 1}, not {prompt}")
        files = [
            benchmark.picture(result, next(i["file"] for i in result["images"] if i["prompt"] == prompts[prompt]))
            for result in found
        ]
        rows.append((prompts[prompt], [load_image(path) for path in (found[0]["references"][0], *files)]))
    return picture_grid(rows, ["reference", *(str(row["arm"]) for row in arms)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sheet of the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the benchmark's folder, such as runs/playground")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--subjects", nargs="*", default=[], help="default: all")
    parser.add_argument("--prompt", type=int, default=0, help="number of the prompt that is shown")
    given = parser.parse_args(arguments)
    try:
        save_picture(draw_sheet(given.folder, given.subjects, given.prompt), given.picture)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(given.picture)


if __name__ == "__main__":
    main()
