"""The tables of training steps in README and docs, from the result files of ``benchmarks/step.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ether_diffusion.page.text import markdown_table

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> Any:
    """A result file that is no benchmark's."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def step_costs() -> str:
    """README: a training step beside the frozen model's, at every size that was measured."""
    arms = {"ETHER n=4": "ETHER", "ETHER+ n=4": "ETHER+", "LoRA r=4": "LoRA r = 4"}
    rows = []
    for name, title in (
        ("steps-512", "SD1.5, 512 px"),
        ("steps-256", "SD1.5, 256 px"),
        ("steps-sd3-small", "SD3 class, 110 M, 256 px"),
        ("steps-flux-small", "FLUX.1 class, 115 M, 256 px"),
        ("steps-playground", "playground"),
    ):
        found = load(name)["rows"]
        rows.append([title, *(f"{found[arm]['ratio']:.2f}" for arm in arms)])
    return markdown_table(["step / frozen step", *arms.values()], rows)


def small_transformers() -> str:
    """docs: a training step of two transformers of middle size."""
    titles = {"steps-sd3-small": "SD3 class", "steps-flux-small": "FLUX.1 class"}
    return _steps([(title, load(name)["rows"]) for name, title in titles.items()], ",.0f")


def tuner_steps() -> str:
    """docs: a training step of the tuner of PEFT, beside ``ether.attach`` and PEFT's own tuners."""
    titles = {"playground": "the playground's UNet", "playground-flow": "its flow transformer"}
    return _steps([(titles[table["model"]], table["rows"]) for table in load("steps-peft")], ",.1f")


def all_steps() -> str:
    """docs: a training step of every method of the benchmark, on both embedded bases."""
    titles = {"playground": "UNet", "playground-flow": "flow transformer"}
    return _steps([(titles[table["model"]], table["rows"]) for table in load("steps-all-methods")], ",.1f")


def _steps(tables: list[tuple[str, dict[str, Any]]], megabytes: str) -> str:
    """A training step of every method on models, each with its title; ``megabytes`` is how memory is written."""
    heads = ["", "method", "parameters", "step / frozen", "quartiles", "peak MB", "kept MB"]
    lines = []
    for title, rows in tables:
        for arm, row in rows.items():
            low, high = row["quartiles"]
            spread = "" if arm == "frozen" else f"{low:.3f} … {high:.3f}"
            memory = [format(row["memory"][key], megabytes) for key in ("peak", "saved")]
            lines.append([title, arm, f"{row['parameters']:,}", f"{row['ratio']:.3f}", spread, *memory])
            title = ""
    return markdown_table(heads, lines, text_columns=(0, 1, 4))


def gpu_steps() -> str:
    """docs: a training step on a GPU, eager and with compiled blocks."""
    arms = ("ETHER n=4", "ETHER+ n=4", "LoRA r=4")
    titles = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3.5-medium", "flux": "FLUX.1, 4 + 8 of its layers"}
    lines = []
    for table in load("steps-h200"):
        rows = table["rows"]
        shown = [
            f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f} … {row['quartiles'][1]:.2f})" if row else "—"
            for row in (rows.get(arm) for arm in arms)
        ]
        kept = [f"{row['memory']['saved']:,.0f}" if row and "memory" in row else "—" for row in map(rows.get, arms)]
        name = f"{titles[table['model']]}, {table['resolution']} px" + (", compiled" if table["compile"] else "")
        lines.append([name, f"{1e3 * rows['frozen']['seconds']:.0f}", *shown, " / ".join(kept)])
    heads = [
        "",
        "frozen step, ms",
        "ETHER / frozen",
        "ETHER+ / frozen",
        "LoRA / frozen",
        "kept, MB: ETHER / ETHER+ / LoRA",
    ]
    return markdown_table(heads, lines, text_columns=(0, 2, 3, 4, 5))


TABLES: dict[str, Callable[[], str]] = {
    "step-costs": step_costs,
    "small-transformers": small_transformers,
    "tuner-steps": tuner_steps,
    "all-steps": all_steps,
    "gpu-steps": gpu_steps,
}
