"""The scores of one subject's images: what every program of the evaluation suite and every run's report computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ether_diffusion.metrics.backbones import AnytorchClip, Clip, Dino, Picture
from ether_diffusion.metrics.fidelity import (
    check_token,
    drift,
    pair_similarity,
    prompt_similarity,
    similarity_among,
    without_token,
)
from ether_diffusion.metrics.perceptual import Lpips

LIBRARIES = (
    *("torch", "diffusers", "transformers", "pillow", "numpy", "peft", "torchmetrics", "torchvision", "clip-anytorch"),
    *("opencv-python-headless", "opencv-python", "torch-fidelity", "controlnet-aux", "face-alignment"),
)

Row = dict[str, Any]


@dataclass
class Judges:
    """The models that score, loaded once.

    Attributes:
        dino: for DINO, PRES and drift.
        clip: for CLIP-I and CLIP-T.
        lpips: for LPIPS and DIV, which are left out where it is None.
    """

    dino: Dino
    clip: Clip | AnytorchClip
    lpips: Lpips | None = None

    @property
    def identity(self) -> dict[str, dict[str, str]]:
        """What stands beside every score: each model with its weights and preprocessing, and the libraries."""
        models = {"dino": self.dino.identity, "clip": self.clip.identity}
        if self.lpips is not None:
            models["lpips"] = self.lpips.identity
        return {**models, "libraries": library_versions()}

    @property
    def weights(self) -> dict[str, dict[str, str]]:
        """What the scores depend on, of each judge: its weights and preprocessing, wherever its files lie."""
        models = {name: each for name, each in self.identity.items() if name != "libraries"}
        return {name: {key: value for key, value in each.items() if key != "model"} for name, each in models.items()}


def library_versions() -> dict[str, str]:
    """Of the libraries that scores depend on, those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class References:
    """The subject's own images and, where they are known, the true answers to its prompts, seen once by every judge.

    Args:
        paths: the images, in the order in which pairs are listed.
        judges: who looks at them.
        truths: for each prompt, as it was written, true pictures of what it asks for (K).
    """

    def __init__(
        self, paths: Sequence[Path], judges: Judges, truths: Mapping[str, Sequence[Picture]] | None = None
    ) -> None:
        self.paths = list(paths)
        self.dino: Tensor = judges.dino.image_features(self.paths)
        self.clip: Tensor = judges.clip.image_features(self.paths)
        self.truths = {} if truths is None else dict(truths)
        self.true_dino: dict[str, Tensor] = {}
        if self.truths:
            counts = [len(pictures) for pictures in self.truths.values()]
            seen = judges.dino.image_features([path for pictures in self.truths.values() for path in pictures])
            self.true_dino = dict(zip(self.truths, seen.split(counts), strict=True))

    def among(self, judges: Judges) -> dict[str, float]:
        """DINO, CLIP-I and LPIPS among themselves, the papers' row of real images; nothing for a single one."""
        if len(self.paths) < 2:
            return {}
        scores = {"dino": similarity_among(self.dino), "clip_i": similarity_among(self.clip)}
        if judges.lpips is not None:
            scores["lpips"] = judges.lpips.among(self.paths) or 0.0
        return scores


class Scored(NamedTuple):
    """What :func:`score_images` finds.

    Attributes:
        images: a row per image.
        prompts: a row per prompt of several images, its ``div``; none without the judge of LPIPS.
    """

    images: list[Row]
    prompts: list[Row]


