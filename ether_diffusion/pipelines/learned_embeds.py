"""``learned_embeds.safetensors``: the embeddings of a placeholder token, as diffusers, kohya and ComfyUI read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ether_diffusion.families.parts import TEXT_ENCODERS
from ether_diffusion.files import atomic_path
from ether_diffusion.pipelines.schema import ITEM_SIZES, SchemaError, read_header, table, tensor_headers
from ether_diffusion.placeholder import VECTORS_LIMIT, check_placeholder
from ether_diffusion.reading import shown

LEARNED_EMBEDS = "learned_embeds.safetensors"
"""The name that diffusers looks for in a folder, or on the Hub."""
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class LearnedEmbeds:
    """A placeholder token and its embeddings.

    Attributes:
        token: as it stands in prompts.
        rows: by text encoder, (vectors, features); the number of vectors is the same in all.
        keys: of the tensors in the file, by text encoder: the token itself where there is one text encoder, which
            diffusers' ``load_textual_inversion`` takes from the folder; ``clip_l`` and ``clip_g`` of SDXL.
    """

    token: str
    rows: Mapping[str, Tensor]
    keys: Mapping[str, str]

    @property
    def vectors(self) -> int:
        """How many embeddings the token has in every text encoder."""
        return len(next(iter(self.rows.values())))

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that stand for the token and the values of its embeddings."""
        digest = hashlib.sha256(self.token.encode())
        for component, rows in sorted(self.rows.items()):
            values = rows.detach().float().cpu().contiguous()
            digest.update(f" {component} {tuple(values.shape)} ".encode())
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Refuse what must not be saved.

        Raises:
            ValueError: a number is not finite.
        """
        if broken := [component for component, rows in self.rows.items() if not rows.isfinite().all()]:
            raise ValueError(f"not saved: the embeddings of {self.token} hold NaN or infinity ({broken[0]})")

    def write(self, path: Path) -> None:
        """Write the file atomically, in fp32."""
        tensors = {self.keys[name]: rows.detach().float().cpu().contiguous() for name, rows in self.rows.items()}
        metadata = {
            "format_version": FORMAT_VERSION,
            "placeholder_token": self.token,
            "components": json.dumps(dict(self.keys)),
        }
        with atomic_path(path) as temporary:
            temporary.write_bytes(serialize(tensors, metadata=metadata))


def is_texts(metadata: object) -> bool:
    """Whether a header's metadata are a table of texts."""
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def read_embeds(path: Path) -> LearnedEmbeds:
    """Read embeddings that this library wrote; everything is checked before a tensor is read.

    Raises:
        SchemaError: the file is damaged, or of another kind; the message goes on after the file's name.
        OSError: it cannot be read.
    """
    header, data_size = read_header(path)
    metadata = header.pop("__metadata__", {})
    headers = tensor_headers(header, data_size)
    if not is_texts(metadata) or metadata.get("format_version") != FORMAT_VERSION:
        raise SchemaError("was not written by this library: pipe.load_textual_inversion loads embeddings of others")
    token, keys = metadata.get("placeholder_token", ""), table(metadata, "components")
    try:
        check_placeholder(token)
    except ValueError as error:
        raise SchemaError(f"has broken metadata: {error}") from None
    if not keys or not set(keys) <= set(TEXT_ENCODERS) or sorted(map(str, keys.values())) != sorted(headers):
        raise SchemaError(f"has broken metadata: components is {shown(keys)}, and the tensors are {shown([*headers])}")
    shapes = [each.shape for each in headers.values()]
    if any(len(shape) != 2 or not 1 <= shape[0] <= VECTORS_LIMIT or shape[0] != shapes[0][0] for shape in shapes):
        raise SchemaError(f"has embeddings of shapes {shown(shapes)}: as many vectors in each are expected")
    if any(each.dtype not in ITEM_SIZES for each in headers.values()):
        raise SchemaError(f"has embeddings that are no floating numbers; {', '.join(ITEM_SIZES)} are expected")
    try:
        with safe_open(path, framework="pt") as file:
            rows = {component: file.get_tensor(key).float() for component, key in keys.items()}
    except SafetensorError as error:
        raise SchemaError(f"cannot be read as safetensors; it is damaged or cut off ({error})") from error
    if not all(each.isfinite().all() for each in rows.values()):
        raise SchemaError("has embeddings with NaN or infinity")
    return LearnedEmbeds(token, rows, keys)
