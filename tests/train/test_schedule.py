"""The course of the learning rate against the contract's formulas, at every edge."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidevlm.train.schedule import constant, constant_cooldown, cosine

rates = st.floats(0, 1, allow_subnormal=False)
steps = st.integers(0, 300)


@given(rate=rates, warmup=steps, total=st.integers(1, 300))
def test_cosine_is_the_contracts_formula(rate: float, warmup: int, total: int) -> None:
    at = cosine(rate, warmup, total)
    for s in range(total):
        if s < warmup:
            expected = rate * (s + 1) / warmup
        else:
            expected = rate * (1 + math.cos(math.pi * (s - warmup) / (total - warmup))) / 2
        assert at(s) == pytest.approx(expected, rel=1e-12)


def test_cosine_by_hand() -> None:
    at = cosine(1.0, 4, 8)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [at(s) for s in range(8)] == pytest.approx(expected)
    assert at(8) == 0 and at(9) == 0, "past the end it stays at 0, and does not rise again"


def test_without_warmup_the_first_step_has_the_whole_rate() -> None:
    for at in (cosine(0.5, 0, 7), constant(0.5, 0), constant_cooldown(0.5, 0, 7, 2, 1.0, 0.0)):
        assert at(0) == 0.5


@pytest.mark.parametrize("warmup", [8, 9, 1000])
def test_a_warmup_as_long_as_the_training_or_longer(warmup: int) -> None:
    for at in (
        cosine(1.0, warmup, 8),
        constant(1.0, warmup),
        constant_cooldown(1.0, warmup, 8, 4, 1.0, 0.0),
    ):
        assert [at(s) for s in range(8)] == pytest.approx([(s + 1) / warmup for s in range(8)])


def test_one_step() -> None:
    assert cosine(0.3, 0, 1)(0) == 0.3
    assert cosine(0.3, 1, 1)(0) == 0.3
    assert constant_cooldown(0.3, 0, 1, 1, 1.0, 0.0)(0) == 0.3


def test_constant_stays_after_the_warmup() -> None:
    at = constant(2.0, 4)
    assert [at(s) for s in (0, 3, 4, 5, 10**9)] == [0.5, 2.0, 2.0, 2.0, 2.0]


def test_cooldown_by_hand() -> None:
    at = constant_cooldown(1.0, 2, 10, 4, 2.0, 0.2)
    # Elapsed 0, 1, 2, 3 of 4: 0.8 (1 - e/4)^2 + 0.2 from step 6 on.
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.65, 0.4, 0.25]
    assert [at(s) for s in range(10)] == pytest.approx(expected)
    assert at(10) == pytest.approx(0.2) and at(1000) == pytest.approx(0.2)


@given(
    rate=rates,
    warmup=steps,
    total=st.integers(1, 300),
    cooldown=st.integers(1, 400),
    power=st.floats(0.01, 8),
    end=rates,
)
def test_cooldown_is_the_contracts_formula(
    rate: float, warmup: int, total: int, cooldown: int, power: float, end: float
) -> None:
    at = constant_cooldown(rate, warmup, total, cooldown, power, end)
    begin = total - cooldown
    for s in range(total):
        if s < warmup:
            expected = rate * (s + 1) / warmup
        elif s < begin:
            expected = rate
        else:
            expected = (1 - (s - begin) / cooldown) ** power * (rate - end) + end
        assert at(s) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_cooldown_longer_than_the_training_began_before_it() -> None:
    at = constant_cooldown(1.0, 0, 4, 8, 1.0, 0.0)
    assert [at(s) for s in range(4)] == pytest.approx([0.5, 0.375, 0.25, 0.125])
    whole = constant_cooldown(1.0, 0, 4, 4, 1.0, 0.0)
    assert [whole(s) for s in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@given(
    rate=rates,
    warmup=steps,
    total=steps,
    cooldown=st.integers(0, 400),
    power=st.floats(0.01, 8),
    end=rates,
    step=st.integers(0, 1000),
)
def test_never_negative_and_defined_everywhere(
    rate: float, warmup: int, total: int, cooldown: int, power: float, end: float, step: int
) -> None:
    for at in (
        cosine(rate, warmup, total),
        constant(rate, warmup),
        constant_cooldown(rate, warmup, total, cooldown, power, end),
    ):
        assert 0 <= at(step) <= max(rate, end) * (1 + 1e-12)
