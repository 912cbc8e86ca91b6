"""A study of language that runs on a CPU: a small text model learns code words with ETHER, ETHER+, LoRA or in full.

    python examples/captions_study.py --config examples/captions_study.yaml

The plan is ``docs/studies/language.md``. A model of the Llama class is trained from scratch on captions with questions
(``captions_text.py``). Each method then learns tasks in which colours have other names. Every job leaves one JSON
file; the same command goes on where it was stopped, and several processes share the jobs.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import ClassVar, get_args

import torch
from captions_table import LADDER, BaseRecord, JobRecord, Results, best_rate, further_rate, tables
from captions_text import KEPT, KINDS_OF_QUESTIONS, Line, Vocabulary, lines, permutation
from language_settings import InputError, LanguageConfig, Method, adapt, count_trained, run
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from ether_diffusion.evaluation.runner import PAUSE, claimed
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.ranges import COUNT, POSITIVE, SEED, SHARE, Range, check_ranges
from ether_diffusion.reading import read_json
from ether_diffusion.training.cli import parse_config

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARMUP = 0.1
"""Share of the steps in which the rate rises; then it falls to 0 as a cosine."""
CLIP = 1.0
HELD_OUT_SEED = 2**31
"""Of the lines that answers are scored on; the captions are others in any case."""
PACKAGES = ("torch", "transformers", "peft")


@dataclass(kw_only=True)
class CaptionsConfig:
    """Settings of the study.

    Attributes:
        output_dir: of the base, the jobs' records, ``language.json`` and ``language.md``.
        rates: of every method, the learning rates to begin with, of the ladder of half decades.
        most_rates: how many rates a method may have, once those beside the best are added.
        tuning_tasks: permutations on which rates are chosen.
        test_tasks: those of the table.
        hidden_size: of the model.
        layers: of the model.
        heads: of the model.
        intermediate_size: of the model.
        base_steps: of the training from scratch.
        base_learning_rate: of the same.
        least_base: share of the questions about colours that the base must answer right before anything is finetuned.
        steps: of a finetuning.
        examples: lines that a finetuning sees, again and again.
        batch_size: lines per step, of base and finetunings.
        scored: held-out lines of each kind of question.
        n_blocks: of ETHER and ETHER+.
        rank: of LoRA.
        threads: of torch, in each process.
        seed: of the base's start and data.
    """

    RANGES: ClassVar[dict[str, Range]] = {
        **dict.fromkeys(
            ("hidden_size", "layers", "heads", "intermediate_size", "base_steps", "steps", "examples", "batch_size"),
            COUNT,
        ),
        **dict.fromkeys(("scored", "n_blocks", "rank", "threads", "most_rates"), COUNT),
        "base_learning_rate": POSITIVE,
        "least_base": SHARE,
        "seed": SEED,
    }

    output_dir: Path = Path("runs/language")
    rates: dict[str, list[float]] = field(default_factory=dict)
    most_rates: int = 6
    tuning_tasks: list[int] = field(default_factory=list)
    test_tasks: list[int] = field(default_factory=list)
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 344
    base_steps: int = 6000
    base_learning_rate: float = 2e-3
    least_base: float = 0.85
    steps: int = 300
    examples: int = 512
    batch_size: int = 32
    scored: int = 512
    n_blocks: int = 4
    rank: int = 4
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, self.RANGES)
        if unknown := sorted(set(self.rates) - set(get_args(Method))):
            raise ValueError(f"unknown method {unknown[0]!r} in rates; there are: {', '.join(get_args(Method))}")
        for method, rates in self.rates.items():
            if strange := [rate for rate in rates if rate not in LADDER]:
                steps = ", ".join(f"{rate:g}" for rate in LADDER)
                raise ValueError(f"the rate {strange[0]:g} of {method} is none of the ladder's: {steps}")
        if not self.rates or not all(self.rates.values()) or not self.tuning_tasks or not self.test_tasks:
            raise ValueError("rates, tuning_tasks and test_tasks must name at least one each")
        if shared := sorted(set(self.tuning_tasks) & set(self.test_tasks)):
            raise ValueError(f"task {shared[0]} is both for tuning and for testing")


@dataclass(frozen=True)
class Job:
    """One finetuning.

    Attributes:
        part: "tuning" or "test".
        method: of ``language_settings``.
        rate: learning rate.
        task: number of the permutation, and seed of the training.
    """

    part: str
    method: str
    rate: float
    task: int

    @property
    def key(self) -> str:
        """Its file below the study's folder, without the ending."""
        return f"{self.part}/{self.method}@{self.rate:g}/task-{self.task}"


