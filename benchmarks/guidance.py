"""What CLIP sees in pictures of an embedded base at several guidance scales (and shifts of a flow model's σ).

    python benchmarks/guidance.py --base playground-flow --images 128 --json docs/results/guidance.json

The captions, seeds and judge are those of the base's build report; with 512 images the row of the base's own guidance
is the report's. The interval is Wilson's for a share of so many pictures, 95 %. It does not say whether two scales
differ: they draw the same captions from the same noise, so look at the paired counts beside the best scale.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from scipy.stats import binomtest

from ether_diffusion import playground
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table
from ether_diffusion.playground.build.evaluate import SAMPLING, Sampling, asked_scenes, generate, loaded, right_answers
from ether_diffusion.playground.build.judges import Judges

KINDS = {playground.NAME: "unet", playground.FLOW: "flow"}
"""Of the embedded bases, what they are to the build."""
ASPECTS = ("class", "colour", "background")


def measured(base: str, guidance: float, shift: float | None, images: int, seed: int) -> dict[str, list[bool]]:
    """Of every picture whether CLIP sees the class, a colour of the coat and the background that was asked for."""
    device = torch.device("cpu")
    pipe = loaded(Path(playground.base_folder(base)), device)
    if shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=shift)
    own = SAMPLING[KINDS[base]]
    scenes = asked_scenes(seed, images)
    drawn = generate(pipe, scenes, seed, Sampling(own.scheduler, own.steps, guidance))
    return right_answers(Judges(playground.BASE / "judges", device), scenes, drawn.pictures)


def report_of(base: str) -> Path:
    """The record of the base's build, which names its seed."""
    from ether_diffusion.playground.flow_base import OWN

    return (OWN if base == playground.FLOW else playground.BASE) / "build.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(KINDS), default=playground.NAME)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 6.0])
    parser.add_argument("--shift", type=float, nargs="+", help="of a flow model; its own where it is not given")
    parser.add_argument("--seed", type=int, help="of captions and noise (default: that of the base's report)")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--json", type=Path, help="file to add the results to")
    given = parser.parse_args()
    own = int(json.loads(report_of(given.base).read_text())["seed"])
    seed = own if given.seed is None else given.seed
    rows: list[dict[str, object]] = []
    answers: list[dict[str, list[bool]]] = []
    for shift in given.shift or [None]:
        for guidance in given.guidance:
            found = measured(given.base, guidance, shift, given.images, seed)
            answers.append(found)
            row: dict[str, object] = {"guidance": guidance, "shift": shift, "images": given.images, "seed": seed}
            for aspect in ASPECTS:
                hits = sum(found[aspect])
                ends = binomtest(hits, given.images).proportion_ci(method="wilson")
                row[aspect] = [hits / given.images, ends.low, ends.high]
            rows.append(row)
            print(json.dumps(row), flush=True)
    best = max(range(len(rows)), key=lambda number: sum(map(sum, answers[number].values())))
    table = []
    for number, row in enumerate(rows):
        cells = [f"{row['guidance']:g}", "own" if row["shift"] is None else f"{row['shift']:g}"]
        cells += ["{:.3f} [{:.3f}, {:.3f}]".format(*row[aspect]) for aspect in ASPECTS]  # type: ignore[misc]
        pairs = list(zip(answers[number]["class"], answers[best]["class"], strict=True))
        cells.append(f"{sum(a and not b for a, b in pairs)} / {sum(b and not a for a, b in pairs)}")
        table.append(cells)
    print(markdown_table(["guidance", "shift", *ASPECTS, "class right only here / only at the best"], table))
    if given.json is not None:
        known = json.loads(given.json.read_text()) if given.json.exists() else {}
        known[given.base] = {"command": " ".join(["python", *sys.argv]), "rows": rows}
        write_text(given.json, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
