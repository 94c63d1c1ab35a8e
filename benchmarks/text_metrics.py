"""Seconds to count 500 pairs of 60 words and to resample all scores 1,000 times, on one core.

    python benchmarks/text_metrics.py

Words are drawn with frequencies 1 / (rank + 2.7), as in language (Zipf, Mandelbrot); a
generated text is the true one with a fifth of the words exchanged.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.text_metrics.scoring import Scoring

PAIRS, WORDS, VOCABULARY = 500, 60, 3_000


def main() -> None:
    """Print the seconds."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    chances = 1 / (np.arange(VOCABULARY) + 2.7)
    drawn, other = random.choice(VOCABULARY, (2, PAIRS, WORDS), p=chances / chances.sum())
    exchanged = np.where(random.random(drawn.shape) < 0.2, other, drawn)
    texts = [[" ".join(f"w{n}ing" for n in row) for row in rows] for rows in (exchanged, drawn)]
    scoring = Scoring()
    start, cpu = time.perf_counter(), time.process_time()
    counted = scoring.count(*texts)
    middle, middle_cpu = time.perf_counter(), time.process_time()
    values = Bootstrap(1000).values([str(i) for i in range(PAIRS)], counted.values).values
    end, end_cpu = time.perf_counter(), time.process_time()
    print(f"{len(values)} scores of {PAIRS} pairs of {WORDS} words")
    print(f"counting    {middle - start:.2f} s, {middle_cpu - cpu:.2f} s of the processor")
    print(f"resampling  {end - middle:.2f} s, {end_cpu - middle_cpu:.2f} s of the processor")


if __name__ == "__main__":
    main()
