"""Stage 6: every figure of the build report, on seeds that no training picture comes from."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from ether_diffusion.data.randomness import generator
from ether_diffusion.playground.build.autoencoder import reconstructions
from ether_diffusion.playground.build.drawings import HELD_OUT, picture_array, to_unit
from ether_diffusion.playground.build.judges import Judges
from ether_diffusion.playground.build.metrics import confusion, mean_iou, nearest_accuracy, psnr, share
from ether_diffusion.playground.world import (
    BACKGROUNDS,
    SUBJECTS,
    Region,
    Scene,
    draw,
    full_captions,
    random_scene,
    subject,
)
from ether_diffusion.playground.world.sampling import SIZES, random_object

TARGETS = {
    "autoencoder_psnr": 27.0,
    "clip_class": 0.97,
    "clip_colour": 0.97,
    "clip_background": 0.97,
    "dino_subject": 0.90,
    "segmenter_miou": 0.90,
    "base_class": 0.85,
    "base_colour": 0.90,
    "base_background": 0.95,
}
"""What the figures should reach; the others explain."""
ASKED = 2_000_003
"""What is added to the build's seed for the scenes asked of the base."""
QUERIES = 24
"""New drawings of each subject whose nearest reference is looked up."""
BATCH = 64

Figures = dict[str, float]


@dataclass(frozen=True)
class Sampling:
    """How a base draws: the solver's name, its steps, and the guidance scale as its pipeline counts it."""

    scheduler: str
    steps: int
    guidance: float


SAMPLING = {"unet": Sampling("DDIM", 30, 4.0), "flow": Sampling("Euler", 30, 3.0)}
"""Of both bases; ``docs/results/guidance.json`` has what other scales draw on the second."""


@dataclass(frozen=True)
class Samples:
    """What was asked of the base and what it drew.

    Attributes:
        captions: the prompts.
        pictures: (N, 3, 64, 64) in [-1, 1].
    """

    captions: list[str]
    pictures: Tensor


def evaluate(folder: Path, seed: int, held_out: int, images: int, device: torch.device) -> tuple[Figures, Samples]:
    """Measure the pipeline and the judges of a build's folder: its weights as they are shipped, computed in fp32."""
    judges, pipe = Judges(folder / "judges", device), loaded(folder, device)
    scenes = [random_scene(seed + HELD_OUT, index) for index in range(held_out)]
    figures = autoencoder_figures(pipe, scenes, device) | segmenter_figures(judges, scenes)
    figures |= {f"clip_{name}": value for name, value in clip_figures(judges, scenes).items()}
    figures |= dino_figures(judges, seed)
    own, samples = base_figures(pipe, judges, SAMPLING["unet"], seed, images)
    return figures | own, samples


def evaluate_flow(folder: Path, judges: Path, seed: int, images: int, device: torch.device) -> tuple[Figures, Samples]:
    """Measure what the assembled pipeline in ``folder`` draws, by the judges of the base that it was built beside."""
    return base_figures(loaded(folder, device), Judges(judges, device), SAMPLING["flow"], seed, images)


def loaded(folder: Path, device: torch.device) -> DiffusionPipeline:
    """The pipeline in fp32, without a progress bar."""
    pipe = DiffusionPipeline.from_pretrained(folder).to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_figures(
    pipe: DiffusionPipeline, judges: Judges, sampling: Sampling, seed: int, images: int
) -> tuple[Figures, Samples]:
    """What CLIP sees in pictures of fresh scenes with one object, drawn by the pipeline and by the world."""
    asked = asked_scenes(seed, images)
    samples = generate(pipe, asked, seed, sampling)
    figures = {f"base_{name}": value for name, value in seen_figures(judges, asked, samples.pictures).items()}
    drawn = to_unit(torch.from_numpy(picture_array(asked)))
    return figures | {f"drawn_{name}": value for name, value in seen_figures(judges, asked, drawn).items()}, samples


def asked_scenes(seed: int, images: int) -> list[Scene]:
    """The scenes that a base is asked for: each of one object, on seeds that no training picture comes from."""
    return list(itertools.islice(_lone_scenes(seed + ASKED), images))


@torch.no_grad()
def autoencoder_figures(pipe: DiffusionPipeline, scenes: list[Scene], device: torch.device) -> Figures:
    """PSNR of the autoencoder."""
    pictures = torch.from_numpy(picture_array(scenes)).to(device)
    return {"autoencoder_psnr": psnr(reconstructions(pipe.vae, pictures), to_unit(pictures))}


def segmenter_figures(judges: Judges, scenes: list[Scene]) -> Figures:
    """mIoU over one confusion matrix, and the share of right pixels."""
    drawings = [draw(scene) for scene in scenes]
    pictures = to_unit(torch.from_numpy(np.stack([np.asarray(drawing.image) for drawing in drawings])))
    maps = torch.from_numpy(np.stack([drawing.semantic_map for drawing in drawings])).long()
    matrix = confusion(judges.regions(pictures).cpu(), maps, len(Region))
    return {
        "segmenter_miou": mean_iou(matrix),
        "segmenter_pixels": (matrix.diagonal().sum() / matrix.sum()).item(),
    }


