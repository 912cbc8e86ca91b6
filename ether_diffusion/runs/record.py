"""The reading side of a run folder: what a run, finished or not, says of itself, and how to put it in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, cast, get_type_hints

from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import FAMILIES
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.page.text import counted, data_size, number
from ether_diffusion.pipelines.file import FILE_NAME
from ether_diffusion.pipelines.schema import CONTROL
from ether_diffusion.reading import DamagedFileError, matches, parse_json, read_bytes, read_json, read_yaml, shown
from ether_diffusion.registry import METHODS, MethodEntry, title_of
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.choosing import BEST, SAMPLE_SCORES, ScoredStep, best_step

T = TypeVar("T")
Row = TypeVar("Row")

CONDITIONS = {
    "image": "control images",
    "map": "semantic maps",
    "segmentation": "semantic maps",
    "canny": "canny edges",
}
"""Each kind of condition as people write it."""

BEST_FILE = f"{BEST}/{FILE_NAME}"
"""The adapter of the best step: in the run folder, and under ``files`` in its record."""
HIGHLIGHTS = (
    "learning_rate",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "resolution",
    "mixed_precision",
    "ema_decay",
    "seed",
    "with_prior_preservation",
    "train_text_encoder",
    "placeholder_token",
    "initializer_token",
    "token_lr",
    "token_steps",
    "revision",
    "variant",
)
"""Settings of every method that a reader looks for first."""


class RunRecordError(DamagedFileError):
    """A file of a run folder is damaged; the message names it and says what is wrong."""


@dataclass(frozen=True)
class RunFacts:
    """``provenance.json``: what a result depends on beside its settings. A default stands for what is not recorded.

    ``files`` has of each adapter file the step of its weights; ``sample_judges`` are those of ``sample_scores.jsonl``.
    """

    config_hash: str = ""
    family: str = ""
    base_hash: dict[str, str] = field(default_factory=dict)
    base_file: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    num_processes: int = 1
    trained_parameters: dict[str, int] = field(default_factory=dict)
    status: str = "running"
    step: int = 0
    instance_images: list[str] = field(default_factory=list)
    class_images: int = 0
    training_pairs: int = 0
    started: str = ""
    seconds: float = 0.0
    files: dict[str, int] = field(default_factory=dict)
    stopped_early: bool = False
    sample_judges: dict[str, dict[str, str]] = field(default_factory=dict)


class MetricsRow(TypedDict):
    """One line of ``metrics.jsonl``: one optimisation step. All values are finite; a norm that was not is left out."""

    step: int
    loss: float
    instance_loss: NotRequired[float]
    prior_loss: NotRequired[float]
    lr: dict[str, float]
    grad_norm: NotRequired[float]
    steps_per_second: float


class ValidationRow(TypedDict):
    """One line of ``validation.jsonl``: the loss on fixed pictures with fixed noise, at a step with samples."""

    step: int
    loss: float
    times: list[float]
    by_time: list[float]


class SamplePrompt(TypedDict):
    """One entry of ``samples/prompts.json``: the picture ``file`` in every ``samples/step-*`` folder.

    ``condition`` is the path, in ``samples``, of what controls it.
    """

    file: str
    prompt: str
    seed: int
    condition: NotRequired[str]


@dataclass(frozen=True)
class Judging:
    """What the scores of a run depend on: what ``scores.json`` has beside them.

    Attributes:
        judges: of each judge its ``model``, a hash of its ``weights`` and its ``preprocessing``; ``libraries`` has the
            versions of what they run on.
        token: the rare word that CLIP-T leaves out; None if the prompts were scored as they are written.
        seed: of the training.
        step: of the finetuned model's samples.
        prompts: number of different prompts.
        images: number of pictures behind each column: ``finetuned``, ``references`` and, if it was drawn, ``base``.
    """

    judges: dict[str, dict[str, str]]
    token: str | None
    seed: int | None
    step: int
    prompts: int
    images: dict[str, int]

    @property
    def basis(self) -> str:
        """What a value rests on: ``8 pictures of 4 prompts, one training, one seed (0)``."""
        seed = "" if self.seed is None else f" ({self.seed})"
        pictures, prompts = counted(self.images["finetuned"], "picture"), counted(self.prompts, "prompt")
        return f"{pictures} of {prompts}, one training, one seed{seed}"

    @property
    def caption(self) -> str:
        """What a reader must know to read the scores."""
        sentences = [f"{self.basis}: another seed gives other values. Finetuned is step {self.step:,}."]
        if (references := self.images["references"]) > 1:
            sentences.append(
                f"References: the subject's {references:,} pictures among themselves. A nearest reference above theirs "
                "suggests copies."
            )
        sentences.append(
            f'CLIP-T is of the prompts without the rare word "{self.token}".'
            if self.token
            else "CLIP-T is of the prompts as they are written, a rare word in them included."
        )
        return " ".join(sentences)


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        folder: the run folder, absolute.
        config: ``config.yaml``.
        provenance: ``provenance.json``.
        metrics: the rows of ``metrics.jsonl``.
        torn_lines: how many lines of it cannot be read; a killed run leaves one.
        validation: the rows of ``validation.jsonl``, those that can be read; runs of 0.1 have none.
        sample_scores: the rows of ``sample_scores.jsonl``; there are none where the run had no judges.
        prompts: what the sample grids show.
        sample_steps: steps with a sample grid, ascending; 0 is the base model without the adapter.
        scores: the scores of ``scores.json``, from metric to what was scored to the score.
        judging: what they depend on; None where there are none, or where an older version did not record it.
    """

    folder: Path
    config: dict[str, object]
    provenance: RunFacts
    metrics: list[MetricsRow]
    torn_lines: int
    validation: list[ValidationRow]
    sample_scores: list[ScoredStep]
    prompts: list[SamplePrompt]
    sample_steps: list[int]
    scores: dict[str, dict[str, float | None]]
    judging: Judging | None

    @property
    def method(self) -> str:
        """The method's key, such as ``ether_plus``."""
        return str(self.config["method"])

    @property
    def entry(self) -> MethodEntry:
        """The method's entry in the registry."""
        return METHODS[self.method]

    @property
    def method_name(self) -> str:
        """The method as people write it: ``ETHER+``."""
        return "ControlNet" if (self.method, self.control) == ("none", "controlnet") else title_of(self.config)

    @property
    def base(self) -> str:
        """The base model's Hub id or folder."""
        return self.source.name

    @property
    def source(self) -> Base:
        """The base with its revision and variant: what to load it by."""
        return Base.of(self.config)

    @property
    def instance_prompt(self) -> str | None:
        """The prompt that names the subject; ``None`` where the run learned no single subject."""
        prompt = self.config.get("instance_prompt")
        return None if prompt is None else str(prompt)

    @property
    def placeholder_token(self) -> str | None:
        """The new token that the run has learnt for the subject; ``None`` where it learned none."""
        token = self.config.get("placeholder_token")
        return None if token is None else str(token)

    @property
    def class_prompt(self) -> str | None:
        """The prompt that names the subject's class, without the subject; ``None`` where none was given."""
        prompt = self.config.get("class_prompt")
        return None if prompt is None else str(prompt)

    @property
    def control(self) -> str | None:
        """How the run learned a control: ``encoder`` or ``controlnet``; ``None`` where it learned none."""
        control = self.config.get("control")
        return None if control is None else str(control)

    @property
    def family(self) -> type[Family]:
        """The family of the base; runs of 0.1, which do not say it, know SD and SDXL."""
        older = "sdxl" if "text_encoder_2" in self.provenance.base_hash else "sd"
        return FAMILIES.get(self.provenance.family or older, FAMILIES[older])

    @property
    def family_settings(self) -> FamilySettings:
        """How its prompts were encoded: drawing does it alike.

        Raises:
            RunRecordError: a setting is damaged.
        """
        kinds = {name: kind for name, kind in get_type_hints(FamilySettings).items() if name in self.config}
        found = {name: self.config[name] for name in kinds}
        try:
            if wrong := [name for name, kind in kinds.items() if not matches(found[name], kind)]:
                raise ValueError(f"its {wrong[0]} is {shown(found[wrong[0]])}")
            return FamilySettings(**found)  # type: ignore[arg-type]
        except ValueError as error:
            raise RunRecordError(f"{self.folder / 'config.yaml'} is damaged: {error}") from error

    @property
    def peft_components(self) -> list[str]:
        """The components that the run saved as peft folders; LoRA has diffusers' own format, but for a ControlNet."""
        if self.entry.saved_as != "peft" and not (self.entry.saved_as == "lora" and self.control == "controlnet"):
            return []
        return [component for component in self.provenance.trained_parameters if component != CONTROL]

    @property
    def control_name(self) -> str:
        """What the run learned to follow, in words."""
        return CONDITIONS[str(self.config["condition"])]

    @property
    def controlnet(self) -> str | None:
        """The ControlNet of the run: a Hub id or folder, the run's own where it trained its weights."""
        if self.control != "controlnet":
            return None
        own = self.config["train_controlnet"] != "nothing"
        return str(self.folder / "controlnet" if own else self.config["controlnet_model_name_or_path"])

    @property
    def trained(self) -> str:
        """The trained parameters in words, with their size in fp32: ``398,592 parameters (1.6 MB)``."""
        count = sum(self.provenance.trained_parameters.values())
        return f"{count:,} parameters ({data_size(4 * count)})"

    @property
    def result_bytes(self) -> int:
        """The size of the files that hold what was learnt; of full finetuning, the components that it changed."""
        folders = [self.folder, *(self.folder / component for component in self.provenance.trained_parameters)]
        return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))

    @property
    def steps(self) -> str:
        """How far the run got: ``600 of 1,400 steps``."""
        early = ", stopped early" if self.provenance.stopped_early else ""
        return f"{self.provenance.step:,} of {self.config['max_train_steps']:,} steps{early}"

    @property
    def best_step(self) -> int | None:
        """The best scored step, by the rule of :func:`ether_diffusion.runs.choosing.best_step`."""
        return best_step(self.sample_scores)

    @property
    def kept_step(self) -> int | None:
        """The step of the adapter in ``best/``, as the run recorded it; ``None`` where there is none.

        It is an earlier one than :attr:`best_step` if the run was killed before it kept that.
        """
        return self.provenance.files.get(BEST_FILE) if (self.folder / BEST_FILE).is_file() else None

    @property
    def finetuned_step(self) -> int | None:
        """The last step with samples of the finetuned model; ``None`` before the first."""
        return max((step for step in self.sample_steps if step > 0), default=None)

    def sample(self, step: int, file: str) -> Path:
        """The path of one sample, relative to the run folder."""
        return Path("samples") / f"step-{step:06d}" / file

    def settings(self, more: Iterable[str] = ()) -> dict[str, str]:
        """The highlights and the settings named in ``more``, in words, without those that were left open.

        A learning rate that was left to the method is the first component's highest in the metrics.
        """
        rate = max((rate for row in self.metrics for rate in list(row["lr"].values())[:1]), default=None)
        values = {"learning_rate": rate} | {key: value for key, value in self.config.items() if value is not None}
        names = ("method", *self.entry.settings, *HIGHLIGHTS, *more)
        return {name: format_value(values[name]) for name in names if values.get(name) is not None}


