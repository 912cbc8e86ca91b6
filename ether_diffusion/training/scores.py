"""Scores of a run's own samples, the base's beside the finetuned ones, for its report and its model card.

``python -m ether_diffusion.training.scores runs/dog --dino facebook/dino-vits16 --clip openai/clip-vit-large-patch14``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.files import write_text
from ether_diffusion.metrics.judges import add_judges, judges_of
from ether_diffusion.metrics.scoring import Judges, References, score_images
from ether_diffusion.training.model_card import write_model_card
from ether_diffusion.training.report import write_report
from ether_diffusion.training.run_record import Run, read_run

Scores = dict[str, dict[str, float]]


class NothingToScoreError(RuntimeError):
    """The run lacks what is compared: samples of the finetuned model, or the subject's pictures."""


def score_run(run_dir: str | Path, judges: Judges, token: str | None = None) -> Scores:
    """Score the samples of step 0 (the base) and of the last step, and write ``scores.json``, report and card.

    Args:
        run_dir: the run folder.
        judges: who scores.
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
    references = References(_references(run), judges)
    if run.finetuned_step is None:
        raise NothingToScoreError(f"{run.folder} has no samples of the finetuned model: let it reach validation_steps")
    titles = {"dino": "DINO", "clip_i": "CLIP-I", "lpips": "LPIPS"}
    titles |= (
        {"clip_t": "CLIP-T", "clip_t_written": "CLIP-T, prompt as written"} if token else {"clip_t_written": "CLIP-T"}
    )
    scores: Scores = {}
    prompts = [prompt["prompt"] for prompt in run.prompts]
    for column, step in {"base": 0, "finetuned": run.finetuned_step}.items():
        if step in run.sample_steps:
            samples = [run.folder / run.sample(step, prompt["file"]) for prompt in run.prompts]
            rows = score_images(samples, prompts, references, judges, token).images
            for metric in (metric for metric in titles if metric in rows[0]):
                scores.setdefault(titles[metric], {})[column] = sum(row[metric] for row in rows) / len(rows)
    for metric, score in references.among(judges).items():
        scores[titles[metric]]["references"] = score
    write_text(run.folder / "scores.json", json.dumps(scores, indent=1))
    write_model_card(run.folder)
    write_report(run.folder)
    return scores


def _references(run: Run) -> list[Path]:
    """The subject's pictures, where the run found them.

    Raises:
        NothingToScoreError: one of them is not there, or the run recorded none.
    """
    paths = [Path(path) for path in run.provenance.instance_images]
    if not paths:
        raise NothingToScoreError(f"{run.folder} recorded no pictures of the subject: there is nothing to compare with")
    if gone := [str(path) for path in paths if not path.is_file()]:
        raise NothingToScoreError(f"the subject's pictures are gone: {', '.join(gone)}; put them back")
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the run folder named on the command line and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run folder, such as runs/dog")
    add_judges(parser)
    parser.add_argument("--token", help="the rare word of the prompts, such as qwe")
    given = parser.parse_args(arguments)
    try:
        scores = score_run(given.run, judges_of(given), given.token)
    except (ImportError, OSError, NothingToScoreError, ValueError) as error:
        parser.error(str(error))
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    print(f"{'':26}" + "".join(f"{column:>12}" for column in columns))
    for metric, row in scores.items():
        print(f"{metric:26}" + "".join(f"{row[c]:12.3f}" if c in row else f"{'':12}" for c in columns))


if __name__ == "__main__":
    main()
