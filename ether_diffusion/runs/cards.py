"""What the cards of runs and of adapters share: the header that the Hub reads, and text that is safe in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ether_diffusion import playground
from ether_diffusion.pipelines.file import SINGLE_FILE, is_hub_id, public_name

TAGS = ("text-to-image", "diffusers", "diffusers-training")


def card_data(
    base: str,
    tags: Sequence[str],
    own: bool,
    lora: bool,
    instance_prompt: str | None,
    relation: str = "adapter",
    pictures: Sequence[Mapping[str, Any]] = (),
) -> ModelCardData:
    """The header of a card.

    Args:
        base: of the model; it is named if it is on the Hub.
        tags: for those who search.
        own: whether this library loads the result, or diffusers.
        lora: whether there is a LoRA for others to load.
        instance_prompt: what calls what it learnt.
        relation: of the result to the base, as the Hub has it: adapter, finetune.
        pictures: for the page: text and output of each.
    """
    more: dict[str, Any] = {"widget": list(pictures)} if pictures else {}
    if is_hub_id(base):
        more |= {"base_model": base, "base_model_relation": relation}
    return ModelCardData(
        library_name="ether-diffusion" if own else "diffusers",
        tags=[*tags, *(["lora"] if lora else [])],
        instance_prompt=instance_prompt,
        **more,
    )


def markdown(text: str) -> str:
    """``text`` on one line, inert in Markdown: no markup, no HTML, no end of a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", " ".join(text.split()))


def literal(text: str) -> str:
    """A Python string literal in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


def base_link(base: str) -> str:
    """A base in Markdown: a link to the Hub, or the last part of a path here."""
    if base in playground.GUIDANCE:
        return f"{base}, which comes with ether-diffusion"
    if is_hub_id(base):
        return f"[{markdown(base)}](https://huggingface.co/{base})"
    return f"{markdown(Path(base).name)} (a local copy)"


def base_path(base: str) -> str:
    """What a reader's code calls a base: its id on the Hub, or a path of the reader's own."""
    return base if is_hub_id(base) else f"path/to/{public_name(base)}"


def full_path(name: str) -> str:
    """A file or folder of this machine by its full path; anything else, such as an id on the Hub, as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def own_loading(base: str, config: str | None = None, here: bool = False) -> tuple[str, str] | None:
    """The import and the call that give a base which this library loads: an embedded one, or one in a single file.

    Args:
        base: its name.
        config: of a single file what has its settings, where it is known.
        here: whether the code is for this machine, with its paths.

    Returns:
        None for a base that ``from_pretrained`` loads.
    """
    if base in playground.GUIDANCE:
        call = "playground.load()" if base == playground.NAME else f"playground.load(name={literal(base)})"
        return "from ether_diffusion import playground", call
    if base.endswith(SINGLE_FILE):
        settings = f"path/to/{public_name(config)}" if config else "path/to/settings"
        paths = (full_path(base), full_path(config)) if here and config else (base_path(base), settings)
        call = f"load_single_file({', '.join(map(literal, paths))})"
        return "from ether_diffusion.pipelines.single_file import load_single_file", call
    return None


def drawing_line(arguments: str, base: str) -> str:
    """The Python line that draws with a base: ``arguments`` of the pipeline's call, and what the base needs."""
    return f"image = pipe({arguments}{_drawing_code(base)}).images[0]"


def _drawing_code(base: str) -> str:
    """Arguments of a call that draws with an embedded base, which its pipeline's defaults do not suit."""
    if base not in playground.GUIDANCE:
        return ""
    size = ", height=64, width=64" if base == playground.FLOW else ""
    return f", guidance_scale={playground.GUIDANCE[base]:g}{size}"
