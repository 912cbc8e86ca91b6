"""Small inputs of every reader: whole ones, which the fuzzer changes, and broken ones that once did harm.

``python tests/corpus/make.py FOLDER`` writes all of them; no binary file is in the repository.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

JSON = Any
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONFIG = {"method": "ether_plus", "n_blocks": 4, "two_sided": True, "targets": ["mid_block.*.attn1.to_q"], "seed": 0}
FUSED = "transformer.single_transformer_blocks.0.attn.to_out"
PARTS = {"u.attention": [4, 8], "u.mlp": [4, 24], "v.attention": [4, 8], "v.mlp": [4, 24]}
DEEP = "[" * 50_000


def adapter_header() -> dict[str, JSON]:
    """The header of an adapter of one projection of the tiny UNet, 64 features wide."""
    vectors = {
        f"{KEY}.{name}": {"dtype": "F32", "shape": [4, 16], "data_offsets": [256 * place, 256 * place + 256]}
        for place, name in enumerate(("u", "v", "u_out", "v_out"))
    }
    metadata = {
        "format_version": "1",
        "ether_config": json.dumps({"unet": CONFIG}),
        "base_model": "playground",
        "base_hash": json.dumps({"unet": "0123456789abcdef"}),
        "library_version": "0.1",
    }
    return {"__metadata__": metadata, **vectors}


def fused_header() -> dict[str, JSON]:
    """The header of an adapter of a fused Linear of the tiny FLUX.2: 32 features of attention and 96 of MLP."""
    header, place = {"__metadata__": adapter_header()["__metadata__"]}, 0
    config = {**CONFIG, "targets": ["single_*.attn.to_out"], "two_sided": False}
    header["__metadata__"] |= {"format_version": "2", "ether_config": json.dumps({"transformer": config})}
    header["__metadata__"]["base_hash"] = json.dumps({"transformer": "0123456789abcdef"})
    for name, shape in PARTS.items():
        size = 4 * shape[0] * shape[1]
        header[f"{FUSED}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return header


def adapter(header: JSON | None = None, data: bytes | None = None) -> bytes:
    """A safetensors file with a header as it is given, text or JSON."""
    header = adapter_header() if header is None else header
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    vectors = np.random.default_rng(0).normal(size=256).astype("<f4").tobytes() if data is None else data
    return struct.pack("<Q", len(text)) + text + vectors


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, pixels: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG of any header; the pixels are as they are given."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = more + chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def picture(mode: str, kind: str, **options: Any) -> bytes:
    """A small picture of noise as a file."""
    values = np.random.default_rng(1).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    grey16 = Image.fromarray(values[..., 0].astype(np.uint16))
    image = grey16 if mode == "I;16" else Image.fromarray(values).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SETTINGS: dict[str, JSON] = {
    "pretrained_model_name_or_path": "playground",
    "instance_data_dir": "photos",
    "instance_prompt": "a photo of qwe dog",
    "output_dir": "runs/dog",
    "method": "ether_plus",
    "max_train_steps": 400,
    "learning_rate": 0.006,
    "validation_prompt": ["qwe dog in the snow", "qwe dog on a beach"],
    "with_prior_preservation": False,
    "mixed_precision": "no",
    "report_to": [],
}
ROWS: list[JSON] = [
    {"file_name": "a.png", "conditioning_image": "b.png", "text": "a dog"},
    {"file_name": "b.png", "conditioning_image": "a.png", "text": ["a cat", "a small cat"]},
]
RECORD: dict[str, JSON] = {
    "config.yaml": SETTINGS,
    "provenance.json": {"config_hash": "0", "base_hash": {"unet": "1"}, "status": "done", "step": 400, "seconds": 2.5},
    "metrics.jsonl": {"step": 1, "loss": 0.5, "lr": {"unet": 0.006}, "steps_per_second": 2.0},
    "samples/prompts.json": [{"file": "00-0.png", "prompt": "a photo of qwe dog", "seed": 0}],
    "scores.json": {
        "scores": {"dino": {"base": 0.4, "finetuned": None}},
        "judges": {"clip": {"model": "playground", "weights": "0", "preprocessing": "1"}},
        "token": "qwe",
        "seed": 0,
        "step": 400,
        "prompts": 1,
        "images": {"finetuned": 1, "references": 4},
    },
}


def whole() -> dict[str, dict[str, bytes]]:
    """Whole inputs by reader and name."""
    pictures = {
        "rgb.png": picture("RGB", "PNG"),
        "alpha.png": picture("RGBA", "PNG"),
        "grey.png": picture("L", "PNG"),
        "grey16.png": picture("I;16", "PNG"),
        "palette.png": picture("P", "PNG", transparency=0),
        "a.jpg": picture("RGB", "JPEG"),
        "cmyk.jpg": picture("CMYK", "JPEG"),
        "a.webp": picture("RGB", "WEBP"),
        "a.bmp": picture("RGB", "BMP"),
        "a.gif": picture("P", "GIF"),
        "a.tif": picture("RGB", "TIFF", compression="tiff_lzw"),
    }
    return {"adapter": {"a.safetensors": adapter(), "parts.safetensors": adapter(fused_header())}, "picture": pictures}


def _changed(**metadata: JSON) -> bytes:
    header = adapter_header()
    header["__metadata__"].update(metadata)
    return adapter(header)


def _vector(**entry: JSON) -> bytes:
    header = adapter_header()
    header[f"{KEY}.u"].update(entry)
    return adapter(header)


def _part(old: str, new: str, version: str = "2") -> bytes:
    """The parts' file with another key, or of another version."""
    header = fused_header()
    header[f"{FUSED}.{new}"] = header.pop(f"{FUSED}.{old}")
    header["__metadata__"]["format_version"] = version
    return adapter(header)


