"""How a model's reports are best written: a part of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_OF_DRAWS = ("top_k", "top_p", "temperature")
_OF_BEAMS = ("beams", "groups", "diversity")
_OF_CHOICE = ("candidates", "choose")


@dataclass(frozen=True)
class GenerationConfig:
    """The `generation` part of a model configuration: how its reports are best written.

    Its keys are settings of `Decoding`, with the same defaults; who asks for others gets these.
    """

    max_tokens: int = 100
    min_tokens: int = 0
    top_k: int = 1  # 0: all
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    beams: int = 1
    groups: int = 1
    diversity: float = 0.5
    length_penalty: float = 1.0
    candidates: int = 1
    choose: str = "likelihood"

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults, in the form of the JSON files."""
        return {k: v for k, v in asdict(self).items() if v != getattr(GenerationConfig, k)}

    @property
    def settings(self) -> dict[str, Any]:
        """Those of a `Decoding`."""
        return {**asdict(self), "top_k": self.top_k or None}

    def with_given(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a `Decoding`: those given, and those of the model that go with them.

        Draws that are asked for take the place of the model's beams, beams that of its draws, and
        the most likely token (`top_k` 1) that of both; its candidates were meant for its own form,
        and are then left out too.

        Args:
            given: settings of a `Decoding`; draws that name no `top_k` are from all tokens.
        """
        form = self._form(given)
        left = set[str]()
        if form != self._form({}):
            left |= {*_OF_DRAWS, *_OF_BEAMS, *_OF_CHOICE}
        elif form == "draws":
            left |= {*_OF_BEAMS}
        else:
            left |= {*_OF_DRAWS}
        if given.get("candidates") == 1:
            left.add("choose")
        settings = {k: v for k, v in self.settings.items() if k not in left} | dict(given)
        if form == "draws":
            settings["top_k"] = settings.get("top_k") or None
        if "candidates" not in given and settings.get("candidates", 1) > 1:
            settings["candidates"] = max(settings["candidates"], given.get("best", 1))
        return settings

    def _form(self, given: Mapping[str, Any]) -> str:
        """greedy, draws or beams."""
        if given.get("beams", 1) > 1:
            return "beams"
        if given.get("top_k", 0) == 1:
            return "greedy"
        if "top_k" in given or given.get("top_p", 1) != 1 or given.get("temperature", 1) != 1:
            return "draws"
        if self.beams > 1:
            return "greedy" if "beams" in given else "beams"
        return "greedy" if self.top_k == 1 else "draws"
