"""What the engine is measured against computes the same numbers."""

import importlib.util

import pytest

from tests.examples import ROOT
from tests.unit.test_lpi import brute_force, problem

spec = importlib.util.spec_from_file_location("baselines", ROOT / "benchmarks" / "baselines.py")
baselines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(baselines)


@pytest.mark.parametrize("way", ["published", "shared"])
@pytest.mark.parametrize("vocabulary", [97, 5000])
def test_a_baseline_agrees_with_the_definition(way, vocabulary, monkeypatch):
    x = problem(0, vocabulary, step=1.0)
    truth = brute_force(**x)
    monkeypatch.setattr(baselines, "_LOGITS", 7 * vocabulary)
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in x.items()}
    found = getattr(baselines, way)(**inputs)
    assert (found - truth).abs().max() < 2e-5
    assert truth.abs().max() > 0.1
