"""Runs, adapter files and LoRA files side by side on one page, drawn from the same prompts and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ether_diffusion.evaluation.compare.columns import (
    Column,
    Source,
    columns_of,
    draw_columns,
    first_run,
)
from ether_diffusion.files import write_text
from ether_diffusion.page.pictures import Picture, data_uri, save_picture, shared_size, thumbnail
from ether_diffusion.page.render import render
from ether_diffusion.pipelines.file import public_name
from ether_diffusion.runs.checksums import sha256
from ether_diffusion.runs.record import Run
from ether_diffusion.runs.report import run_record
from ether_diffusion.runs.sample import Request, drawing_facts

PAGE, PICTURES = "compare.html", "pictures"
THUMBNAIL, FULL_SIZE = 512, 24
"""Pixels of the longer side, and how many pictures of the page may have them."""
REFERENCE, MAX_REFERENCES = 128, 6


@dataclass(frozen=True)
class Row:
    """One prompt and seed, with the picture of every column."""

    prompt: str
    seed: int
    pictures: list[Picture]


def write_page(
    sources: Sequence[Source],
    columns: Sequence[Column],
    request: Request,
    dtype: str,
    drawn: Iterable[tuple[Column, str, int, Image.Image]],
    folder: Path,
) -> Path:
    """Write the PNGs as they are drawn and, when all are there, the page; return its path.

    Args:
        sources: of :func:`~ether_diffusion.evaluation.compare.columns.read_sources`.
        columns: of :func:`~ether_diffusion.evaluation.compare.columns.columns_of`.
        request: what is drawn.
        dtype: of the base, by its name in torch.
        drawn: every column's pictures with their prompts and seeds.
        folder: a new one.

    Raises:
        ValueError: the first source is no run.
        OSError: the folder cannot be written.
    """
    run = first_run(sources)
    facts = drawing_facts(request, run, dtype)
    size = shared_size(len(columns) * len(request.prompts) * len(request.seeds), THUMBNAIL, FULL_SIZE)
    rows: dict[tuple[str, int], list[Picture]] = {}
    digest = hashlib.sha256()
    for column, prompt, seed, image in drawn:
        name = f"{request.prompts.index(prompt):02d}-seed{seed}-{columns.index(column):02d}.png"
        about = {"prompt": prompt, "seed": seed, "column": column.title, "strength": column.strength}
        save_picture(image, folder / PICTURES / name, about | facts)
        digest.update(json.dumps([column.title, prompt, seed]).encode() + image.tobytes())
        rows.setdefault((prompt, seed), []).append(_picture(column, prompt, seed, image, size))
    page = render(
        Path(__file__).with_name("compare.html.jinja"),
        {},
        columns=columns,
        names=[source.name for source in sources],
        base=public_name(run.base),
        request=request,
        references=_references(run),
        comparison=digest.hexdigest()[:16],
        rows=[Row(prompt, seed, pictures) for (prompt, seed), pictures in rows.items()],
        size=size,
        records={"Pictures": {key: str(value) for key, value in facts.items()}}
        | {source.name: _record(source) for source in sources},
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _picture(column: Column, prompt: str, seed: int, image: Image.Image, size: int) -> Picture:
    name = "Base model" if column.source is None else f"{column.source.name}, strength {column.strength:g}"
    return Picture(data_uri(image, size), f"{name}: {prompt}, seed {seed}", f"{prompt}, seed {seed}")


def _references(run: Run) -> list[Picture]:
    """The pictures that the first run learnt from, as far as they are still there."""
    paths = [Path(path) for path in run.provenance.instance_images][:MAX_REFERENCES]
    found = [Picture(thumbnail(path, REFERENCE), f"Reference {path.name}", path.name) for path in paths]
    return [picture for picture in found if picture.source]


def _record(source: Source) -> dict[str, str]:
    """What tells which adapter it is."""
    if source.run is not None:
        return run_record(source.run)
    kind = "LoRA" if source.lora else "adapter of this library"
    return {"File": source.path.name, "Kind": kind, "SHA-256": sha256(source.path)}


def draw_page(sources: Sequence[Source], run: Run, request: Request, device: str, dtype: str, folder: Path) -> Path:
    """Draw a request with every source at every strength, and write the page; return its path.

    Args:
        sources: of :func:`~ether_diffusion.evaluation.compare.columns.read_sources`.
        run: the first of them.
        request: what is drawn; its prompts are not twice there.
        device: where to draw.
        dtype: of the base, by its name in torch.
        folder: a new one.

    Raises:
        AdapterFileError: a source does not fit the base.
        ValueError: they cannot be compared.
        OSError: the base cannot be read, or the folder not be written.
    """
    columns = columns_of(sources, request.strengths)
    drawn = draw_columns(columns, run, request, device, getattr(torch, dtype))
    total = len(columns) * len(request.prompts) * len(request.seeds)
    bar = tqdm(drawn, total=total, desc="draw", unit="picture")
    return write_page(sources, columns, request, dtype, bar, folder)
