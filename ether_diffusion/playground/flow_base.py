"""The second base, ``playground-flow``: what it has of its own is its transformer; the rest is the first base's.

Stock diffusers loads a folder with all parts, so one is put together in the user's cache when it is first asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ether_diffusion.files import atomic_path

OWN = Path(__file__).parent / "flow"
"""The transformer, the scheduler, and how it was built."""
PROMPT_LENGTH = 512
"""Tokens that the pipeline pads prompts to; the text tower has so many places, and was trained on the first 48."""
PLACES = "embeddings.position_embedding.weight"
CHAT_TEMPLATE = "{{ messages[0]['content'] }}"
"""The prompt as it is: the text tower was trained on captions, not on conversations."""
PARTS: dict[str, tuple[str, str]] = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "transformer": ("diffusers", "ZImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
LAYOUT = 1
"""Rises when folders that are put together look other than before."""


def flow_folder(base: Path) -> Path:
    """The whole base as a diffusers folder in the user's cache, put together there if it is not there yet.

    Args:
        base: folder of the first base.

    Raises:
        FileNotFoundError: this installation has no transformer.
        OSError: the cache cannot be written.
    """
    if not (OWN / "transformer").is_dir():
        raise FileNotFoundError(f"{OWN} has no transformer: this installation comes without playground-flow")
    folder = cache_folder() / f"playground-flow-{_contents(base, OWN)[:16]}"
    if not (folder / "model_index.json").is_file():
        try:
            with atomic_path(folder) as temporary:
                assemble(base, OWN, temporary)
        except OSError as error:
            raise OSError(
                f"{folder} cannot be written ({error}): name another folder for caches by the environment variable "
                "XDG_CACHE_HOME"
            ) from error
    return folder


def cache_folder() -> Path:
    """Where this package keeps what it can make again: ``ether-diffusion`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ether-diffusion"


def assemble(base: Path, own: Path, folder: Path) -> None:
    """Write a Z-Image pipeline to ``folder``: autoencoder and text tower of ``base``, transformer of ``own``.

    Z-Image's pipeline pads prompts to ``PROMPT_LENGTH`` tokens, puts them into a chat template and adds the
    autoencoder's shift. So the tower gets places that no prompt of the world reaches, the tokenizer a template that
    changes nothing, the autoencoder a shift of 0; what they compute is what they computed before.
    """
    for source, parts in ((own, ("transformer", "scheduler")), (base, ("vae", "text_encoder", "tokenizer"))):
        for part in parts:
            (folder / part).mkdir(parents=True)
            for file in (source / part).iterdir():
                shutil.copyfile(file, folder / part / file.name)  # without its mode: an installation may be read-only
    _change(folder / "vae" / "config.json", shift_factor=0.0)
    _change(folder / "tokenizer" / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    _change(folder / "text_encoder" / "config.json", max_position_embeddings=PROMPT_LENGTH)
    _lengthen(folder / "text_encoder" / "model.safetensors")
    index = {"_class_name": "ZImagePipeline", **{part: list(where) for part, where in PARTS.items()}}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _change(path: Path, **settings: Any) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) | settings
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _lengthen(path: Path) -> None:
    weights = load_file(path)
    key = next(key for key in weights if key.endswith(PLACES))
    places = weights[key].new_zeros(PROMPT_LENGTH, weights[key].shape[1])
    places[: len(weights[key])] = weights[key]
    save_file({**weights, key: places}, path, metadata={"format": "pt"})


def _contents(*folders: Path) -> str:
    """SHA-256 of the files that go into an assembled base, in hexadecimal."""
    digest = hashlib.sha256(str(LAYOUT).encode())
    for folder in folders:
        for path in sorted(each for part in PARTS for each in folder.glob(f"{part}/*")):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
