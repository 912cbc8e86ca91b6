"""The settings of a benchmark, and the jobs that they stand for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ether_diffusion.data.randomness import generator
from ether_diffusion.evaluation.images import Asked
from ether_diffusion.evaluation.protocols import Subject
from ether_diffusion.metrics.judges import CLIP, DINO, LPIPS_SIZE
from ether_diffusion.training.config import DreamBoothConfig

HASHED = (
    *("training", "token", "images_per_prompt", "class_images", "num_inference_steps", "guidance_scale"),
    *("dino", "clip", "lpips", "lpips_net", "lpips_size"),
)
"""Settings of a benchmark that its scores depend on."""
BASE = "base"
"""The arm that trains nothing: the base model itself, asked the same prompts."""


@dataclass
class BenchmarkConfig:
    """Train, draw and score every subject of a protocol with every arm.

    Attributes:
        output_dir: where runs, images and results go; what is there already is not done again.
        protocol: playground, dreambooth, or a YAML file of subjects.
        data_dir: folder with the photos of the protocol dreambooth.
        subjects: only these subjects; all where none is named.
        arms: from a name to the settings of train_dreambooth.py that make it: {"lora": {"method": "lora", "rank": 4}}.
            A list of learning rates makes one arm of each. The base itself is always scored, too.
        training: settings of train_dreambooth.py that all arms share, the base model among them.
        seeds: one run for each.
        token: the rare word.
        images_per_prompt: images drawn for each prompt.
        class_images: images drawn for the bare class, for PRES; 0 for none.
        drift: draw the subject's unrelated prompts, too, and compare with the base's images.
        batch_size: images drawn at a time.
        num_inference_steps: denoising steps of an image.
        guidance_scale: classifier-free guidance of an image.
        dino: judge of DINO: a Hub id, a folder or playground.
        clip: judge of CLIP-I and CLIP-T, likewise, or anytorch: and a model of clip-anytorch.
        lpips: file with the weights of LPIPS' trunk, or lpips for that package's; without it there is no LPIPS or DIV.
        lpips_net: alex or vgg.
        lpips_size: pixels of the squares that LPIPS compares.
        keep_runs: keep what was trained, not only the images and scores.
    """

    output_dir: Path
    protocol: str = "playground"
    data_dir: Path | None = None
    subjects: list[str] = field(default_factory=list)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    token: str = "qwe"
    images_per_prompt: int = 4
    class_images: int = 4
    drift: bool = True
    batch_size: int = 8
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    dino: str = DINO
    clip: str = CLIP
    lpips: str | None = None
    lpips_net: Literal["alex", "vgg"] = "alex"
    lpips_size: int = LPIPS_SIZE
    keep_runs: bool = False

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.data_dir = None if self.data_dir is None else Path(self.data_dir)
        if "pretrained_model_name_or_path" not in self.training:
            raise ValueError("training needs pretrained_model_name_or_path: the base model")
        if BASE in self.arms:
            raise ValueError(f"an arm cannot be called {BASE}: that is the base model itself")
        for name in ("images_per_prompt", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.seeds:
            raise ValueError("seeds is empty: name at least one")

    @property
    def base_model(self) -> str:
        """The base model of all arms."""
        return str(self.training["pretrained_model_name_or_path"])


@dataclass(frozen=True)
class Job:
    """One subject learnt once, or for the base only asked for.

    Attributes:
        arm: its name.
        settings: of the arm, one learning rate among them if it has any.
        subject: what is learnt.
        seed: of training and images.
    """

    arm: str
    settings: dict[str, Any]
    subject: Subject
    seed: int

    @property
    def key(self) -> str:
        """Its folder below the output folder."""
        rate = self.settings.get("learning_rate")
        arm = self.arm if rate is None else f"{self.arm}@{rate:g}"
        return f"{arm}/{self.subject.name}/seed-{self.seed}"

    def hash(self, config: BenchmarkConfig) -> str:
        """Stands for all settings that its scores depend on, the arm's and the benchmark's."""
        settings = {name: getattr(config, name) for name in HASHED}
        settings |= {"arm": self.settings, "class": self.subject.class_word, "prompts": self.subject.prompts}
        settings["unrelated"] = self.subject.unrelated if config.drift else ()
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def method(self) -> str:
        """What trains: a method of train_dreambooth.py."""
        return str(self.settings.get("method", DreamBoothConfig.method))

    @property
    def of_base(self) -> Job:
        """The base, asked the same."""
        return Job(BASE, {}, self.subject, self.seed)

    def asked(self, config: BenchmarkConfig) -> dict[str, Asked]:
        """All images of the job: of the subject, of the class, for unrelated prompts; every arm has the same seeds."""
        return {
            "images": self._ask(
                "image", [p.format(token=config.token) for p in self.subject.prompts], config.images_per_prompt
            ),
            "class_images": self._ask("class", [f"a photo of a {self.subject.class_word}"], config.class_images),
            "unrelated": self._ask("unrelated", self.subject.unrelated, int(config.drift)),
        }

    def _ask(self, stream: str, prompts: Sequence[str], each: int) -> Asked:
        asked = [prompt for prompt in prompts for _ in range(each)]
        return Asked(asked, [generator(self.seed, stream, number).initial_seed() for number in range(len(asked))])

    def training_config(self, config: BenchmarkConfig, folder: Path) -> DreamBoothConfig:
        """The settings of its training run, which draws no samples of its own.

        Raises:
            ValueError: a setting is not one of train_dreambooth.py's, or impossible.
        """
        own = {
            "output_dir": folder,
            "overwrite": True,
            "seed": self.seed,
            "instance_data_dir": self.subject.references,
            "instance_prompt": f"a photo of a {config.token} {self.subject.class_word}",
            "class_prompt": f"a photo of a {self.subject.class_word}",
            "num_validation_images": 0,
        }
        settings = {**config.training, **self.settings, **own}
        settings.setdefault("checkpointing_steps", settings.get("max_train_steps", DreamBoothConfig.max_train_steps))
        try:
            return DreamBoothConfig(**settings)
        except TypeError as error:
            raise ValueError(f"arm {self.arm}: {error}") from None


def all_jobs(config: BenchmarkConfig, subjects: list[Subject]) -> list[Job]:
    """Every job of a benchmark, subject by subject, the base first."""
    arms: list[tuple[str, dict[str, Any]]] = [(BASE, {})]
    for name, settings in config.arms.items():
        rates = settings.get("learning_rate")
        for rate in rates if isinstance(rates, list) else [rates]:
            arms.append((name, {**settings, "learning_rate": None if rate is None else float(rate)}))
    return [
        Job(name, settings, subject, seed) for subject in subjects for seed in config.seeds for name, settings in arms
    ]
