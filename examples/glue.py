"""Finetune DeBERTaV3-base on a task of GLUE with ETHER, ETHER+, LoRA or in full, and score it.

    python examples/glue.py --config examples/glue.yaml --task mrpc
    python examples/glue.py --config examples/glue.yaml --method ether --count

The adapter acts on all six Linears of each of the 12 layers, as in the paper (arXiv 2405.20271, Sec. 5.2): 82,944
trained numbers for ETHER and 331,776 for ETHER+, besides the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from language_settings import (
    InputError,
    LanguageConfig,
    Model,
    Record,
    adapt,
    count_trained,
    load_pretrained,
    on_meta,
    one_line,
    read_records,
    run,
    save,
    training_arguments,
)
from numpy.typing import NDArray
from scipy import stats
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from ether_diffusion.ranges import COUNT, Range
from ether_diffusion.training.cli import parse_config

HUB_DATA = "nyu-mll/glue"
TARGETS = ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense")
"""The six Linears of a layer of DeBERTa: three of attention, its output, and the two of the feed-forward."""
HEAD = ("pooler", "classifier")
"""Not in the pretrained file: new, and trained whole by every method."""
DEBERTA_V3_BASE: dict[str, object] = {
    "vocab_size": 128100,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "pooler_hidden_size": 768,
    "position_biased_input": False,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
}
"""The architecture of ``microsoft/deberta-v3-base``, for counting without a download."""
Values = NDArray[np.float64]


def accuracy(answers: Values, truth: Values) -> float:
    return float(np.mean(answers == truth))


def f1(answers: Values, truth: Values) -> float:
    """F1 of class 1; 0 where neither has it."""
    both = answers.sum() + truth.sum()
    return float(2 * (answers * truth).sum() / both) if both else 0.0


def matthews(answers: Values, truth: Values) -> float:
    """Matthews' correlation of two classes, which is Pearson's of their indicators; 0 where one is constant."""
    return pearson(answers, truth)


def pearson(answers: Values, truth: Values) -> float:
    constant = np.ptp(answers) == 0 or np.ptp(truth) == 0
    return 0.0 if constant else float(np.corrcoef(answers, truth)[0, 1])


def spearman(answers: Values, truth: Values) -> float:
    return pearson(stats.rankdata(answers), stats.rankdata(truth))


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        texts: the keys of one or two texts.
        metrics: what it is scored by; the first one is the task's.
        labels: how many classes; 1 is a regression.
        validation: the splits that are scored.
    """

    texts: tuple[str, ...]
    metrics: tuple[Callable[[Values, Values], float], ...] = (accuracy,)
    labels: int = 2
    validation: tuple[str, ...] = field(default=("validation",))


TASKS = {
    "cola": Task(("sentence",), (matthews,)),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("sentence1", "sentence2"), (accuracy, f1)),
    "qqp": Task(("question1", "question2"), (accuracy, f1)),
    "stsb": Task(("sentence1", "sentence2"), (pearson, spearman), labels=1),
    "mnli": Task(("premise", "hypothesis"), labels=3, validation=("validation_matched", "validation_mismatched")),
    "qnli": Task(("question", "sentence")),
    "rte": Task(("sentence1", "sentence2")),
}


@dataclass(kw_only=True)
class GlueConfig(LanguageConfig):
    """Settings of a finetuning of an encoder on a task of GLUE.

    Attributes:
        task: of GLUE.
        validation_file: as ``train_file``; the two come together.
        eval_batch_size: texts per forward when scoring.
        precision: of the forward: "no" is fp32.
    """

    RANGES: ClassVar[dict[str, Range]] = {**LanguageConfig.RANGES, "eval_batch_size": COUNT}

    model: str = "microsoft/deberta-v3-base"
    output_dir: Path = Path("runs/glue")
    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"] = "mrpc"
    validation_file: Path | None = None
    eval_batch_size: int = 64
    precision: Literal["no", "bf16", "fp16"] = "no"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("give both train_file and validation_file, or neither")


