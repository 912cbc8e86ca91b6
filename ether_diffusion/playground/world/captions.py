"""What a scene is called: whole captions that name every attribute, and short ones that name a few."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ether_diffusion.playground.world.scene import Scene, SceneObject

SMALL, BIG = 12.5, 19.5
"""Below and above these sizes (pixels) an object may be called small or big."""
SHORT = 0.2
"""Share of the short captions among the random ones."""


@dataclass(frozen=True)
class _Place:
    """Words for a background.

    Attributes:
        noun: its name without article.
        prepositions: what may stand before the noun.
        idioms: whole phrases that place an object there without the noun.
        tinted: whether a tint colours the noun itself; otherwise it colours a sky above it.
    """

    noun: str
    prepositions: tuple[str, ...]
    idioms: tuple[str, ...] = ()
    tinted: bool = False


_PLACES = {
    "meadow": _Place("meadow", ("on", "in")),
    "beach": _Place("beach", ("on",), ("at the beach",)),
    "night": _Place("night sky", ("under",), ("at night",)),
    "clouds": _Place("cloudy sky", ("in",), ("among the clouds",), tinted=True),
    "snow": _Place("snowy field", ("on",), ("in the snow",)),
    "bricks": _Place("brick wall", ("in front of", "against"), tinted=True),
}


def with_article(words: str) -> str:
    """``words`` after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def background_phrase(background: str, tint: str | None = None) -> str:
    """The background alone: "a beach", "a pink brick wall", "a meadow under an orange sky"."""
    place = _PLACES[background]
    noun = f"{tint} {place.noun}" if tint and place.tinted else place.noun
    return with_article(noun) + _sky(place, tint)


def where_phrases(background: str, tint: str | None = None) -> tuple[str, ...]:
    """All ways to say that something is there, the plainest first: ("on a beach", "at the beach")."""
    place = _PLACES[background]
    phrases = [f"{preposition} {background_phrase(background, tint)}" for preposition in place.prepositions]
    if not (tint and place.tinted):
        phrases += [idiom + _sky(place, tint) for idiom in place.idioms]
    return tuple(phrases)


def object_phrases(item: SceneObject) -> tuple[str, ...]:
    """All ways to name an object with its colours, pattern and parts, and its size where that is remarkable."""
    look = item.look
    worn = " and ".join(look.garments)
    extras = [with_article(f"{look.accent} {worn}")] if worn else []
    extras += ["a face"] if "face" in look.parts else []
    pair = f"{look.colour} and {look.second}"
    coats: dict[str, list[tuple[str, list[str]]]] = {
        "plain": [(f"{look.colour} {item.kind}", [])],
        "striped": [(f"{pair} striped {item.kind}", []), (f"{look.colour} {item.kind}", [f"{look.second} stripes"])],
        "dotted": [(f"{pair} dotted {item.kind}", []), (f"{look.colour} {item.kind}", [f"{look.second} dots"])],
        "two-tone": [(f"{pair} two-tone {item.kind}", []), (f"half {look.colour} half {look.second} {item.kind}", [])],
    }
    phrases = [noun + _with([*marks, *extras]) for noun, marks in coats[look.pattern]]
    size = "small " if item.size < SMALL else "big " if item.size > BIG else ""
    return tuple(with_article(words) for words in (*phrases, *(size + phrase for phrase in phrases if size)))


def full_captions(scene: Scene) -> tuple[str, ...]:
    """All phrasings that name every object with its whole look, and the background; the left object comes first.

    A scene without objects has those of its background alone.
    """
    wheres = where_phrases(scene.background, scene.tint)
    if not scene.objects:
        return _framed(background_phrase(scene.background, scene.tint))
    things = object_phrases(scene.objects[0])
    for item in scene.objects[1:]:
        things = tuple(f"{a} {link} {b}" for a in things for b in object_phrases(item) for link in ("and", "next to"))
    plain = [f"{thing} {where}" for thing in things for where in wheres]
    framed = [caption for phrase in plain for caption in _framed(phrase)]
    return (*framed, *(f"a photo of {thing}, {where}" for thing in things for where in wheres))


def short_captions(scene: Scene) -> tuple[str, ...]:
    """Captions that leave something out: class only, class and coat colours, class and background, background only."""
    background = background_phrase(scene.background, scene.tint)
    if not scene.objects:
        return (background,)
    kinds = " and ".join(with_article(item.kind) for item in scene.objects)
    colours = " and ".join(
        with_article(" and ".join(filter(None, (item.look.colour, item.look.second))) + f" {item.kind}")
        for item in scene.objects
    )
    where = where_phrases(scene.background, scene.tint)[0]
    return (kinds, f"a photo of {kinds}", colours, f"a photo of {colours}", f"{kinds} {where}", background)


def random_caption(scene: Scene, seed: int, index: int) -> str:
    """One caption of the scene, a pure function of all arguments; ``SHORT`` of them are short ones."""
    dice = random.Random(f"caption {seed} {index}")
    return dice.choice(short_captions(scene) if dice.random() < SHORT else full_captions(scene))


def _framed(phrase: str) -> tuple[str, ...]:
    return (phrase, f"a photo of {phrase}", f"a picture of {phrase}")


def _sky(place: _Place, tint: str | None) -> str:
    return f" under {with_article(tint)} sky" if tint and not place.tinted else ""


def _with(extras: list[str]) -> str:
    return f" with {' and '.join(extras)}" if extras else ""
