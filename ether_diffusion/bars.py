"""The bar of work that takes a while before a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from ether_diffusion.logs import informs

T = TypeVar("T")


def hidden() -> bool | None:
    """What ``disable`` of a bar is: True in any process but the first, and where a program prints no information.

    None lets the bar hide itself where the standard error is no terminal.
    """
    return None if informs() else True


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with a bar on the standard error that disappears at the end.

    Args:
        items: with a length.
        what: is done with them, such as ``class images``.
    """
    yield from tqdm(items, desc=what, leave=False, disable=hidden(), dynamic_ncols=True)
