"""Semantic maps made by a model, for pictures that come without conditions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import device as Device

from ether_diffusion.bars import progress
from ether_diffusion.control.conditions import load_condition, palette_map
from ether_diffusion.data.pairs import Pair, PairSource
from ether_diffusion.files import atomic_path
from ether_diffusion.metrics.segmentation import Segmenter


class SegmentedPairs:
    """The pictures of a source with the maps that a segmenter sees in them, in :data:`MAP_PALETTE`'s colours.

    All maps are made at once and kept as palette PNGs in ``folder``, under a hash of the picture's pixels and the
    segmenter's weights, so that a resumed run, and other runs with the same cache, make none anew.

    Args:
        source: the pictures.
        segmenter: Hub id, folder or playground.
        folder: where the maps are kept.
        device: where the segmenter computes.

    Raises:
        OSError: the segmenter cannot be loaded.
        ValueError: it is no segmentation model, or sees more classes than there are colours for.
        UnreadableImageError: a picture is broken; the message names it.
    """

    endless = False

    def __init__(self, source: PairSource, segmenter: str, folder: Path, device: Device) -> None:
        self.source = source
        judge = Segmenter(segmenter, device)
        seen = json.dumps([judge.identity["weights"], judge.identity["preprocessing"]])
        self.classes: list[str] = judge.names
        self.maps: list[Path] = []
        for index in progress(range(len(source)), "semantic maps"):
            image = source.pair(index).image
            content = hashlib.sha256(f"{seen} {image.size}".encode() + image.tobytes()).hexdigest()
            path = folder / f"{content}.png"
            if not path.is_file():
                (ids,) = judge.maps([image])
                picture = palette_map(ids)
                with atomic_path(path) as temporary:
                    picture.save(temporary, "PNG")
            self.maps.append(path)

    def __len__(self) -> int:
        return len(self.source)

    def pair(self, index: int) -> Pair:
        """The picture of that number with its map."""
        known = self.source.pair(index)
        return replace(known, condition=load_condition(self.maps[index], True))

    def captions(self) -> Iterable[str]:
        """Those of the source."""
        return self.source.captions()
