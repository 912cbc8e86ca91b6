"""The subjects of finetuning: reference pictures and evaluation prompts, after DreamBooth (arXiv:2208.12242)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.files import atomic_path
from ether_diffusion.images import load_image
from ether_diffusion.playground.world.backgrounds import BACKGROUNDS, TINTS
from ether_diffusion.playground.world.canvas import SIDE
from ether_diffusion.playground.world.captions import BIG, SMALL, where_phrases, with_article
from ether_diffusion.playground.world.individuals import INDIVIDUALS
from ether_diffusion.playground.world.looks import Look
from ether_diffusion.playground.world.objects import KINDS
from ether_diffusion.playground.world.palette import COLOURS
from ether_diffusion.playground.world.sampling import PAIR_SIZES, SIZES, random_object
from ether_diffusion.playground.world.scene import Scene, draw

REFERENCES = 5
REFERENCE_SIZES = (15.0, 22.0)
"""Least and greatest size (half height in pixels) of a subject in its reference pictures."""


@dataclass(frozen=True)
class Request:
    """What an evaluation prompt asks for, as the world knows it.

    Attributes:
        prompt: the text, with the placeholder ``{token}`` before the class word.
        background: one of ``BACKGROUNDS``.
        tint: palette colour of the sky or the wall, None for its own.
        sizes: least and greatest size of the subject (half height in pixels) that the prompt allows.
        friend: colour and class word of a second object to the right, None without one.
    """

    prompt: str
    background: str
    tint: str | None = None
    sizes: tuple[float, float] = SIZES
    friend: tuple[str, str] | None = None


@dataclass(frozen=True)
class Subject:
    """An individual that the base has never seen.

    Attributes:
        name: unique, fit for a folder.
        class_word: one of ``KINDS``, for the class prompt.
        look: what all its pictures share.
        references: five scenes on three backgrounds, each at another place and size.
        requests: ten evaluation prompts with what they ask for, none of them a reference's scene: new backgrounds,
            sizes, coloured skies and walls, a second object.
    """

    name: str
    class_word: str
    look: Look
    references: tuple[Scene, ...]
    requests: tuple[Request, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts of ``requests``."""
        return tuple(request.prompt for request in self.requests)


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
    return Subject(name, kind, look, references, _requests(kind, look, seen, new, dice))


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


def true_scene(individual: Subject, request: Request, seed: int, index: int) -> Scene:
    """A scene that is exactly what a prompt asks for: the subject in the asked place, size and company.

    What the prompt leaves open is random: position, tilt, the exact shades. A pure function of its arguments.

    Args:
        individual: who is drawn.
        request: what is asked; of this subject, or of any other.
        seed: of a series of scenes.
        index: number of the scene in the series.
    """
    rng = random.Random(f"truth {individual.name} {request.prompt} {seed} {index}")
    kind, look, objects = individual.class_word, individual.look, []
    if request.friend is None:
        objects.append(random_object(rng, kind, look, request.sizes))
    else:
        colour, other = request.friend
        objects.append(random_object(rng, kind, look, PAIR_SIZES, (0, SIDE / 2)))
        objects.append(random_object(rng, other, Look(colour), PAIR_SIZES, (SIDE / 2, SIDE)))
    return Scene(request.background, tuple(objects), request.tint, rng.getrandbits(32))


def true_pictures(individual: Subject, request: Request, count: int) -> list[Image.Image]:
    """The first ``count`` of the scenes that :func:`true_scene` has for a prompt with seed 0, drawn (RGB, 64 x 64)."""
    return [draw(true_scene(individual, request, 0, index)).image for index in range(count)]


def known_subject(pictures: Sequence[Path]) -> Subject | None:
    """The subject whose reference pictures these are, by their pixels.

    Args:
        pictures: files; all of them must be references of one subject, in any order.

    Returns:
        None where they are not, or where there are none.

    Raises:
        UnreadableImageError: one is no picture, or it is broken.
    """
    seen = {image.tobytes() for image in map(load_image, pictures) if image.size == (SIDE, SIDE)}
    for name in INDIVIDUALS if seen else ():
        individual = subject(name)
        if seen <= {draw(reference).image.convert("RGB").tobytes() for reference in individual.references}:
            return individual if len(seen) == len(pictures) else None
    return None


def request_of(individual: Subject, prompt: str) -> Request | None:
    """What a prompt asks for: the subject's request with this text and one word as its token; None if it is another."""
    for request in individual.requests:
        before, after = map(re.escape, request.prompt.split("{token}"))
        if re.fullmatch(rf"{before}\S+{after}", prompt):
            return request
    return None


def _reference(kind: str, look: Look, background: str, dice: random.Random) -> Scene:
    return Scene(background, (random_object(dice, kind, look, REFERENCE_SIZES),), variation=dice.getrandbits(32))


def _requests(kind: str, look: Look, seen: list[str], new: list[str], dice: random.Random) -> tuple[Request, ...]:
    """Ten requests; the second objects are of other classes and of colours that the subject does not have."""
    me = f"a {{token}} {kind}"
    where = {background: where_phrases(background)[0] for background in BACKGROUNDS}
    colours = [c for c in COLOURS if c not in (*look.coat, look.accent)]
    friends = list(zip(dice.sample(colours, 2), dice.sample([k for k in KINDS if k != kind], 2), strict=True))
    named = [with_article(f"{colour} {other}") for colour, other in friends]
    skies = [b for b in (*new, *seen) if b not in ("night", "bricks")]
    tinted = [(b, dice.choice([t for t in TINTS[b] if t not in look.coat])) for b in (skies[0], skies[1])]
    small, big = (SIZES[0], SMALL), (BIG, SIZES[1])
    return (
        *(Request(f"{me} {where[background]}", background) for background in new),
        Request(f"a photo of {me} {where[new[0]]}", new[0]),
        Request(f"a small {{token}} {kind} {where[new[1]]}", new[1], sizes=small),
        Request(f"a big {{token}} {kind} {where[new[2]]}", new[2], sizes=big),
        *(Request(f"{me} {where_phrases(background, tint)[0]}", background, tint) for background, tint in tinted),
        Request(f"{me} and {named[0]} {where[new[1]]}", new[1], friend=friends[0]),
        Request(f"{me} next to {named[1]} {where[seen[0]]}", seen[0], friend=friends[1]),
    )
