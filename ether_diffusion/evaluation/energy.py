"""Fig. 7: how training changed the hyperspherical energy of every attention projection, by layer and in all."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ether_diffusion.evaluation.collection import distinct_names
from ether_diffusion.evaluation.distances import effective_weights
from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.evaluation.images import load_pipeline, load_run
from ether_diffusion.files import write_text
from ether_diffusion.metrics.energy import hyperspherical_energy
from ether_diffusion.training.run_record import read_run

Energies = dict[str, float]


def energies(model: torch.nn.Module, show: str) -> Energies:
    """HE(W) of what each attention projection of a UNet amounts to, by path."""
    weights = list(effective_weights(model))
    return {path: hyperspherical_energy(weight) for path, weight in tqdm(weights, desc=show, unit="layer")}


def change(before: Energies, after: Energies) -> dict[str, Any]:
    """(HE(W') - HE(W)) / HE(W) by layer, and of the sums over all layers.

    Raises:
        ValueError: the layers are not the same.
    """
    if before.keys() != after.keys():
        raise ValueError("the run and its base do not have the same attention projections")
    total = sum(before.values())
    return {
        "all": (sum(after.values()) - total) / total,
        "layers": {path: (after[path] - energy) / energy for path, energy in before.items()},
    }


def study(runs: Sequence[Path], device: torch.device | str = "cpu") -> dict[str, dict[str, Any]]:
    """The change of energy of every run against its own base, by the run's :func:`distinct_names`, with its method.

    Raises:
        FileNotFoundError: a folder is no run, or lacks its weights.
        ValueError: a run's layers are not its base's.
    """
    names = distinct_names(runs)
    known: dict[str, Energies] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, folder in zip(names, runs, strict=True):
        run = read_run(folder)
        if run.base not in known:
            known[run.base] = energies(load_pipeline(run.base, device).unet, "base")
        after = energies(load_run(folder, device).unet, name)
        facts = {"base": run.base, "base_hash": run.provenance.base_hash, "config_hash": run.provenance.config_hash}
        found[name] = {"method": run.method_name, **facts, **change(known[run.base], after)}
    return found


def write_study(folder: Path, found: dict[str, dict[str, Any]]) -> str:
    """Write ``energy.json``, ``energy.md`` and ``energy.png``; return the table."""
    lines = [
        Line(name, range(len(entry["layers"])), [100 * value for value in entry["layers"].values()])
        for name, entry in found.items()
    ]
    panel = Panel("Change of the hyperspherical energy, %", "attention projection, from the input on", lines)
    write_figure(folder / "energy.png", [panel], columns=1)
    rows = ["| run | method | change in all | largest change of a layer |", "|---|---|---:|---:|"]
    for name, entry in found.items():
        path, largest = max(entry["layers"].items(), key=lambda item: abs(item[1]))
        rows.append(f"| {name} | {entry['method']} | {entry['all']:+.2e} | {largest:+.2e} ({path}) |")
    text = "\n".join(rows) + "\n"
    write_text(folder / "energy.json", json.dumps(found, indent=1))
    write_text(folder / "energy.md", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """The program.

    Raises:
        SystemExit: a run or its base cannot be loaded.
    """
    parser = argparse.ArgumentParser(prog="python eval/hyperspherical_energy.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of train_dreambooth.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        found = study(given.runs, "cuda" if torch.cuda.is_available() else "cpu")
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(write_study(given.output_dir, found))
    print(f"figure: {given.output_dir / 'energy.png'}")