def broken() -> dict[str, dict[str, bytes]]:
    """Broken inputs by reader and name: each once gave another error than it should, hung, or took gigabytes."""
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return {
        "adapter": {
            "deep.safetensors": adapter(DEEP),
            "deep_config.safetensors": _changed(ether_config='{"unet":' * 50_000),
            "deep_hash.safetensors": _changed(base_hash=DEEP),
            "list.safetensors": adapter("[]"),
            "two_sided.safetensors": _changed(ether_config=json.dumps({"unet": {**CONFIG, "two_sided": "no"}})),
            "seed.safetensors": _changed(ether_config=json.dumps({"unet": {**CONFIG, "seed": 2**70}})),
            "targets.safetensors": _changed(ether_config=json.dumps({"unet": {**CONFIG, "targets": [1]}})),
            "hash_of_another.safetensors": _changed(base_hash=json.dumps({"vae": "0123456789abcdef"})),
            "control.safetensors": _changed(control_encoder='{"out_channels": 1, "channels": [], "condition": "map"}'),
            "terabytes.safetensors": _changed(
                control_encoder='{"out_channels": 60000, "channels": [60000, 60000], "condition": "map"}'
            ),
            "shape.safetensors": _vector(shape=[2**40, 2**40]),
            "dtype.safetensors": _vector(dtype="F8_E4M3", shape=[16, 16]),
            "offsets.safetensors": _vector(data_offsets=[-1, 2**70]),
            "surrogate.safetensors": adapter('{"\\ud800.u": 1}'),
            "parts_in_version_1.safetensors": _part("u.mlp", "u.mlp", "1"),
            "unknown_part.safetensors": _part("u.mlp", "u.gate"),
            "part_of_the_output.safetensors": _part("u.mlp", "u.q"),
            "whole_beside_part.safetensors": _part("u.mlp", "u"),
            "header_of_gigabytes.safetensors": struct.pack("<Q", 2**63) + b"{}",
        },
        "config": {
            "laughs.yaml": laughs.encode(),
            "deep.yaml": f"a: {DEEP}".encode(),
            "python.yaml": b"seed: !!python/object/apply:os.getpid []",
            "list.yaml": b"- 1",
            "bytes.yaml": b"\xff\xfe\x00",
        },
        "listing": {
            "deep.jsonl": DEEP.encode(),
            "outside.jsonl": b'{"file_name": "/etc/hostname", "conditioning_image": "../../b.png", "text": "x"}',
            "caption.jsonl": b'{"file_name": "a.png", "text": {"a": 1}}',
            "nul.jsonl": b'{"file_name": "a\\u0000.png", "text": "x"}',
            "long.jsonl": json.dumps({"file_name": "a" * 5000, "text": "x"}).encode(),
            "name.jsonl": b'{"file_name": ["a.png"], "text": "x"}',
            "latin.jsonl": '{"file_name": "ä.png", "text": "x"}'.encode("latin-1"),
        },
        "captions": {
            "deep.jsonl": DEEP.encode(),
            "outside.csv": b"file_name,text\n/etc/hostname,x\n",
            "up.csv": b"file_name,text\nx/../../b.png,x\n",
            "nul.csv": b"file_name,text\na\0.png,x\n",
            "long.csv": b"file_name,text\n" + b"a" * 5000 + b",x\n",
            "field.csv": b"file_name,text\na.png," + b"x" * 2**18 + b"\n",
            "open.csv": b'file_name,text\na.png,"' + b"x\n" * 2**17,
            "columns.csv": b"file_name,text" + b",x" * 2**17 + b"\n",
            "half.jsonl": b'{"file_name": "a.png", "text": "\\ud800"}',
            "latin.csv": "file_name,text\nä.png,x\n".encode("latin-1"),
        },
        "picture": {
            "bomb.png": png(40_000, 40_000),
            "large.png": png(12_000, 9_000),
            "long.png": png(200_000, 1),
            "nothing.png": png(0, 0),
            "text_bomb.png": png(
                8, 8, more=b"".join(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**20)) for _ in range(80))
            ),
            "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
            "profile.png": png(8, 8, pixels=bytes(200)).replace(
                chunk(b"IEND", b""), chunk(b"iCCP", b"a\0") + chunk(b"IEND", b"")
            ),
            "empty.png": b"",
        },
        "record": {
            "provenance.json": DEEP.encode(),
            "samples/prompts.json": b'[{"file": "../../../secret.png", "prompt": "x", "seed": 0}]',
            "scores.json": b'{"dino": {"base": 1' + b"0" * 400 + b"}}",
            "metrics.jsonl": b'{"step": 1, "loss": 0.5, "lr": {}, "steps_per_second": 1}\n{"step": 1}\n[1]\n'
            + DEEP.encode(),
            "config.yaml": b"method: [ether]",
        },
    }


def main() -> None:
    """Write all inputs into the folder that is named."""
    folder = Path(sys.argv[1])
    for sort, inputs in (("whole", whole()), ("broken", broken())):
        for reader, files in inputs.items():
            for name, content in files.items():
                path = folder / sort / reader / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


if __name__ == "__main__":
    main()
