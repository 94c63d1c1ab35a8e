"""How a report may go on, from how reports that the model wrote before went on.

Pathology reports repeat each other's phrases. Where the last words of a report stand in an earlier
one, or earlier in itself, the next words are guessed to be those that followed there; the model
then reads all guessed tokens in one pass, which costs little more than reading one, and those that
it would have chosen itself are kept (Leviathan et al., Fast inference from transformers via
speculative decoding, 2023; the guesses of Saxena, Prompt lookup decoding, 2023). The report is the
same; only the number of passes is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SIZES = (4, 2)  # last tokens that must be the same; the longer ones are looked for first
MOST_TOKENS = 16  # read in a pass, of one report
MOST_ROWS = 64  # tokens read in a pass, of all reports: beyond, arithmetic takes the time
LEAST_GAIN = 1.05  # tokens over cost, below which nothing is guessed
FORGETTING = 0.05  # weight of the newest guess in the share of the right ones
MOST_ENTRIES = 100_000  # of each of the two generations of what is remembered


@dataclass(frozen=True)
class Guess:
    """The next tokens of a report, and how many of its last tokens they were found by."""

    size: int
    tokens: tuple[int, ...]


NOTHING = Guess(0, ())


class Lookup:
    """What reports said so far. It may be kept from call to call with the same model.

    It holds tokens that the model has written, none of the data's reports.
    """

    def __init__(self) -> None:
        # The last tokens -> a report and the place in it that follows them, the latest one.
        self._young: dict[tuple[int, ...], tuple[list[int], int]] = {}
        self._old: dict[tuple[int, ...], tuple[list[int], int]] = {}
        self._right = dict(zip(SIZES, (0.6, 0.4), strict=True))  # share, of the first guessed token
        self.passes = self.tokens = 0  # passes of a report over new tokens, and what these gave

    def guess(self, text: list[int]) -> Guess:
        """How a report of these tokens, BOS first, may go on."""
        for size in SIZES:
            key = _last(text, len(text), size)
            found = self._young.get(key) or self._old.get(key)
            if found is not None:
                other, place = found
                return Guess(size, tuple(other[place : place + MOST_TOKENS - 1]))
        return NOTHING

    def worth(self, guesses: Sequence[Guess], room: int, cost: Callable[[int], float]) -> int:
        """Tokens that are best read of each report in the next pass, 1 to `room`: 1 is no guess.

        As many tokens are gained as guesses have been right of late. `cost` tells what a pass over
        n tokens takes, of all reports: with the libraries behind torch it is about sqrt(n) on a CPU
        (`benchmarks/few_rows.py`), and less on a GPU.
        """
        rows = len(guesses)
        most = min(room, MOST_TOKENS, MOST_ROWS // rows)
        best, count = LEAST_GAIN, 1
        for n in range(2, most + 1):
            gain = sum(self._expected(g, n) for g in guesses) / rows
            gain /= cost(rows * n) / cost(rows)
            if gain > best:
                best, count = gain, n
        return count

    def _expected(self, guess: Guess, count: int) -> float:
        """Tokens that a pass over `count` of them gives."""
        ahead = min(count - 1, len(guess.tokens))
        if not ahead:
            return 1.0
        on = min(self._right[SIZES[0]], 0.99)
        return 1.0 + self._right[guess.size] * (1 - on**ahead) / (1 - on)

    def learn(self, guess: Guess, text: list[int], new: int) -> None:
        """A report's last `new` tokens have been chosen; `guess` was how it might go on."""
        self.passes += 1
        self.tokens += new
        start = len(text) - new
        size = guess.size
        for guessed, chosen in zip(guess.tokens, text[start:], strict=False):
            self._right[size] += FORGETTING * ((guessed == chosen) - self._right[size])
            if guessed != chosen:
                break
            size = SIZES[0]
        if len(self._young) > MOST_ENTRIES:
            self._old, self._young = self._young, {}
        for place in range(start, len(text)):
            for size in SIZES:
                self._young[_last(text, place, size)] = (text, place)


def _last(text: list[int], end: int, size: int) -> tuple[int, ...]:
    """The last tokens before a place; fewer at the beginning."""
    return tuple(text[max(0, end - size) : end]) if end >= size else (-1, *text[:end])
