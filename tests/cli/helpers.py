"""What the tests of the command share."""

from __future__ import annotations

from collections.abc import Iterator

from ether_diffusion.cli.verbs import ETHER, Group, Program


def programs(group: Group = ETHER, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Program]]:
    """Every program with the words after ``ether`` that run it."""
    for verb in group.verbs.values():
        if isinstance(verb, Group):
            yield from programs(verb, (*words, verb.name))
        else:
            yield (*words, verb.name), verb