def score_images(
    images: Sequence[Picture],
    prompts: Sequence[str | None],
    references: References,
    judges: Judges,
    token: str | None = None,
    show: bool = False,
) -> Scored:
    """Score images, whose means over a subject are the papers' figures; every judge sees each image once.

    Args:
        images: generated images (N), or their paths.
        prompts: what was asked for, as it was written; None where that is not known.
        references: the subject's own images (M).
        judges: who scores.
        token: the rare word of the prompts.
        show: progress bars.

    Returns:
        N rows: ``dino``, ``clip_i`` and, with its judge, ``lpips``, each the mean over the references, with the M
        values under ``pairs``; ``dino_nearest``, DINO to the nearest reference; where the prompt is known, ``prompt``,
        ``clip_t_written`` of it as it stands and, with a token, ``clip_t`` of it without the token, which CLIP was
        never taught; where the prompt's truths are known, ``truth``, the mean DINO to them and, with its judge,
        ``truth_lpips``. And a row per prompt: ``div``, the mean LPIPS among its images.

    Raises:
        ValueError: a token is given that no prompt has, so that it cannot be the one of the training.
    """
    if token and (written := [prompt for prompt in prompts if prompt is not None]):
        check_token(token, written)
    seen = judges.clip.image_features(images, "CLIP" if show else None)
    looks = judges.dino.image_features(images, "DINO" if show else None)
    pairs = {"dino": pair_similarity(looks, references.dino), "clip_i": pair_similarity(seen, references.clip)}
    diversities: list[Row] = []
    if judges.lpips is not None:
        groups = _groups(prompts)
        asked = [[images[row] for row in rows] for rows in groups.values()]
        parts, spread = judges.lpips.compare(asked, references.paths, "LPIPS" if show else None)
        order = [row for rows in groups.values() for row in rows]
        pairs["lpips"] = torch.cat(parts)[torch.tensor(order).argsort()]
        diversities = [
            {"prompt": prompt, "div": value}
            for prompt, value in zip(groups, spread, strict=True)
            if isinstance(prompt, str) and value is not None
        ]
    rows: list[Row] = [
        {name: values[row].mean().item() for name, values in pairs.items()}
        | {"dino_nearest": pairs["dino"][row].max().item()}
        | {"pairs": {name: values[row].tolist() for name, values in pairs.items()}}
        for row in range(len(images))
    ]
    for prompt, members in _groups(prompts).items():
        if isinstance(prompt, str) and prompt in references.true_dino:
            truth = {"truth": pair_similarity(looks[members], references.true_dino[prompt]).mean(1)}
            if judges.lpips is not None:
                drawn = [images[row] for row in members]
                (distances,), _ = judges.lpips.compare([drawn], references.truths[prompt])
                truth["truth_lpips"] = distances.mean(1)
            for place, row in enumerate(members):
                rows[row] |= {name: values[place].item() for name, values in truth.items()}
    known = [(row, prompt) for row, prompt in enumerate(prompts) if prompt is not None]
    if known:
        texts = {"clip_t_written": [prompt for _, prompt in known]}
        if token:
            texts["clip_t"] = [without_token(prompt, token) for _, prompt in known]
        for name, said in texts.items():
            scores = prompt_similarity(seen[[row for row, _ in known]], text_features(judges.clip, said))
            for (row, prompt), score in zip(known, scores.tolist(), strict=True):
                rows[row] |= {"prompt": prompt, name: score}
    return Scored(rows, diversities)


def _groups(prompts: Sequence[str | None]) -> dict[str | int, list[int]]:
    """The numbers of the images of each prompt, under the prompt; an image without one is alone, under its number."""
    groups: dict[str | int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(number if prompt is None else prompt, []).append(number)
    return groups


def text_features(clip: Clip | AnytorchClip, prompts: Sequence[str]) -> Tensor:
    """Features of the prompts, (N, d); a prompt that several images share is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    return clip.text_features(distinct)[[distinct.index(prompt) for prompt in prompts]]


def score_class_images(images: Sequence[Picture], references: References, judges: Judges) -> list[Row]:
    """One row per image of the bare class: ``pres``, its mean DINO with the subject's own images; lower is better."""
    similarity = pair_similarity(judges.dino.image_features(images), references.dino).mean(1)
    return [{"pres": value} for value in similarity.tolist()]


def score_drift(images: Sequence[Picture], base: Sequence[Picture], judges: Judges) -> list[Row]:
    """One row per image for an unrelated prompt: ``drift`` from the base's image for the same prompt and seed."""
    moved = drift(judges.dino.image_features(images), judges.dino.image_features(base))
    return [{"drift": value} for value in moved.tolist()]
