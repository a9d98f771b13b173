"""What the engine is measured against computes the same numbers, for any cut into tiles and any number of cores."""

import pytest
import torch

from benchmarks import baselines
from tests.unit.test_lpi import brute_force, problem

UNEMBEDDED, READ = ("weight", "offset"), ("residual", "scale", "target")
TILES = {"published": "LOGITS", "shared": "EXPONENTIALS"}
WAYS = [*TILES, "plain_published", "plain_shared"]


def scored(way, x):
    """LPI of a problem by a baseline, everything in float32."""
    x = {name: value.float() if value.is_floating_point() else value for name, value in x.items()}
    before = baselines.Before.of(*(x[name] for name in (*UNEMBEDDED, *READ)))
    work = getattr(baselines, way)
    if way.endswith("shared"):
        return work(x["values"] @ x["weight"].T, x["coefficients"], x["scale"], x["target"], before)
    return work(**x) if way == "plain_published" else work(**x, before=before)


@pytest.mark.parametrize(("way", "tile"), [*((way, None) for way in WAYS), *((way, (7, 60)) for way in TILES)])
@pytest.mark.parametrize("vocabulary", [97, 5000])
def test_a_baseline_agrees_with_the_definition(way, tile, vocabulary, monkeypatch):
    x = problem(0, vocabulary, step=1.0)
    if tile:  # neither divides its length, so that the last ones are shorter
        monkeypatch.setattr(baselines, TILES[way], tile)
    truth = brute_force(**x)
    assert (scored(way, x) - truth).abs().max() < 2e-5
    assert truth.abs().max() > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_large_logits_do_not_overflow(way):
    x = problem(1, step=1.0)
    x["offset"] = x["offset"] + 200
    truth = brute_force(**x)
    assert (scored(way, x) - truth).abs().max() < 1e-3  # float32 at 200: 2e-5 a logit
    assert truth.abs().max() > 0.1


@pytest.mark.parametrize("way", TILES)
def test_the_number_of_cores_does_not_matter_and_stays_as_it_was(way):
    x, cores = problem(2, 5000, neurons=300), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(scored(way, x))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(cores)
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_the_distribution_before_is_a_distribution():
    x = problem(3, 500, peak=20.0)
    before = baselines.Before.of(x["weight"], x["offset"].float(), x["residual"], x["scale"], x["target"])
    logits = x["offset"] + x["scale"][:, None].double() * (x["residual"].double() @ x["weight"].double().T)
    torch.testing.assert_close(before.prob.double(), logits.softmax(1), rtol=1e-4, atol=1e-7)
    assert (before.log_total - logits.logsumexp(1)).abs().max() < 1e-4
    at_target = logits.log_softmax(1).gather(1, x["target"][:, None])[:, 0]
    assert (before.of_target - at_target).abs().max() < 1e-4
