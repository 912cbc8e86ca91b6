"""What prompts in several chunks do to the pictures of a base that has learnt on one: the playground's.

Scenes of the drawn world that its base has not seen are asked for by their captions, each with the same noise, and
CLIP-T says how well the pictures show them. "short" is the caption alone, in one chunk and padded with empty ones.
"late" is the caption behind words that say nothing and fill the first chunk: with one chunk it is cut off, with two it
is seen. Differences from the first row are means over the captions with a 95 % interval (Student's t).

    OMP_NUM_THREADS=1 python benchmarks/prompt_chunks.py --captions 96

(The playground's tokenizer takes 48 tokens, so a chunk has 46; CLIP's has 75.)
"""

from __future__ import annotations

import argparse

import torch
from scipy import stats
from torch import Tensor

from ether_diffusion.families.clip_chunks import tokens_per_chunk
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.metrics.backbones import load_clip
from ether_diffusion.metrics.fidelity import prompt_similarity
from ether_diffusion.playground import GUIDANCE, NAME
from ether_diffusion.playground.world import random_caption, random_scene
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import Asked, draw, load_pipeline

SEED = 90_000
"""Of the scenes: the base was trained on others."""
FILLING = "a picture of"
"""Said again and again in front of a late caption; three tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=96)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16)
    given = parser.parse_args()
    pipe, clip = load_pipeline(Base(NAME)), load_clip(NAME)
    captions = [random_caption(random_scene(SEED, index), SEED, index) for index in range(given.captions)]
    texts, size = clip.text_features(captions), tokens_per_chunk(pipe.tokenizer)
    filling = " ".join((f"{FILLING} " * size).split()[:size])
    late = [f"{filling} {caption}" for caption in captions]
    rows = [
        ("short", captions, 1),
        ("short", captions, 2),
        ("short", captions, 3),
        ("late", late, 1),
        ("late", late, 2),
    ]
    first: Tensor | None = None
    print("| prompts | chunks | CLIP-T | difference |\n| --- | ---: | ---: | ---: |")
    for name, prompts, chunks in rows:
        asked = Asked(prompts, list(range(len(prompts))))
        encoding = FamilySettings(prompt_chunks=chunks)
        drawn = list(draw(pipe, asked, given.batch_size, given.steps, GUIDANCE[NAME], encoding))
        scores = prompt_similarity(clip.image_features(drawn), texts)
        told = "–"
        if first is not None:
            apart = (scores - first).double()
            half = stats.t.ppf(0.975, len(apart) - 1) * apart.std() / len(apart) ** 0.5
            told = f"{apart.mean():+.3f} ± {half:.3f}"
        first = scores if first is None else first
        print(f"| {name} | {chunks} | {scores.mean():.3f} | {told} |", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
