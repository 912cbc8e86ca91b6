from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from ether_diffusion.data.plan import BatchPlan, Draw, MicroBatches

BUCKETS = ["square"] * 7 + ["wide"] * 5 + ["tall"]  # with batches of 4: 13 batches in a cycle of 4 passes


def indices(plan: BatchPlan, steps: range) -> list[int]:
    return [draw.index for step in steps for draw in plan.batch(step)]


def test_single_group_covers_each_picture_once_per_pass() -> None:
    stream = indices(BatchPlan(["square"] * 7, batch_size=3, seed=0), range(70))
    passes = [stream[start : start + 7] for start in range(0, 210, 7)]
    assert all(sorted(one_pass) == list(range(7)) for one_pass in passes)
    assert len(set(map(tuple, passes))) > 20


def test_batch_larger_than_the_folder_spans_passes() -> None:
    stream = indices(BatchPlan([0, 0, 0], batch_size=8, seed=0), range(3))
    assert Counter(stream) == {0: 8, 1: 8, 2: 8}


def test_every_picture_comes_first_equally_often() -> None:
    plan, n = BatchPlan([None] * 5, batch_size=5, seed=0), 1000
    first = Counter(plan.batch(step)[0].index for step in range(n))
    chi_squared = sum((first[index] - n / 5) ** 2 / (n / 5) for index in range(5))
    assert chi_squared < 18.5  # 4 degrees of freedom, p = 0.001


def test_every_batch_has_one_group_and_every_cycle_shows_all_pictures_equally_often() -> None:
    plan = BatchPlan(BUCKETS, batch_size=4, seed=0)
    for first_step in range(0, 130, 13):
        batches = [[draw.index for draw in plan.batch(first_step + i)] for i in range(13)]
        assert all(len({BUCKETS[index] for index in batch}) == 1 for batch in batches)
        assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(13), 4)


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 13), (2, 13), (3, 13), (4, 13), (6, 13)])
def test_a_lone_shape_is_seen_as_often_as_any_picture(batch_size: int, steps: int) -> None:
    seen = BatchPlan(BUCKETS, batch_size, seed=1).seen(0, steps)
    assert seen == dict.fromkeys(range(13), batch_size)


def test_after_any_share_of_a_cycle_a_group_has_had_that_share_of_its_batches() -> None:
    groups = ["square"] * 40 + ["wide"] * 23 + ["tall"]
    plan, had = BatchPlan(groups, batch_size=5, seed=0), Counter[str]()
    for step in range(256):
        had[groups[plan.batch(step)[0].index]] += 1
        for name, size in Counter(groups).items():
            # at time t of a cycle each group has t of its batches but for less than one, e; in batches,
            # e (1 - p) of its own and p e of each of the two others
            assert abs(had[name] - (step + 1) * size / 64) < 1 + size / 64, (step, name)


def test_within_a_pass_of_a_group_no_picture_comes_twice() -> None:
    stream = [index for index in indices(BatchPlan(BUCKETS, batch_size=4, seed=0), range(52)) if index < 7]
    passes = [stream[start : start + 7] for start in range(0, len(stream), 7)]
    assert all(sorted(one_pass) == list(range(7)) for one_pass in passes)


def test_order_of_the_groups_is_shuffled_in_each_cycle() -> None:
    plan = BatchPlan(BUCKETS, batch_size=4, seed=0)
    orders = {tuple(BUCKETS[plan.batch(13 * p + i)[0].index] for i in range(13)) for p in range(60)}
    assert len(orders) > 50


@pytest.mark.parametrize("groups", [["square"] * 7, BUCKETS])
@pytest.mark.parametrize("steps", [(0, 0), (0, 1), (3, 40), (13, 26), (5, 130)])
def test_the_record_counts_what_the_batches_have(groups: list[str], steps: tuple[int, int]) -> None:
    plan = BatchPlan(groups, 4, seed=2)
    counted = Counter(draw.index for step in range(*steps) for draw in plan.batch(step))
    assert BatchPlan(groups, 4, seed=2).seen(*steps) == counted


