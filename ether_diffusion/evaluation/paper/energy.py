"""Fig. 7: how training changed the hyperspherical energy of every trained layer, by layer and in all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.families.parts import DENOISERS
from ether_diffusion.files import write_text
from ether_diffusion.metrics.distances import (
    Components,
    Energies,
    change,
    components,
    energies,
    is_trained,
    trained_layers,
)
from ether_diffusion.page.text import distinct_names, markdown_table
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import load_pipeline, load_run
from ether_diffusion.runs.record import read_run


def study(runs: Sequence[Path], device: torch.device | str = "cpu") -> dict[str, dict[str, Any]]:
    """The change of energy of every run against its own base, by the run's :func:`distinct_names`, with its method.

    Raises:
        FileNotFoundError: a folder is no run, or lacks its weights.
        ValueError: a run's layers are not its base's.
    """
    found: dict[str, dict[str, Any]] = {}
    bases: dict[Base, Components] = {}
    for name, folder in zip(distinct_names(runs), runs, strict=True):
        run = read_run(folder)
        if run.source not in bases:
            bases[run.source] = components(load_pipeline(run.source, device))
        before: Energies = {}
        after: Energies = {}
        for component, model in components(load_run(folder, device)).items():
            base = bases[run.source][component]
            if is_trained(component, model, base):
                layers = trained_layers(model)
                label = "" if component in DENOISERS else f"{component}."
                for into, of, what in ((before, base, "base"), (after, model, name)):
                    into |= {f"{label}{path}": energy for path, energy in energies(of, what, layers).items()}
        facts: dict[str, Any] = {
            "base": str(run.source),
            "base_hash": run.provenance.base_hash,
            "config_hash": run.provenance.config_hash,
        }
        facts["seed"] = run.config.get("seed")
        found[name] = {"method": run.method_name, **facts, **change(before, after)}
    return found


def write_study(folder: Path, found: dict[str, dict[str, Any]]) -> str:
    """Write ``energy.json``, ``energy.md`` and ``energy.png``; return the table."""
    lines = [
        Line(name, range(len(entry["layers"])), [100 * value for value in entry["layers"].values()])
        for name, entry in found.items()
    ]
    panel = Panel("Change of the hyperspherical energy, %", "trained layer, from the input on", lines)
    told = "Each run is one training with one seed; another training of the same method gives other values."
    write_figure(folder / "energy.png", [panel], caption=[told])
    rows = []
    for name, entry in found.items():
        path, largest = max(entry["layers"].items(), key=lambda item: abs(item[1]))
        layers = str(len(entry["layers"]))
        rows.append([name, entry["method"], layers, f"{entry['all']:+.2e}", f"{largest:+.2e} ({path})"])
    heads = ["run", "method", "trained layers", "change in all", "largest change of a layer"]
    text = f"{markdown_table(heads, rows, (0, 1))}\n{told}\n"
    write_text(folder / "energy.json", json.dumps(found, indent=1))
    write_text(folder / "energy.md", text)
    return text
