"""LPI with the norm measured anew, against its definition in float64: it is really measured again for every pair."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import local_norm, lpi, moments
from moescope.norms import Norm

EPS = 1e-5


def log_probs(x, residual):
    """log softmax [k, V] of what the norm and the head make of residuals [k, d], all in float64. The centring of a
    LayerNorm is in the weight already, but for its statistic."""
    r = residual.double()
    y = r - r.mean(1, keepdim=True) if x["centred"] else r
    sigma = (y.square().mean(1, keepdim=True) + EPS).sqrt()
    return (r / sigma @ x["weight"].double().T + x["offset"]).log_softmax(1)


def brute_force(x):
    """log p(t | r + c v) - log p(t | r), a vocabulary row per pair."""
    residual, values, coefficients = (x[name].double() for name in ("residual", "values", "coefficients"))
    out = torch.empty(coefficients.shape, dtype=torch.float64)
    for p, t in enumerate(x["target"]):
        before = log_probs(x, residual[[p]])[0, t]
        out[p] = log_probs(x, residual[p] + coefficients[p, :, None] * values)[:, t] - before
    return out


def problem(
    seed, vocabulary=97, hidden=24, neurons=40, prompts=11, centred=False, width=0.2, size=1.0, peak=1.0, step=1.0
):
    """Random input: ``width`` scales the unembedding (diffuse to peaked p), ``peak`` the residuals, ``step`` what is
    added to them; ``size`` the values, while the coefficients shrink as they grow."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    weight = randn(vocabulary, hidden) * width
    return {
        "centred": centred,
        "weight": weight - weight.mean(1, keepdim=True) if centred else weight,  # as Unembedding.of folds it
        "offset": randn(vocabulary).double(),
        "values": (randn(neurons, hidden) + 0.3) * size,
        "coefficients": randn(prompts, neurons) * torch.rand(prompts, neurons, generator=g) ** 4 * step / size,
        "residual": (randn(prompts, hidden) + 0.5) * peak,
        "target": torch.randint(vocabulary, (prompts,), generator=g),
    }


def reading_of(x, cap=None):
    """(unembedding, norm, base) of a problem."""
    hidden = x["weight"].shape[1]
    norm = Norm(torch.ones(hidden), torch.zeros(hidden), x["centred"], EPS)
    unembedding = lpi.Unembedding(x["weight"], x["offset"], cap)
    base = lpi.Base.of(unembedding, x["residual"], norm.scale(x["residual"]), x["target"])
    return unembedding, norm, base


def fast(x):
    """(LPI, certificate) of a problem."""
    certificate = lpi.Certificate()
    neurons = lpi.Neurons(x["values"], x["coefficients"])
    (scores,) = local_norm.of_neurons(*reading_of(x), [neurons], certificate)
    return scores, certificate.as_dict()


def worst(scores, truth, coefficients):
    """The largest error as a share of what is guaranteed."""
    active = truth[coefficients != 0].abs()
    tolerance = min(1e-6, max(1e-9, 0.01 * active.median().item()))
    return ((scores - truth).abs() / (tolerance * (1 + truth.abs()))).max().item()


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer_norm"])
@pytest.mark.parametrize("width", [0.0, 0.2, 4.0], ids=["offset_alone", "usual", "peaked"])
@pytest.mark.parametrize("step", [1e-8, 1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_neurons_agree_with_the_definition(centred, width, step, size):
    x = problem(0, centred=centred, width=width, step=step, size=size)
    assert worst(fast(x)[0], brute_force(x), x["coefficients"]) <= 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(17, 700),
    hidden=st.integers(3, 48),
    centred=st.booleans(),
    width=st.floats(0.01, 3.0),
    peak=st.floats(1e-3, 100),
    step=st.floats(1e-6, 50),
)
def test_neurons_agree_with_the_definition_on_any_input(seed, vocabulary, hidden, centred, width, peak, step):
    x = problem(seed, vocabulary, hidden, 12, 5, centred, width, 1.0, peak, step)
    assert worst(fast(x)[0], brute_force(x), x["coefficients"]) <= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("vocabulary", "hidden", "shared"), [(300, 32, 0.3), (300, 512, 0.1), (17, 512, 30.0)])
def test_rows_and_values_that_share_a_direction(vocabulary, hidden, shared, seed):
    """Sums of one sign round more than sums that cancel: W v in float32 may be nothing but rounding."""
    x = problem(seed, vocabulary, hidden, width=3 * hidden**-0.5, peak=5.0)
    x["weight"] += shared
    x["values"], x["residual"] = x["values"] + 5, x["residual"] + 5
    assert worst(fast(x)[0], brute_force(x), x["coefficients"]) <= 1


