"""Evaluation mode ends as it began."""

from __future__ import annotations

import pytest
from torch import nn

from slidevlm.models.mode import evaluation_mode


def test_every_module_gets_its_own_mode_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == before