def read_run(run_dir: str | Path) -> Run:
    """Read a run folder, finished or not. Only ``config.yaml`` and ``provenance.json`` must be there.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
        RunRecordError: a file of it is damaged.
    """
    folder = Path(run_dir).resolve()
    for required in ("config.yaml", "provenance.json"):
        if not (folder / required).is_file():
            raise FileNotFoundError(
                f"{run_dir} is not a run folder: it has no {required}. "
                "Give the folder that a training program wrote (its output_dir), such as runs/dog."
            )
    metrics, torn_lines = _read_rows(folder / "metrics.jsonl", MetricsRow)
    validation, _ = _read_rows(folder / "validation.jsonl", ValidationRow)
    sample_scores, _ = _read_rows(folder / SAMPLE_SCORES, ScoredStep)
    scores, judging = _read_scores(folder / "scores.json")
    return Run(
        folder=folder,
        config=_read_settings(folder / "config.yaml"),
        provenance=RunFacts(**_read_known(folder / "provenance.json", RunFacts)),
        metrics=metrics,
        torn_lines=torn_lines,
        validation=validation,
        sample_scores=sample_scores,
        prompts=_read_prompts(folder / "samples" / "prompts.json"),
        sample_steps=_sample_steps(folder / "samples"),
        scores=scores,
        judging=judging,
    )


