"""A page of pictures drawn with a run's adapter, and with its exported LoRA by diffusers alone, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.files import write_text
from ether_diffusion.page.pictures import Picture, data_uri
from ether_diffusion.page.render import render
from ether_diffusion.pipelines import disabled, set_adapters
from ether_diffusion.pipelines.file import public_name
from ether_diffusion.pipelines.loaded import adapters
from ether_diffusion.pipelines.new_tokens import add_new_token, new_tokens
from ether_diffusion.runs.drawing import Asked, draw, load_pipeline, load_run
from ether_diffusion.runs.record import SamplePrompt, read_run
from ether_diffusion.runs.report import run_record

THUMBNAIL = 256
"""Pixels of the longer side."""
BATCH = 4
SHOWN = 12
"""Pictures at most."""


@dataclass(frozen=True)
class Difference:
    """How far pictures of 8 bits are from each other.

    Attributes:
        largest: of a colour of a pixel, of 255.
        pixels: share of the pixels that differ at all.
    """

    largest: int
    pixels: float

    @classmethod
    def between(cls, first: Image.Image, second: Image.Image) -> Difference:
        """Of two pictures of one size."""
        one, other = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (first, second))
        apart = np.abs(one - other).max(axis=-1)
        return cls(int(apart.max()), float((apart > 0).mean()))


@dataclass(frozen=True)
class Row:
    """One prompt: the base, the adapter, the LoRA, and how far these two and the first two are apart."""

    prompt: SamplePrompt
    pictures: list[Picture]
    difference: Difference
    effect: Difference


def check_comparable(run_dir: str | Path, kind: str) -> None:
    """See that a page can be drawn, before anything is written.

    Raises:
        ValueError: the run has no prompts, or learnt a control, whose pictures need conditions; or diffusers does not
            read the format.
    """
    run = read_run(run_dir)
    if run.control is not None:
        raise ValueError(f"{run.folder} learnt a control, whose pictures need conditions: leave out --page")
    if not run.prompts:
        raise ValueError(f"{run.folder} drew no samples, so there are no prompts to compare: leave out --page")
    if kind not in run.family.READ_BY_DIFFUSERS:
        able = " or ".join(run.family.READ_BY_DIFFUSERS) or "none of this family"
        raise ValueError(f"--page draws with diffusers, which does not read the format {kind!r} but {able}")


def write_comparison(run_dir: str | Path, lora: str | Path, page: str | Path, strength: float = 1.0) -> Difference:
    """Draw a run's prompts with the base, the adapter and the LoRA, and write the page.

    Args:
        run_dir: a run that learnt a subject with an adapter of this library; see :func:`check_comparable`.
        lora: the exported file.
        page: the HTML file to write.
        strength: s of the adapter that the file was made with.

    Returns:
        The largest differences between adapter and LoRA.
    """
    run = read_run(run_dir)
    prompts = run.prompts[:SHOWN]
    asked = Asked([prompt["prompt"] for prompt in prompts], [prompt["seed"] for prompt in prompts])
    steps, guidance = int(str(run.config["num_inference_steps"])), float(str(run.config["guidance_scale"]))
    encoding = run.family_settings
    pipe = load_run(run.folder)
    set_adapters(pipe, list(adapters(pipe)), strength)
    adapter = list(draw(pipe, asked, BATCH, steps, guidance, encoding))
    with disabled(pipe):
        base = list(draw(pipe, asked, BATCH, steps, guidance, encoding))
    tokens = new_tokens(pipe)
    del pipe
    stock = load_pipeline(run.source)
    for name, embeds in tokens.items():  # which a LoRA has not
        add_new_token(stock, name, embeds)
    stock.load_lora_weights(str(lora))
    exported = list(draw(stock, asked, BATCH, steps, guidance, encoding))
    rows = [
        Row(
            prompt,
            [
                Picture(data_uri(image, THUMBNAIL), f"{prompt['prompt']}, {name}", name)
                for name, image in (("base", one), ("adapter", two), ("LoRA", three))
            ],
            Difference.between(two, three),
            Difference.between(one, two),
        )
        for prompt, one, two, three in zip(prompts, base, adapter, exported, strict=True)
    ]
    worst = Difference(max(row.difference.largest for row in rows), max(row.difference.pixels for row in rows))
    html = render(
        Path(__file__).with_name("comparison.html.jinja"),
        {},
        run=run,
        record=run_record(run),
        base=public_name(run.base),
        strength=strength,
        lora=Path(lora).name,
        rows=rows,
        worst=worst,
        steps=steps,
        guidance=guidance,
    )
    write_text(page, html)
    return worst
