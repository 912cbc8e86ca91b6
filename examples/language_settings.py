"""What the examples of language share: settings, methods, records from files, and errors in one line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, TypeVar

import peft
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

import ether_diffusion.peft_tuner as tuner  # registers the type ETHER with PEFT
from ether_diffusion.files import write_text
from ether_diffusion.ranges import AMOUNT, COUNT, POSITIVE, SEED, Range, check_ranges
from ether_diffusion.reading import matches, parse_json, read_lines, read_text

Loaded = TypeVar("Loaded")
Model: TypeAlias = PreTrainedModel | peft.PeftModel
Record = dict[str, str | int | float]
Method = Literal["ether", "ether_plus", "lora", "full"]


class InputError(ValueError):
    """What the user gave cannot be used; the program ends with this one line."""


@dataclass(kw_only=True)
class LanguageConfig:
    """Settings of a finetuning of a language model.

    Attributes:
        model: the base: a folder or an id of the Hub.
        output_dir: where the adapter (or, for "full", the model) and ``results.json`` go.
        method: "ether", "ether_plus", "lora" or "full".
        n_blocks: diagonal blocks of ETHER and ETHER+.
        two_sided: ETHER+ only: transform the output features as well.
        rank: of LoRA; its alpha is the same number.
        learning_rate: of the method.
        weight_decay: of AdamW. On ETHER's vectors it has no effect on the transform, which has their directions only.
        batch_size: lines per step, over all processes.
        micro_batch_size: lines per forward; None takes a process's share of the batch at once.
        epochs: passes over the training data.
        max_steps: end after so many steps; None leaves it to ``epochs``.
        warmup: share of the steps in which the rate rises.
        schedule: how the rate goes on from there.
        max_grad_norm: where the gradient is clipped; 0 clips nothing.
        max_length: tokens of a text; what is longer is cut.
        train_file: JSON lines or a JSON list; None takes the data of the Hub.
        seed: of the vectors, the head and the order of the data.
        count: print the trained numbers of the real architecture and end; nothing is downloaded.
    """

    RANGES: ClassVar[dict[str, Range]] = {
        "n_blocks": COUNT,
        "rank": COUNT,
        "learning_rate": POSITIVE,
        "weight_decay": AMOUNT,
        "batch_size": COUNT,
        "micro_batch_size": COUNT,
        "epochs": POSITIVE,
        "max_steps": COUNT,
        "warmup": Range(0, 1, below=True),
        "max_grad_norm": AMOUNT,
        "max_length": Range(8),
        "seed": SEED,
    }

    model: str
    output_dir: Path
    method: Method = "ether_plus"
    n_blocks: int = 4
    two_sided: bool = True
    rank: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 16
    micro_batch_size: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    warmup: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: float = 1.0
    max_length: int = 256
    train_file: Path | None = None
    seed: int = 0
    count: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, self.RANGES)


def adapt(
    model: PreTrainedModel,
    config: LanguageConfig,
    targets: Sequence[str],
    task_type: str,
    head: Sequence[str] = (),
) -> Model:
    """The model under the method of the settings; all but what is trained is frozen.

    Args:
        model: of transformers.
        config: method, blocks or rank, and seed.
        targets: ends of the paths of the Linears that are finetuned.
        task_type: as PEFT names it, such as "CAUSAL_LM".
        head: modules that are new and trained whole.

    Raises:
        InputError: ``n_blocks`` does not divide, or the model has no such Linears.
    """
    if config.method == "full":
        return model
    shared = {"target_modules": list(targets), "task_type": task_type, "modules_to_save": list(head) or None}
    settings = (
        peft.LoraConfig(r=config.rank, lora_alpha=config.rank, **shared)
        if config.method == "lora"
        else tuner.EtherPeftConfig(
            variant=config.method,
            n_blocks=config.n_blocks,
            two_sided=config.two_sided,
            seed=config.seed,
            **shared,  # type: ignore[arg-type]
        )
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:  # neither PEFT nor the tuner has a class of its own for settings that do not fit
        raise InputError(one_line(error)) from error


def count_trained(model: nn.Module, head: Sequence[str] = ()) -> tuple[int, int]:
    """How many numbers are trained: in the model without its head, and in the head."""
    sizes = [0, 0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes[any(part in head for part in name.split("."))] += parameter.numel()
    return sizes[0], sizes[1]


def training_arguments(config: LanguageConfig, **more: object) -> TrainingArguments:
    """The settings in the form of transformers' Trainer.

    Raises:
        InputError: the batch cannot be cut into equal parts for the processes and forwards.
    """
    arguments = TrainingArguments(
        output_dir=str(config.output_dir),
        use_cpu=not torch.accelerator.is_available(),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_strategy="no",
        logging_first_step=True,
        logging_steps=10,
        report_to=[],
        **more,
    )
    processes: int = arguments.world_size  # what a launcher started, and the Trainer takes part in
    micro = config.micro_batch_size or math.ceil(config.batch_size / processes)
    if config.batch_size % (micro * processes):
        raise InputError(
            f"batch_size {config.batch_size} is no multiple of micro_batch_size {micro} times {processes} processes"
        )
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = config.batch_size // (micro * processes)
    return arguments


def read_records(path: Path, kinds: dict[str, type]) -> list[Record]:
    """The records of a file of JSON lines or of one JSON list.

    Args:
        path: of the file.
        kinds: the keys that every record must have, with the type of the value. Other keys are left out.

    Raises:
        InputError: the file is not there, is no such file, or a record lacks something; the line is named.
    """
    try:
        text = read_text(path).lstrip()
        found = (
            list(enumerate(parse_json(text), 1))
            if text.startswith("[")
            else [(number, parse_json(line)) for number, line in read_lines(path)]
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON lines or a JSON list: {one_line(error)}") from error
    if not found:
        raise InputError(f"{path} has no records")
    for number, record in found:
        for key, kind in kinds.items():
            if not isinstance(record, dict) or not matches(record.get(key), kind):
                raise InputError(f'{path}, record {number}: "{key}" must be of type {kind.__name__}')
    return [{key: record[key] for key in kinds} for _, record in found]


def load_pretrained(load: Callable[..., Loaded], name: str, **options: object) -> Loaded:
    """Call a ``from_pretrained``.

    Raises:
        InputError: there is no such model.
    """
    try:
        return load(name, **options)
    except OSError as error:
        raise InputError(f"{name} cannot be loaded: {one_line(error)}") from error


def save(model: Model, tokenizer: PreTrainedTokenizerBase, config: LanguageConfig, results: dict[str, object]) -> None:
    """Write what was trained (an adapter, or the model), the tokenizer, and ``results.json`` with the settings."""
    model.save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    text = json.dumps({"settings": asdict(config), **results}, indent=1, default=str)
    write_text(config.output_dir / "results.json", text + "\n")


def one_line(error: Exception) -> str:
    """The first line of an error, else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(program: Callable[[], None]) -> None:
    """Run a program; a mistake of the user ends it with one line.

    Raises:
        SystemExit: after an :class:`InputError`.
    """
    try:
        program()
    except InputError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def on_meta(make: Callable[[], Model]) -> Model:
    """A model with shapes and without numbers."""
    with torch.device("meta"):
        return make()
