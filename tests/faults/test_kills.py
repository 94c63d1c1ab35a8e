"""Whatever strikes a training down, started again it ends as if nothing had happened.

A short form by default; `make faults` strikes 50 times ($SLIDEVLM_FAULTS).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from slidevlm.data.synthetic import synthesize

_spec = importlib.util.spec_from_file_location(
    "faults_harness", Path(__file__).with_name("harness.py")
)
assert _spec is not None and _spec.loader is not None
harness = importlib.util.module_from_spec(_spec)
sys.modules["faults_harness"] = harness  # its dataclasses look themselves up
_spec.loader.exec_module(harness)

NUMBER = int(os.environ.get("SLIDEVLM_FAULTS", "8"))
SEED = int(os.environ.get("SLIDEVLM_FAULTS_SEED", "1"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(harness.END_SECONDS + 180 * NUMBER),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes of Linux"),
]


def test_strikes_leave_no_trace(tmp_path: Path) -> None:
    cohort = synthesize(tmp_path / "cohort", specimens=90, seed=1)
    model = harness.model_with_dropout(tmp_path)
    undisturbed = harness.training(cohort, tmp_path, "undisturbed", model)
    started = undisturbed.start()
    assert started.agent.wait(timeout=harness.END_SECONDS) == 0, started.said()
    wanted = harness.final_state(undisturbed)
    wanted_losses = harness.losses(undisturbed)
    wanted_evaluations = harness.evaluations(undisturbed)
    assert len(wanted_evaluations) == harness.EPOCHS
    assert [step for step, _ in wanted_losses] == list(range(1, harness.STEPS + 1))

    left = harness.strikes(NUMBER, SEED)
    runs = 0
    while left:
        runs += 1
        one = harness.training(cohort, tmp_path, f"struck{runs}", model)
        while not one.last.exists():
            started = one.start()
            if left and started.strike(left[0]):
                strike = left.pop(0)
                seconds = started.wait_until_gone()
                saved = harness.check_checkpoints(one.run)
                steps = harness.losses(one)[-1:] if (one.run / "metrics.jsonl").exists() else []
                print(f"{strike}: gone in {seconds:.1f} s, {saved} checkpoints, at {steps}")
                continue
            code = started.agent.wait(timeout=harness.END_SECONDS)
            assert code == 0, started.said()
            started.wait_until_gone()
        # Struck after its last checkpoint, a run still has its end to make.
        started = one.start()
        assert started.agent.wait(timeout=harness.END_SECONDS) == 0, started.said()
        assert harness.equal(harness.final_state(one), wanted), f"{one.name} ended elsewhere"
        assert harness.losses(one) == wanted_losses, f"{one.name} logged something else"
        assert harness.evaluations(one) == wanted_evaluations, f"{one.name} was judged otherwise"
        print(f"{one.name}: {one.starts} starts, the same to the last bit")
