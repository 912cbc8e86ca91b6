"""Scores of a run's own samples, the base's beside the finetuned ones, for its report and its model card.

``python -m ether_diffusion.training.scores runs/dog --dino facebook/dino-vits16 --clip openai/clip-vit-large-patch14``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ether_diffusion.data.images import load_image
from ether_diffusion.files import write_text
from ether_diffusion.metrics.backbones import Clip, Dino
from ether_diffusion.metrics.fidelity import (
    prompt_similarity,
    similarity_among,
    subject_similarity,
    without_token,
)
from ether_diffusion.training.model_card import write_model_card
from ether_diffusion.training.report import write_report
from ether_diffusion.training.run_record import Run, read_run

Scores = dict[str, dict[str, float]]


class NothingToScoreError(RuntimeError):
    """The run lacks what is compared: samples of the finetuned model, or the subject's pictures."""


def score_run(run_dir: str | Path, dino: Dino, clip: Clip, token: str | None = None) -> Scores:
    """Score the samples of step 0 (the base) and of the last step, and write ``scores.json``, report and card.

    Args:
        run_dir: the run folder.
        dino: sees the subject, for DINO.
        clip: sees the subject and reads the prompts, for CLIP-I and CLIP-T.
        token: the rare word that names the subject; where it is given, CLIP-T is of the prompts without it, which
            CLIP knows, and a second one of the prompts as they are written.

    Returns:
        From metric to the scores of ``base`` (if the run drew its samples), ``finetuned`` and, where it makes sense,
        ``references``: of the subject's own pictures among themselves.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
        NothingToScoreError: it has no samples after step 0, or the subject's pictures are gone.
    """
    run = read_run(run_dir)
    references = _references(run)
    if run.finetuned_step is None:
        raise NothingToScoreError(f"{run.folder} has no samples of the finetuned model: let it reach validation_steps")
    steps = {"base": 0, "finetuned": run.finetuned_step}
    samples = {
        column: [load_image(run.folder / run.sample(step, prompt["file"])) for prompt in run.prompts]
        for column, step in steps.items()
        if step in run.sample_steps
    }
    prompts = [prompt["prompt"] for prompt in run.prompts]
    texts = {"CLIP-T": [without_token(prompt, token) for prompt in prompts] if token else prompts}
    if token:
        texts["CLIP-T, prompt as written"] = prompts
    scores: Scores = {metric: {} for metric in ("DINO", "CLIP-I", *texts)}
    for metric, model in (("DINO", dino), ("CLIP-I", clip)):
        real = model.image_features(references)
        for column, images in samples.items():
            scores[metric][column] = subject_similarity(model.image_features(images), real)
        if len(references) > 1:
            scores[metric]["references"] = similarity_among(real)
    for column, images in samples.items():
        seen = clip.image_features(images)
        for metric, text in texts.items():
            scores[metric][column] = prompt_similarity(seen, clip.text_features(text))
    write_text(run.folder / "scores.json", json.dumps(scores, indent=1))
    write_model_card(run.folder)
    write_report(run.folder)
    return scores


def _references(run: Run) -> list[Image.Image]:
    """The subject's pictures, where the run found them.

    Raises:
        NothingToScoreError: one of them is not there, or the run recorded none.
    """
    paths = [Path(path) for path in run.provenance.instance_images]
    if not paths:
        raise NothingToScoreError(f"{run.folder} recorded no pictures of the subject: there is nothing to compare with")
    if gone := [str(path) for path in paths if not path.is_file()]:
        raise NothingToScoreError(f"the subject's pictures are gone: {', '.join(gone)}; put them back")
    return [load_image(path) for path in paths]


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the run folder named on the command line and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run folder, such as runs/dog")
    parser.add_argument("--dino", default="facebook/dino-vits16", help="Hub id, folder or playground")
    parser.add_argument("--clip", default="openai/clip-vit-large-patch14", help="Hub id, folder or playground")
    parser.add_argument("--token", help="the rare word of the prompts, such as qwe")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        scores = score_run(given.run, Dino(given.dino, device), Clip(given.clip, device), given.token)
    except (FileNotFoundError, NothingToScoreError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"a judge cannot be loaded: {error}")
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    print(f"{'':26}" + "".join(f"{column:>12}" for column in columns))
    for metric, row in scores.items():
        print(f"{metric:26}" + "".join(f"{row[c]:12.3f}" if c in row else f"{'':12}" for c in columns))


if __name__ == "__main__":
    main()