def clip_figures(judges: Judges, scenes: list[Scene]) -> Figures:
    """Zero-shot accuracy on drawn scenes with one object; ``colour`` of plain coats, which have but one."""
    lone = [scene for scene in scenes if len(scene.objects) == 1]
    figures = seen_figures(judges, lone, to_unit(torch.from_numpy(picture_array(lone))))
    return {
        "class": figures["class"],
        "colour": figures["colour_plain"],
        "colour_patterned": figures["colour_patterned"],
        "background": figures["background"],
    }


def seen_figures(judges: Judges, scenes: list[Scene], pictures: Tensor) -> Figures:
    """How often CLIP sees the class, a colour of the coat and the background that the scenes (one object each) have.

    ``colour`` is over all; ``colour_plain`` where the coat has one colour; ``colour_patterned`` where it has two,
    either of which is right.
    """
    right = right_answers(judges, scenes, pictures)
    plain = [scene.objects[0].look.second is None for scene in scenes]
    return {
        "class": share(right["class"]),
        "colour": share(right["colour"]),
        "colour_plain": share([hit for hit, one in zip(right["colour"], plain, strict=True) if one]),
        "colour_patterned": share([hit for hit, one in zip(right["colour"], plain, strict=True) if not one]),
        "background": share(right["background"]),
    }


def right_answers(judges: Judges, scenes: list[Scene], pictures: Tensor) -> dict[str, list[bool]]:
    """Of every picture whether CLIP sees the class, a colour of the coat and the background of its scene."""
    items = [scene.objects[0] for scene in scenes]
    kinds, colours, backgrounds = judges.kinds(pictures), judges.colours(pictures), judges.backgrounds(pictures)
    return {
        "class": [kind == item.kind for kind, item in zip(kinds, items, strict=True)],
        "colour": [colour in item.look.coat for colour, item in zip(colours, items, strict=True)],
        "background": [seen == scene.background for seen, scene in zip(backgrounds, scenes, strict=True)],
    }


def dino_figures(judges: Judges, seed: int) -> Figures:
    """Whether the nearest reference of a subject's new drawing is of that subject.

    ``dino_subject``: ``QUERIES`` new drawings per subject, any background and size, against all references.
    ``dino_subject_references``: each reference against all the others.
    """
    queries = [(name, scene) for name in SUBJECTS for scene in _subject_scenes(name, seed)]
    references = [(name, scene) for name in SUBJECTS for scene in subject(name).references]
    query, gallery = (
        judges.features(to_unit(torch.from_numpy(picture_array([scene for _, scene in named]))))
        for named in (queries, references)
    )
    labels, gallery_labels = (
        torch.tensor([SUBJECTS.index(name) for name, _ in named], device=judges.device)
        for named in (queries, references)
    )
    others = [torch.arange(len(gallery), device=judges.device) != row for row in range(len(gallery))]
    among = [
        nearest_accuracy(gallery[row : row + 1], gallery_labels[row : row + 1], gallery[rest], gallery_labels[rest])
        for row, rest in enumerate(others)
    ]
    return {
        "dino_subject": nearest_accuracy(query, labels, gallery, gallery_labels),
        "dino_subject_references": sum(among) / len(among),
    }


@torch.no_grad()
def generate(pipe: DiffusionPipeline, scenes: list[Scene], seed: int, sampling: Sampling) -> Samples:
    """One picture for a random full caption of each scene, with the pipeline's scheduler."""
    captions = [random.Random(f"asked {seed} {k}").choice(full_captions(scene)) for k, scene in enumerate(scenes)]
    pictures = []
    for start in tqdm(range(0, len(captions), BATCH), desc="generate", unit="batch"):
        prompts = captions[start : start + BATCH]
        drawn = pipe(
            prompts,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            height=64,
            width=64,
            output_type="np",
            generator=[generator(seed, "generate", start + k) for k in range(len(prompts))],
        ).images
        pictures.append(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1)
    return Samples(captions, torch.cat(pictures))


def _lone_scenes(seed: int) -> itertools.chain[Scene]:
    """The endless random scenes of ``seed`` that have one object."""
    return itertools.chain.from_iterable(
        [scene] for index in itertools.count() if len((scene := random_scene(seed, index)).objects) == 1
    )


def _subject_scenes(name: str, seed: int) -> list[Scene]:
    dice = random.Random(f"query {seed} {name}")
    individual = subject(name)
    return [
        Scene(
            dice.choice(BACKGROUNDS),
            (random_object(dice, individual.class_word, individual.look, SIZES),),
            variation=dice.getrandbits(32),
        )
        for _ in range(QUERIES)
    ]
