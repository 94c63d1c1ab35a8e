"""Seconds a report: generation with its cache beside the same model without one.

    python benchmarks/generate.py [small] [large] [greedy] [beams] [--threads N] [--batch B]
                                  [--tokens N] [--processor]

Random weights, one process, one bag of 2,000 tiles of width 512. Small: 2 + 2 layers x 512,
vocabulary 8,192, 128 tokens. Large: 12 + 12 layers x 1,024, vocabulary 42,384, 64 tokens. Both with
a perceiver of 4 blocks x 128 latents, all tokens generated (no report ends early). Beams: 6 in 3
groups.

Without cache, each token takes the text encoder and the decoder over all tokens so far, and the
slide's keys and values again, as trainers that generate through the forward pass do, with layers as
torch has them; the slide itself is encoded once. The two are in turn, and must write the same
tokens. The last column is the time of the last tokens over that of the first ones with the cache:
the latter fifth over the first. --batch B gives, besides, seconds a report of either for B bags at
a time. --processor counts seconds of the processor, for a machine that does other work too.

One greedy report at a time reads every weight of the decoder for every token, unless several are
guessed. The line under such a row tells what that alone takes here, and so the ratio that no way of
doing it without guesses can pass. The large model guesses with its weights rounded to 16 bits
(`models/sketch.py`); these are made before the clock starts, and at once: a command does so after
128 tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models import CoCa, build_model, from_dict, fused
from slidevlm.models.generate import Decoding, Sketch, draft

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 512, "layers": 2, "heads": 8, "vocabulary": 8_192, "tokens": 128},
    "large": {"width": 1_024, "layers": 12, "heads": 16, "vocabulary": 42_384, "tokens": 64},
}
FORMS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"beams": 6, "groups": 3}}
TILES, TILE_WIDTH = 2_000, 512


def model_of(size: dict[str, int]) -> CoCa:
    """A model with random weights, none of them zero."""
    config = from_dict(
        {
            "family": "coca",
            "embed_dim": 512,
            "tile_width": TILE_WIDTH,
            "slide": {"type": "perceiver", "width": 512, "latents": 128, "blocks": 4,
                      "self_layers": 1, "heads": 8},
            "text": {"type": "scratch", "width": size["width"], "layers": size["layers"],
                     "heads": size["heads"], "context_length": 192},
            "decoder": {"layers": size["layers"], "heads": size["heads"], "slide_tokens": 128},
        },
        "benchmark",
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config, size["vocabulary"])
    assert isinstance(model, CoCa)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@dataclass
class _Nothing:
    """What is kept without a cache: the slides' tokens, and all tokens so far."""

    image: Tensor
    slide: Tensor
    tokens: Tensor

    def keep(self, rows: Tensor, slides: Tensor | None = None) -> None:
        self.tokens = self.tokens[rows]
        if slides is not None:
            self.image, self.slide = self.image[slides], self.slide[slides]

    def reorder(self, rows: Tensor, since: int) -> None:
        self.tokens = self.tokens[rows]


class _Tower:
    """A tower as torch runs it: generation finds no layers in it that it could have quicker."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def modules(self) -> tuple[nn.Module, ...]:
        return ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any) -> Any:
        return self.inner(*args)


class Uncached(nn.Module):
    """The model's weights, and everything computed again for each token."""

    def __init__(self, model: CoCa) -> None:
        super().__init__()
        self.inner = model
        assert model.decoder is not None
        self.text, self.decoder = _Tower(model.text), _Tower(model.decoder)

    def start(self, bags: Bags, capacity: int) -> tuple[Tensor, _Nothing]:
        slide, image = self.inner.see(bags)
        return image, _Nothing(image, slide, torch.zeros(len(bags), 0, dtype=torch.int64))

    def step(self, tokens: Tensor, kept: _Nothing) -> Tensor:
        kept.tokens = torch.cat([kept.tokens, tokens], dim=1)
        beams = len(kept.tokens) // len(kept.image)
        hidden = self.inner.text(kept.tokens)
        view = self.inner._view(kept.slide.repeat_interleave(beams, 0))
        image = kept.image.repeat_interleave(beams, 0)
        return self.inner._write(hidden, image, view, None)[:, -1]


Clock = Callable[[], float]


