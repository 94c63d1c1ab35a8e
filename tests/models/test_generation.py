"""What is left of a model's recommended decoding beside what a user asks for."""

from __future__ import annotations

from typing import Any

import pytest

from slidevlm.models.decoding import Decoding
from slidevlm.models.generation import GenerationConfig

COMMON = {"max_tokens": 130, "no_repeat_ngram": 3}
GREEDY = GenerationConfig(**COMMON, repetition_penalty=1.5)
DRAWS = GenerationConfig(**COMMON, top_k=0, top_p=0.8, candidates=8, choose="consensus")
BEAMS = GenerationConfig(**COMMON, beams=6, groups=3, candidates=6, choose="similarity")
CASES: dict[str, tuple[GenerationConfig, dict[str, Any], dict[str, Any]]] = {
    "the model's": (
        DRAWS,
        {},
        {"top_k": None, "top_p": 0.8, "candidates": 8, "choose": "consensus"},
    ),
    "its draws, other settings": (
        DRAWS,
        {"temperature": 0.7, "top_k": 9, "max_tokens": 20},
        {"top_k": 9, "top_p": 0.8, "temperature": 0.7, "max_tokens": 20, "candidates": 8,
         "choose": "consensus"},
    ),
    "greedy for draws": (DRAWS, {"top_k": 1}, {"top_k": 1}),
    "beams for draws": (DRAWS, {"beams": 4}, {"beams": 4}),
    "draws for beams": (BEAMS, {"top_p": 0.9}, {"top_k": None, "top_p": 0.9}),
    "greedy for beams": (BEAMS, {"beams": 1}, {}),
    "other beams": (
        BEAMS,
        {"diversity": 0.2, "groups": 2},
        {"beams": 6, "groups": 2, "diversity": 0.2, "candidates": 6, "choose": "similarity"},
    ),
    "draws for greedy": (
        GREEDY, {"temperature": 0.5}, {"top_k": None, "temperature": 0.5, "repetition_penalty": 1.5}
    ),
    "all tokens": (GREEDY, {"top_k": None}, {"top_k": None, "repetition_penalty": 1.5}),
    "not drawn at all": (GREEDY, {"top_p": 1.0}, {"repetition_penalty": 1.5}),
    "no choice": (DRAWS, {"candidates": 1}, {"top_k": None, "top_p": 0.8}),
    "more than the candidates": (
        DRAWS,
        {"best": 12},
        {"top_k": None, "top_p": 0.8, "best": 12, "candidates": 12, "choose": "consensus"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_asked_for_goes_first(case: str) -> None:
    model, given, expected = CASES[case]
    found = Decoding(1, 2, 0, **model.with_given(given))
    assert found == Decoding(1, 2, 0, **{**COMMON, **expected})
