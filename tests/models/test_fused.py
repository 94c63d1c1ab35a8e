"""Layers on the kernels: the modules' numbers, the same reports, and nothing left changed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models import build_model, few_rows, fused, jit, zoo
from slidevlm.models.attention import (
    GEGLU,
    CrossAttention,
    FeedForward,
    KeyValues,
    LayerCache,
    SelfAttentionLayer,
    place_next,
)
from slidevlm.models.few_rows import FewRows
from slidevlm.models.fused import MOST, Fused
from slidevlm.models.generate import Decoding, Lookup, draft
from slidevlm.models.quantize import Int8Linear

needs_numba = pytest.mark.skipif(not fused.is_available(), reason="numba is not installed")
WIDTH, HEADS = 48, 4


@pytest.fixture(params=[1, 2])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fused]:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    made = Fused(FewRows)
    with torch.inference_mode(), made.own_threads():
        yield made


def spread_out(module: nn.Module) -> nn.Module:
    """With parameters of which none is 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=2e-5, rtol=2e-5)


@needs_numba
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [1, 2])
def test_cross_attention(stand_in: Fused, beams: int, length: int) -> None:
    """Of sequences that share a context, whose keys and values lie side by side or do not."""
    module = spread_out(CrossAttention(WIDTH, HEADS, 0.1))
    key, value = spread_out(KeyValues(WIDTH, 20, HEADS))(torch.randn(2, 9, 20))
    forward = stand_in.of(module)
    assert forward is not None
    x = torch.randn(2 * beams, length, WIDTH)
    exact = module.double()(x.double(), key.double(), value.double())
    close(forward(x, key, value), exact)
    close(forward(x, key.contiguous(), value.contiguous()), exact)
    module.float()
    close(forward(x, key.contiguous(), value), exact)  # their steps differ: the module's own
    odd = key.transpose(2, 3).contiguous().transpose(2, 3)
    close(forward(x, odd, value), exact)


@needs_numba
def test_a_layer_token_by_token(stand_in: Fused) -> None:
    """A prompt, then a token at a time, then several at each sequence's own place."""
    layer = spread_out(SelfAttentionLayer(WIDTH, HEADS, 0.1, causal=True))
    forward = stand_in.of(layer)
    assert forward is not None
    caches = [layer.attention.new_cache(2, 12, torch.zeros(0)) for _ in range(2)]
    for new in (3, 1, 1):
        x = torch.randn(2, new, WIDTH)
        close(forward(x, caches[0]), layer(x, caches[1]))
        assert caches[0].length == caches[1].length
        close(caches[0].key, caches[1].key)
        close(caches[0].value, caches[1].value)
    for lengths, new in (((5, 3), 4), ((6, 7), 1), ((8, 8), 1), ((9, 9), 3)):
        for cache in caches:
            place_next([cache], lengths, new)
        x = torch.randn(2, new, WIDTH)
        close(forward(x, caches[0]), layer(x, caches[1]))
        close(caches[0].key, caches[1].key)
    assert caches[0].length == 12
    place_next([caches[0]], (12, 12), 1)
    with pytest.raises(IndexError, match="2 sequences of 13 tokens do not fit .* for 2 of 12"):
        forward(torch.randn(2, 1, WIDTH), caches[0])
    with pytest.raises(IndexError, match="3 sequences of 1 tokens"):
        forward(torch.randn(3, 1, WIDTH), layer.attention.new_cache(2, 12, torch.zeros(0)))