def _read_json(path: Path, default: T) -> T:
    if not path.exists():
        return default
    try:
        found: T = read_json(path, type(default))
    except DamagedFileError as error:
        raise RunRecordError(str(error)) from error
    return found


def _read_settings(path: Path) -> dict[str, object]:
    try:
        settings = read_yaml(path)
    except ValueError as error:
        raise RunRecordError(str(error)) from error
    if not matches(settings, dict[str, object]) or not all(isinstance(key, str) for key in settings):
        raise RunRecordError(f"{path} is damaged: it holds {shown(settings)}, settings are expected")
    if settings.get("method") not in list(METHODS):
        raise RunRecordError(f"{path} is damaged: its method is {shown(settings.get('method'))}, none that is known")
    found: dict[str, object] = settings
    return found


def _read_known(path: Path, record: type[RunFacts | Judging], values: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the file has of a record's fields, each of its type; fields of later versions are passed over."""
    recorded = _read_json(path, {}) if values is None else values
    found = {}
    for name, kind in get_type_hints(record).items():
        if name in recorded:
            if not matches(recorded[name], kind):
                raise RunRecordError(f"{path} is damaged: its {name} is {shown(recorded[name])}")
            found[name] = recorded[name]
    return found


def _read_prompts(path: Path) -> list[SamplePrompt]:
    """What the sample grids show; their files lie in the folder of the samples."""
    prompts: list[SamplePrompt] = _read_json(path, [])
    for place, prompt in enumerate(prompts, 1):
        if not matches(prompt, SamplePrompt):
            raise RunRecordError(f"{path} is damaged: entry {place} lacks file, prompt or seed")
        for name in (prompt["file"], prompt.get("condition", "")):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise RunRecordError(f"{path} is damaged: entry {place} names {shown(name)}, outside of its folder")
    return prompts


def _read_scores(path: Path) -> tuple[dict[str, dict[str, float | None]], Judging | None]:
    """The scores and what they depend on; the first version of the file was the scores alone."""
    recorded: dict[str, Any] = _read_json(path, {})
    judging = None
    if "judges" in recorded:
        known = _read_known(path, Judging, recorded)
        if missing := [each.name for each in fields(Judging) if each.name not in known]:
            raise RunRecordError(f"{path} is damaged: it has no {missing[0]}")
        judging, recorded = Judging(**known), recorded.get("scores", {})
    if not matches(recorded, dict[str, dict[str, float | None]]):
        raise RunRecordError(f"{path} is damaged: its scores are no tables of numbers")
    return recorded, judging


def _read_rows(path: Path, kind: type[Row]) -> tuple[list[Row], int]:
    """The rows of that kind, and the number of lines that are none."""
    rows: list[Row] = []
    torn = 0
    for line in read_bytes(path).decode("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if matches(row, kind):
            rows.append(cast(Row, row))
        else:
            torn += 1
    return rows, torn


def _sample_steps(samples: Path) -> list[int]:
    names = (path.name for path in samples.glob("step-*") if path.is_dir())
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


def format_value(value: object) -> str:
    """A setting or a score as people write it: yes, no, 0.006, ``–`` for nothing."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return number(value, "g", "–")
        case list() | tuple():
            return ", ".join(format_value(item) for item in value) or "–"
        case _:
            return str(value)
