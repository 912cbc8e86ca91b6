"""Scores of a run's own samples, the base's beside the finetuned ones, for its report and its model card.

``python -m ether_diffusion.runs.scores runs/dog --dino facebook/dino-vits16 --clip openai/clip-vit-large-patch14``
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from torch import Tensor

from ether_diffusion.arguments import Parser
from ether_diffusion.files import write_text
from ether_diffusion.images import UnreadableImageError
from ether_diffusion.metrics.asked import add_judges, judges_of
from ether_diffusion.metrics.backbones import ANYTORCH
from ether_diffusion.metrics.scoring import Judges, References, score_images
from ether_diffusion.runs.model_card import write_model_card
from ether_diffusion.runs.rare_token import checked_token, words_kept
from ether_diffusion.runs.record import Judging, Run, read_run
from ether_diffusion.runs.report import write_report

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]

TITLES = {
    "dino": "DINO",
    "dino_nearest": "nearest reference",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "clip_t_written": "CLIP-T, prompt as written",
    "truth": "truth-likeness",
    "lpips": "LPIPS",
    "div": "DIV",
}
"""Each score of :func:`score_images` as the table names it, in its order."""


class NothingToScoreError(RuntimeError):
    """The run lacks what is compared: samples of the finetuned model, or the subject's pictures."""


def score_run(run_dir: str | Path, judges: Judges, token: str | None = None) -> Scores:
    """Score the samples of step 0 (the base) and of the last step, and write ``scores.json``, report and card.

    Nothing is written before everything is scored.

    Args:
        run_dir: the run folder.
        judges: who scores.
        token: the rare word that names the subject; by default the one that
            :func:`~ether_diffusion.runs.rare_token.rare_token` finds. CLIP-T is of the prompts without it, which
            CLIP knows, and a second one of the prompts as they are written. Without a token there is one CLIP-T,
            of the prompts as they are written.

    Returns:
        From metric to the scores of ``base`` (if the run drew its samples), ``finetuned`` and, where it makes sense,
        ``references``: of the subject's own pictures among themselves.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
        NothingToScoreError: it has no samples after step 0, or the subject's pictures are gone.
        ValueError: ``token`` cannot be the rare word of the run's prompts.
        UnreadableImageError, OSError: a picture cannot be read.
    """
    run = read_run(run_dir)
    paths, step = _compared(run)
    token = checked_token(run, token)
    if token and (kept := words_kept(run, token)):
        logger.warning("without %r the prompts still have %s", token, ", ".join(map(repr, kept)))
    references = References(paths, judges)
    steps = {column: at for column, at in {"base": 0, "finetuned": step}.items() if at in run.sample_steps}
    columns = {column: sample_means(run, at, references, judges, token) for column, at in steps.items()}
    columns["references"] = among_references(references, judges)
    judging = Judging(
        judges=public_identity(judges),
        token=token,
        seed=seed if isinstance(seed := run.config.get("seed"), int) else None,
        step=step,
        prompts=len({prompt["prompt"] for prompt in run.prompts}),
        images={column: len(run.prompts) for column in steps} | {"references": len(paths)},
    )
    titles = TITLES if token else TITLES | {"clip_t_written": TITLES["clip_t"]}
    scores = {
        title: {column: values[name] for column, values in columns.items() if name in values}
        for name, title in titles.items()
        if name in columns["finetuned"]
    }
    write_text(run.folder / "scores.json", json.dumps({"scores": scores} | asdict(judging), indent=1))
    write_model_card(run.folder)
    write_report(run.folder)
    return scores


def sample_means(run: Run, step: int, references: References, judges: Judges, token: str | None) -> dict[str, float]:
    """The mean of every score over the samples of a step that have it; of DIV, over the prompts with several samples.

    Args:
        run: whose samples.
        step: with a sample grid.
        references: the subject's own pictures.
        judges: who scores.
        token: the rare word of the prompts, where it is known.
    """
    samples = [run.folder / run.sample(step, prompt["file"]) for prompt in run.prompts]
    scored = score_images(samples, [prompt["prompt"] for prompt in run.prompts], references, judges, token)
    found = {name: [row[name] for row in scored.images if name in row] for name in TITLES}
    means = {name: fmean(values) for name, values in found.items() if values}
    return means | ({"div": fmean(row["div"] for row in scored.prompts)} if scored.prompts else {})


def among_references(references: References, judges: Judges) -> dict[str, float]:
    """The scores of the references among themselves, ``dino_nearest`` with them; nothing for a single one."""
    scores = references.among(judges)
    return scores | ({"dino_nearest": nearest_among(references.dino)} if len(references.paths) > 1 else {})


def nearest_among(references: Tensor) -> float:
    """Mean over the images of the cosine to the nearest of the others.

    Args:
        references: unit features (M, d), M at least 2.
    """
    return (references @ references.T).fill_diagonal_(-1).amax(1).mean().item()


def public_identity(judges: Judges) -> dict[str, dict[str, str]]:
    """What identifies the judges, for files that others may see: no folder of this machine is named."""
    return {name: without_folder(facts) for name, facts in judges.identity.items()}


def without_folder(facts: dict[str, str]) -> dict[str, str]:
    """What identifies a judge, without the folder of this machine that it was loaded from: others see it."""
    if "model" not in facts:
        return facts
    name = re.sub(rf"LPIPS \w+ \((.+)\)|{ANYTORCH}(.+)", r"\1\2", facts["model"])
    if not Path(name).exists():
        return facts
    return facts | {"model": facts["model"].replace(name, Path(name).resolve().name)}


def _compared(run: Run) -> tuple[list[Path], int]:
    """The subject's pictures, where the run found them, and the step of the samples that are held against them.

    Raises:
        NothingToScoreError: a picture is not there, the run recorded none, or it has no samples of the finetuned model.
    """
    paths = [Path(path) for path in run.provenance.instance_images]
    if not paths:
        raise NothingToScoreError(f"{run.folder} recorded no pictures of the subject: there is nothing to compare with")
    if gone := [str(path) for path in paths if not path.is_file()]:
        raise NothingToScoreError(f"the subject's pictures are gone: {', '.join(gone)}; put them back")
    if run.finetuned_step is None or not run.prompts:
        raise NothingToScoreError(f"{run.folder} has no samples of the finetuned model: let it reach validation_steps")
    return paths, run.finetuned_step


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the run folder named on the command line and print its table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run folder, such as runs/dog")
    add_judges(parser)
    parser.add_argument(
        "--token",
        help="the rare word of the prompts, such as qwe (default: the word that the instance prompt has and the class "
        "prompt has not, if there is exactly one and a prompt of the samples has it)",
    )
    given = parser.parse_args(arguments)
    try:
        run = read_run(given.run)
        _compared(run)
        checked_token(run, given.token)  # a mistake shows before the judges are loaded
        judges = judges_of(given)
    except (ImportError, OSError, NothingToScoreError, ValueError) as error:
        parser.error(str(error))
    try:
        scores = score_run(given.run, judges, given.token)
    except (OSError, UnreadableImageError) as error:
        parser.error(str(error))
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    print(f"{'':26}" + "".join(f"{column:>12}" for column in columns))
    for metric, row in scores.items():
        print(f"{metric:26}" + "".join(f"{row[c]:12.3f}" if c in row else f"{'':12}" for c in columns))
    if judging := read_run(given.run).judging:
        print(judging.caption)


if __name__ == "__main__":
    main()
