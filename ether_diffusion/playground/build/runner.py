"""From stage to stage: what is finished is skipped, what was killed goes on, the result appears as a whole."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.playground.build.assemble import assemble, assemble_own
from ether_diffusion.playground.build.autoencoder import AutoencoderStage
from ether_diffusion.playground.build.clip import ClipStage
from ether_diffusion.playground.build.dino import DinoStage
from ether_diffusion.playground.build.drawings import draw_pool
from ether_diffusion.playground.build.evaluate import evaluate, evaluate_flow
from ether_diffusion.playground.build.flow import FlowStage
from ether_diffusion.playground.build.loop import Stage, train
from ether_diffusion.playground.build.presets import STAGES
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.report import build_record, write_report
from ether_diffusion.playground.build.segmenter import SegmenterStage
from ether_diffusion.playground.build.unet import UnetStage
from ether_diffusion.playground.flow_base import assemble as assemble_flow

ALL = ("draw", *STAGES, "evaluate")
"""Everything that builds do, in order; each does what belongs to its base."""
CLASSES: Mapping[str, Callable[[Project], Stage]] = {
    "autoencoder": AutoencoderStage,
    "clip": ClipStage,
    "dino": DinoStage,
    "segmenter": SegmenterStage,
    "unet": UnetStage,
    "flow": FlowStage,
}
NEEDS: Mapping[str, tuple[str, ...]] = {"unet": ("autoencoder", "clip")}


def run(project: Project, folder: Path, stages: tuple[str, ...] = ALL, workers: int = 1) -> None:
    """Run the ``stages`` in order; the last one, ``"evaluate"``, writes the result to ``folder``.

    Raises:
        FileNotFoundError: a stage that another one needs is not finished.
        ValueError: ``project.work`` belongs to a build of another recipe, or ``folder`` to something else.
    """
    processes = PartialState()
    with processes.main_process_first():
        check_recipe(project)
    if "evaluate" in stages:
        check_target(folder)
    needs = {**NEEDS, "evaluate": project.stages}
    for name in (name for name in stages if name in ("draw", *project.stages, "evaluate")):
        processes.wait_for_everyone()
        if missing := [stage for stage in needs.get(name, ()) if not _record_path(project, stage).exists()]:
            raise FileNotFoundError(f"{name} needs {', '.join(missing)}: run these stages first")
        if name == "draw":
            with processes.main_process_first():
                pools = {"scenes": project.preset.scenes, "pairs": 0 if project.beside else project.preset.pairs}
                for what, count in pools.items():
                    draw_pool(project.drawings, what, project.seed, count, workers)
        elif name != "evaluate":
            run_stage(project, name)
        elif processes.is_main_process:
            finish(project, folder)


def run_stage(project: Project, name: str) -> None:
    """Train one stage and write its model and record; does nothing if it is finished."""
    path = _record_path(project, name)
    if path.exists():
        print(f"{name}: finished before")
        return
    stage = CLASSES[name](project)
    if project.start:
        stage.start_from(project.start)
    trained = train(stage, path.parent, project.seed)
    if not PartialState().is_main_process:
        return
    parameters = sum(p.numel() for p in stage.network.parameters() if p.requires_grad)
    with atomic_path(project.model(name)) as temporary:
        stage.save(temporary)
    record = {"parameters": parameters, "device": project.device.type} | trained._asdict()
    write_text(path, json.dumps(record))
    (path.parent / "checkpoint.pt").unlink(missing_ok=True)
    project.latents(name).unlink(missing_ok=True)


def finish(project: Project, folder: Path) -> None:
    """Assemble, measure and report; ``folder`` appears, or is replaced, when all of it is written."""
    records: dict[str, dict[str, Any]] = {
        name: json.loads(_record_path(project, name).read_text()) for name in project.stages
    }
    preset = project.preset
    with atomic_path(folder) as temporary:
        if project.beside:
            size = assemble_own(project, temporary)
            with tempfile.TemporaryDirectory() as place:
                assemble_flow(project.beside, temporary, whole := Path(place) / "base")
                judges = project.beside / "judges"
                figures, samples = evaluate_flow(whole, judges, project.seed, preset.images, project.device)
        else:
            size = assemble(project, temporary)
            figures, samples = evaluate(temporary, project.seed, preset.held_out, preset.images, project.device)
        record = build_record(project, records, figures, size)
        write_report(temporary, record, records, samples)
    for name, entry in record["figures"].items():
        print(
            f"{name:28} {entry['value']:7.3f}  {'' if entry.get('reached', True) else 'below ' + str(entry['target'])}"
        )


def check_recipe(project: Project) -> None:
    """Bind the work folder to one seed, pool and architecture; durations may change between runs.

    Raises:
        ValueError: it is bound to others.
    """
    preset, path = project.preset, project.work / "recipe.json"
    architecture = json.loads(json.dumps(asdict(preset.architecture)))
    recipe = {"seed": project.seed, "scenes": preset.scenes, "pairs": preset.pairs, "architecture": architecture}
    recipe |= {name: str(folder) for name in ("start", "beside") if (folder := getattr(project, name))}
    if not path.exists():
        write_text(path, json.dumps(recipe, indent=2))
    elif (there := json.loads(path.read_text())) != recipe:
        changed = [key for key in recipe if there.get(key) != recipe[key]]
        raise ValueError(f"{project.work} belongs to a build with another {', '.join(changed)}: choose another --work")


def check_target(folder: Path) -> None:
    """Refuse to replace a folder that no build wrote.

    Raises:
        ValueError: ``folder`` exists, is not empty and has no ``build.json``.
    """
    if folder.exists() and not (folder / "build.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not the result of a build: it would be replaced; choose another folder")


def _record_path(project: Project, stage: str) -> Path:
    return project.work / stage / "record.json"
