"""A CLIP tokenizer whose byte-pair merges make one token of every word of the world."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

from transformers import CLIPTokenizer

from ether_diffusion.playground.world import random_caption, random_scene

RARE_WORDS = ("sks", "qwe", "zwx", "olis", "vkt", "xjy", "ohwx", "pll")
"""Words without a meaning, one token each, to name subjects with; no caption holds them."""
CAPTIONS = 20_000
LENGTH = 48
"""Tokens of a prompt, of which a caption of the world takes up to 40; Stable Diffusion has 77."""

Pair = tuple[str, str]


@cache
def world_words() -> tuple[str, ...]:
    """Every word of letters in the captions of the world, sorted."""
    captions = (random_caption(random_scene(0, index), 0, index) for index in range(CAPTIONS))
    return tuple(sorted({word for caption in captions for word in re.findall("[a-z]+", caption)}))


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Byte-pair encoding (arXiv:1508.07909), each word counted once, until every word is one token.

    Encoding replays the merges in this order, so it makes of each of ``words`` the one token that it is here.
    """
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[Pair] = []
    while counts := Counter(pair for parts in pieces.values() for pair in pairwise(parts)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}
    return merges


def _merge(parts: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def byte_letters() -> list[str]:
    """The 256 letters that stand for the bytes, as in GPT-2 and CLIP: printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def world_tokenizer() -> CLIPTokenizer:
    """Tokens as CLIP orders them: the bytes, the bytes that end a word, the merges, start and end of text.

    Any text has tokens: what is not a word of the world falls into pieces, down to single bytes.
    """
    merges = learn_merges((*world_words(), *RARE_WORDS))
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
