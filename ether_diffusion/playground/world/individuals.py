"""The subjects' looks, and the rule that keeps them out of the training scenes."""

from __future__ import annotations

from ether_diffusion.playground.world.looks import Look

INDIVIDUALS: dict[str, tuple[str, Look]] = {
    "striped-robot": ("robot", Look("red", "striped", "yellow", 0, ("antenna",), "blue")),
    "scarf-robot": ("robot", Look("white", "dotted", "purple", 0, ("scarf",), "orange")),
    "clown-fish": ("fish", Look("orange", "striped", "white", 90, ("hat",), "green")),
    "dotted-fish": ("fish", Look("pink", "dotted", "blue")),
    "gala-house": ("house", Look("yellow", "two-tone", "blue", 90, ("hat",), "red")),
    "candy-house": ("house", Look("pink", "striped", "white", 45)),
    "apple-tree": ("tree", Look("green", "dotted", "red", 0, ("face",))),
    "scarf-tree": ("tree", Look("orange", "two-tone", "purple", 45, ("scarf",), "blue")),
    "harlequin-ball": ("ball", Look("purple", "two-tone", "yellow", 45, ("hat", "face"), "green")),
    "beach-ball": ("ball", Look("blue", "striped", "orange", 90, ("antenna",), "pink")),
    "jolly-star": ("star", Look("blue", "striped", "pink", 0, ("antenna", "face"), "red")),
    "patched-heart": ("heart", Look("red", "two-tone", "white", 90, ("face",))),
    "gift-box": ("box", Look("green", "striped", "pink", 90, ("hat", "face"), "purple")),
}
"""Name to class word and look. Every one has two colours on its coat."""


def reserved(kind: str, colours: frozenset[str]) -> bool:
    """Whether a coat of these colours, in any pattern, belongs to an individual of this class.

    The training scenes have no such object: not the individual in other clothes, nor its colours in other patterns.
    """
    return any((kind, colours) == (other, look.coat) for other, look in INDIVIDUALS.values())