@needs_numba
def test_many_rows_are_the_modules_own(stand_in: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = spread_out(SelfAttentionLayer(WIDTH, HEADS, 0.1, causal=True))
    cross = spread_out(CrossAttention(WIDTH, HEADS, 0.1))
    linear = spread_out(nn.Linear(WIDTH, 5))
    key = torch.randn(1, HEADS, 3, WIDTH // HEADS)
    called: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(kernels, name)

    kernels, stand_in.kernels = stand_in.kernels, Watched()
    forward, across, product = (stand_in.of(m) for m in (layer, cross, linear))
    assert forward is not None and across is not None and product is not None
    for rows, expected in ((MOST, 3), (MOST + 1, 0)):
        called.clear()
        x = torch.randn(rows, 1, WIDTH)
        close(product(x), linear(x))
        close(across(x, key, key), cross(x, key, key))
        caches = [layer.attention.new_cache(rows, 2, x) for _ in range(2)]
        close(forward(x, caches[0]), layer(x, caches[1]))
        assert len(called) == expected
    called.clear()
    assert product(torch.randn(0, WIDTH)).shape == (0, 5)
    close(across(x, key[:, :, :0], key[:, :, :0]), cross(x, key[:, :, :0], key[:, :, :0]))
    for wrong in (
        lambda: product(x[..., :8]),
        lambda: across(x[:3], *[key.repeat(2, 1, 1, 1)] * 2),
    ):
        with pytest.raises(RuntimeError):  # the module's own
            wrong()
    close(forward(x, None), layer(x, None))
    stored = LayerCache(*(torch.zeros(HEADS, 2, 2, WIDTH // HEADS).transpose(0, 1),) * 2)
    close(forward(x[:2], stored), layer(x[:2], layer.attention.new_cache(2, 2, x)))
    assert called == []


@needs_numba
def test_only_what_is_nothing_more_than_its_weights(stand_in: Fused) -> None:
    def layer(**changed: Any) -> SelfAttentionLayer:
        return SelfAttentionLayer(WIDTH, HEADS, 0.1, causal=True, **changed).eval()

    def changed(change: Callable[[SelfAttentionLayer], Any]) -> SelfAttentionLayer:
        other = layer()
        change(other)
        return other

    class Own(SelfAttentionLayer):
        pass

    class OwnNorm(nn.LayerNorm):
        pass

    def hook(module: nn.Module, *_: Any) -> None:
        pass

    own_hook = changed(lambda m: m.register_forward_hook(hook))
    for module in (layer(), own_hook, CrossAttention(WIDTH, HEADS, 0.1).eval(), nn.Linear(8, 8)):
        assert stand_in.of(module) is not None
    cross = CrossAttention(WIDTH, HEADS, 0.0)
    cross.out = Int8Linear(cross.out)
    others = [
        layer(feed_forward=FeedForward(WIDTH, 60, 0.0)),
        changed(lambda m: setattr(m.feed_forward, "outer", Int8Linear(m.feed_forward.outer))),
        changed(lambda m: setattr(m.attention, "forward", m.attention.forward)),
        changed(lambda m: setattr(m, "forward", m.forward)),
        changed(lambda m: setattr(m, "norm", nn.LayerNorm(WIDTH, elementwise_affine=False))),
        changed(lambda m: setattr(m, "norm", OwnNorm(WIDTH))),
        changed(lambda m: setattr(m.attention, "dropout", nn.Identity())),
        changed(lambda m: setattr(m.attention, "causal", False)),
        changed(lambda m: m.attention.out.register_forward_hook(hook)),
        changed(lambda m: m.attention.out.register_forward_pre_hook(hook)),
        changed(lambda m: m.train()),
        changed(lambda m: m.bfloat16()),
        Own(WIDTH, HEADS, 0.0, causal=True),
        cross,
        GEGLU(8, 0.0),
        Int8Linear(nn.Linear(8, 8)),
        nn.Linear(8, 8).bfloat16(),
    ]
    for i, module in enumerate(others):
        assert stand_in.of(module) is None, i
    assert stand_in.of(layer().train(False)) is not None


def model_of(family: str) -> Any:
    config = zoo.load("coca_tiny")
    changes: dict[str, Any] = {"tile_width": 12}
    if family == "lm":
        changes = {"family": "lm"}
    torch.manual_seed(0)
    model = build_model(replace(config, **changes), vocab_size=60)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@needs_numba
@pytest.mark.parametrize("family", ["coca", "lm"])
@pytest.mark.parametrize("guessing", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"top_k": 5, "seed": 3},
        {"top_k": 3, "best": 2},
        {"beams": 6, "groups": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_tokens": 9},
    ],
    ids=str,
)
def test_the_reports_are_the_same(
    form: dict[str, Any], guessing: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bags of different sizes, reports that end early, and more rows than the kernels take."""
    model = model_of(family)
    if family == "coca":
        bags = Bags(torch.randn(22, 12, generator=torch.Generator().manual_seed(1)), (7, 1, 9, 5))
    else:
        bags = Bags(torch.zeros(4, 1), (1,) * 4)
    names = [f"s{i}" for i in range(4)]
    decoding = Decoding(1, 2, 0, max_tokens=24, **form)
    reports, compiled, costs = [], [], []
    rows, worth = fused._rows, Lookup.worth
    monkeypatch.setattr(fused, "_rows", lambda x: (compiled.append(len(x)), rows(x))[1])
    monkeypatch.setattr(Lookup, "worth", lambda *a: (costs.append(a[3]), worth(*a))[1])
    for least in (10**9, 0):
        monkeypatch.setattr(few_rows, "LEAST", least)
        assert not compiled, "by torch first"
        costs.clear()
        lookup = Lookup() if guessing else None
        found = [draft(model, bags, names, decoding, (5, 9), lookup=lookup) for _ in range(2)]
        reports.append([[d.tokens for d in drafts] for each in found for drafts in each])
    assert reports[0] == reports[1]
    assert any(reports[0][0]) and compiled
    if guessing and "beams" not in form:
        assert set(costs) == {fused.cost}


@needs_numba
def test_the_kernels_are_taken_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8).bfloat16())
    with torch.inference_mode():
        for least, expected in ((4097, False), (4096, True)):
            monkeypatch.setattr(few_rows, "LEAST", least)
            with few_rows.few_rows(tower, None) as found:
                assert (found is not None) is expected
                assert isinstance(tower[0].forward, FewRows) is not expected
                assert "forward" not in tower[1].__dict__
            assert "forward" not in tower[0].__dict__
        monkeypatch.setattr(few_rows, "LEAST", 0)
        with pytest.raises(ZeroDivisionError), few_rows.few_rows(tower):
            _ = 1 / 0
        assert "forward" not in tower[0].__dict__
        with torch.autocast("cpu", torch.bfloat16), few_rows.few_rows(tower) as found:
            assert found is None and "forward" not in tower[0].__dict__


@needs_numba
def test_the_caller_s_threads_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    before = numba.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with Fused(FewRows).own_threads():
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert Fused(FewRows).threads == numba.config.NUMBA_NUM_THREADS


GENERATES = """
import logging, os, sys, torch
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
from test_fused import model_of
from slidevlm.batch import Bags
from slidevlm.models import few_rows, fused
from slidevlm.models.generate import Decoding, draft
few_rows.LEAST, model = 0, model_of("lm")
def write():
    bags = Bags(torch.zeros(1, 1), (1,))
    return draft(model, bags, ["s"], Decoding(1, 2, 0, max_tokens=9))[0][0].tokens
first = write()
"""


def generating(code: str, **environment: str) -> list[str]:
    """The lines of a process of its own that has written a report, and then runs `code`."""
    text = GENERATES.format(folder=str(Path(__file__).parent)) + code
    command = [sys.executable, "-c", text]
    given = {**os.environ, **environment}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_numba
def test_torch_s_threads_are_as_before() -> None:
    """numba sets those of OpenMP when it starts its own, once in a process."""
    told = generating("print(fused.is_available(), torch.get_num_threads())")
    assert told[-1] == "True 1"


@needs_numba
def test_a_forked_process_writes_without_numba() -> None:
    """Its threads are those of the process before, and not there."""
    code = (
        "child = os.fork()\n"
        "if not child:\n"
        "    print(fused.is_available(), write() == first, flush=True)\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1], write() == first)\n"
    )
    told = generating(code)
    assert told[-2:] == ["False True", "0 True"]
    assert "without numba: its threads" in told[-3]


@needs_numba
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NUMBA_THREADING_LAYER": "workqueue"}, "workqueue threads can clash"),
        ({"NUMBA_THREADING_LAYER": "none_such"}, "which does not work here"),
        ({"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set"),
    ],
)
def test_numba_as_it_is_told_to_be(environment: dict[str, str], said: str) -> None:
    told = generating("print(write() == first, fused.is_available())", **environment)
    assert told[-1] == "True False"
    assert [said in line for line in told if "without numba" in line] == [True]


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not looked for numba yet."""
    monkeypatch.setattr(jit, "_processes", [])
    for name in ("_is_there", "_has_threads", "_kernels"):
        monkeypatch.setattr(jit, name, functools.cache(getattr(jit, name).__wrapped__))
    yield
    jit.suggest.cache_clear()


@needs_numba
@pytest.mark.usefixtures("unstarted")
@pytest.mark.parametrize("error", [OSError("no space left"), SystemError("too new a numpy")])
def test_numba_that_is_broken(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from slidevlm.models import kernels

    def fails() -> None:
        raise error

    monkeypatch.setattr(kernels, "compile_all", fails)
    for _ in range(2):
        assert not fused.is_available()
    assert [str(error) in r.getMessage() for r in caplog.records] == [True]


@pytest.mark.usefixtures("unstarted")
def test_without_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, decoding = model_of("lm"), Decoding(1, 2, 0, max_tokens=9)
    bags = Bags(torch.zeros(1, 1), (1,))
    expected = draft(model, bags, ["s"], decoding)[0][0].tokens
    monkeypatch.setattr(few_rows, "LEAST", 0)
    monkeypatch.setitem(sys.modules, "numba", None)
    jit.suggest.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert draft(model, bags, ["s"], decoding)[0][0].tokens == expected
    assert not fused.is_available()
    told = [r.getMessage() for r in caplog.records if "slidevlm[cpu]" in r.getMessage()]
    assert len(told) == 1, "once"


def test_what_a_pass_takes() -> None:
    assert fused.cost(1) == 1 and fused.cost(9) == 2
    assert fused.cost(MOST) < 4 and fused.cost(25) == 5
    assert all(fused.cost(n) < fused.cost(n + 1) for n in range(1, 64))
