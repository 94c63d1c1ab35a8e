"""Linear layers on a few rows: the same numbers, and nothing left changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from slidevlm.models import few_rows as module
from slidevlm.models.few_rows import FewRows, few_rows
from slidevlm.models.quantize import Int8Linear


@pytest.fixture(autouse=True)
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the layers are those of `test_fused.py`."""
    monkeypatch.setattr(module, "is_available", lambda: False)


@pytest.fixture(params=["intel", "amd", "amd with avx512"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the processor is taken for."""
    told = {"intel": "GenuineIntel avx512f", "amd": "AuthenticAMD avx2"}
    text = told.get(request.param, "AuthenticAMD avx2 avx512f")
    monkeypatch.setattr(module, "_processor", lambda: text)
    return str(request.param)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (600, 30), (2048, 2050)])
@pytest.mark.usefixtures("processor")
def test_the_numbers_are_those_of_the_layer(
    inputs: int, outputs: int, bias: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    exact = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    exact.load_state_dict(linear.state_dict())
    for shape in [(1,), (1, 1), (2, 1), (1, 3), (4, 2), (3, 3), (5, 13), (5, 1), (0, 4)]:
        x = torch.randn(*shape, inputs)
        apart = torch.randn(*shape, 2 * inputs)[..., ::2]
        for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2), apart):
            with torch.inference_mode():
                found, expected = FewRows(linear)(given), exact(given.double())
            assert found.shape == expected.shape and found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)


def test_each_way_is_taken(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    """The tables of `benchmarks/few_rows.py`, in some shapes."""
    ways: list[str] = []
    mm, linear, dense = torch.addmm, module.F.linear, torch.Tensor.to_mkldnn
    pieces = torch.baddbmm
    monkeypatch.setattr(torch, "addmm", lambda *a: (ways.append("other side"), mm(*a))[1])
    monkeypatch.setattr(torch, "baddbmm", lambda *a: (ways.append("pieces"), pieces(*a))[1])
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda *a: (ways.append("oneDNN"), dense(*a))[1])
    monkeypatch.setattr(module.F, "linear", lambda *a: (ways.append("linear"), linear(*a))[1])

    def way(inputs: int, outputs: int, rows: int, threads: int = 1) -> list[str]:
        ways.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with torch.inference_mode():
            FewRows(nn.Linear(inputs, outputs))(torch.zeros(rows, inputs))
        return list(ways)

    assert way(1024, 4096, 65) == ["linear"] == way(8, 8, 0)
    once: list[str] = []  # a product with the weight turned over, which is a tensor's own
    if processor == "intel":
        assert way(1024, 4096, 4) == ["oneDNN", "linear"] == way(1024, 1024, 64)
        assert way(1024, 4096, 3) == ["linear"] == way(512, 64, 8) == way(1024, 1023, 4)
        assert way(1024, 4096, 1) == once == way(8, 8, 1) == way(8, 8, 1, threads=2)
        return
    assert way(512, 64, 8) == ["other side"] and way(512, 64, 9) == ["linear"]
    assert way(512, 64, 1) == ["pieces"] == way(1024, 64, 1, threads=2)
    if processor == "amd":
        assert way(1024, 64, 5) == ["other side"] and way(1024, 64, 6) == ["linear"]
        assert way(1024, 4096, 5) == ["other side"] and way(1024, 4096, 6) == ["oneDNN", "linear"]
        assert way(1024, 4096, 1) == once == way(2048, 64, 1)
        assert way(2048, 64, 2) == ["other side"]
        return
    assert way(1024, 64, 1) == ["pieces"] == way(2736, 64, 1)
    assert way(4096, 64, 1) == ["oneDNN", "linear"] == way(2736, 64, 2) == way(1024, 64, 4)
    assert way(1024, 64, 3) == ["other side"] == way(768, 64, 5)
    assert way(512, 64, 64, threads=2) == ["other side"] and way(512, 8192, 9) == [
        "oneDNN",
        "linear",
    ]


@pytest.mark.parametrize("processor", ["amd", "amd with avx512"], indirect=True)
@pytest.mark.parametrize("given", [(1, 600), (1, 1, 600)])
@pytest.mark.usefixtures("processor")
def test_a_single_row_is_told_to_be_a_row(
    given: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a column's strides the library takes five times as long, and gives the same numbers."""
    seen: list[tuple[int, ...]] = []
    product = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a: (seen.append(a[2].stride()), product(*a))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.inference_mode():
        FewRows(nn.Linear(600, 64))(torch.zeros(given))
    assert seen == [(0, 1, 600)]


@pytest.mark.usefixtures("processor")
def test_what_comes_from_the_other_side_lies_side_by_side() -> None:
    """Or attention falls back to its slow form: it asks for a last dimension of stride 1."""
    for rows in (1, 4):
        with torch.inference_mode():
            y = FewRows(nn.Linear(64, 48))(torch.randn(rows, 1, 64))
        assert y.is_contiguous()


def test_what_the_processor_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "Path", lambda _: told)
    monkeypatch.setattr(module, "_processor", module._processor.__wrapped__)
    monkeypatch.setattr(module.platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    for text, intel, wide in (
        ("vendor_id\t: GenuineIntel\nflags\t: avx2", True, False),
        ("AuthenticAMD avx2 avx512f", False, True),
    ):
        told.write_text(text)
        assert module.is_intel() is intel and module.has_avx512() is wide
    told.unlink()
    assert module.is_intel() is True, "elsewhere the interpreter tells"


def test_layers_are_as_before_also_after_an_error() -> None:
    tower = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def inside() -> list[bool]:
        with few_rows(tower, None):
            return [isinstance(m.forward, FewRows) for m in tower]

    with torch.no_grad():
        assert inside() == [True, False]
        with pytest.raises(ZeroDivisionError), few_rows(tower):
            _ = 1 / 0
        with torch.autocast("cpu", torch.bfloat16):
            assert inside() == [False, False]
    assert inside() == [False, False], "a gradient is wanted"
    assert "forward" not in tower[0].__dict__


def test_only_plain_layers_in_float32() -> None:
    with torch.no_grad():
        narrow = nn.Sequential(nn.Linear(4, 4).bfloat16())
        quantised = nn.Sequential(Int8Linear(nn.Linear(8, 8)))
        compiled = nn.Sequential(nn.Linear(4, 4))
        compiled[0].forward = own = compiled[0].forward
        for tower in (narrow, quantised, compiled):
            with few_rows(tower):
                assert not any(isinstance(m.forward, FewRows) for m in tower.modules())
        assert compiled[0].__dict__["forward"] == own
