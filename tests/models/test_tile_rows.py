"""Tiles some rows at a time: compiled as by torch, in one thread as in two."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models import CoCa, build_model, jit, linear, pieces, tile_rows, zoo
from slidevlm.models.linear import norm_linear, normalised_linear
from slidevlm.models.pieces import calmly
from slidevlm.models.quantize import Int8Linear
from slidevlm.models.ragged import ragged_cross_attention
from slidevlm.models.slide import perceiver
from slidevlm.models.tile_rows import Moments, moments_of, normalised_rows, use_normalised

LENGTHS = (40, 1, 33, 7)
WIDTH = 24


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Everything is worth the compiled pass, in pieces of 16 rows; how many rows it has read."""
    kernels = jit.kernels("tile_kernels", threaded=False)
    if kernels is None:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(tile_rows, "LEAST", 1)
    monkeypatch.setitem(tile_rows.BYTES_AT_ONCE, "cpu", 4 * WIDTH * 16)
    read, before = [], kernels.pass_over

    def pass_over(tiles, *rest):
        read.append(len(tiles))
        before(tiles, *rest)

    monkeypatch.setattr(kernels, "pass_over", pass_over)
    return read


def tiles_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tiles = (3 + 2 * torch.randn(sum(LENGTHS), WIDTH, generator=draw)).to(dtype)
    return tiles, (torch.randn(WIDTH, generator=draw), 0.5 + torch.rand(WIDTH, generator=draw))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_standardised", [True, False])
def test_rows_and_moments_of_bags(
    compiled: list[int], threads: int, dtype: torch.dtype, is_standardised: bool
) -> None:
    tiles, standard = tiles_of(dtype)
    if not is_standardised:
        standard = None
    exact = tiles.double()
    if standard is not None:
        exact = (exact - standard[0]) / standard[1]
    normal = F.layer_norm(exact, (WIDTH,))
    found, moments = torch.full(tiles.shape, torch.nan), Moments(LENGTHS)

    def use(begin: int, rows: Tensor) -> None:
        found[begin : begin + len(rows)] = rows

    use_normalised(use, tiles, 1e-5, torch.float32, standard, moments)
    close(found, normal)
    bags = exact.split(list(LENGTHS))
    close(moments.found()[:, :WIDTH], torch.stack([bag.mean(0) for bag in bags]))
    close(moments.found()[:, WIDTH:], torch.stack([b.std(0, unbiased=False) for b in bags]))
    assert sum(compiled) == len(tiles) and max(compiled) == 16
    again = [rows.clone() for rows in normalised_rows(tiles, 1e-5, torch.float32, standard)]
    close(torch.cat(again), normal)
    if standard is not None:
        assert torch.equal(moments_of(tiles, LENGTHS, standard), moments.found())
        for number, bag in enumerate(tiles.split(list(LENGTHS))):
            alone = moments_of(bag, (len(bag),), standard)[0]
            assert torch.equal(alone, moments.found()[number]), "nothing of the bags beside"


@pytest.mark.usefixtures("threads")
def test_rows_in_16_bits(compiled: list[int]) -> None:
    tiles, standard = tiles_of()
    exact = torch.cat([r.clone() for r in normalised_rows(tiles, 1e-5, torch.float32, standard)])
    rows = [r.clone() for r in normalised_rows(tiles, 1e-5, torch.bfloat16, standard)]
    assert torch.equal(torch.cat(rows), exact.bfloat16()) and compiled