def test_float32_moments_round_no_more_than_the_bound_allows():
    """Next to a token that has most of the mass, 50,000 others are lost one by one, all in the same way."""
    x = problem(0, 50304, 16, 96, 24)
    x["weight"] *= 1e-2
    x["weight"][:, 0] = torch.where(torch.arange(50304) < 25152, 0.5, -0.5)
    x["weight"][7] *= 10
    x["offset"] = torch.zeros_like(x["offset"])
    x["offset"][7] = 12.0
    x["values"] = 1e-2 * x["values"] + torch.eye(16)[0]
    reading = local_norm._Reading(*reading_of(x))
    moves = local_norm._Moves(reading, lpi.Neurons(x["values"], x["coefficients"]))
    series = local_norm._Series(reading, x["values"], moves, slice(None), 1e-6)
    p, a, u = (tensor.double() for tensor in (series.prob, series.a, series.u))
    largest = 0.0
    for k in (2, 3, 4):
        cross, own = series._moments(torch.arange(96), k)
        for i, moment in enumerate([*cross, own[:, None]]):
            exact, size = ((p * x**i) @ (y ** (k - i)).T for x, y in ((a, u), (a.abs(), u.abs())))
            largest = max(largest, ((moment - exact).abs() / size).max().item())
    assert 2e-6 < largest < moments.ROUNDING


@pytest.mark.parametrize("target", [5, 6], ids=["dominant", "hopeless"])
@pytest.mark.parametrize("step", [1e-3, 1.0, 1e3])
def test_one_token_that_dominates(target, step):
    x = problem(4, step=step)
    x["offset"][5] = 40.0
    x["target"] = torch.full_like(x["target"], target)
    assert worst(fast(x)[0], brute_force(x), x["coefficients"]) <= 1


@pytest.mark.parametrize("step", [1e-6, 1e-3])
def test_small_scores_keep_their_digits(step):
    """s - 1 is then far below the rounding of s."""
    x = problem(3, step=step)
    truth, scores = brute_force(x), fast(x)[0]
    large = truth.abs() > 1e-9
    assert torch.equal(scores[large].sign(), truth[large].sign())
    assert ((scores - truth).abs()[large] / truth.abs()[large]).median() < 1e-5


def test_a_vector_along_the_residual_changes_the_temperature_alone():
    """Made by hand: the normed residual stays what it is (eps aside), or turns round."""
    x = problem(5, prompts=1, peak=300.0)
    x["values"] = x["residual"].repeat(4, 1)
    x["coefficients"] = torch.tensor([[1e-3, 0.5, 40.0, -2.0]])
    scores = fast(x)[0]
    assert scores[0, :3].abs().max() < 1e-8
    turned = log_probs(x, -x["residual"]) - log_probs(x, x["residual"])
    assert math.isclose(scores[0, 3], turned[0, x["target"][0]], abs_tol=1e-6)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer_norm"])
@pytest.mark.parametrize("left", [0.0, 1e-7, 1e-4, 3e-2, 0.1])
@pytest.mark.parametrize("peak", [1.0, 1e4])
def test_a_vector_that_cancels_the_residual(centred, left, peak):
    """sigma falls to the square root of eps, and s rises as far as it can."""
    x = problem(6, centred=centred, peak=peak, neurons=11, step=1e-3)
    x["values"] = -x["residual"] + left * x["residual"].norm() * x["values"] / x["values"].norm()
    x["coefficients"] = torch.eye(11) + x["coefficients"] * (1 - torch.eye(11))
    scores, truth = fast(x)[0], brute_force(x)
    assert worst(scores, truth, x["coefficients"]) <= 1
    if left == 0 and not centred:
        alone = x["offset"].log_softmax(0)[x["target"]] - log_probs(x, x["residual"])[range(11), x["target"]]
        assert torch.allclose(scores.diagonal(), alone, atol=1e-9), "nothing is left but the offset"


def test_zero_vectors_and_zero_coefficients_change_nothing():
    x = problem(7)
    x["values"][3] = 0
    x["coefficients"][:, 4] = 0
    scores, _ = fast(x)
    assert (scores[:, [3, 4]] == 0).all()
    assert (scores[:, :3] != 0).all()


