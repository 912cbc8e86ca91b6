"""Which picture each sample of each step is: a pure function of the seed and the step.

Nothing is carried from step to step, so a resumed run, another number of processes and another accumulation
see the same samples.
"""

from __future__ import annotations

import itertools
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
    may cross from one pass to the next. With several, a pass shuffles every group, cuts it into batches,
    fills its last batch from a fresh shuffle of the group, and shuffles the order of all batches.

    Args:
        groups: ``groups[i]`` is the group of picture ``i``: pictures of one group have one size.
        batch_size: samples per optimizer step: processes × accumulation × samples per device.
        seed: of the permutations.

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
        self._seed = seed
        self._pass_number = 0
        self._pass = self._shuffled_pass(0)

    def batch(self, step: int) -> list[Draw]:
        """Return the ``batch_size`` samples of ``step``, counted from 0.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        first = step * self.batch_size
        return [Draw(self._index(counter), counter) for counter in range(first, first + self.batch_size)]

    def _index(self, counter: int) -> int:
        """Every pass has the same length, so the counter alone says which pass and where in it."""
        pass_number, position = divmod(counter, len(self._pass))
        if pass_number != self._pass_number:
            self._pass = self._shuffled_pass(pass_number)
            self._pass_number = pass_number
        return self._pass[position]

    def _shuffled_pass(self, pass_number: int) -> list[int]:
        random = generator(self._seed, "plan", pass_number)
        if len(self._members) == 1:
            return _shuffled(self._members[0], random)
        batches = [batch for members in self._members for batch in self._group_batches(members, random)]
        return [index for batch in _shuffled(batches, random) for index in batch]

    def _group_batches(self, members: list[int], random: torch.Generator) -> list[list[int]]:
        n_batches = -(-len(members) // self.batch_size)
        stream: list[int] = []
        while len(stream) < n_batches * self.batch_size:
            stream += _shuffled(members, random)
        return [stream[i * self.batch_size : (i + 1) * self.batch_size] for i in range(n_batches)]


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
