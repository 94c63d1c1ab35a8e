"""Names -> builders, and what an unknown name is told."""

from __future__ import annotations

import pytest

from slidevlm.errors import ConfigError
from slidevlm.registry import Registry, nearest, unknown


def registry() -> Registry[int]:
    found: Registry[int] = Registry("fruit")
    for number, name in enumerate(("pear", "apple", "apricot")):
        assert found.register(name)(number) == number, "a decorator gives back what it takes"
    return found


def test_what_was_registered_is_found() -> None:
    found = registry()
    assert found["apple"] == 1 and "pear" in found and "plum" not in found
    assert list(found) == ["apple", "apricot", "pear"], (
        "in an order that does not depend on imports"
    )


def test_a_second_one_of_the_same_name_is_a_bug() -> None:
    found = registry()
    with pytest.raises(AssertionError, match="fruit 'pear' is registered twice"):
        found.register("pear")(9)
    assert found["pear"] == 0


def test_an_unknown_name_is_told_the_nearest_or_all() -> None:
    with pytest.raises(ConfigError) as caught:
        registry()["apricott"]
    assert str(caught.value) == "unknown fruit 'apricott'; did you mean apricot?"
    with pytest.raises(ConfigError) as caught:
        registry()["xyz"]
    assert str(caught.value) == "unknown fruit 'xyz'; choose one of: apple, apricot, pear"


def test_at_most_three_near_names_the_nearest_first() -> None:
    names = ["coca_stage_1", "coca_stage_1_large", "coca_stage_2", "coca_stage_3", "clip"]
    near = nearest("coca_stage1", names)
    assert near[0] == "coca_stage_1" and len(near) == 3
    assert nearest("resnet50", names) == []
    assert "did you mean coca_stage_1 or " in unknown("model", "coca_stage1", names)
