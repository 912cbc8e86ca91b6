"""Text of the study of language: captions of the playground's drawn world, with questions about them.

A line is ``<caption> ; <question> ? <answer> .``, one token per word. The world's program knows the scene, so every
answer is true. A shifted task answers the questions about colours in code words, one for each colour.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ether_diffusion.playground.world import COLOURS, Scene, full_captions, random_scene

CODES = ("aru", "bem", "cilo", "dovu", "eshi", "fal", "guno", "hiri")
"""A code word for each colour; which one stands for which is the task."""
KINDS_OF_QUESTIONS = ("colour", "place", "pattern", "wear", "say")
KEPT = ("place", "pattern", "wear", "say")
"""Questions whose answers no shifted task changes: what is retained of the base."""
PAD, END = "<pad>", "."
HELD_OUT = 5
"""One in so many captions is held out, chosen by a hash of its words."""
IGNORED = -100


@dataclass(frozen=True)
class Line:
    """A question about a caption with its answer, all as words.

    Attributes:
        kind: one of ``KINDS_OF_QUESTIONS``.
        prompt: the caption and the question.
        answer: its words; the last one is ``END``.
    """

    kind: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]


def permutation(task: int) -> dict[str, str]:
    """The code word of each colour in the shifted task number ``task``."""
    codes = random.Random(f"task {task}").sample(CODES, len(COLOURS))
    return dict(zip(COLOURS, codes, strict=True))


def lines(seed: int, kinds: tuple[str, ...], held_out: bool, codes: Mapping[str, str] | None = None) -> Iterator[Line]:
    """An endless series of lines, a pure function of the arguments.

    Args:
        seed: of the scenes and the choices.
        kinds: of the questions, drawn alike.
        held_out: whether the captions are those that no training sees, or the others.
        codes: the answers about colours in other words, by :func:`permutation`.
    """
    index = 0
    while True:
        rng, scene = random.Random(f"line {seed} {index}"), random_scene(seed, index)
        caption = rng.choice(full_captions(scene)).replace(",", " ,")
        index += 1
        if is_held_out(caption) != held_out:
            continue
        kind = rng.choice(kinds)
        if scene.objects or kind in ("place", "say"):
            question, answer = _question(kind, scene, rng)
            answer = [(codes or {}).get(word, word) if kind == "colour" else word for word in answer]
            yield Line(kind, (*caption.split(), ";", *question, "?"), (*answer, END))


def is_held_out(caption: str) -> bool:
    """Whether no training may see a caption; the same on every machine."""
    return zlib.crc32(caption.encode()) % HELD_OUT == 0


def _question(kind: str, scene: Scene, rng: random.Random) -> tuple[list[str], list[str]]:
    """The words of a question and of its answer."""
    if kind == "place":
        return ["place"], [scene.background]
    if kind == "say":
        word = rng.choice((*CODES, *COLOURS))
        return ["say", word], [word]
    item = rng.choice(scene.objects)
    asked = [kind, "of", "the", item.kind]
    if kind == "colour":
        return asked, _joined([item.look.colour, *([item.look.second] if item.look.second else [])])
    if kind == "pattern":
        return asked, [item.look.pattern]
    return asked, _joined(list(item.look.parts) or ["nothing"])


def _joined(words: list[str]) -> list[str]:
    return [each for word in words for each in ("and", word)][1:]


class Vocabulary:
    """Words and their ids; the same list for every seed."""

    def __init__(self, samples: int = 4000) -> None:
        """Collect the words of so many lines, and those that a line can lack by chance.

        Args:
            samples: how many lines are read.
        """
        found = {PAD, END, *CODES, *COLOURS}
        for held_out in (False, True):
            source = lines(0, KINDS_OF_QUESTIONS, held_out)
            for _ in range(samples // 2):
                line = next(source)
                found |= {*line.prompt, *line.answer}
        self.words = (PAD, *sorted(found - {PAD}))
        self.ids = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        """The number of words."""
        return len(self.words)

    def batch(self, chosen: list[Line]) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors of some lines, padded on the right.

        Args:
            chosen: the lines.

        Returns:
            Ids, mask of the words, and targets: the words of the answers, ``IGNORED`` elsewhere; each (lines, longest
            line).
        """
        texts = [[self.ids[word] for word in (*line.prompt, *line.answer)] for line in chosen]
        width = max(map(len, texts))
        ids = torch.tensor([text + [self.ids[PAD]] * (width - len(text)) for text in texts])
        places = torch.arange(width)
        mask = places < torch.tensor([[len(text)] for text in texts])
        first = torch.tensor([[len(line.prompt)] for line in chosen])
        targets = ids.masked_fill(~mask | (places < first), IGNORED)
        return ids, mask.long(), targets
