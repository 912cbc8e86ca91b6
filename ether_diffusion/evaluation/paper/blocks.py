"""The number of blocks: what it does to quality, to the time of a step, and to the memory that the backward keeps.

The quality is a benchmark's whose arms differ in ``n_blocks``; time and memory are measured on its base, the arms
taking turns in one process, as ratios to the frozen model.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.host import attach
from ether_diffusion.evaluation.figures import Line, Panel, score_line, write_figure
from ether_diffusion.evaluation.subjects.arms import BenchmarkConfig
from ether_diffusion.evaluation.subjects.benchmark import run_benchmark
from ether_diffusion.evaluation.subjects.summary import BY_KEY, Result, all_results, primary, summarize
from ether_diffusion.evaluation.tables import caption, format_score, judges_line
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table
from ether_diffusion.pipelines.components import is_xl
from ether_diffusion.registry import METHODS, OWN_METHODS
from ether_diffusion.runs.drawing import load_pipeline
from ether_diffusion.training.cli import parse_config

ROUNDS = 15


@dataclass(frozen=True)
class Cost:
    """What a training step costs beside that of the frozen model (forward, and backward to the input).

    Attributes:
        time: ratio of the median times.
        kept_bytes: of the activations that the backward needs, weights not counted.
        kept: their ratio.
    """

    time: float
    kept_bytes: int
    kept: float


def random_inputs(pipe: DiffusionPipeline, batch_size: int) -> dict[str, Any]:
    """A batch as the UNet takes it, of the base's own resolution."""
    unet, dice = pipe.unet, torch.Generator().manual_seed(0)
    side, tokens = unet.config.sample_size, pipe.tokenizer.model_max_length

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=dice).to(unet.device, unet.dtype)

    inputs: dict[str, Any] = {
        "sample": noise(unet.config.in_channels, side, side),
        "timestep": torch.full((batch_size,), 500, device=unet.device),
        "encoder_hidden_states": noise(tokens, unet.config.cross_attention_dim),
    }
    if is_xl(pipe):
        width = pipe.text_encoder_2.config.projection_dim
        inputs["added_cond_kwargs"] = {"text_embeds": noise(width), "time_ids": noise(6)}
    return inputs


def step(unet: nn.Module, parameters: Sequence[nn.Parameter], inputs: dict[str, Any]) -> float:
    """Seconds of one forward and backward; to the input where there are no parameters."""
    began = time.perf_counter()
    sample = inputs["sample"].clone().requires_grad_(not parameters)
    prediction = unet(**{**inputs, "sample": sample}).sample
    F.mse_loss(prediction.float(), torch.zeros_like(prediction, dtype=torch.float32)).backward()
    if sample.device.type == "cuda":
        torch.cuda.synchronize()
    for parameter in parameters:
        parameter.grad = None
    return time.perf_counter() - began


def kept_bytes(work: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that ``work`` keeps for a backward, those of its ``own`` tensors left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(kept.values())


def step_bytes(unet: nn.Module, parameters: Sequence[nn.Parameter], inputs: dict[str, Any]) -> int:
    """Bytes that a step keeps for its backward, those of the model's own state not."""
    own = [*unet.parameters(), *unet.buffers(), *parameters]
    return kept_bytes(lambda: step(unet, parameters, inputs), own)


def step_costs(
    pipe: DiffusionPipeline, configs: dict[str, EtherConfig], batch_size: int = 1, rounds: int = ROUNDS
) -> dict[str, Cost]:
    """The cost of a step with each adapter, all of them measured round by round in this process.

    Args:
        pipe: the base, whose UNet has no adapter.
        configs: adapters by name.
        batch_size: of a step.
        rounds: whose medians are compared.
    """
    base = pipe.unet.requires_grad_(False)
    inputs = random_inputs(pipe, batch_size)
    models: dict[str, tuple[nn.Module, list[nn.Parameter]]] = {"frozen": (base, [])}
    for name, config in configs.items():  # the frozen weights are shared
        unet = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        models[name] = (unet, list(attach(unet, config).parameters()))
    kept = {name: step_bytes(*model, inputs) for name, model in models.items()}  # and the warm-up
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(rounds), desc="step times", unit="round"):
        for name, model in models.items():
            times[name].append(step(*model, inputs))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {name: Cost(median[name] / median["frozen"], kept[name], kept[name] / kept["frozen"]) for name in configs}


def analyse(folder: Path, results: list[Result], blocks: dict[str, int], costs: dict[str, Cost]) -> str:
    """Write ``blocks.json``, ``blocks.md`` and ``blocks.png``; return the table.

    Args:
        folder: where to.
        results: the benchmark's.
        blocks: n of every arm.
        costs: of every arm.
    """
    summary = summarize(results)
    rows = sorted((row for row in summary if row["arm"] in blocks), key=lambda row: blocks[row["arm"]])
    n = [blocks[row["arm"]] for row in rows]
    metrics = [primary(summary), BY_KEY["clip_t"]]
    panels = [
        Panel(metric.title, "blocks n", [score_line("scores", n, rows, metric)], log_x=True) for metric in metrics
    ]
    mine = [costs[row["arm"]] for row in rows]
    panels.append(Panel("Time of a step / frozen", "blocks n", [Line("cost", n, [c.time for c in mine])], log_x=True))
    panels.append(Panel("Kept activations / frozen", "blocks n", [Line("cost", n, [c.kept for c in mine])], log_x=True))
    told = caption(rows, [])
    write_figure(folder / "blocks.png", panels, caption=told)
    heads = ["n", *(metric.heading for metric in metrics), "time of a step / frozen", "kept activations / frozen"]
    lines = [
        [str(number), *(format_score(row["scores"][m.key]) for m in metrics), f"{cost.time:.2f}", f"{cost.kept:.2f}"]
        for number, row, cost in zip(n, rows, mine, strict=True)
    ]
    text = markdown_table(heads, lines, ()) + "\n" + "\n".join([*told, judges_line(results[0]["judges"])]) + "\n"
    write_text(
        folder / "blocks.json", json.dumps({"rows": rows, "costs": {k: asdict(c) for k, c in costs.items()}}, indent=1)
    )
    write_text(folder / "blocks.md", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: the benchmark, unless it is done, then the costs, and the study of both.

    Raises:
        SystemExit: an arm is none of this library's methods, a setting is impossible, or jobs failed.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config = parse_config(BenchmarkConfig, arguments)
    configs = {}
    for arm in config.arms:
        settings = config.settings_of(arm)
        method = settings.get("method", EtherConfig.method)
        if method not in OWN_METHODS:
            raise SystemExit(f"error: arm {arm}: blocks are studied for {', '.join(OWN_METHODS)}, not {method}")
        names = [name for name in METHODS[method].settings if name in settings]
        configs[arm] = EtherConfig(method, **{name: settings[name] for name in names})
    if not run_benchmark(config):
        print("other processes have jobs left; the last one to finish measures the costs")
        return
    pipe = load_pipeline(config.base_model, "cuda" if torch.cuda.is_available() else "cpu")
    costs = step_costs(pipe, configs, int(config.training.get("train_batch_size", 1)))
    blocks = {arm: each.n_blocks for arm, each in configs.items()}
    print(analyse(config.output_dir, all_results(config.output_dir), blocks, costs))
    print(f"figure: {config.output_dir / 'blocks.png'}")
