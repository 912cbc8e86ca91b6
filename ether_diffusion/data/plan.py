"""Which picture each sample of each step is: a pure function of the seed and the step.

Nothing is carried from step to step, so a resumed run, another number of processes and another accumulation
see the same samples.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import Sampler

from ether_diffusion.data.randomness import generator

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """One sample of a run.

    Args:
        index: which picture.
        counter: the sample's number in the run, from 0; the key of its randomness.
    """

    index: int
    counter: int


class BatchPlan:
    """An endless plan of batches, each of pictures of one group.

    With one group the pictures are an endless stream of permutations: each is seen once per pass, and a batch
    may cross from one pass to the next. With several, each group is such a stream, cut into batches: what fills
    no batch is carried over to the group's next pass. A cycle is the fewest passes after which nothing is carried
    over, so that it shows each picture equally often; the batches of a group lie evenly over it: after any share
    of a cycle a group has had that share of its batches, within one batch.

    Args:
        groups: ``groups[i]`` is the group of picture ``i``: pictures of one group have one size.
        batch_size: samples per optimizer step: processes × accumulation × samples per device.
        seed: of the permutations.

    Attributes:
        passes: over the pictures, in one cycle.

    Raises:
        ValueError: there are no pictures, or ``batch_size`` is not positive.
    """

    def __init__(self, groups: Sequence[Hashable], batch_size: int, seed: int) -> None:
        if not groups:
            raise ValueError("got no pictures to plan batches of, expected at least one group entry")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self.batch_size = batch_size
        self._members = list(members.values())
        self.passes = 1
        if len(members) > 1:
            self.passes = batch_size // math.gcd(batch_size, *(len(group) for group in self._members))
        self._seed = seed
        self._cycle_number = 0
        self._cycle = self._shuffled_cycle(0)

    def batch(self, step: int) -> list[Draw]:
        """Return the ``batch_size`` samples of ``step``, counted from 0.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        first = step * self.batch_size
        return [Draw(self._index(counter), counter) for counter in range(first, first + self.batch_size)]

    def seen(self, first_step: int, end_step: int) -> Counter[int]:
        """How often the steps, from the first to before the last, show each picture that they show."""
        counts: Counter[int] = Counter()
        start, end = first_step * self.batch_size, end_step * self.batch_size
        length = len(self._cycle)
        while start < end:
            if start % length == 0 and (cycles := (end - start) // length):
                counts.update({index: self.passes * cycles for group in self._members for index in group})
                start += cycles * length
            else:
                stop = min(end, (start // length + 1) * length)
                counts.update(self._index(counter) for counter in range(start, stop))
                start = stop
        return counts

    def _index(self, counter: int) -> int:
        """Every cycle has the same length, so the counter alone says which cycle and where in it."""
        cycle_number, position = divmod(counter, len(self._cycle))
        if cycle_number != self._cycle_number:
            self._cycle = self._shuffled_cycle(cycle_number)
            self._cycle_number = cycle_number
        return self._cycle[position]

    def _shuffled_cycle(self, cycle_number: int) -> list[int]:
        random = generator(self._seed, "plan", cycle_number)
        if len(self._members) == 1:
            return _shuffled(self._members[0], random)
        placed: list[tuple[float, list[int]]] = []
        for members in self._members:
            stream = [index for _ in range(self.passes) for index in _shuffled(members, random)]
            batches = [stream[start : start + self.batch_size] for start in range(0, len(stream), self.batch_size)]
            jitter = torch.rand(len(batches), generator=random, dtype=torch.float64).tolist()
            placed += [((number + jitter[number]) / len(batches), batch) for number, batch in enumerate(batches)]
        return [index for _, batch in sorted(placed, key=lambda each: each[0]) for index in batch]


class EndlessPlan:
    """Batches of a source that never repeats itself: sample ``n`` of the run is its picture ``n``.

    Args:
        batch_size: samples per optimizer step: processes × accumulation × samples per device.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def batch(self, step: int) -> list[Draw]:
        """Return the ``batch_size`` samples of ``step``, counted from 0."""
        first = step * self.batch_size
        return [Draw(counter, counter) for counter in range(first, first + self.batch_size)]


class MicroBatches(Sampler[list[Draw]]):
    """One process's share of a plan's batches, as the ``batch_sampler`` of a ``DataLoader``.

    Round ``r`` of process ``p`` takes the ``micro_batch_size`` samples of the batch from position
    ``(r * num_processes + p) * micro_batch_size``; a step has
    ``batch_size / (num_processes * micro_batch_size)`` rounds.

    Args:
        plan: the batches of the whole run.
        start_step: the first step to yield.
        end_step: the step to stop before; ``None`` goes on forever.
        micro_batch_size: samples per device and round.
        process_index: this process, from 0.
        num_processes: how many processes share each batch.

    Raises:
        ValueError: the rounds do not divide the plan's batch, or ``process_index`` is no process.
    """

    def __init__(
        self,
        plan: BatchPlan | EndlessPlan,
        start_step: int,
        end_step: int | None,
        micro_batch_size: int,
        process_index: int,
        num_processes: int,
    ) -> None:
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}, expected 0 to {num_processes - 1}")
        if micro_batch_size < 1 or plan.batch_size % (micro_batch_size * num_processes):
            raise ValueError(
                f"a batch of {plan.batch_size} does not divide into rounds of {num_processes} processes × "
                f"{micro_batch_size} samples; make the batch a multiple of their product"
            )
        self.plan = plan
        self.steps = (start_step, end_step)
        self.micro_batch_size = micro_batch_size
        self.process_index = process_index
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[Draw]]:
        start_step, end_step = self.steps
        round_size = self.micro_batch_size * self.num_processes
        offset = self.process_index * self.micro_batch_size
        for step in itertools.count(start_step) if end_step is None else range(start_step, end_step):
            batch = self.plan.batch(step)
            for start in range(offset, self.plan.batch_size, round_size):
                yield batch[start : start + self.micro_batch_size]


def _shuffled(items: Sequence[T], random: torch.Generator) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]
