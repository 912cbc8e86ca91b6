"""The settings of a benchmark of subjects: arms, anchors, comparisons, drawing and judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ether_diffusion.evaluation.settings import OF_A_PROGRAM, share_of, shared_encoding
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.metrics.names import CLIP, DINO, LPIPS_SIZE
from ether_diffusion.ranges import AMOUNT, COUNT, POSITIVE, SEED, Range, check_ranges
from ether_diffusion.runs.base import SETTINGS as BASE_SETTINGS
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.choosing import BEST

OWN = (
    *("output_dir", "overwrite", "resume", "seed", "instance_data_dir", "instance_prompt", "class_prompt"),
    *OF_A_PROGRAM,
)
"""Settings of the training that the benchmark sets itself."""

BASE = "base"
"""The base model itself, asked the same prompts."""
TRUTH = "truth"
"""True pictures of what is asked, other ones than those that the score compares with: a perfect model."""
COPIES = "copies"
"""The references, whatever is asked: a model that has learnt them by heart."""
NOISE = "noise"
"""Uniform noise."""

Sides = Sequence[Sequence[str]]
"""Two lists of cells, ``arm`` or ``arm@rate``: what is compared, and with what; the mean of the cells counts."""
ANCHORS = {
    BASE: "the base model",
    TRUTH: "other drawings of what is asked",
    COPIES: "the references, whatever is asked",
    NOISE: "uniform noise",
}
"""All of them, and what they are."""


@dataclass
class BenchmarkConfig:
    """Train, draw and score every subject of a protocol with every arm.

    Attributes:
        output_dir: where runs, images and results go; what is there already is not done again.
        protocol: playground, dreambooth, or a YAML file of subjects.
        data_dir: folder with the photos of the protocol dreambooth.
        subjects: only these subjects; all where none is named.
        arms: from a name to the settings of train_dreambooth.py that make it: {"lora": {"method": "lora", "rank": 4}}.
            A list of learning rates makes one arm of each. The anchors are always scored, too: the base itself, copies
            of the references, noise and, where it is known, the truth.
        training: settings of train_dreambooth.py that all arms share, the base model among them, with its revision and
            variant where it has them.
        seeds: one run for each.
        token: the rare word.
        instance_prompt: of the training; {token} and {class} stand for the subject's.
        class_prompt: likewise, of the bare class: for prior preservation and PRES.
        images_per_prompt: images drawn for each prompt.
        class_images: images drawn for the bare class, for PRES; 0 for none.
        drift: draw the subject's unrelated prompts, too, and compare with the base's images.
        strengths: draw the subject's prompts at these strengths, too, beside 1: of methods whose result has one.
        batch_size: images drawn at a time.
        num_inference_steps: denoising steps of an image.
        guidance_scale: classifier-free guidance of an image; the base's own where it is not given.
        dino: judge of DINO: a Hub id, a folder or playground.
        clip: judge of CLIP-I and CLIP-T, likewise, or anytorch: and a model of clip-anytorch.
        lpips: file with the weights of LPIPS' trunk, or lpips for that package's; without it there is no LPIPS or DIV.
        lpips_net: alex or vgg.
        lpips_size: pixels of the squares that LPIPS compares.
        keep_runs: keep what was trained, not only the images and scores.
        planned: the comparisons that are tested, by their titles, each of two lists of arms, or arms at a rate:
            {"bound or not, 1e-1": [[normalised@1e-1], [free@1e-1]]}. They are paired by subject, of the score that
            decides, and corrected for each other; of a list the mean counts.
        secondary: likewise, those that have an interval and no test.
        against: a file of another benchmark's rows (results.json, docs/results), to compare with on the same jobs
            without running those again. Comparisons may name arms of the file: "lora [playground]".
        shard: do only the third of sixteen equal shares of the jobs: 3/16, from 1/16 to 16/16. Shards know nothing of
            each other: the jobs of a cluster's array, in one folder or in folders that are copied together.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "seeds": SEED,
        "images_per_prompt": COUNT,
        "class_images": AMOUNT,
        "strengths": POSITIVE,
        "batch_size": COUNT,
        "num_inference_steps": COUNT,
        "guidance_scale": AMOUNT,
        "lpips_size": Range(16),
    }

    output_dir: Path
    protocol: str = "playground"
    data_dir: Path | None = None
    subjects: list[str] = field(default_factory=list)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    token: str = "qwe"
    instance_prompt: str = "a photo of {token} {class}"
    class_prompt: str = "a photo of a {class}"
    images_per_prompt: int = 4
    class_images: int = 4
    drift: bool = True
    strengths: list[float] = field(default_factory=list)
    batch_size: int = 8
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    dino: str = DINO
    clip: str = CLIP
    lpips: str | None = None
    lpips_net: Literal["alex", "vgg"] = "alex"
    lpips_size: int = LPIPS_SIZE
    keep_runs: bool = False
    planned: dict[str, list[list[str]]] = field(default_factory=dict)
    secondary: dict[str, list[list[str]]] = field(default_factory=dict)
    against: Path | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.data_dir = None if self.data_dir is None else Path(self.data_dir)
        self.against = None if self.against is None else Path(self.against)
        if "pretrained_model_name_or_path" not in self.training:
            raise ValueError("training needs pretrained_model_name_or_path: the base model")
        if taken := [name for name in ANCHORS if name in self.arms]:
            raise ValueError(f"an arm cannot be called {taken[0]}: that is {ANCHORS[taken[0]]}")
        if self.against is not None and (taken := named_in([list(self.arms)], self.against.stem)):
            raise ValueError(
                f"an arm cannot be called {taken[0]}: that is how an arm of {self.against} is named. "
                "Choose another name"
            )
        for where, settings in {"training": self.training, **self.arms}.items():
            if taken := [name for name in OWN if name in settings]:
                raise ValueError(f"{where}: {', '.join(taken)} is set by the benchmark itself; leave it out")
        if isinstance(self.training.get("learning_rate"), list):
            raise ValueError("training: a list of learning rates belongs to an arm, which becomes one for each")
        for where, settings in self.arms.items():
            if taken := [name for name in BASE_SETTINGS if name in settings]:
                raise ValueError(f"arm {where}: {', '.join(taken)} names a base; all arms share that of training")
        for arm in self.arms:
            if (learnt := self.settings_of(arm).get("placeholder_token")) not in (None, self.token):
                raise ValueError(
                    f"arm {arm} learns the placeholder_token {learnt}, and the prompts have the token {self.token}: "
                    f"give the benchmark token={learnt}"
                )
        check_ranges(self, self.RANGES)
        _ = self.encoding
        share_of(self.shard)
        if not self.seeds:
            raise ValueError("seeds is empty: name at least one")
        if 1.0 in self.strengths or len(set(self.strengths)) != len(self.strengths):
            raise ValueError("strengths names those beside 1, which is always drawn, each once")

        for title, sides in {**self.planned, **self.secondary}.items():
            if len(sides) != 2 or not all(sides):
                raise ValueError(f"comparison {title!r} needs two lists of arms: [[first], [second]]")
            for cell in (cell for side in sides for cell in side):
                self._check_cell(title, cell)

    def _check_cell(self, title: str, cell: str) -> None:
        """Refuse to compare what will have no results.

        Raises:
            ValueError: there is no such arm, or it is not trained at that rate.
        """
        if self.against is not None and named_in([[cell]], self.against.stem):
            return  # checked once the file is read
        arm, rate = cell_of(cell)
        if arm not in self.drawn_arms:
            hint = "; for an arm of a file of rows name the file by against" if arm.endswith("]") else ""
            raise ValueError(f"comparison {title!r} names {cell!r}, of no arm: {', '.join(self.drawn_arms)}{hint}")
        rates = [each for each in self.rates_of(self.drawn_arms[arm]) if each is not None]
        if rate is not None and rate not in rates:
            known = f"its rates are {', '.join(f'{each:g}' for each in rates)}" if rates else "it names no rate"
            raise ValueError(f"comparison {title!r} names {cell!r}, which {arm} is not trained at: {known}")

    @property
    def drawn_arms(self) -> dict[str, str]:
        """From the names of all arms that have results to the arm whose training they draw."""
        return {arm: arm for arm in self.arms}

    def rates_of(self, arm: str) -> list[float | None]:
        """The learning rates that an arm is trained at; None for the method's own.

        Raises:
            ValueError: a learning rate is no number.
        """
        rates = self.settings_of(arm).get("learning_rate")
        return [_rate(rate, arm) for rate in (rates if isinstance(rates, list) else [rates])]

    @property
    def base(self) -> Base:
        """The base model of all arms."""
        return Base.of(self.training)

    @property
    def encoding(self) -> FamilySettings:
        """How the prompts of all pictures are encoded.

        Raises:
            ValueError: arms and base would differ.
        """
        return shared_encoding(self.training, self.arms)

    def settings_of(self, arm: str) -> dict[str, Any]:
        """All settings of an arm's training, the shared ones among them, but for what the benchmark sets itself."""
        return {**self.training, **self.arms[arm]}


