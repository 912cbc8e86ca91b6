"""Tampered run folders: a resume names what is wrong, or works by the documented rule; nothing is executed.

``python tests/tamper.py`` tries every change on every file of a run and its newest checkpoint, with the checksums as
they were and with forged ones; ``tests/training/test_tamper.py`` runs :data:`SHORT`, thirty of these. The rules
(``docs/reliability.md``):

- of a damaged checkpoint nothing is read, its name and the newest whole one are told;
- a forged one, whose checksums agree, is refused by name or trained on, but nothing in it is executed;
- of a damaged record the file is named; a file that the run only writes is written anew, and the result is that of the
  uninterrupted run;
- links, pipes and devices are named, or replaced by files; what they lead to stays as it is.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.checksums import CHECKSUMS, write_checksums
from ether_diffusion.training import dreambooth
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

NEWEST, OLDER = "checkpoints/step-000002", "checkpoints/step-000001"
CHECKPOINT = ("trained.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl",
              "ether_weights.safetensors", CHECKSUMS)  # fmt: skip
RUN = ("config.yaml", "provenance.json", "metrics.jsonl", "validation.jsonl", ".written.jsonl", "samples/prompts.json")
FILES = (*(f"{NEWEST}/{name}" for name in CHECKPOINT), *RUN)
FOLDERS = (NEWEST, "checkpoints", "samples", "samples/step-000002")
SECONDS = 60
"""A resume that takes longer hangs."""


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


@dataclass(frozen=True)
class Scene:
    """Where a file is tampered with.

    Attributes:
        run: the run folder.
        outside: a folder that links lead to; nothing in it may change.
        executed: made by code that runs.
    """

    run: Path
    outside: Path
    executed: Path


Change = Callable[[Path, Scene], None]


def truncated(path: Path, scene: Scene) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path, scene: Scene) -> None:
    path.write_bytes(b"")


def flipped(path: Path, scene: Scene) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def removed(path: Path, scene: Scene) -> None:
    path.unlink()


def raw_pickle(path: Path, scene: Scene) -> None:
    path.write_bytes(pickle.dumps(Attack(scene.executed)))


def saved_pickle(path: Path, scene: Scene) -> None:
    torch.save({"step": Attack(scene.executed), "state": {0: Attack(scene.executed)}}, path)


def yaml_object(path: Path, scene: Scene) -> None:
    path.write_text(f"method: !!python/object/apply:os.mkdir ['{scene.executed}']\n")


def folder_instead(path: Path, scene: Scene) -> None:
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def link_outside(path: Path, scene: Scene) -> None:
    target = scene.outside / path.name
    shutil.move(path, target)
    path.symlink_to(target)


def device_link(path: Path, scene: Scene) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe_instead(path: Path, scene: Scene) -> None:
    path.unlink()
    os.mkfifo(path)


def other_step(path: Path, scene: Scene) -> None:
    older = scene.run / OLDER / path.name
    if older.is_file():
        shutil.copy(older, path)
    else:
        path.write_text(path.read_text().replace('"step": 2', '"step": 7'))


def deep(path: Path, scene: Scene) -> None:
    path.write_text("[" * 100_000)


def wrong_types(path: Path, scene: Scene) -> None:
    _rewrite(path, lambda value: "text" if isinstance(value, int | float) else 5)


def huge_numbers(path: Path, scene: Scene) -> None:
    _rewrite(path, lambda value: 10**30 if isinstance(value, int | float) else value, 1e30)


def not_finite(path: Path, scene: Scene) -> None:
    _rewrite(path, lambda value: float("nan") if isinstance(value, float) else value, float("nan"))


def _rewrite(path: Path, change: Callable[[Any], Any], filled: float | None = None) -> None:
    """Change every value that is no container; tensors are filled, or get another shape."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(each) for each in value)
        if isinstance(value, Tensor):
            floating = value.is_floating_point()
            return value.new_zeros(3) if filled is None else value.clone().fill_(filled) if floating else value
        return change(value)

    if path.suffix == ".safetensors":
        save_file({key: walk(value).contiguous() for key, value in load_file(path).items()}, path)
    elif path.suffix in (".bin", ".pkl"):
        buffer = io.BytesIO()
        torch.save(walk(torch.load(path, weights_only=False)), buffer)
        path.write_bytes(buffer.getvalue())
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(walk(yaml.safe_load(path.read_text()))))
    else:
        values = [walk(json.loads(line)) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
        text = json.dumps(walk(json.loads(path.read_text()))) if values is None else "\n".join(map(json.dumps, values))
        path.write_text(f"{text}\n")


CHANGES: dict[str, Change] = {
    change.__name__: change
    for change in (
        *(truncated, emptied, flipped, removed, raw_pickle, saved_pickle, yaml_object, folder_instead, link_outside),
        *(device_link, pipe_instead, other_step, deep, wrong_types, huge_numbers, not_finite),
    )
}


@dataclass(frozen=True)
class Case:
    """One tampering: a file or folder of the run, what is done to it, and whether the checksums are made to agree."""

    place: str
    change: str
    forged: bool = False

    def __str__(self) -> str:
        return f"{self.place} {self.change}{' forged' if self.forged else ''}"


def all_cases() -> Iterator[Case]:
    """Every change of every file, and links in place of folders."""
    for place in FILES:
        for change in CHANGES:
            if change == "yaml_object" and not place.endswith(".yaml"):
                continue
            yield Case(place, change)
            if place.startswith(NEWEST) and not place.endswith(CHECKSUMS):
                yield Case(place, change, forged=True)
    for place in FOLDERS:
        yield Case(place, "link_outside")


SHORT = [
    *(Case(f"{NEWEST}/{name}", "flipped") for name in CHECKPOINT),
    *(Case(f"{NEWEST}/optimizer.bin", change, forged=True) for change in ("raw_pickle", "wrong_types", "huge_numbers")),
    *(Case(f"{NEWEST}/custom_checkpoint_0.pkl", change, forged=True) for change in ("saved_pickle", "wrong_types")),
    *(Case(f"{NEWEST}/random_states_0.pkl", change, forged=True) for change in ("saved_pickle", "wrong_types")),
    *(Case(f"{NEWEST}/trained.safetensors", change, forged=True) for change in ("wrong_types", "not_finite")),
    *(Case(f"{NEWEST}/optimizer.bin", change) for change in ("truncated", "folder_instead", "pipe_instead")),
    *(Case(f"{NEWEST}/trained.safetensors", change) for change in ("link_outside", "device_link", "other_step")),
    *(Case("config.yaml", change) for change in ("yaml_object", "wrong_types", "link_outside")),
    *(Case("provenance.json", change) for change in ("wrong_types", "deep")),
    *(Case("metrics.jsonl", change) for change in ("huge_numbers", "link_outside")),
    *(Case(".written.jsonl", change) for change in ("link_outside", "pipe_instead", "deep")),
    *(Case(place, "link_outside") for place in FOLDERS[:2]),
]
"""What the suite runs."""


def settings(work: Path, base: Path, run: Path, steps: int, **changes: Any) -> DreamBoothConfig:
    """A small run with samples at every step."""
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "output_dir": run,
        "instance_data_dir": work / "photos",
        "instance_prompt": "a photo of qwe dog",
        "max_train_steps": steps,
        "checkpointing_steps": 1,
        "validation_steps": 1,
        "num_validation_images": 1,
        "num_inference_steps": 1,
        "resolution": 16,
        "cache_dir": work / "cache",
    }
    return DreamBoothConfig(**values | changes)