class Study:
    """A base and the finetunings that start from it."""

    def __init__(self, config: CaptionsConfig) -> None:
        """Hold the settings against those of the folder, if it has any.

        Raises:
            InputError: the folder holds a study with other settings.
        """
        self.config = config
        self.vocabulary = Vocabulary()
        marker, own = config.output_dir / "settings.json", _comparable(config)
        if marker.is_file() and (known := read_json(marker, dict)) != own:
            changed = sorted(key for key in {*known, *own} if known.get(key) != own.get(key))
            raise InputError(f"{config.output_dir} holds a study with another {', '.join(changed)}: name a new folder")
        write_text(marker, json.dumps(own, indent=1))
        torch.set_num_threads(config.threads)

    def record(self, key: str) -> Path:
        return self.config.output_dir / "jobs" / f"{key}.json"

    def run(self) -> Results:
        """Train what is not done: the base, the tuning tasks at all rates, the test tasks at the chosen ones.

        Raises:
            InputError: the base has learnt too little.
        """
        config = self.config
        self._share(["base"], lambda key: self.train_base())
        base: BaseRecord = read_json(self.record("base"), BaseRecord)
        if (known := base["by_kind"]["colour"]) < config.least_base:
            raise InputError(
                f"the base answers {known:.3f} of the questions about colours right, least_base is "
                f"{config.least_base:g}: give more base_steps and a new output_dir"
            )
        grid = [(method, rate) for method, rates in config.rates.items() for rate in sorted(rates)]
        tuned: list[JobRecord] = []
        while grid:
            tuned += self._finetune([Job("tuning", *arm, task) for arm in grid for task in config.tuning_tasks])
            further = {method: further_rate(tuned, method, config.most_rates) for method in config.rates}
            grid = [(method, rate) for method, rate in further.items() if rate is not None]
        chosen = [(method, best_rate(tuned, method)) for method in config.rates]
        tested = self._finetune([Job("test", *arm, task) for arm in chosen for task in config.test_tasks])
        return {
            "settings": _comparable(config),
            "versions": {name: version(name) for name in PACKAGES},
            "base": base,
            "jobs": tuned + tested,
        }

    def train_base(self) -> None:
        """Train the model from scratch on lines of all kinds."""
        started = time.monotonic()
        model = self._new_model()
        source = lines(self.config.seed, KINDS_OF_QUESTIONS, held_out=False)
        batches = iter(lambda: list(islice(source, self.config.batch_size)), [])
        self._train(model, batches, self.config.base_steps, self.config.base_learning_rate, "base")
        with atomic_path(self._weights) as temporary:
            save_file(model.state_dict(), temporary)
        found = {kind: self.score(model, kind) for kind in KINDS_OF_QUESTIONS}
        record: BaseRecord = {
            "parameters": sum(each.numel() for each in model.parameters()),
            "by_kind": found,
            "retained": sum(found[kind] for kind in KEPT) / len(KEPT),
            "seconds": time.monotonic() - started,
        }
        write_text(self.record("base"), json.dumps(record, indent=1))

    def finetune(self, job: Job) -> None:
        """Train one method on one task, score it on held-out captions, and write the record."""
        started, config = time.monotonic(), self.config
        model = self._new_model()
        model.load_state_dict(load_file(self._weights))
        codes = permutation(job.task)
        method = LanguageConfig(
            model="", output_dir=config.output_dir, method=job.method, n_blocks=config.n_blocks,  # type: ignore[arg-type]
            rank=config.rank, seed=job.task,
        )  # fmt: skip
        torch.manual_seed(job.task)
        adapted = adapt(model, method, TARGETS, "CAUSAL_LM")
        known = list(islice(lines(_seed_of(job.task), ("colour",), held_out=False, codes=codes), config.examples))
        batches = _epochs(known, config.batch_size, random.Random(job.task))
        self._train(adapted, batches, config.steps, job.rate, job.key)
        by_kind = {kind: self.score(adapted, kind) for kind in KEPT}
        record: JobRecord = {
            "part": job.part,
            "method": job.method,
            "learning_rate": job.rate,
            "task": job.task,
            "parameters": sum(count_trained(adapted)),
            "shifted": self.score(adapted, "colour", codes),
            "retained": sum(by_kind.values()) / len(by_kind),
            "by_kind": by_kind,
            "seconds": time.monotonic() - started,
        }
        write_text(self.record(job.key), json.dumps(record, indent=1))

    @torch.no_grad()
    def score(self, model: nn.Module, kind: str, codes: dict[str, str] | None = None) -> float:
        """Share of held-out questions of a kind whose whole answer is right, word for word.

        The words are the likeliest after the true ones before them. All are right if and only if the answer that
        the model writes by itself, always taking the likeliest word, is right.
        """
        chosen = list(islice(lines(HELD_OUT_SEED, (kind,), held_out=True, codes=codes), self.config.scored))
        right = 0
        model.eval()
        for start in range(0, len(chosen), 128):
            ids, mask, targets = self.vocabulary.batch(chosen[start : start + 128])
            likeliest = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
            hits = (likeliest[:, :-1] == targets[:, 1:]) | (targets[:, 1:] < 0)
            right += int(hits.all(1).sum())
        return right / len(chosen)

    @property
    def _weights(self) -> Path:
        return self.config.output_dir / "base.safetensors"

    def _new_model(self) -> LlamaForCausalLM:
        torch.manual_seed(self.config.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.vocabulary),
                hidden_size=self.config.hidden_size,
                num_hidden_layers=self.config.layers,
                num_attention_heads=self.config.heads,
                intermediate_size=self.config.intermediate_size,
                max_position_embeddings=128,
                pad_token_id=self.vocabulary.ids["<pad>"],
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def _train(self, model: nn.Module, batches: Iterator[list[Line]], steps: int, rate: float, title: str) -> None:
        """AdamW without weight decay on ``steps`` batches; the loss is on the words of the answers."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, steps))
        model.train()
        for batch in tqdm(islice(batches, steps), total=steps, desc=title, unit="step", leave=False):
            ids, mask, targets = self.vocabulary.batch(batch)
            model(input_ids=ids, attention_mask=mask, labels=targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def _finetune(self, jobs: Sequence[Job]) -> list[JobRecord]:
        """The records of some jobs, once all are done."""
        by_key = {job.key: job for job in jobs}
        self._share(list(by_key), lambda key: self.finetune(by_key[key]))
        return [read_json(self.record(key), JobRecord) for key in by_key]

    def _share(self, keys: Sequence[str], work: Callable[[str], None]) -> None:
        """Do what has no record yet; wait for what another process does."""
        waiting = deque(keys)
        with tqdm(total=len(keys), unit="job", disable=len(keys) < 2) as progress:
            while waiting:
                key = waiting.popleft()
                with claimed(self.config.output_dir, key) as mine:
                    if mine and not self.record(key).is_file():
                        work(key)
                if mine:
                    progress.update()
                else:
                    waiting.append(key)
                    time.sleep(PAUSE)


def _share_of_rate(step: int, steps: int) -> float:
    """The rate at a step, as a share of the highest: a linear rise, then a cosine to 0."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _epochs(known: list[Line], size: int, rng: random.Random) -> Iterator[list[Line]]:
    """Endless batches: all lines in random order, again and again."""
    queue: list[Line] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(known, len(known))
        yield queue[:size]
        queue = queue[size:]


def _seed_of(task: int) -> int:
    """Of the lines of a task: none that the base or the scores have."""
    return HELD_OUT_SEED + 1 + task


def _comparable(config: CaptionsConfig) -> dict[str, object]:
    """What a study's results depend on."""
    found = copy.deepcopy(asdict(config))
    del found["output_dir"], found["threads"]
    return json.loads(json.dumps(found))


def main() -> None:
    config = parse_config(CaptionsConfig)
    results = Study(config).run()
    text = tables(results)
    write_text(config.output_dir / "language.json", json.dumps(results, indent=1) + "\n")
    write_text(config.output_dir / "language.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
