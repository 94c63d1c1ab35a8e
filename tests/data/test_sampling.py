from __future__ import annotations

import itertools

import pytest

from slidevlm.data.sampling import EvalBatches, TrainBatches, generator
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


@pytest.mark.parametrize(("n", "size", "ranks"), [(10, 3, 1), (10, 3, 4), (2, 5, 3), (0, 2, 1)])
def test_evaluation_counts_each_once(n, size, ranks):
    samplers = [EvalBatches(n, size, r, ranks) for r in range(ranks)]
    batches = [list(s) for s in samplers]
    assert sorted(i for b in batches for batch in b for i in batch) == list(range(n))
    assert [len(b) for b in batches] == [len(s) for s in samplers]
    assert all(len(batch) <= size for b in batches for batch in b)


def test_generator_depends_on_its_parts():
    first = [generator(*parts).integers(2**60) for parts in [("a", 1), ("a", 1), ("a1",), (1, "a")]]
    assert first[0] == first[1] and len(set(first)) == 3