def test_only_the_centre_of_a_layer_norm_is_blind_to_a_constant():
    x = problem(8, centred=True, step=30.0)
    x["values"][:] = 1.0
    assert fast(x)[0].abs().max() < 1e-5
    assert fast({**x, "centred": False})[0].abs().median() > 1e-2


def test_it_would_be_seen_if_the_temperature_were_left_out():
    """The nearest wrong answers miss the truth by orders of magnitude more than the guarantee: the norm frozen at the
    base residual, and the direction alone expanded, as norm ``final`` does."""
    x = problem(9, step=1.0)
    truth, (unembedding, norm, base) = brute_force(x), reading_of(x)
    frozen = lpi.of_neurons(unembedding, base, [lpi.Neurons(x["values"], x["coefficients"])])[0]
    shrunk = norm.scale((x["residual"][:, None] + x["coefficients"][..., None] * x["values"]).flatten(0, 1))
    rescaled = x["coefficients"] * shrunk.view(11, 40) / base.scale[:, None]
    direction = lpi.of_neurons(unembedding, base, [lpi.Neurons(x["values"], rescaled.float())])[0]
    assert worst(fast(x)[0], truth, x["coefficients"]) <= 1
    for wrong in (frozen, direction):
        assert worst(wrong, truth, x["coefficients"]) > 1e4
        assert ((wrong - truth).abs() / truth.abs()).median() > 0.05


def test_where_the_norm_hardly_moves_it_agrees_with_the_frozen_norm():
    """Vectors at right angles to the residual, so short that s = 1 - O(c^2)."""
    x = problem(10, prompts=1, step=1e-5)
    r = x["residual"][0]
    x["values"] = x["values"] - (x["values"] @ r)[:, None] * r / r.square().sum()
    unembedding, _, base = reading_of(x)
    frozen = lpi.of_neurons(unembedding, base, [lpi.Neurons(x["values"], x["coefficients"])])[0]
    scores, _ = fast(x)
    assert scores.abs().max() > 1e-6
    assert (scores - frozen).abs().max() < 3e-9


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer_norm"])
def test_increases_along_a_chain_of_residuals_add_up(centred):
    """Each residual is read with its own scale, so one step ends where the next begins, vectors and neurons alike."""
    x = problem(11, centred=centred, neurons=6)
    residual, total, by_neuron = x["residual"].double(), torch.zeros(11).double(), torch.zeros(11).double()
    for i in range(6):
        step = {**x, "residual": residual, "values": x["values"][[i]], "coefficients": x["coefficients"][:, [i]]}
        writes = step["coefficients"].double() * step["values"].double()
        total += local_norm.of_vectors(*reading_of(step), writes)
        by_neuron += fast(step)[0][:, 0]
        residual = residual + writes
    target = x["target"][:, None]
    gain = (log_probs(x, residual) - log_probs(x, x["residual"])).gather(1, target)[:, 0]
    assert torch.allclose(total, gain, rtol=0, atol=1e-12)
    assert torch.allclose(by_neuron, gain, rtol=0, atol=1e-5)


def test_heads_are_scored_as_whole_vectors():
    x = problem(12)
    neurons, heads = local_norm.of_heads(*reading_of(x), lpi.Neurons(x["values"], x["coefficients"]), 5)
    assert torch.equal(neurons, fast(x)[0])
    for head in range(5):
        own = slice(8 * head, 8 * head + 8)
        after = x["residual"].double() + x["coefficients"][:, own].double() @ x["values"][own].double()
        gain = (log_probs(x, after) - log_probs(x, x["residual"])).gather(1, x["target"][:, None])[:, 0]
        assert torch.allclose(heads[:, head], gain, rtol=0, atol=1e-12)
        assert (heads[:, head] - neurons[:, own].sum(1)).abs().max() > 1e-3


def test_experts_meet_only_their_own_prompts():
    x = problem(13, step=3.0)
    rows = [torch.tensor([1, 4, 10]), torch.tensor([0]), torch.arange(11)]
    parts = [lpi.Neurons(x["values"][i::3], x["coefficients"][r, i::3], r) for i, r in enumerate(rows)]
    certificate, truth = lpi.Certificate(), brute_force(x)
    found = local_norm.of_neurons(*reading_of(x), parts, certificate)
    for i, (r, scores) in enumerate(zip(rows, found, strict=True)):
        assert ((scores - truth[r, i::3]).abs() <= 1e-6 * (1 + truth[r, i::3].abs())).all()
    assert certificate.pairs == sum(scores.numel() for scores in found)