def read_data(config: GlueConfig) -> DatasetDict:
    """The texts and labels of a task: "train", and its splits for validation.

    Raises:
        InputError: a file is not as it must be, or the Hub's data cannot be had.
    """
    task = TASKS[config.task]
    if config.train_file is None or config.validation_file is None:
        try:
            return load_dataset(HUB_DATA, config.task)
        except OSError as error:
            raise InputError(f"{HUB_DATA} cannot be loaded: {one_line(error)}; give train_file") from error
    kinds: dict[str, type] = {**dict.fromkeys(task.texts, str), "label": float if task.labels == 1 else int}
    files = {"train": config.train_file, task.validation[0]: config.validation_file}
    found = {split: read_records(path, kinds) for split, path in files.items()}
    for split, records in found.items():
        for number, record in enumerate(records, 1):
            if task.labels > 1 and record["label"] not in range(task.labels):
                raise InputError(f'{files[split]}, record {number}: "label" must be from 0 to {task.labels - 1}')
    return DatasetDict({split: Dataset.from_list(_floats(records, task)) for split, records in found.items()})


def _floats(records: list[Record], task: Task) -> list[Record]:
    return [{**record, "label": float(record["label"])} for record in records] if task.labels == 1 else records


def tokenized(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, config: GlueConfig) -> DatasetDict:
    keys = TASKS[config.task].texts

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer(*(batch[key] for key in keys), truncation=True, max_length=config.max_length)
        return {**found, "labels": batch["label"]}

    return data.map(tokens, batched=True, remove_columns=data["train"].column_names)


def scores(task: Task, prediction: EvalPrediction) -> dict[str, float]:
    """Every metric of a task by its name.

    Args:
        task: that was predicted.
        prediction: logits (texts, labels), or (texts, 1) of a regression, and the true labels.
    """
    logits, truth = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids, np.float64)
    answers = logits.reshape(-1) if task.labels == 1 else logits.argmax(-1).astype(np.float64)
    return {metric.__name__: metric(answers, truth) for metric in task.metrics}


def count(config: GlueConfig) -> tuple[int, int]:
    """Trained numbers on DeBERTaV3-base, without and in the head."""
    settings = DebertaV2Config(**DEBERTA_V3_BASE, num_labels=TASKS[config.task].labels)
    model = on_meta(lambda: adapted(DebertaV2ForSequenceClassification(settings), config))
    return count_trained(model, HEAD)


def adapted(model: PreTrainedModel, config: GlueConfig) -> Model:
    return adapt(model, config, TARGETS, "SEQ_CLS", HEAD)


def finetune(config: GlueConfig) -> Model:
    """Train, score after every epoch, save the adapter and ``results.json``; return the trained model.

    Raises:
        InputError: data, base or settings cannot be used.
    """
    task = TASKS[config.task]
    set_seed(config.seed)
    data = read_data(config)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, config.model)
    base = load_pretrained(
        AutoModelForSequenceClassification.from_pretrained,
        config.model,
        num_labels=task.labels,
        ignore_mismatched_sizes=True,  # a base that was finetuned on a task with more or fewer classes
        dtype="float32",
    )
    model = adapted(base, config)
    trained, head = count_trained(model, HEAD)
    print(f"{config.method}: {trained:,} trained numbers and {head:,} in the head")

    precision = {} if config.precision == "no" else {config.precision: True}
    arguments = training_arguments(
        config, eval_strategy="epoch", per_device_eval_batch_size=config.eval_batch_size, **precision
    )
    splits = tokenized(data, tokenizer, config)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits[task.validation[0]],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda prediction: scores(task, prediction),
    )
    trainer.train()
    found = {split: trainer.evaluate(splits[split]) for split in task.validation if split in splits}
    if trainer.is_world_process_zero():
        sizes = {"trained": trained, "head": head}
        save(model, tokenizer, config, {**sizes, "scores": found, "log": trainer.state.log_history})
        for split, values in found.items():
            told = ", ".join(f"{metric.__name__} {values[f'eval_{metric.__name__}']:.4f}" for metric in task.metrics)
            print(f"{config.task}, {split}: {told}")
    return model


def main() -> None:
    config = parse_config(GlueConfig)
    if config.count:
        trained, head = count(config)
        print(f"{config.method}: {trained:,} trained numbers and {head:,} in the head")
    else:
        finetune(config)


if __name__ == "__main__":
    run(main)
