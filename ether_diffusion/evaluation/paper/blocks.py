"""The number of blocks: what it does to quality, to the time of a step, and to the memory that the backward keeps.

The quality is a benchmark's whose arms differ in ``n_blocks``; time and memory are measured on its base, the arms
taking turns in one process, as ratios to the frozen model.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.host import attach
from ether_diffusion.evaluation.figures import Line, Panel, score_line, write_figure
from ether_diffusion.evaluation.paper.settings import BlocksConfig
from ether_diffusion.evaluation.subjects.summary import BY_KEY, Result, all_results, primary, summarize
from ether_diffusion.evaluation.tables import caption, format_score, judges_line
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import ObjectiveSettings
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table
from ether_diffusion.runs.drawing import load_pipeline

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


@dataclass(frozen=True)
class StepInput:
    """A batch.

    Attributes:
        noisy: latents (batch, channels, h, w).
        predict: from the denoiser and noisy latents to its prediction.
    """

    noisy: Tensor
    predict: Callable[[nn.Module, Tensor], Tensor]


def random_input(family: Family, batch_size: int) -> StepInput:
    """A batch as the denoiser takes it, of the base's own resolution."""
    resolution, dice = family.native_resolution, torch.Generator().manual_seed(0)
    side, weight = resolution // family.vae_factor, next(family.denoiser.parameters())
    noisy = torch.randn(batch_size, family.latent_channels, side, side, generator=dice).to(weight)
    objective = family.objective(ObjectiveSettings())
    times = objective.times(objective.levels.spread(1), (side, side)).to(weight.device).expand(batch_size)
    with torch.no_grad():
        prompts = family.placed(family.encode_prompts(["a photo"] * batch_size), weight.device, weight.dtype)
    sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
    sizes = sizes.to(weight.device).expand(batch_size, 6)

    def predict(denoiser: nn.Module, noisy: Tensor) -> Tensor:
        return family.prediction(denoiser(**family.arguments(noisy, times, prompts, sizes)), noisy)

    return StepInput(noisy, predict)


def step(denoiser: nn.Module, parameters: Sequence[nn.Parameter], given: StepInput) -> float:
    """Seconds of one forward and backward; to the latents where there are no parameters."""
    began = time.perf_counter()
    noisy = given.noisy.clone().requires_grad_(not parameters)
    prediction = given.predict(denoiser, noisy)
    F.mse_loss(prediction.float(), torch.zeros_like(prediction, dtype=torch.float32)).backward()
    if noisy.device.type == "cuda":
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


def step_bytes(denoiser: nn.Module, parameters: Sequence[nn.Parameter], given: StepInput) -> int:
    """Bytes that a step keeps for its backward, those of the model's own state not."""
    own = [*denoiser.parameters(), *denoiser.buffers(), *parameters]
    return kept_bytes(lambda: step(denoiser, parameters, given), own)


def step_costs(
    pipe: DiffusionPipeline, configs: dict[str, EtherConfig], batch_size: int = 1, rounds: int = ROUNDS
) -> dict[str, Cost]:
    """The cost of a step with each adapter, all of them measured round by round in this process.

    Args:
        pipe: the base, whose denoiser has no adapter.
        configs: adapters by name.
        batch_size: of a step.
        rounds: whose medians are compared.
    """
    family = family_of(pipe)
    base = family.denoiser.requires_grad_(False)
    given = random_input(family, batch_size)
    models: dict[str, tuple[nn.Module, list[nn.Parameter]]] = {"frozen": (base, [])}
    for name, config in configs.items():  # the frozen weights are shared
        denoiser = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        models[name] = (denoiser, list(attach(denoiser, config).parameters()))
    kept = {name: step_bytes(*model, given) for name, model in models.items()}  # and the warm-up
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(rounds), desc="step times", unit="round"):
        for name, model in models.items():
            times[name].append(step(*model, given))
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


def study_blocks(config: BlocksConfig) -> str:
    """Measure the costs, and study them with the results of a benchmark that is done; the text of the table."""
    pipe = load_pipeline(config.base, "cuda" if torch.cuda.is_available() else "cpu")
    costs = step_costs(pipe, config.adapters, int(config.training.get("train_batch_size", 1)))
    blocks = {arm: each.n_blocks for arm, each in config.adapters.items()}
    return analyse(config.output_dir, all_results(config.output_dir), blocks, costs)
