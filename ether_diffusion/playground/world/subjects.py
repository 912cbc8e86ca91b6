"""The subjects of finetuning: reference pictures and evaluation prompts, after DreamBooth (arXiv:2208.12242)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.files import atomic_path
from ether_diffusion.playground.world.backgrounds import BACKGROUNDS, TINTS
from ether_diffusion.playground.world.captions import where_phrases, with_article
from ether_diffusion.playground.world.individuals import INDIVIDUALS
from ether_diffusion.playground.world.looks import Look
from ether_diffusion.playground.world.objects import KINDS
from ether_diffusion.playground.world.palette import COLOURS
from ether_diffusion.playground.world.sampling import random_object
from ether_diffusion.playground.world.scene import Scene, draw

REFERENCES = 5
REFERENCE_SIZES = (15.0, 22.0)
"""Least and greatest size (half height in pixels) of a subject in its reference pictures."""


@dataclass(frozen=True)
class Subject:
    """An individual that the base has never seen.

    Attributes:
        name: unique, fit for a folder.
        class_word: one of ``KINDS``, for the class prompt.
        look: what all its pictures share.
        references: five scenes on three backgrounds, each at another place and size.
        prompts: ten evaluation prompts with the placeholder ``{token}`` before the class word, none of them a
            reference's scene: new backgrounds, sizes, coloured skies and walls, a second object.
    """

    name: str
    class_word: str
    look: Look
    references: tuple[Scene, ...]
    prompts: tuple[str, ...]


def subject(name: str) -> Subject:
    """The subject of that name.

    Raises:
        ValueError: there is no such subject.
    """
    if name not in INDIVIDUALS:
        raise ValueError(f"no such subject: {name!r}; there are {', '.join(INDIVIDUALS)}")
    kind, look = INDIVIDUALS[name]
    dice = random.Random(f"subject {name}")
    backgrounds = dice.sample(BACKGROUNDS, len(BACKGROUNDS))
    seen, new = backgrounds[:3], backgrounds[3:]
    references = tuple(_reference(kind, look, seen[index % len(seen)], dice) for index in range(REFERENCES))
    return Subject(name, kind, look, references, _prompts(kind, look, seen, new, dice))


def write_subject(name: str, folder: str | Path) -> Path:
    """Write the subject's reference pictures, ``00.png`` to ``04.png`` (RGB, 64 x 64), as a whole or not at all.

    Returns:
        ``folder``; what was in it is replaced.

    Raises:
        ValueError: there is no such subject.
        OSError: the folder cannot be written.
    """
    pictures = [draw(reference).image for reference in subject(name).references]
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for index, picture in enumerate(pictures):
            picture.save(temporary / f"{index:02d}.png")
    return Path(folder)


def _reference(kind: str, look: Look, background: str, dice: random.Random) -> Scene:
    return Scene(background, (random_object(dice, kind, look, REFERENCE_SIZES),), variation=dice.getrandbits(32))


def _prompts(kind: str, look: Look, seen: list[str], new: list[str], dice: random.Random) -> tuple[str, ...]:
    """Ten prompts; the second objects are of other classes and of colours that the subject does not have."""
    me = f"a {{token}} {kind}"
    where = {background: where_phrases(background)[0] for background in BACKGROUNDS}
    colours = [c for c in COLOURS if c not in (*look.coat, look.accent)]
    friends = [
        with_article(f"{colour} {other}")
        for colour, other in zip(dice.sample(colours, 2), dice.sample([k for k in KINDS if k != kind], 2), strict=True)
    ]
    skies = [b for b in (*new, *seen) if b not in ("night", "bricks")]
    tinted = [(b, dice.choice([t for t in TINTS[b] if t not in look.coat])) for b in (skies[0], skies[1])]
    return (
        *(f"{me} {where[background]}" for background in new),
        f"a photo of {me} {where[new[0]]}",
        f"a small {{token}} {kind} {where[new[1]]}",
        f"a big {{token}} {kind} {where[new[2]]}",
        *(f"{me} {where_phrases(background, tint)[0]}" for background, tint in tinted),
        f"{me} and {friends[0]} {where[new[1]]}",
        f"{me} next to {friends[1]} {where[seen[0]]}",
    )