def test_what_the_pass_does_not_serve_goes_the_other_way(compiled: list[int]) -> None:
    tiles, standard = tiles_of()
    double = standard[0].double(), standard[1].double()
    for given, dtype, about in (
        (tiles.double(), torch.float64, double),
        (tiles, torch.float64, standard),
        (tiles, torch.float32, double),
    ):
        rows = torch.cat(list(normalised_rows(given, 1e-5, dtype, about)))
        close(rows, F.layer_norm((tiles.double() - standard[0]) / standard[1], (WIDTH,)))
        assert not compiled
    every_second = tiles[:, ::2]
    half = standard[0][::2], standard[1][::2]
    rows = torch.cat([r.clone() for r in normalised_rows(every_second, 1e-5, torch.float32, half)])
    close(rows, F.layer_norm((every_second.double() - half[0]) / half[1], (WIDTH // 2,)))
    assert compiled, "it is copied to lie side by side"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_projection_and_its_gradients(compiled: list[int], dtype: torch.dtype) -> None:
    tiles, standard = tiles_of(dtype)
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    weights = tuple(torch.randn(n, WIDTH, requires_grad=True) for n in (3, 5))
    bias = torch.randn(8, requires_grad=True)
    leaves = [norm.weight, norm.bias, *weights, bias]
    ours = torch.cat(normalised_linear(tiles, norm, weights, bias, standard), 1)
    rows = (tiles.double() - standard[0]) / standard[1]
    normal = F.layer_norm(rows, (WIDTH,), norm.weight.double(), norm.bias.double())
    expected = F.linear(normal, torch.cat(weights).double(), bias.double())
    close(ours, expected)
    factor = torch.randn(expected.shape)
    mine = torch.autograd.grad((ours * factor).sum(), leaves)
    theirs = torch.autograd.grad((expected * factor).sum(), leaves)
    for got, exact in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)
    assert sum(compiled) == 2 * len(tiles), "forward, and again backward"


def model() -> CoCa:
    torch.manual_seed(0)
    made = build_model(replace(zoo.load("coca_tiny"), tile_width=WIDTH), 20).eval()
    assert isinstance(made, CoCa)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_a_slide_seen_by_one_thread_and_by_two(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LEAST", 64)
    monkeypatch.setattr(linear, "PIECE", 32 * 60)
    monkeypatch.setattr(perceiver, "HEAVY", 0)
    monkeypatch.setattr(perceiver, "PLACES", 30)
    tiles, standard = tiles_of(torch.float16)
    places = 1e4 * torch.rand(len(tiles), 2)
    made, bags = model(), Bags(tiles, LENGTHS, places, None, "um")
    made.slide.standardise.set(*standard)
    exact = made.double().see(Bags(tiles.double(), LENGTHS, places, None, "um"))
    made.float()
    shared: list[int] = []
    before = pieces.share

    def share(work, count):
        if pieces.are_shared(tiles):
            shared.append(count)
        before(work, count)

    for module in ("linear", "ragged", "tile_rows", "slide.perceiver"):
        monkeypatch.setattr(f"slidevlm.models.{module}.share", share)
    for inference in (torch.inference_mode, torch.no_grad):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                with inference():
                    found = made.see(bags)
            finally:
                torch.set_num_threads(1)
            for mine, theirs in zip(found, exact, strict=True):
                close(mine, theirs.detach())
            assert bool(shared) == (threads == 2)
        assert threads == 1 or {6, 3, 2, 16} <= set(shared), "tiles, places, keys, attention"
        shared.clear()
    wanted = made.see(bags)[1]  # with a graph
    wanted.sum().backward()
    assert made.slide.tile_project.weight.grad is not None and not shared


def test_a_heavy_encoder_shares_the_tiles_alone(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LEAST", 64)
    made, (tiles, _) = model(), tiles_of()
    called: list[str] = []
    monkeypatch.setattr("slidevlm.models.coca.calmly", lambda work: called.append("calmly"))
    before = perceiver.HEAVY
    monkeypatch.setattr(perceiver, "HEAVY", 0)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            made.see(Bags(tiles, LENGTHS))
            assert called == ["calmly"]
            monkeypatch.setattr(perceiver, "HEAVY", before)
            assert made.see(Bags(tiles, LENGTHS)) is not None
    finally:
        torch.set_num_threads(1)
    assert called == ["calmly"] and compiled


@pytest.mark.usefixtures("compiled")
def test_what_is_light(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_light(name: str, tiles: int, **changes: object) -> bool:
        config = zoo.load(name)
        config = replace(config, tile_width=64, slide=replace(config.slide, **changes))
        return build_model(config, 20).slide.is_light(Bags(torch.zeros(tiles, 64), (tiles,)))

    assert is_light("coca_small", 3000) and not is_light("coca_small", 30)
    with monkeypatch.context() as patch:
        patch.setattr(tile_rows, "LEAST", 3000 * 64 + 1)
        assert not is_light("coca_small", 3000), "torch's threads share what is done with tiles"
    with monkeypatch.context() as patch:
        patch.setattr(jit, "kernels", lambda name, *, threaded: None)
        assert not is_light("coca_small", 3000), "likewise"
    assert is_light("coca_stage_1", 10_000) and not is_light("coca_stage_1", 1000)
    assert not is_light("coca_small", 3000, cross_heads=1), "which is computed another way"
    made = build_model(replace(zoo.load("coca_small"), tile_width=64), 20)
    bags = Bags(torch.zeros(3000, 64), (3000,))
    made.slide.first.key_values.project = Int8Linear(made.slide.first.key_values.project)
    assert not made.slide.is_light(bags), "its product is not in pieces"
    assert not build_model(replace(zoo.load("coca_vit_stage_1"), tile_width=64), 20).slide.is_light(
        bags
    )


@pytest.mark.parametrize("which", ["norm", "linear", "another norm"])
def test_who_watches_a_layer_is_called(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setattr(pieces, "LEAST", 64)
    norm, layer, x = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5), torch.randn(50, WIDTH)
    called: list[int] = []
    if which == "another norm":

        class Norm(nn.LayerNorm):
            def forward(self, x: Tensor) -> Tensor:
                called.append(len(x))
                return super().forward(x)

        norm = Norm(WIDTH)
    else:
        hooked = norm if which == "norm" else layer
        hooked.register_forward_hook(lambda module, given, found: called.append(len(found)))
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            calmly(lambda: norm_linear(x, norm, layer))
    finally:
        torch.set_num_threads(1)
    assert called == [50]


def test_other_defaults_of_torch_change_nothing(compiled: list[int]) -> None:
    tiles, standard = tiles_of()
    expected = torch.cat([r.clone() for r in normalised_rows(tiles, 1e-5, torch.float32)])
    known = moments_of(tiles, LENGTHS, standard)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            rows = [r.clone() for r in normalised_rows(tiles, 1e-5, torch.float32)]
            found = moments_of(tiles, LENGTHS, standard)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.cat(rows), expected) and torch.equal(found, known) and compiled


def test_shared_operations_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST", 64)
    monkeypatch.setattr("slidevlm.models.linear.PIECE", WIDTH * 30)
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(WIDTH), torch.randn(2, 50, WIDTH)
    nn.init.normal_(norm.weight)
    query, key, value = torch.randn(4, 3, 5, 8), torch.randn(3, 81, 8), torch.randn(3, 81, 8)
    counts: list[int] = []
    for module in ("linear", "ragged"):

        def share(work, count):
            counts.append(count)
            pieces.share(work, count)

        monkeypatch.setattr(f"slidevlm.models.{module}.share", share)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            for bias in (True, False):
                layer = nn.Linear(WIDTH, 5, bias=bias)
                found = calmly(lambda: norm_linear(x, norm, layer))  # noqa: B023
                close(found, layer(norm(x)))
            found = calmly(lambda: ragged_cross_attention(query, key, value, LENGTHS))
    finally:
        torch.set_num_threads(1)
    close(found, ragged_cross_attention(query, key, value, LENGTHS))
    assert counts == [4, 4, 12]


def test_without_numba() -> None:
    """The same to rounding, and one is told once what would help."""
    code = (
        "import sys, torch; sys.modules['numba'] = None\n"
        "import logging\n"
        "logging.basicConfig(level='INFO', format='%(message)s', stream=sys.stdout)\n"
        "from slidevlm.models import tile_rows\n"
        "tile_rows.LEAST = 1\n"
        "x = torch.randn(90, 7)\n"
        "rows = torch.cat(list(tile_rows.normalised_rows(x, 1e-5, torch.float32)))\n"
        "assert torch.equal(rows, torch.nn.functional.layer_norm(x, (7,)))\n"
        "print(tile_rows.moments_of(x, (90,), (torch.zeros(7), torch.ones(7))).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    told = "on a CPU, tiles are read sooner with numba: pip install 'slidevlm[cpu]'"
    assert done.stdout.splitlines() == [told, "torch.Size([1, 14])"], done.stderr


def test_small_bags_share_a_piece() -> None:
    """With up to ten rows, as of bags of 10 + 3, 2, 2, 7, 9 and 1 tiles."""
    begins = [0, 10, 13, 15, 17, 24, 33, 34]
    assert tile_rows._pieces(begins, 10) == [range(1), range(1, 4), range(4, 5), range(5, 7)]
    assert tile_rows._pieces([0, 4], 10) == [range(1)]
    assert tile_rows._pieces([0, 40, 80], 10) == [range(1), range(1, 2)]


def test_the_number_of_threads_changes_no_digit() -> None:
    """Of tiles at the sizes of a real bag, which is 9 pieces and the rest of one."""
    tiles = torch.randn(4700, 1024, generator=torch.Generator().manual_seed(0)).half()
    norm, weight, found = nn.LayerNorm(1024), torch.randn(64, 1024), []
    standard = torch.zeros(1024), torch.ones(1024)
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        moments = Moments((4700,))
        try:
            with torch.inference_mode():
                (rows,) = normalised_linear(tiles, norm, (weight,), None, standard, moments)
        finally:
            torch.set_num_threads(1)
        found.append((rows, moments.found()))
    if jit.kernels("tile_kernels", threaded=False) is None:
        pytest.skip("numba is not installed: torch shares each operation")
    for rows, known in found[1:]:
        assert torch.equal(rows, found[0][0]) and torch.equal(known, found[0][1])