def test_one_group_is_the_plan_of_version_0_1() -> None:
    """Pinned, so that a run of 0.1 goes on as it began."""
    assert indices(BatchPlan(["square"] * 7, 3, seed=0), range(5)) == [3, 1, 4, 0, 2, 5, 6, 6, 2, 4, 5, 1, 3, 0, 1]


def test_counters_number_the_samples_of_the_run() -> None:
    plan = BatchPlan(BUCKETS, batch_size=4, seed=0)
    assert [draw.counter for step in range(20) for draw in plan.batch(step)] == list(range(80))


@pytest.mark.parametrize("groups", [["square"] * 7, BUCKETS])
def test_batch_is_a_pure_function_of_seed_and_step(groups: list[str]) -> None:
    in_order = [BatchPlan(groups, 4, seed=3).batch(step) for step in range(30)]
    plan = BatchPlan(groups, 4, seed=3)
    assert [plan.batch(step) for step in reversed(range(30))] == in_order[::-1]
    assert [BatchPlan(groups, 4, seed=4).batch(step) for step in range(30)] != in_order


@pytest.mark.parametrize("groups", [["square"] * 7, BUCKETS])
def test_processes_and_accumulation_share_out_the_same_samples(groups: list[str]) -> None:
    plan = BatchPlan(groups, batch_size=4, seed=0)

    def step_samples(micro_batch_size: int, num_processes: int) -> list[set[Draw]]:
        rounds = 4 // (micro_batch_size * num_processes)
        shares = [
            list(MicroBatches(plan, 0, 10, micro_batch_size, process, num_processes))
            for process in range(num_processes)
        ]
        assert all(len(share) == 10 * rounds for share in shares)
        assert all(len(micro) == micro_batch_size for share in shares for micro in share)
        return [
            {draw for share in shares for micro in share[step * rounds : (step + 1) * rounds] for draw in micro}
            for step in range(10)
        ]

    whole = [set(plan.batch(step)) for step in range(10)]
    for layout in [(4, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 4)]:
        assert step_samples(*layout) == whole, layout


def test_rounds_are_laid_out_process_by_process() -> None:
    plan = BatchPlan(["square"] * 100, batch_size=12, seed=0)
    second_of_three = list(MicroBatches(plan, 0, 1, 2, 1, 3))
    assert [[draw.counter for draw in micro] for micro in second_of_three] == [[2, 3], [8, 9]]


@pytest.mark.parametrize("groups", [["square"] * 7, BUCKETS])
def test_resumed_stream_is_the_tail_of_the_whole(groups: list[str]) -> None:
    whole = list(MicroBatches(BatchPlan(groups, 4, seed=0), 0, 20, 1, 1, 2))
    resumed = list(MicroBatches(BatchPlan(groups, 4, seed=0), 13, 20, 1, 1, 2))
    assert resumed == whole[13 * 2 :]


def test_without_a_last_step_the_stream_goes_on() -> None:
    plan = BatchPlan([0, 0, 0], batch_size=2, seed=0)
    endless = MicroBatches(plan, 3, None, 2, 0, 1)
    assert list(islice(endless, 50)) == [plan.batch(step) for step in range(3, 53)]


class Counters:
    """A dataset whose item is the sample's counter."""

    def __getitem__(self, draw: Draw) -> int:
        return draw.counter


def test_data_loader_takes_it_as_its_batch_sampler() -> None:
    sampler = MicroBatches(BatchPlan([0] * 5, batch_size=2, seed=0), 1, 4, 2, 0, 1)
    loader: DataLoader[list[int]] = DataLoader(Counters(), batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
    assert list(loader) == [[2, 3], [4, 5], [6, 7]]


def test_impossible_plans_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        BatchPlan([], 1, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchPlan([0], 0, 0)
    plan = BatchPlan([0], 4, 0)
    with pytest.raises(ValueError, match="step is -1"):
        plan.batch(-1)
    with pytest.raises(ValueError, match=r"batch of 4 .* 3 processes × 1"):
        MicroBatches(plan, 0, None, 1, 0, 3)
    with pytest.raises(ValueError, match=r"4 does not divide .* 0 samples"):
        MicroBatches(plan, 0, None, 0, 0, 1)
    with pytest.raises(ValueError, match="process_index is 2, expected 0 to 1"):
        MicroBatches(plan, 0, None, 1, 2, 2)
