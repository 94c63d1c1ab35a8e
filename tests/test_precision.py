"""--precision: what each word means on each device, and that it is what really happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slidevlm import precision
from slidevlm.errors import ConfigError
from slidevlm.flags import arguments
from slidevlm.precision import resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("name", "device", "dtype", "scaled"),
    [
        ("fp32", CPU, None, False),
        ("fp32", CUDA, None, False),
        ("amp", CPU, BFLOAT16, False),
        ("amp", CUDA, FLOAT16, True),
        ("amp_bf16", CPU, BFLOAT16, False),
        ("amp_bf16", CUDA, BFLOAT16, False),
        ("amp_bfloat16", CPU, BFLOAT16, False),
        ("amp_bfloat16", CUDA, BFLOAT16, False),
    ],
)
def test_the_table_of_the_contract(
    name: str, device: torch.device, dtype: torch.dtype | None, scaled: bool
) -> None:
    found = resolve(name, device)
    assert (found.device, found.autocast_dtype, found.scale_gradients) == (device, dtype, scaled)


@pytest.mark.parametrize(
    ("name", "device", "weights", "everything", "autocast", "scaled"),
    [
        ("bf16", CPU, BFLOAT16, False, BFLOAT16, False),
        ("bf16", CUDA, BFLOAT16, False, BFLOAT16, False),
        ("fp16", CUDA, FLOAT16, False, FLOAT16, True),
        ("pure_bf16", CPU, BFLOAT16, True, None, False),
        ("pure_bf16", CUDA, BFLOAT16, True, None, False),
        ("pure_fp16", CUDA, FLOAT16, True, None, True),
        ("amp", CUDA, None, False, FLOAT16, True),
        ("fp32", CPU, None, False, None, False),
    ],
)
def test_forms_whose_weights_have_16_bits(
    name: str,
    device: torch.device,
    weights: torch.dtype | None,
    everything: bool,
    autocast: torch.dtype | None,
    scaled: bool,
) -> None:
    found = resolve(name, device)
    assert (found.weights_dtype, found.everything) == (weights, everything)
    assert (found.autocast_dtype, found.scale_gradients) == (autocast, scaled)


def test_what_the_declaration_offers_is_here() -> None:
    (argument,) = (a for a in arguments() if a.name == "precision")
    for name in argument.spec.choices:
        resolve(name, CUDA)
        if "fp16" not in name:
            resolve(name, CPU)


@pytest.mark.parametrize("name", ["fp16", "pure_fp16", "fp64", ""])
def test_other_forms_are_refused_with_those_that_run(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, CPU)
    message = str(caught.value)
    assert f"--precision {name} does not run on cpu" in message
    assert message.endswith("amp, amp_bf16, amp_bfloat16, bf16, fp32, pure_bf16")


@pytest.mark.parametrize(
    ("name", "inside"), [("fp32", torch.float32), ("amp", BFLOAT16), ("amp_bf16", BFLOAT16)]
)
def test_a_forward_pass_computes_in_that_type(name: str, inside: torch.dtype) -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    found = resolve(name, CPU)
    for _ in range(2):  # a context can be had again and again
        with found.autocast():
            y = layer(x)
            norm = nn.functional.layer_norm(y.float(), (4,))
        assert y.dtype == inside
        assert norm.dtype == torch.float32
    assert layer(x).dtype == torch.float32, "and only within the context"
    y.float().sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "amp", "amp_bf16"])
def test_nothing_is_scaled_on_a_cpu(name: str) -> None:
    scaler = resolve(name, CPU).scaler()
    assert not scaler.is_enabled()
    parameter = nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    loss = 2 * parameter
    assert scaler.scale(loss) is loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad is not None and parameter.grad.item() == 2.0
    scaler.step(optimizer)
    scaler.update()
    assert parameter.item() == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_float16_gradients_are_scaled_on_cuda() -> None:
    found = resolve("amp", CUDA)
    assert found.scaler().is_enabled()
    with found.autocast():
        assert nn.Linear(4, 4, device=CUDA)(torch.ones(2, 4, device=CUDA)).dtype == FLOAT16


@pytest.mark.parametrize(("fast", "warned"), [(True, False), (False, True)])
def test_a_cpu_without_bfloat16_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    messages: pytest.LogCaptureFixture,
    fast: bool,
    warned: bool,
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: fast)
    assert resolve("amp", CPU).autocast_dtype == BFLOAT16, "what was asked for is what is done"
    assert ("--precision amp on a CPU is bfloat16" in messages.text) is warned
    messages.clear()
    resolve("fp32", CPU)
    resolve("amp_bf16", CUDA)
    assert messages.text == "", "the CPU does not matter there"