@pytest.mark.parametrize("step", [1e-6, 1e-2, 3.0, 300.0])
def test_soft_capped_logits_agree_with_the_definition(step):
    x = problem(14, step=step, width=1.0)
    (scores,) = local_norm.of_neurons(*reading_of(x, cap=2.0), [lpi.Neurons(x["values"], x["coefficients"])])

    def capped(residual):
        y = residual / (residual.square().mean(1, keepdim=True) + EPS).sqrt()
        return (2 * torch.tanh((y @ x["weight"].double().T + x["offset"]) / 2)).log_softmax(1)

    residual, values, coefficients = (x[name].double() for name in ("residual", "values", "coefficients"))
    target = x["target"][:, None]
    after = [capped(residual + coefficients[:, [i]] * values[i]).gather(1, target) for i in range(40)]
    assert torch.allclose(scores, torch.cat(after, 1) - capped(residual).gather(1, target), rtol=0, atol=1e-12)


def test_the_certificate_tells_how_the_numbers_were_reached():
    small, large = fast(problem(15, step=1e-2))[1], fast(problem(15, step=300.0))[1]
    assert small["direct_share"] == 0
    assert 0.2 < large["direct_share"] <= 1
    for certificate in (small, large):
        assert certificate["pairs"] == 11 * 40
        assert sum(certificate["pairs_by_order"].values()) == round(440 * (1 - certificate["direct_share"]))
        assert 0 <= certificate["largest_bound_of_tolerance"] <= 1
    assert small["largest_bound_of_tolerance"] > 0
    assert len(small["pairs_by_order"]) > 1, "the order follows the data"


def test_the_bounds_hold_and_are_not_empty(monkeypatch):
    """Without direct evaluation the error stays below what the series says of itself."""
    x = problem(16, step=0.3)
    truth = brute_force(x)
    unembedding, norm, base = reading_of(x)
    neurons = lpi.Neurons(x["values"], x["coefficients"])
    reading = local_norm._Reading(unembedding, norm, base)
    moves = local_norm._Moves(reading, neurons)
    reached = []
    for order in range(2, 10):
        monkeypatch.setattr(moments, "MAX_ORDER", order)
        series = local_norm._Series(reading, x["values"], moves, slice(None), 1e-6)
        error = (moves.first - series.curvature - truth).abs()
        assert (error <= series.bound + 1e-13).all()
        reached.append((series.bound <= 1e-6).float().mean().item())
    assert reached[0] < 0.6 < 0.9 < reached[-1]


@pytest.mark.parametrize("tile", [97 * 3, 97 * 40])
@pytest.mark.parametrize("block", [97 * 8, 97 * 40])
def test_results_do_not_depend_on_what_is_evaluated_at_once(tile, block, monkeypatch):
    x = problem(17, vocabulary=970, step=3.0)
    before = fast(x)[0]
    monkeypatch.setattr(local_norm, "_PROJECTED", block)
    monkeypatch.setattr(moments, "DEPTH", tile // 40)
    monkeypatch.setattr(local_norm, "_DIRECT", tile)
    assert ((fast(x)[0] - before).abs() <= 2e-6 * (1 + before.abs())).all()


@pytest.mark.parametrize("name", ["coefficients", "values", "residual"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_input_that_is_not_finite_is_an_error(name, bad):
    x = problem(18)
    x[name][0, 0] = bad
    with pytest.raises(lpi.NotFiniteError):
        fast(x)


@pytest.mark.parametrize("width", [0.0, 0.2])
def test_a_residual_of_no_size_left_is_an_error_without_eps(width):
    """0 / 0: never a silent number."""
    x = problem(19, neurons=11, width=width)
    x["values"], x["coefficients"] = -x["residual"], torch.eye(11)
    unembedding, norm, _ = reading_of(x)
    norm = Norm(norm.gain, norm.bias, norm.centred, 0.0)
    base = lpi.Base.of(unembedding, x["residual"], norm.scale(x["residual"]), x["target"])
    with pytest.raises(lpi.NotFiniteError):
        local_norm.of_neurons(unembedding, norm, base, [lpi.Neurons(x["values"], x["coefficients"])])


def test_a_base_read_with_another_scale_is_refused():
    x = problem(20)
    unembedding, norm, _ = reading_of(x)
    base = lpi.Base.of(unembedding, x["residual"], norm.scale(2 * x["residual"]), x["target"])
    with pytest.raises(ValueError, match="scale of its own residual"):
        local_norm.of_neurons(unembedding, norm, base, [lpi.Neurons(x["values"], x["coefficients"])])
