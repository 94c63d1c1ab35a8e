"""How a report goes on, as the model itself guesses with its weights rounded to 16 bits.

On a CPU a token takes the time of reading the weights, and rounded ones take half of it. So some
tokens are written with those, and one pass of the model as it is over all of them keeps those that
it would have chosen itself (Leviathan et al., Fast inference from transformers via speculative
decoding, 2023; that the model drafts for itself, by less work: Zhang et al., Draft & verify, 2024).
The report is the same. It pays for one report at a time: several share the reading as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from slidevlm.models.fused import Fused, Narrowed, cost
from slidevlm.models.lookup import FORGETTING, LEAST_GAIN

NARROW = 0.55  # what a token takes with weights in 16 bits; in 32 it is 1
MOST_TOKENS = 12  # read in a pass
# To round the weights takes the time of some 40 tokens, mostly for new memory.
LEAST_WRITTEN = 128  # tokens of single reports before that is done
RIGHT = 0.97  # share of right guesses that is expected
RETURNING = 0.005  # to it, a token that was not worth a guess: so all is tried again now and then
# So many weights are worth it: of fewer, other things take as long, and more would take 2 GB.
LEAST_WEIGHTS, MOST_WEIGHTS = 2**24, 2**30


class Sketch:
    """A model's rounded weights, and how good its guesses were. It is for one model.

    Args:
        after: passes over a token of a single report before weights are rounded.
    """

    def __init__(self, after: int = LEAST_WRITTEN) -> None:
        self.left = after
        self.right = RIGHT  # share of guessed tokens, of late
        self._kept = Narrowed()

    def worth(self, fused: Fused, room: int) -> int:
        """Tokens that are best read in the next pass, 1 to `room`: all but one are guessed."""
        if not LEAST_WEIGHTS <= fused.size <= MOST_WEIGHTS:
            return 1
        if self.left > 0:
            self.left -= 1
            return 1
        if not fused.can_round():
            return 1
        best, count, on = LEAST_GAIN, 1, min(self.right, 0.99)
        for n in range(2, min(room, MOST_TOKENS) + 1):
            gained = (1 - on**n) / (1 - on)
            gain = gained / ((n - 1) * NARROW + cost(n))
            if gain > best:
                best, count = gain, n
        if count == 1 and room > 1:
            self.right += RETURNING * (RIGHT - self.right)
        return count

    def rounded(self, fused: Fused) -> AbstractContextManager[None]:
        """Within, the layers guess."""
        return fused.rounded(self._kept)

    def learn(self, guessed: Sequence[int], chosen: Sequence[int]) -> None:
        """What was guessed, and what then came, as far as that says how good the guesses are."""
        for guess, token in zip(guessed, chosen, strict=False):
            self.right += FORGETTING * ((guess == token) - self.right)