def train(config: DreamBoothConfig) -> None:
    forget_accelerator()
    dreambooth.run(config)


class HangsError(BaseException):
    """A resume took more than :data:`SECONDS`."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise HangsError when the time is over; in the main thread alone."""

    def over(number: int, frame: object) -> None:
        raise HangsError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Ground:
    """A finished run of two steps, of which each case gets a copy, and the uninterrupted run of three."""

    def __init__(self, work: Path, base: Path) -> None:
        self.work, self.base = work, base
        (work / "photos").mkdir(parents=True)
        for shade in (40, 200):
            Image.new("RGB", (16, 16), (shade, 90, 60)).save(work / "photos" / f"{shade}.png")
        train(settings(work, base, work / "finished", 2))
        train(settings(work, base, work / "whole", 3))
        self.expected = load_file(work / "whole" / "ether_weights.safetensors")

    def verdict(self, case: Case) -> str:
        """What became of a resume: "refused", "same result", or, of a forged checkpoint, "trained on".

        Raises:
            AssertionError: code ran, an outside file changed, a message names nothing, or the result is another one.
        """
        place = Path(tempfile.mkdtemp(dir=self.work))
        scene = Scene(place / "run", place / "outside", place / "executed")
        shutil.copytree(self.work / "finished", scene.run)
        scene.outside.mkdir()
        try:
            return self._verdict(case, scene)
        finally:
            shutil.rmtree(place)

    def _verdict(self, case: Case, scene: Scene) -> str:
        path = scene.run / case.place
        CHANGES[case.change](path, scene)
        if case.forged:
            write_checksums(path.parent)
        outside = _content(scene.outside)
        refused: Exception | None = None
        try:
            with within(SECONDS):
                train(settings(self.work, self.base, scene.run, 3, resume="latest"))
        except (ValueError, OSError) as error:  # what run_program makes one line of
            refused = error
        assert not scene.executed.exists(), "code was executed"
        assert _content(scene.outside) == outside, "a file outside of the run folder changed"
        if refused is not None:
            named = (str(scene.run), path.name, Path(case.place).parent.name)
            assert any(name in str(refused) for name in named if name), f"names nothing: {refused!r}"
            return "refused"
        found = load_file(scene.run / "ether_weights.safetensors")
        same = found.keys() == self.expected.keys()
        same = same and all(torch.equal(found[key], self.expected[key]) for key in found)
        if not same and case.forged:
            return "trained on"
        assert same, "the result is not that of the uninterrupted run, and nothing was said"
        return "same result"


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main() -> None:
    """Try every case, and print what became of them.

    Raises:
        SystemExit: 1 if one did not end as documented.
    """
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work:
        base = Path(work, "base")
        tiny_pipeline().save_pretrained(base)
        ground = Ground(Path(work, "ground"), base)
        for case in all_cases():
            try:
                counts[ground.verdict(case)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                counts["WRONG"] += 1
                print(f"{case}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            print(f"{counts.total()} tried", file=sys.stderr, end="\r")
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    raise SystemExit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()
