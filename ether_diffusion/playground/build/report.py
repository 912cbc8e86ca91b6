"""The record of a build, ``build.json``, and the same to look at: ``report.md`` with its two pictures."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ether_diffusion.page.text import markdown_table, number
from ether_diffusion.playground.build.evaluate import SAMPLING, TARGETS, Figures, Samples
from ether_diffusion.playground.build.project import Project

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")
SHOWN = 32

Record = dict[str, Any]


def build_record(project: Project, stages: Mapping[str, Record], figures: Figures, size: int) -> Record:
    """All that is to be known of a build; ``stages`` are the finished stages' own records.

    A build that went on from another one has that one's training under ``started_from``.
    """
    earlier = json.loads((project.start / "build.json").read_text()) if project.start else {}
    kept = ("seed", "device", "minutes", "stages", "recipe", "started_from")
    lineage = {"started_from": {name: earlier[name] for name in kept if name in earlier}} if earlier else {}
    return {
        **lineage,
        "seed": project.seed,
        "device": torch.cuda.get_device_name(project.device) if project.device.type == "cuda" else platform.machine(),
        "minutes": round(sum(record["seconds"] for record in stages.values()) / 60, 1),
        "bytes": size,
        "figures": {name: _figure(value, TARGETS.get(name)) for name, value in figures.items()},
        "sampling": asdict(SAMPLING["flow" if project.beside else "unet"]),
        "stages": {
            name: {key: value for key, value in record.items() if key not in ("curve", "validation")}
            | ({"validation": record["validation"][-1][1]} if record.get("validation") else {})
            for name, record in stages.items()
        },
        "recipe": asdict(project.preset),
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def write_report(folder: Path, record: Record, stages: Mapping[str, Record], samples: Samples) -> None:
    """Write ``build.json``, ``report.md``, ``samples.png`` and ``curves.png``."""
    (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(record), encoding="utf-8")
    _draw_samples(folder / "samples.png", samples)
    _draw_curves(folder / "curves.png", stages)


def markdown(record: Record) -> str:
    """The report's text."""
    figures = markdown_table(
        ["figure", "reached", "target"], [_row(name, entry) for name, entry in record["figures"].items()], (0, 1, 2)
    )
    stages = markdown_table(
        ["stage", "parameters", "steps", "minutes", "device"],
        [
            [name, f"{entry['parameters']:,}", f"{entry['steps']:,}", f"{entry['seconds'] / 60:.1f}", entry["device"]]
            for name, entry in record["stages"].items()
        ],
        range(5),
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["libraries"].items())
    which = "flow transformer" if "flow" in record["stages"] else "base model"
    return f"""# The playground's {which}: how it was built

Seed {record["seed"]}, {record["minutes"]} minutes of training, weights {record["bytes"] / 1e6:.2f} MB in fp16.
{versions}.

{figures}
`base_*` are generated pictures, `drawn_*` the drawings of the same scenes under the same judge: its ceiling.
The figures are of fresh seeds; shares are of 1.

{stages}
![samples](samples.png)

Drawn by the base for captions of fresh scenes, the first {SHOWN}, unselected.

![loss curves](curves.png)
"""


def _figure(value: float, target: float | None) -> Record:
    return {"value": value} if target is None else {"value": value, "target": target, "reached": value >= target}


def _row(name: str, entry: Record) -> list[str]:
    verdict = "" if "target" not in entry else "reached" if entry["reached"] else "MISSED"
    return [name, number(entry["value"]), f"{number(entry.get('target'))} {verdict}".strip()]


def _draw_samples(path: Path, samples: Samples) -> None:
    shown = list(zip(samples.captions, samples.pictures, strict=True))[:SHOWN]
    figure = Figure(figsize=(16, 2.5 * -(-len(shown) // 8)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 8), 8, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (caption, picture) in zip(axes.flat, shown, strict=False):
        axis.imshow(((picture.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_title(textwrap.fill(caption, 28), fontsize=7)
    figure.savefig(path, dpi=80)


def _draw_curves(path: Path, stages: Mapping[str, Record]) -> None:
    figure = Figure(figsize=(max(4 * len(stages), 7), 3), layout="constrained")
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for axis, (name, record) in zip(axes, stages.items(), strict=True):
        axis.plot(*zip(*record["curve"], strict=True), linewidth=0.8, label="training")
        if record.get("validation"):
            axis.plot(*zip(*record["validation"], strict=True), linewidth=1.2, label="fixed noise, averaged weights")
            axis.legend()
            axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("step")
    figure.savefig(path, dpi=80)
