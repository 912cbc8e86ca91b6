"""The pool of training drawings: made once in worker processes, kept on disk in chunks, resumable.

Drawing runs at a few hundred scenes a second and core, which a GPU outruns by far; a pool of many thousand scenes,
each with several captions, takes its place.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from ether_diffusion.files import atomic_path
from ether_diffusion.playground.build.meanings import caption_meaning, scene_meanings
from ether_diffusion.playground.build.vocabulary import LENGTH, world_tokenizer
from ether_diffusion.playground.world import BACKGROUNDS, KINDS, Scene, draw, random_caption, random_scene
from ether_diffusion.playground.world.sampling import SIZES, random_look, random_object

CHUNK = 1000
CAPTIONS = 6
"""Captions drawn for each scene."""
HELD_OUT = 1_000_003
"""What is added to the build's seed for drawings that no model is trained on."""

Arrays = Mapping[str, NDArray[np.generic]]


def paired_scene(seed: int, index: int) -> Scene:
    """Scene ``index`` of the endless pairs of ``seed``: scenes 2k and 2k + 1 show one look at two places.

    The looks are those of the random scenes, so no individual's is among them; the two backgrounds differ.
    """
    dice = random.Random(f"pair {seed} {index // 2}")
    kind = dice.choice(KINDS)
    look = random_look(dice, kind)
    background = dice.sample(BACKGROUNDS, 2)[index % 2]
    dice = random.Random(f"pair {seed} {index // 2} {index % 2}")
    return Scene(background, (random_object(dice, kind, look, SIZES),), variation=dice.getrandbits(32))


def picture_array(scenes: list[Scene]) -> NDArray[np.uint8]:
    """The drawings, (N, 64, 64, 3) uint8."""
    return np.stack([np.asarray(draw(scene).image) for scene in scenes])


def to_unit(pictures: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) fp32 in [-1, 1], which every model of the playground takes."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def caption_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> NDArray[np.int64]:
    """(N, ``LENGTH``) token ids, padded with the end of text.

    Raises:
        ValueError: a caption is longer than ``LENGTH``.
    """
    ids = tokenizer(captions, padding="max_length", max_length=LENGTH).input_ids
    if (longest := max(map(len, ids))) > LENGTH:
        raise ValueError(f"a caption has {longest} tokens, a prompt {LENGTH}: raise LENGTH")
    return np.asarray(ids)


def scene_chunk(seed: int, start: int, count: int) -> Arrays:
    """Pictures, semantic maps, ``CAPTIONS`` captions each and what they mean (see :mod:`.meanings`)."""
    scenes = [random_scene(seed, index) for index in range(start, start + count)]
    drawings = [draw(scene) for scene in scenes]
    texts = [
        [random_caption(scene, seed, CAPTIONS * (start + n) + k) for k in range(CAPTIONS)]
        for n, scene in enumerate(scenes)
    ]
    tokens = caption_tokens(_tokenizer(), [text for row in texts for text in row])
    return {
        "pictures": np.stack([np.asarray(drawing.image) for drawing in drawings]),
        "maps": np.stack([drawing.semantic_map for drawing in drawings]),
        "tokens": tokens.reshape(count, CAPTIONS, LENGTH).astype(np.int16),
        "said": np.array([[caption_meaning(s, text) for text in row] for s, row in zip(scenes, texts, strict=True)]),
        "true": np.array([scene_meanings(scene) for scene in scenes]),
    }


def pair_chunk(seed: int, start: int, count: int) -> Arrays:
    """Pictures of the pairs ``start`` and on, (count, 2, 64, 64, 3) uint8."""
    pictures = picture_array([paired_scene(seed, index) for index in range(2 * start, 2 * (start + count))])
    return {"pictures": pictures.reshape(count, 2, *pictures.shape[1:])}


CHUNKS: Mapping[str, Callable[[int, int, int], Arrays]] = {"scenes": scene_chunk, "pairs": pair_chunk}


def draw_pool(folder: Path, what: str, seed: int, count: int, workers: int) -> None:
    """Draw ``count`` of ``"scenes"`` or ``"pairs"`` to chunk files in ``folder``; those that are there stay."""
    todo = []
    for start in range(0, count, CHUNK):
        path = _chunk_path(folder, what, start, min(CHUNK, count - start))
        if not path.exists():
            todo.append(partial(_write_chunk, path, what, seed, start, min(CHUNK, count - start)))
    if not todo:
        return
    progress = tqdm(total=len(todo), desc=f"draw {what}", unit="chunk")
    if workers <= 1 or len(todo) == 1:
        for write in todo:
            write()
            progress.update()
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
            for future in as_completed([executor.submit(write) for write in todo]):
                future.result()
                progress.update()
    progress.close()


def load_pool(folder: Path, what: str, count: int, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    """The named arrays of the first ``count`` drawings on ``device``, in the dtypes of the files.

    Raises:
        FileNotFoundError: the pool was not drawn, or not so many.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, count, CHUNK):
        path = _chunk_path(folder, what, start, min(CHUNK, count - start))
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run the stage 'draw' first")
        with safe_open(path, "pt") as chunk:
            for name in names:
                parts[name].append(chunk.get_tensor(name).to(device))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _chunk_path(folder: Path, what: str, start: int, count: int) -> Path:
    return folder / f"{what}-{start:07d}-{count}.safetensors"


def _write_chunk(path: Path, what: str, seed: int, start: int, count: int) -> None:
    with atomic_path(path) as temporary:
        save_file(dict(CHUNKS[what](seed, start, count)), temporary)


@cache
def _tokenizer() -> CLIPTokenizer:
    return world_tokenizer()