def committed_name(arm: str, file: str) -> str:
    """What an arm of a file of rows is called beside the benchmark's own.

    Args:
        arm: its name in the file.
        file: the file's name without its ending.
    """
    return f"{arm} [{file}]"


def named_in(sides: Sides, file: str) -> list[str]:
    """The cells that name arms of a file of rows.

    Args:
        sides: of a comparison.
        file: as for :func:`committed_name`.
    """
    return [cell for side in sides for cell in side if cell_of(cell)[0].endswith(committed_name("", file))]


def cell_of(text: str) -> tuple[str, float | None]:
    """The arm and the rate of ``arm@rate``; all rates of ``arm``.

    Raises:
        ValueError: the rate is no number.
    """
    arm, at, rate = text.rpartition("@")
    try:
        return (arm, float(rate)) if at else (text, None)
    except ValueError:
        told = 'such as lora@1e-3, or "lora [playground]@1e-3" of a file of rows'
        raise ValueError(f"{text!r}: write arm or arm@rate, {told}") from None


def _rate(value: Any, arm: str) -> float | None:
    """A learning rate as YAML has it, which takes 6e-2 for a word."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"arm {arm}: the learning rate {value!r} is no number") from None


@dataclass
class DerivedConfig(BenchmarkConfig):
    """A benchmark whose arms are drawn in further ways; what was trained is kept.

    Attributes:
        keep_runs: always, since the further ways are made of what was trained.
    """

    WAYS: ClassVar[tuple[str, ...]]
    """Names of the further ways; that of an arm is called ``arm, way``."""

    keep_runs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep_runs:
            raise ValueError("keep_runs must stay true: the further ways are made of what was trained")

    @property
    def drawn_arms(self) -> dict[str, str]:
        """Each arm as it ended, and in every further way."""
        return {name: arm for arm in self.arms for name in (arm, *(f"{arm}, {way}" for way in self.WAYS))}


@dataclass
class ChoosingConfig(DerivedConfig):
    """A benchmark whose trainings choose a step; that one is drawn beside the last."""

    WAYS: ClassVar[tuple[str, ...]] = (BEST,)
