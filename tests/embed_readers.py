"""Embeddings of placeholder tokens through the code of a program that reads them: ComfyUI's own ``load_embed``.

    python tests/embed_readers.py FOLDER

The folder is a checkout of ComfyUI, which is not part of this project (docs/tokens.md names the version). The functions
are taken out of its ``comfy/sd1_clip.py``, so that none of its packages is needed. Of every family that can learn a
token a file is written and read under the keys that ComfyUI's tokenizers of that family ask for.
"""

from __future__ import annotations

import argparse
import ast
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families.tiny import build
from torch import Tensor

from ether_diffusion.families.registry import FAMILIES, family_of
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds

FUNCTIONS = ("load_embed", "bundled_embed", "expand_directory_list", "safe_load_embed_zip")
ASKED = {
    "sd": {"text_encoder": "clip_l"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "chroma": {"text_encoder": "t5xxl"},
}
"""The ``embedding_key`` of ComfyUI's tokenizers, by the text encoder that they are for."""


def loader(checkout: Path) -> Callable[..., Tensor | None]:
    """ComfyUI's ``load_embed``, with the functions that it calls."""
    tree = ast.parse((checkout / "comfy" / "sd1_clip.py").read_text(encoding="utf-8"))
    tree.body = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in FUNCTIONS]
    scope: dict[str, Any] = {"os": os, "torch": torch, "logging": logging, "traceback": traceback}
    exec(compile(tree, "sd1_clip.py", "exec"), scope)
    found: Callable[..., Tensor | None] = scope["load_embed"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="checkout of ComfyUI")
    load_embed = loader(parser.parse_args().comfyui)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name, each in FAMILIES.items() if each.TOKEN_KEYS):
            family = family_of(build(name))
            tables = {encoder: family.text_encoders[encoder].get_input_embeddings() for encoder in family.TOKEN_KEYS}
            rows = {encoder: torch.randn(3, table.embedding_dim) for encoder, table in tables.items()}
            keys = {encoder: key or "<dog>" for encoder, key in family.TOKEN_KEYS.items()}
            LearnedEmbeds("<dog>", rows, keys).write(Path(folder) / f"{name}.safetensors")
            for encoder, key in ASKED[name].items():
                read = load_embed(name, [folder], rows[encoder].shape[1], key)
                same = read is not None and torch.equal(read, rows[encoder])
                failed |= not same
                print(f"{name:7} {key:7} {'the same rows' if same else 'other rows'}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
