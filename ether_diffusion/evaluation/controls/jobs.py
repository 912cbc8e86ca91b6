"""What a study of controls is to do: its settings, and a job for each method at each learning rate and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.training.control_config import ControlConfig

VARIED = ("learning_rate", "encoder_lr")
"""Settings of an arm that may be a list, which makes one job of each value."""
STEADY = ("constant", "constant_with_warmup", "piecewise_constant")
"""Schedules that do not depend on how long the training will be."""
OWN = ("output_dir", "overwrite", "resume", "max_train_steps")
"""Settings of the training that the study sets itself."""


@dataclass
class ControlStudyConfig:
    """Train control with every arm, and score it on the way.

    Attributes:
        output_dir: where runs, pictures and results go; what is there already is not done again.
        arms: from a name to the settings of train_controlnet.py that make it. One of learning_rate and encoder_lr may
            be a list: a job for each value.
        training: settings of train_controlnet.py that all arms share.
        seeds: of the trainings: a job for each, of every arm at every rate.
        eval_steps: after how many steps to draw and score; the last is the length of the training.
        data: folder of pairs to evaluate on, semantic maps among them; drawn for the playground.
        pairs: how many pairs of the data to use at the last step.
        curve_pairs: how many at the steps before it, one sample each.
        samples: for each pair at the last step.
        batch_size: pictures drawn at a time.
        num_inference_steps: denoising steps of a picture.
        guidance_scale: classifier-free guidance of a picture.
        seed: of the noise that pictures are drawn from.
        segmenter: judge of the maps: Hub id, folder or playground.
        label_offset: the maps' id of the segmenter's class 0; as its image processor says where it is not given.
        ignore_index: id that is left out of the scores.
        clip: judge of CLIP-T; without it there is none.
        fid_features: of FID and KID: inception, dino:NAME, clip:NAME or playground; without them there is neither.
            Both need many pairs: see :func:`~ether_diffusion.metrics.distribution.too_few`.
        compare_with: arms that every other is held against; with several seeds the difference in mIoU has a 95 %
            interval over the seeds.
        keep_runs: keep what was trained.
    """

    output_dir: Path
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    eval_steps: list[int] = field(default_factory=lambda: [200, 400, 800])
    data: Path | None = None
    pairs: int = 96
    curve_pairs: int = 48
    samples: int = 4
    batch_size: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 9.0
    seed: int = 0
    segmenter: str = PLAYGROUND
    label_offset: int | None = None
    ignore_index: int | None = 255
    clip: str | None = None
    fid_features: str | None = None
    compare_with: list[str] = field(default_factory=list)
    keep_runs: bool = False

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.data = None if self.data is None else Path(self.data)
        self.eval_steps, self.seeds = sorted(set(self.eval_steps)), list(dict.fromkeys(self.seeds))
        if not self.arms:
            raise ValueError("arms is empty: name at least one")
        if not self.seeds:
            raise ValueError("seeds is empty: name at least one")
        if not self.eval_steps or self.eval_steps[0] < 1:
            raise ValueError("eval_steps must be steps of the training, the last one its length")
        if unknown := [arm for arm in self.compare_with if arm not in self.arms]:
            raise ValueError(f"compare_with: there is no arm {unknown[0]!r}; there are: {', '.join(self.arms)}")
        if self.data is None and self.training.get("train_data_dir") != PLAYGROUND:
            raise ValueError("data is missing: name the folder of pairs to evaluate on")
        for where, settings in {"training": self.training, **self.arms}.items():
            if "seed" in settings:
                raise ValueError(f"{where}: name the seeds of the trainings in seeds, not here")
            if taken := [name for name in OWN if name in settings]:
                raise ValueError(f"{where}: {', '.join(taken)} is set by the study itself; leave it out")


@dataclass(frozen=True)
class Job:
    """One arm at one rate with one seed.

    Attributes:
        arm: its name.
        settings: of train_controlnet.py.
        rate: the value of the setting that is varied, or of the first that the arm names; None where it names none.
        seed: of the training.
    """

    arm: str
    settings: dict[str, Any]
    rate: float | None
    seed: int

    @property
    def key(self) -> str:
        """Its folder."""
        return f"{self.arm if self.rate is None else f'{self.arm}@{self.rate:g}'}/seed-{self.seed}"

    def config(self, folder: Path, steps: int) -> ControlConfig:
        """The settings of its training, which draws no samples of its own.

        Raises:
            ValueError: a setting is not one of train_controlnet.py's, or impossible.
        """
        own = {"output_dir": folder, "max_train_steps": steps, "num_validation_images": 0}
        frequency = {"checkpointing_steps": steps, "checkpoints_total_limit": 1, "validation_steps": steps}
        try:
            config = ControlConfig(**frequency | self.settings | own)
        except TypeError as error:
            raise ValueError(f"arm {self.arm}: {error}") from None
        if config.lr_scheduler not in STEADY:
            raise ValueError(
                f"arm {self.arm}: lr_scheduler={config.lr_scheduler} depends on the training's length, which grows "
                f"from one evaluation to the next; use {', '.join(STEADY)}"
            )
        return config


def all_jobs(config: ControlStudyConfig) -> list[Job]:
    """Every arm at every rate, the arms by turns, seed after seed, so that a study cut short has some of each.

    Raises:
        ValueError: two settings of an arm are lists, or one without a rate, or a rate is no number.
    """
    jobs: list[list[Job]] = []
    for arm, own in config.arms.items():
        lists = [name for name in VARIED if isinstance(own.get(name), list)]
        if len(lists) > 1:
            raise ValueError(f"arm {arm}: only one of {', '.join(lists)} may be a list")
        named = lists or [name for name in VARIED if own.get(name) is not None]
        settings = {**config.training, **own}
        try:
            numbers = {name: settings[name] for name in VARIED if settings.get(name) is not None}
            settings |= {name: float(value) for name, value in numbers.items() if not isinstance(value, list)}
            values = own[lists[0]] if lists else [settings[name] for name in named[:1]]
            rates = list(dict.fromkeys(float(value) for value in values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"arm {arm}: a learning rate is no number: {error}") from None
        if named and not rates:
            raise ValueError(f"arm {arm}: {named[0]} is an empty list: name at least one rate")
        varied = [(rate, {**settings, named[0]: rate}) for rate in rates] if named else [(None, settings)]
        jobs.append([Job(arm, {**s, "seed": seed}, rate, seed) for seed in config.seeds for rate, s in varied])
    longest = max(map(len, jobs))
    return [of_arm[place] for place in range(longest) for of_arm in jobs if place < len(of_arm)]
