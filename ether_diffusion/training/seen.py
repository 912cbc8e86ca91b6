"""How often a training shows each of its pictures: what stands in the record of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ether_diffusion.data.plan import BatchPlan
from ether_diffusion.runs.folder import read_provenance, step_of

BUCKETS = "buckets"
"""In ``provenance.json`` of a run with buckets: their sizes and pictures."""
PLANNED = "pictures_planned"
"""In ``provenance.json`` from the start on: how often the whole run is going to show each picture."""
SEEN = "pictures_seen"
"""There when a run has ended, however it ended, unless it was killed: how often it did."""


@dataclass(frozen=True)
class Stream:
    """One stream of pictures of a training.

    Attributes:
        name: of the stream.
        plan: which picture each sample is.
        pictures: how many there are.
        names: of the pictures; none where there may be too many to list.
        sizes: (height, width) that each is cut to, where they differ.
    """

    name: str
    plan: BatchPlan
    pictures: int
    names: Sequence[str] = ()
    sizes: Sequence[tuple[int, int]] = ()

    def until(self, first_step: int, end_step: int) -> dict[str, Any]:
        """How often the steps show a picture: ``fewest``, ``most``, and the ``times`` of each that has a name."""
        counts = self.plan.seen(first_step, end_step)
        times = [counts[index] for index in range(self.pictures)]
        named = {"times": dict(zip(self.names, times, strict=True))} if self.names else {}
        return {"batch": self.plan.batch_size, "fewest": min(times), "most": max(times), **named}

    def buckets(self, first_step: int, end_step: int) -> dict[str, Any]:
        """The sizes with the number of their pictures, and how often the steps show each of these.

        In an epoch every picture is seen once, whatever its size. What fills no batch waits for the next epoch; after
        ``epochs_of_a_cycle`` nothing waits.
        """
        counts = self.plan.seen(first_step, end_step)
        rows = []
        for size in sorted(set(self.sizes)):
            times = [counts[index] for index, own in enumerate(self.sizes) if own == size]
            height, width = size
            row = {"height": height, "width": width, "pictures": len(times), "seen_per_epoch": 1}
            rows.append({**row, "fewest": min(times), "most": max(times)})
        return {"epochs_of_a_cycle": self.plan.passes, "sizes": rows}


@dataclass(frozen=True)
class Seen:
    """All streams of a training, and the first step that they decide: of a resumed run it may be a later one."""

    streams: Sequence[Stream]
    since_step: int = 0

    def until(self, step: int) -> dict[str, Any]:
        """The record of the steps up to ``step``."""
        since = self.since_step
        return {
            "since_step": since,
            "until_step": step,
            **{stream.name: stream.until(since, max(since, step)) for stream in self.streams},
        }

    def buckets(self, step: int) -> dict[str, Any]:
        """The buckets of the streams that have some, and how often their pictures are shown up to ``step``."""
        since = self.since_step
        return {each.name: each.buckets(since, max(since, step)) for each in self.streams if each.sizes}

    def resumed(self, before: Mapping[str, Any], step: int) -> Seen:
        """The same for a run that goes on from ``step``, where ``before`` is the provenance so far.

        If it had other pictures or another batch, only what follows ``step`` is known.
        """
        known = before.get(PLANNED)
        if not isinstance(known, dict) or not isinstance(since := known.get("since_step"), int) or since > step:
            return replace(self, since_step=step)
        now = self.until(step)
        same = all(_identity(known.get(stream.name)) == _identity(now[stream.name]) for stream in self.streams)
        return replace(self, since_step=since if same else step)


def _identity(stream: Any) -> object:
    """What the plan of a recorded stream depends on."""
    if not isinstance(stream, dict):
        return None
    return stream.get("batch"), sorted(stream.get("times", {}))


def seen_by(output_dir: Path, checkpoint: Path | None, streams: Sequence[Stream]) -> Seen:
    """The streams of a run, which goes on from ``checkpoint`` if there is one."""
    seen = Seen(streams)
    return seen if checkpoint is None else seen.resumed(read_provenance(output_dir), step_of(checkpoint))
