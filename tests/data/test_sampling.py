from __future__ import annotations

import itertools

import numpy as np
import pytest

from slidevlm.data.sampling import EvalBatches, TrainBatches, balanced, generator
from slidevlm.errors import ConfigError


def test_ranks_and_accumulation_make_up_one_large_batch():
    whole = TrainBatches(53, 12, seed=3)
    parts = [TrainBatches(53, 2, seed=3, rank=r, world_size=3, accum_freq=2) for r in range(3)]
    for epoch in (0, 1):
        for sampler in (whole, *parts):
            sampler.set_epoch(epoch)
        steps = [list(p) for p in parts]
        assert all(len(s) == len(p) == 8 for s, p in zip(steps, parts, strict=True))
        for number, batch in enumerate(whole):
            micro = [steps[r][2 * number + k] for k in range(2) for r in range(3)]
            assert list(itertools.chain(*micro)) == batch


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = TrainBatches(50, 5, seed)
        sampler.set_epoch(epoch)
        return [index for batch in sampler for _, index in batch]

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1, -1) for e in (0, 1)}) == 6


def test_going_on_within_an_epoch():
    sampler = TrainBatches(53, 5, 0)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.set_epoch(4, start_batch=7)
    assert list(sampler) == whole[7:] and len(sampler) == 10
    assert {epoch for batch in whole for epoch, _ in batch} == {4}
    sampler.set_epoch(5)
    assert len(list(sampler)) == 10


def test_too_few_specimens():
    with pytest.raises(
        ConfigError, match=r"10 training .* one step of 48 .*lower --batch-size to at most 1"
    ):
        TrainBatches(10, 8, 0, 0, 2, 3)
    with pytest.raises(ConfigError, match="lower --accum-freq or use fewer processes"):
        TrainBatches(3, 8, 0, 0, 2, 3)


# --- by length ------------------------------------------------------------------------------

# Few large bags and many small ones, as cohorts are.
LENGTHS = (np.random.default_rng(0).lognormal(7, 1.2, 203) + 1).astype(np.int64)


def steps_of(epoch, ranks, accum_freq, batch_size, **options):
    """What the ranks take of each step: [step][rank][micro-batch] lists of indices."""
    parts = []
    for rank in range(ranks):
        sampler = TrainBatches(203, batch_size, 0, rank, ranks, accum_freq, **options)
        sampler.set_epoch(epoch)
        batches = [[index for _, index in batch] for batch in sampler]
        assert len(batches) == len(sampler) and {len(b) for b in batches} == {batch_size}
        parts.append([batches[i : i + accum_freq] for i in range(0, len(batches), accum_freq)])
    return [[part[step] for part in parts] for step in range(len(parts[0]))]


def sets(steps):
    return [sorted(i for rank in step for micro in rank for i in micro) for step in steps]


@pytest.mark.parametrize("similar", [False, True])
def test_steps_are_the_same_at_any_number_of_processes(similar):
    options = {"lengths": LENGTHS, "similar": similar}
    for epoch in (0, 1):
        whole = sets(steps_of(epoch, 1, 1, 24, **options))
        assert len(whole) == 8 and len({i for step in whole for i in step}) == 8 * 24
        for ranks, accum_freq in ((2, 1), (1, 2), (4, 3), (3, 2)):
            size = 24 // ranks // accum_freq
            assert sets(steps_of(epoch, ranks, accum_freq, size, **options)) == whole
        assert whole != sets(steps_of(epoch + 1, 1, 1, 24, **options))


def test_balancing_leaves_the_steps_as_they_are():
    plain = [TrainBatches(203, 6, 5, r, 2, 2) for r in range(2)]
    even = [TrainBatches(203, 6, 5, r, 2, 2, lengths=LENGTHS) for r in range(2)]
    for a, b in zip(zip(*plain, strict=True), zip(*even, strict=True), strict=True):
        assert a != b
    taken = [
        [{i for s in samplers for b in list(s)[k : k + 2] for _, i in b} for k in range(0, 16, 2)]
        for samplers in (plain, even)
    ]
    assert taken[0] == taken[1]


def test_balanced_batches_are_even():
    def worst(**options):
        totals = [
            [sum(int(LENGTHS[micro].sum()) for micro in rank) for rank in step]
            for step in steps_of(0, 4, 2, 6, **options)
        ]
        return np.mean([max(t) / np.mean(t) for t in totals])

    assert worst() > 1.3 and worst(lengths=LENGTHS) < 1.05


def test_similar_steps_are_similar_and_mixed():
    def spread(**options):
        return np.mean([np.log(LENGTHS[s]).std() for s in sets(steps_of(0, 1, 1, 8, **options))])

    assert spread(lengths=LENGTHS, similar=True) < spread() / 3
    means = [LENGTHS[s].mean() for s in sets(steps_of(0, 1, 1, 8, lengths=LENGTHS, similar=True))]
    rising = np.mean(np.diff(means) > 0)
    assert 0.2 < rising < 0.8, "the order of the steps is drawn"


@pytest.mark.parametrize("similar", [False, True])
def test_going_on_within_an_epoch_by_length(similar):
    def sampler(start):
        made = TrainBatches(203, 4, 0, 1, 2, 3, lengths=LENGTHS, similar=similar)
        made.set_epoch(2, start)
        return list(made)

    assert sampler(9) == sampler(0)[9:] and sampler(0)


def test_lengths_id_tells_what_the_steps_depend_on():
    other = LENGTHS.copy()
    other[3] += 1
    plain, even = TrainBatches(203, 4, 0), TrainBatches(203, 4, 0, lengths=LENGTHS)
    assert plain.lengths_id() == even.lengths_id() == 0
    ids = [TrainBatches(203, 4, 0, lengths=x, similar=True).lengths_id() for x in (LENGTHS, other)]
    assert 0 not in ids and ids[0] != ids[1]


@pytest.mark.parametrize("parts", [1, 3, 8, 24])
def test_balanced_is_a_parting(parts):
    lengths = np.random.default_rng(parts).integers(0, 1000, 24)
    groups = balanced(lengths, parts)
    assert groups.shape == (parts, 24 // parts) and sorted(groups.ravel()) == list(range(24))
    totals = lengths[groups].sum(1)
    assert totals.max() - totals.min() <= lengths.max()


@pytest.mark.parametrize(("n", "size", "ranks"), [(10, 3, 1), (10, 3, 4), (2, 5, 3), (0, 2, 1)])
def test_evaluation_counts_each_once(n, size, ranks):
    samplers = [EvalBatches(n, size, r, ranks) for r in range(ranks)]
    batches = [list(s) for s in samplers]
    assert sorted(i for b in batches for batch in b for i in batch) == list(range(n))
    assert [len(b) for b in batches] == [len(s) for s in samplers]
    assert all(len(batch) <= size for b in batches for batch in b)
    alone = list(EvalBatches(n, size))
    assert sorted(batch for b in batches for batch in b) == alone, "of one process"


def test_generator_depends_on_its_parts():
    first = [generator(*parts).integers(2**60) for parts in [("a", 1), ("a", 1), ("a1",), (1, "a")]]
    assert first[0] == first[1] and len(set(first)) == 3
