"""The settings of the study of two adapters: arms, pairs of subjects, drawing and judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ether_diffusion.evaluation.settings import share_of, shared_encoding
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.ranges import AMOUNT, COUNT, SEED, Range, check_ranges
from ether_diffusion.runs.base import Base

BASE, TRUTH = "base", "truth"
ANCHORS = (BASE, TRUTH)


@dataclass
class MixingConfig:
    """Draw pairs of the playground's subjects with two adapters that were trained apart.

    Attributes:
        output_dir: where runs, images and results go; what is there already is not done again.
        arms: from a name to the settings of train_dreambooth.py that make it, the learning rate among them.
        training: settings that all arms share, the base model among them.
        pairs: names of two subjects of the playground each, such as [[striped-robot, dotted-fish]].
        seed: of the trainings and pictures.
        tokens: the rare words of the first and of the second.
        images_per_prompt: pictures for each of the six prompts of a pair.
        batch_size: pictures drawn at a time.
        num_inference_steps: denoising steps of a picture.
        guidance_scale: classifier-free guidance; the base's own where it is not given.
        dino: judge of truth-likeness: a Hub id, a folder or playground.
        clip: judge of CLIP-T, likewise.
        shard: do only the third of sixteen equal shares of the jobs: 3/16.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "seed": SEED,
        "images_per_prompt": COUNT,
        "batch_size": COUNT,
        "num_inference_steps": COUNT,
        "guidance_scale": AMOUNT,
    }

    output_dir: Path
    arms: dict[str, dict[str, Any]]
    training: dict[str, Any]
    pairs: list[list[str]]
    seed: int = 0
    tokens: list[str] = field(default_factory=lambda: ["qwe", "sks"])
    images_per_prompt: int = 2
    batch_size: int = 12
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    dino: str = "playground"
    clip: str = "playground"
    shard: str | None = None

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        check_ranges(self, self.RANGES)
        share_of(self.shard)
        if "pretrained_model_name_or_path" not in self.training:
            raise ValueError("training needs pretrained_model_name_or_path: the base model")
        if any(len(pair) != 2 for pair in self.pairs) or not self.pairs:
            raise ValueError(f"pairs is a list of two subjects each, not {self.pairs}")
        if len(set(self.tokens)) != 2:
            raise ValueError(f"tokens needs two different rare words, not {self.tokens}")
        if taken := [name for name in ANCHORS if name in self.arms]:
            raise ValueError(f"an arm cannot be called {taken[0]}: that is an anchor")
        _ = self.encoding

    @property
    def encoding(self) -> FamilySettings:
        """How the prompts of all pictures are encoded.

        Raises:
            ValueError: arms and base would differ.
        """
        return shared_encoding(self.training, self.arms)

    @property
    def base(self) -> Base:
        """The base model of all arms."""
        return Base.of(self.training)
