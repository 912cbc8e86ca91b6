"""The pictures and scores of ``docs/settings.md``: one subject under too little and too much of a setting.

``python docs/settings_pictures.py FOLDER`` makes seven trainings in FOLDER (those that are finished there stay), draws
each with the same prompts and seeds, and writes ``docs/pictures/settings-*.webp`` and ``docs/results/settings.json``.
``docs/tables.py`` makes the tables of it. About 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from diffusers import DiffusionPipeline
from PIL import Image

import ether_diffusion as ether
from ether_diffusion import playground
from ether_diffusion.demo import SUBJECT
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges, References, score_images
from ether_diffusion.page.pictures import picture_grid
from ether_diffusion.playground.world import write_subject
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import Asked, draw, load_pipeline
from ether_diffusion.runs.folder import read_provenance
from ether_diffusion.runs.sample_scores import true_answers

DOCS = Path(__file__).parent
RECIPE = "demo"
TOKEN = "qwe"
STEPS, LONG, EVERY = 400, 1200, 50
"""Steps of every training but the long one, of the long one, and between its checkpoints."""
SEEDS, DENOISING = 2, 16
"""Pictures of each prompt, and denoising steps of a picture."""
HEADS = {
    "a qwe robot on a meadow": "on a meadow",
    "a qwe robot in a cloudy sky": "in a cloudy sky",
    "a qwe robot on a snowy field": "on a snowy field",
    "a small qwe robot on a meadow": "small, meadow",
}
"""The prompts, whose true pictures are known, and what is written over the pictures of each."""
PROMPTS = [prompt for prompt in HEADS for _ in range(SEEDS)]


@dataclass(frozen=True)
class Look:
    """One row of a picture: a training at one of its steps, at a strength."""

    title: str
    training: str
    step: int = STEPS
    strength: float = 1.0


TRAININGS: Mapping[str, Mapping[str, str]] = {
    "long": {"max_train_steps": str(LONG)},
    "slow": {"learning_rate": "1e-3"},
    "fast": {"learning_rate": "1e-1"},
    "one-block": {"n_blocks": "1"},
    "sixteen-blocks": {"n_blocks": "16"},
    "one-photo": {},
    "text-encoder": {"train_text_encoder": "true"},
}
"""What each training has in another way than the recipe, with its 400 steps."""
ROWS: Mapping[str, tuple[Look, ...]] = {
    "steps": tuple(Look(f"{step} steps", "long", step) for step in (50, 150, STEPS, LONG)),
    "rate": (Look("rate 1e-3", "slow"), Look("rate 1e-2", "long"), Look("rate 1e-1", "fast")),
    "strength": tuple(Look(f"strength {each:g}", "long", strength=each) for each in (0.25, 0.5, 1.0, 1.5, 2.0)),
    "photos": (Look("one photo", "one-photo"), Look("five photos", "long")),
    "blocks": (
        Look("n_blocks 1", "one-block"),
        Look("n_blocks 4", "long"),
        Look("n_blocks 16", "sixteen-blocks"),
    ),
    "text-encoder": (Look("denoiser only", "long"), Look("and text encoder", "text-encoder")),
}
"""The rows of each picture; the base is above them."""


def train(name: str, folder: Path) -> Path:
    """Make a training, unless it is finished; return its run folder.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    run = folder / name
    if run.is_dir() and read_provenance(run).get("status") == "finished":
        return run
    photos = folder / ("photo" if name == "one-photo" else "photos")
    settings = {
        "instance_data_dir": str(photos),
        "output_dir": str(run),
        "max_train_steps": str(STEPS),
        "validation_steps": str(LONG),
        "num_validation_images": "1",
        "checkpointing_steps": str(EVERY if name == "long" else STEPS),
        **TRAININGS[name],
    }
    command = [sys.executable, "-m", "ether_diffusion.cli", "train", "--config", RECIPE, "--overwrite"]
    subprocess.run(command + [f"--{key}={value}" for key, value in settings.items()], check=True)
    return run


def photos_of(folder: Path) -> list[Path]:
    """The subject's five photos in ``folder/photos``, and the first of them alone in ``folder/photo``."""
    if not (folder / "photos").is_dir():
        write_subject(SUBJECT, folder / "photos")
    photos = sorted((folder / "photos").glob("*.png"))
    (folder / "photo").mkdir(exist_ok=True)
    shutil.copy(photos[0], folder / "photo")
    return photos


def drawn(pipe: DiffusionPipeline, look: Look | None, folder: Path) -> list[Image.Image]:
    """Every prompt with every seed, in this order, by what a training had learnt; without a look by the base.

    What is drawn already is read.
    """
    kept = folder / "drawn" / ("base" if look is None else f"{look.training}-{look.step}-{look.strength:g}")
    if not kept.is_dir():
        if look is not None:
            learnt = folder / look.training / "checkpoints" / f"step-{look.step:06d}"
            ether.load(pipe, learnt, strength=look.strength)
        asked = Asked(PROMPTS, list(range(SEEDS)) * len(HEADS))
        guidance = playground.GUIDANCE[playground.NAME]
        with atomic_path(kept) as temporary:
            temporary.mkdir()
            for name, image in zip(asked.names, draw(pipe, asked, len(PROMPTS), DENOISING, guidance), strict=True):
                image.save(temporary / name)
        if look is not None:
            ether.unload(pipe)
    return [Image.open(path) for path in sorted(kept.iterdir())]


def scores_of(images: list[Image.Image], references: References, judges: Judges) -> dict[str, float]:
    """Means over the pictures: truth-likeness, DINO, DINO to the nearest photo, CLIP-T without the rare word."""
    rows = score_images(images, PROMPTS, references, judges, TOKEN).images
    keys = ("truth", "dino", "dino_nearest", "clip_t")
    return {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in keys}


def main() -> None:
    """Train, draw, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where photos and trainings are kept")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    photos = photos_of(folder)
    for name in TRAININGS:
        train(name, folder)
    judges = load_judges(playground.NAME, playground.NAME)
    references = References(photos, judges, true_answers(photos, list(HEADS)))
    pipe = load_pipeline(Base(playground.NAME))
    base = drawn(pipe, None, folder)
    pictures = {look: drawn(pipe, look, folder) for rows in ROWS.values() for look in rows}
    heads = [head if number == 0 else "" for head in HEADS.values() for number in range(SEEDS)]
    for name, rows in ROWS.items():
        sheet = picture_grid([("base", base), *((look.title, pictures[look]) for look in rows)], heads)
        with atomic_path(DOCS / "pictures" / f"settings-{name}.webp") as temporary:
            sheet.save(temporary, "WEBP", quality=85, method=6)
    found: dict[str, Any] = {"pictures": len(base), "base": scores_of(base, references, judges)}
    for name, rows in ROWS.items():
        found[name] = {look.title: scores_of(pictures[look], references, judges) for look in rows}
    write_text(DOCS / "results" / "settings.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
