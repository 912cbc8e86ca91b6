"""The settings of a study of controls: arms, rates, seeds, steps, pairs and judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ether_diffusion.evaluation.settings import OF_A_PROGRAM, share_of
from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.ranges import AMOUNT, COUNT, OFFSET, SEED, Range, check_ranges

VARIED = ("learning_rate", "encoder_lr")
"""Settings of an arm that may be a list, which makes one job of each value."""
OWN = ("output_dir", "overwrite", "resume", "max_train_steps", *OF_A_PROGRAM)
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
        allow_outside_paths: take files that the data's listing names outside of its folder, by absolute paths or "..".
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
        shard: do only the third of sixteen equal shares of the jobs: 3/16, from 1/16 to 16/16. Shards know nothing of
            each other: the jobs of a cluster's array, in one folder or in folders that are copied together.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "seeds": SEED,
        "eval_steps": COUNT,
        "pairs": COUNT,
        "curve_pairs": COUNT,
        "samples": COUNT,
        "batch_size": COUNT,
        "num_inference_steps": COUNT,
        "guidance_scale": AMOUNT,
        "seed": SEED,
        "label_offset": OFFSET,
        "ignore_index": AMOUNT,
    }

    output_dir: Path
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    eval_steps: list[int] = field(default_factory=lambda: [200, 400, 800])
    data: Path | None = None
    allow_outside_paths: bool = False
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
    shard: str | None = None

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.data = None if self.data is None else Path(self.data)
        check_ranges(self, self.RANGES)
        share_of(self.shard)
        self.eval_steps, self.seeds = sorted(set(self.eval_steps)), list(dict.fromkeys(self.seeds))
        if not self.arms:
            raise ValueError("arms is empty: name at least one")
        if not self.seeds:
            raise ValueError("seeds is empty: name at least one")
        if not self.eval_steps:
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