class Watched:
    """A model of which is known when it had written how many tokens of one sequence."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self.inner, self.clock = model, clock
        self.times: dict[int, float] = {}  # tokens -> when the next one was begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        self.times.setdefault(cache.encoder[0].length, self.clock())
        logits: Tensor = self.inner.step(tokens, cache)
        return logits

    def steps(self, tokens: Tensor, cache: Any) -> Tensor:
        places = cache.encoder[0].places
        there = cache.encoder[0].length if places is None else int(places[0, 0])
        # What came since was guessed, and is now read again.
        self.times = {n: at for n, at in self.times.items() if n <= there}
        self.times.setdefault(there, self.clock())
        logits: Tensor = self.inner.steps(tokens, cache)
        return logits

    def last_over_first(self, tokens: int) -> float:
        """The time of the latter fifth of these many tokens over that of the first fifth.

        Between two passes all tokens of the first one take as long.
        """
        self.times[tokens] = self.clock()
        found = sorted(self.times.items())[1:]  # without the prompt
        if len(found) < 3:
            return math.nan
        counts, times = zip(*found, strict=True)
        fifth = (counts[-1] - counts[0]) / 5
        marks = [counts[0], counts[0] + fifth, counts[-1] - fifth, counts[-1]]
        a, b, c, d = np.interp(marks, counts, times)
        return float((d - c) / (b - a))


def bags_of(number: int) -> Bags:
    """Bags of random tiles."""
    generator = torch.Generator().manual_seed(1)
    return Bags(torch.randn(number * TILES, TILE_WIDTH, generator=generator), (TILES,) * number)


def seconds_of(
    model: Any, number: int, decoding: Decoding, clock: Clock, sketch: Sketch | None = None
) -> tuple[float, Any]:
    """Seconds of one call, and what it wrote."""
    bags, names = bags_of(number), [f"s{i}" for i in range(number)]
    start = clock()
    found = draft(model, bags, names, decoding, sketch=sketch)
    return clock() - start, [d[0].tokens for d in found]


def fastest_reading(model: CoCa, clock: Clock) -> float:
    """Seconds in which one token's weights come from memory, in the quickest way there is here."""
    read = ("text.layers.", "decoder.")  # of text.tokens a row is
    named = model.named_parameters()
    weights = [p.detach() for name, p in named if name.startswith(read) and p.ndim == 2]
    rows = [torch.randn(1, w.shape[1]) for w in weights]

    def add() -> None:
        for weight in weights:
            weight.sum()

    def multiply() -> None:
        for row, weight in zip(rows, weights, strict=True):
            nn.functional.linear(row, weight)

    def compiled() -> None:
        for row, weight in zip(rows, weights, strict=True):
            kernels.linear(weight.numpy(), None, row.numpy(), torch.get_num_threads())

    ways = [add, multiply]
    if fused.is_available():
        from slidevlm.models import kernels

        ways.append(compiled)
    taken = []
    for way in ways * 5:
        start = clock()
        way()
        taken.append(clock() - start)
    return min(taken)


@torch.inference_mode()
def tell_limit(model: CoCa, tokens: int, uncached: float, clock: Clock) -> None:
    """Print what a report cannot be quicker than, one at a time."""
    encoding = []
    for _ in range(3):
        start = clock()
        model.start(bags_of(1), tokens + 1)
        encoding.append(clock() - start)
    reading = fastest_reading(model, clock)
    limit = uncached / (min(encoding) + tokens * reading)
    print(
        f"the slide takes {min(encoding):.2f} s and reading the weights {1000 * reading:.1f} ms a "
        f"token: no more than {limit:.1f} times without guesses",
        flush=True,
    )


def measure(size: str, form: str, asked: argparse.Namespace) -> None:
    """Print one row."""
    settings, batch, repeats = SIZES[size], asked.batch, asked.repeats
    model, tokens = model_of(settings), asked.tokens or settings["tokens"]
    clock = time.process_time if asked.processor else time.perf_counter
    decoding = Decoding(1, 2, 0, max_tokens=tokens, min_tokens=tokens, **FORMS[form])
    short = Decoding(1, 2, 0, max_tokens=3, min_tokens=3, **FORMS[form])
    slow_model = Uncached(model)
    sketch = Sketch(after=0)
    # First calls allocate, and round the weights for guesses.
    seconds_of(model, 1, short, clock, sketch)
    seconds_of(slow_model, 1, short, clock)
    fast, slow, flat = [], [], []
    for _ in range(repeats):
        watched = Watched(model, clock)
        seconds, written = seconds_of(watched, 1, decoding, clock, sketch)
        fast.append(seconds)
        flat.append(watched.last_over_first(tokens))
        seconds, again = seconds_of(slow_model, 1, decoding, clock)
        slow.append(seconds)
        assert written == again, "cached and uncached write different tokens"
    middle = repeats // 2
    a, b = sorted(fast)[middle], sorted(slow)[middle]
    row = f"| {size} | {form} | {a:.2f} | {b:.2f} | {b / a:.1f} | {sorted(flat)[middle]:.2f} |"
    if batch > 1:
        a, b_each = (seconds_of(m, batch, decoding, clock)[0] / batch for m in (model, slow_model))
        row += f" {a:.2f} | {b_each:.2f} | {b_each / a:.1f} |"
    print(row, flush=True)
    if form == "greedy":
        tell_limit(model, tokens, b, clock)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="generated, in the place of 128 and 64")
    parser.add_argument("--processor", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, {asked.threads} thread(s)")
    head = "| model | form | cached s | uncached s | ratio | last / first |"
    if asked.batch > 1:
        head += f" cached s, {asked.batch} at a time | uncached s, likewise | ratio |"
    print(head)
    print("|---" * (head.count("|") - 1) + "|")
    for size in [s for s in SIZES if s in asked.what] or list(SIZES):
        for form in [f for f in FORMS if f in asked.what] or list(FORMS):
            measure(size, form, asked)


if __name__ == "__main__":
    main()
