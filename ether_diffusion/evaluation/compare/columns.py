"""What stands side by side: the base, and every run or file at each strength, drawn from the same prompts and seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion import pipelines
from ether_diffusion.export.tokens import read_tokens
from ether_diffusion.families.cut_prompts import cut_remarks
from ether_diffusion.families.registry import family_of
from ether_diffusion.page.text import distinct_names
from ether_diffusion.pipelines.file import FILE_NAME, AdapterFileError
from ether_diffusion.pipelines.new_tokens import add_new_token, token_misfits
from ether_diffusion.pipelines.schema import LORA_FILE, SchemaError, is_lora
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import Asked, draw, load_pipeline, load_run, set_strength
from ether_diffusion.runs.record import Run, read_run
from ether_diffusion.runs.sample import Request, check_one_base

logger = logging.getLogger(__name__)

MAX_COLUMNS = 12
"""More cannot be compared by eye."""


@dataclass(frozen=True)
class Source:
    """What was learnt: a run, or a file of an adapter or LoRA.

    Attributes:
        path: the run folder, or the file.
        name: what tells it from the others.
        run: None of a file.
        lora: whether the file is a LoRA, which diffusers loads.
    """

    path: Path
    name: str
    run: Run | None
    lora: bool = False

    @property
    def has_strength(self) -> bool:
        """Whether it can act at other strengths than 1."""
        return self.run is None or self.run.entry.has_strength


@dataclass(frozen=True)
class Column:
    """One way to draw.

    Attributes:
        source: what acts; None for the base alone.
        strength: s of W + s ΔW.
        title: as the page names it.
    """

    source: Source | None
    strength: float
    title: str


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """The run folders and files that a command line names; of another folder the adapter or LoRA in it.

    Raises:
        FileNotFoundError: one is neither.
        ValueError: one is named twice, or a run learnt a control.
        AdapterFileError: a file is no safetensors file, or damaged, or a LoRA's new token has no embeddings.
        DamagedFileError: a run's record is damaged.
    """
    places = [path.resolve() for path in paths]
    if twice := {str(path) for path in paths if places.count(path.resolve()) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} is named twice: name each once, and several by --strengths")
    sources = [_source(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]
    for source in sources:
        if source.run is not None and source.run.control is not None:
            raise ValueError(
                f"{source.name} learnt a control, whose pictures need conditions: ether sample draws them, and a study "
                "of controls compares them"
            )
    return sources


def _source(path: Path, name: str) -> Source:
    if (path / "provenance.json").is_file():
        return Source(path, name, read_run(path))
    files = [file for file in (path, path / FILE_NAME, path / LORA_FILE) if file.suffix == ".safetensors"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path} is neither a run folder nor a .safetensors file of an adapter or LoRA")
    try:
        lora = is_lora(file)
    except SchemaError as error:
        raise AdapterFileError(f"{file} {error}") from error
    if lora:
        read_tokens(file)  # what is amiss is told before anything is drawn
    return Source(file, name, None, lora)


def first_run(sources: Sequence[Source]) -> Run:
    """The run that says the base and the settings.

    Raises:
        ValueError: the first source is a file.
    """
    run = sources[0].run
    if run is None:
        raise ValueError(f"{sources[0].name} is no run folder: name one first, which says the base and the prompts")
    return run


def columns_of(sources: Sequence[Source], strengths: Sequence[float]) -> list[Column]:
    """The base, then every source at every strength.

    Raises:
        ValueError: the runs have several bases, a source has no strength, there is nothing to compare, or more than an
            eye can.
    """
    check_one_base([source.run for source in sources if source.run is not None])
    if 0 in strengths:
        raise ValueError("strength 0 is the base, which the page shows anyway: leave it out")
    if fixed := [source for source in sources if not source.has_strength and {*strengths} != {1.0}]:
        raise ValueError(f"{fixed[0].name} is drawn at strength 1: leave out --strengths")
    if not 2 <= len(sources) * len(strengths) <= MAX_COLUMNS:
        raise ValueError(
            f"{len(sources) * len(strengths)} columns beside the base: name 2 to {MAX_COLUMNS}, by several runs or "
            "files, or by several --strengths"
        )
    named = {*strengths} != {1.0}
    return [
        Column(None, 0.0, "base"),
        *(
            Column(source, strength, f"{source.name}, strength {strength:g}" if named else source.name)
            for source in sources
            for strength in strengths
        ),
    ]


def draw_columns(
    columns: Sequence[Column], run: Run, request: Request, device: str, dtype: torch.dtype
) -> Iterator[tuple[Column, str, int, Image.Image]]:
    """Every column's pictures with their prompts and seeds, in one order and in the same batches.

    Args:
        columns: of :func:`columns_of`.
        run: whose base and encoding of prompts all of them have.
        request: prompts, seeds and how they are drawn; each prompt is drawn with every seed.
        device: of the pipelines, one of which is loaded at a time.
        dtype: of the base.

    Raises:
        AdapterFileError: a file does not fit the base.
        OSError: weights or the base cannot be read.
    """
    asked = Asked(
        [prompt for prompt in request.prompts for _ in request.seeds], [*request.seeds] * len(request.prompts)
    )
    size, base = (request.height, request.width), run.source
    loaded, pipe = None, load_pipeline(base, device, dtype)
    for column in columns:
        if column.source is not None and column.source is not loaded:
            del pipe  # before the next one needs the memory
            loaded, pipe = column.source, _load(column.source, base, device, dtype)
            for remark in cut_remarks(family_of(pipe, run.family_settings), request.prompts):
                logger.warning("%s: %s", loaded.name, remark)
        if column.source is not None and column.source.has_strength:
            set_strength(pipe, column.strength, fused=False)
        images = draw(pipe, asked, request.batch_size, request.steps, request.guidance, run.family_settings, size)
        for prompt, seed, image in zip(asked.prompts, asked.seeds, images, strict=True):
            yield column, prompt, seed, image


def _load(source: Source, base: Base, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    if source.run is not None:
        return load_run(source.path, device, dtype)
    pipe = load_pipeline(base, device, dtype)
    if not source.lora:
        pipelines.load(pipe, source.path)
        return pipe
    if not hasattr(pipe, "load_lora_weights"):
        raise AdapterFileError(f"{source.path} is a LoRA, which diffusers does not load into {type(pipe).__name__}")
    pipe.load_lora_weights(str(source.path))
    if not pipe.get_active_adapters():
        raise AdapterFileError(f"{source.path}: diffusers finds no layer of {base} in this LoRA, and would ignore it")
    for embeds in read_tokens(source.path):
        if problems := token_misfits(pipe, embeds.token, embeds.rows):
            raise AdapterFileError(f"{source.path}: " + "\n".join(problems))
        add_new_token(pipe, embeds.token, embeds)
    return pipe
