"""LPI against its definition in float64, whatever the input; and what the certificate promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import lpi, moments
from moescope import unembedding as unembedding_module


def brute_force(weight, offset, values, coefficients, residual, scale, target):
    """log p(t | r + c v) - log p(t | r), a vocabulary row per pair, all in float64."""
    weight, values, coefficients = weight.double(), values.double(), coefficients.double()
    base = offset + scale[:, None].double() * (residual.double() @ weight.T)
    out = torch.empty(coefficients.shape, dtype=torch.float64)
    for p in range(len(coefficients)):
        moved = base[p] + scale[p].double() * coefficients[p, :, None] * (values @ weight.T)
        before = base[p].log_softmax(0)[target[p]]
        out[p] = moved.log_softmax(1)[:, target[p]] - before
    return out


def problem(seed, vocabulary=97, hidden=24, neurons=40, prompts=11, width=0.1, size=1.0, peak=1.0, step=1.0):
    """Random input: ``peak`` scales the base residual (diffuse to peaked p), ``step`` the coefficients, ``size`` the
    values (the coefficients shrink as they grow)."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "weight": randn(vocabulary, hidden) * width,
        "offset": randn(vocabulary).double(),
        "values": randn(neurons, hidden) * size,
        "coefficients": randn(prompts, neurons) * torch.rand(prompts, neurons, generator=g) ** 4 * step / size,
        "residual": randn(prompts, hidden) * peak,
        "scale": torch.rand(prompts, generator=g) + 0.5,
        "target": torch.randint(vocabulary, (prompts,), generator=g),
    }


def base_of(x):
    """The distribution of a problem, and how it is read."""
    unembedding = lpi.Unembedding(x["weight"], x["offset"])
    return unembedding, lpi.Base.of(unembedding, x["residual"], x["scale"], x["target"])


def fast(x):
    """(LPI, certificate, base) of a problem by the engine."""
    unembedding, base = base_of(x)
    certificate = lpi.Certificate()
    (scores,) = lpi.of_neurons(unembedding, base, [lpi.Neurons(x["values"], x["coefficients"])], certificate)
    return scores, certificate.as_dict(), base


def tolerance(truth, coefficients):
    return min(1e-6, max(1e-9, 0.01 * truth[coefficients != 0].abs().median().item()))


@pytest.mark.parametrize("peak", [0.0, 1.0, 30.0], ids=["diffuse", "usual", "peaked"])
@pytest.mark.parametrize("step", [1e-8, 1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_neurons_agree_with_the_definition(peak, step, size):
    x = problem(0, peak=peak, step=step, size=size)
    truth = brute_force(**x)
    scores, _, _ = fast(x)
    error = (scores - truth).abs() / (1 + truth.abs())
    assert error.max() <= tolerance(truth, x["coefficients"])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(17, 700),
    hidden=st.integers(3, 48),
    width=st.floats(0.01, 1.0),
    peak=st.floats(0, 20),
    step=st.floats(1e-6, 50),
)
def test_neurons_agree_with_the_definition_on_any_input(seed, vocabulary, hidden, width, peak, step):
    x = problem(seed, vocabulary, hidden, 12, 5, width, 1.0, peak, step)
    truth = brute_force(**x)
    scores, _, _ = fast(x)
    assert ((scores - truth).abs() <= 2e-6 * (1 + truth.abs())).all()


def test_small_scores_keep_their_digits():
    """At coefficients of 1e-6 every LPI is far below the largest tolerance: the sign must still be right."""
    x = problem(3, step=1e-6)
    truth = brute_force(**x)
    scores, _, _ = fast(x)
    assert truth.abs().max() < 1e-5
    large = truth.abs() > 1e-9
    assert torch.equal(scores[large].sign(), truth[large].sign())
    assert ((scores - truth).abs()[large] / truth.abs()[large]).median() < 1e-4


def test_one_token_that_dominates():
    x = problem(4)
    x["offset"][5] = 60.0
    for target in (5, 6):
        x["target"] = torch.full_like(x["target"], target)
        truth = brute_force(**x)
        scores, _, _ = fast(x)
        assert ((scores - truth).abs() <= 2e-6 * (1 + truth.abs())).all()


@pytest.mark.parametrize("peak", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("vocabulary", [17, 1000])
def test_the_tolerance_is_that_of_the_finished_scores(vocabulary, peak):
    """The target dominates: true scores are tiny, while the unfinished ones of large steps are anything. Their median
    must not loosen the tolerance."""
    x = problem(0, vocabulary, 32, 40, 9, step=1e3, peak=peak, size=32**-0.5)
    x["coefficients"] /= 32**0.5
    x["offset"] = torch.zeros_like(x["offset"])
    x["offset"][7], x["target"] = 25.0, torch.full_like(x["target"], 7)
    truth = brute_force(**x)
    scores, certificate, _ = fast(x)
    assert certificate["direct_share"] > 0.5, "the case must arise"
    assert ((scores - truth).abs() <= tolerance(truth, x["coefficients"]) * (1 + truth.abs())).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hidden", [32, 512])
def test_rows_and_values_that_share_a_direction(hidden, seed):
    """Unembeddings are far from isotropic: sums of one sign round more than sums that cancel."""
    x = problem(seed, 17, hidden, 40, 9, step=3.0, peak=30.0, width=3 * hidden**-0.5)
    x["weight"] += 3.0
    x["values"] = (x["values"] + 5.0) / hidden**0.5
    truth = brute_force(**x)
    scores, _, _ = fast(x)
    assert ((scores - truth).abs() <= tolerance(truth, x["coefficients"]) * (1 + truth.abs())).all()


def test_zero_vectors_and_zero_coefficients_change_nothing():
    x = problem(5)
    x["values"][3] = 0
    x["coefficients"][:, 4] = 0
    scores, _, _ = fast(x)
    assert (scores[:, [3, 4]] == 0).all()
    assert (scores[:, :3] != 0).all()


def test_a_constant_direction_changes_nothing():
    """A vector that raises all logits alike leaves the distribution alone."""
    x = problem(6, hidden=8)
    x["weight"][:, 0] = 0.7
    x["values"][0] = 0
    x["values"][0, 0] = 50.0
    scores, _, _ = fast(x)
    assert scores[:, 0].abs().max() < 1e-5


def test_large_steps_are_evaluated_directly_and_counted():
    small, large = fast(problem(7, step=1e-2))[1], fast(problem(7, step=300.0))[1]
    assert small["direct_share"] == 0
    assert 0.2 < large["direct_share"] <= 1
    assert small["pairs"] == 11 * 40
    assert 0 < small["largest_bound_of_tolerance"] <= 1
    assert sum(large["pairs_by_order"].values()) == round(large["pairs"] * (1 - large["direct_share"]))


def test_results_do_not_depend_on_how_prompts_and_neurons_are_grouped():
    x = problem(8, step=3.0)
    whole, _, _ = fast(x)
    for rows in ([0, 3, 7], [10]):
        part = {k: v[rows] if k in ("coefficients", "residual", "scale", "target") else v for k, v in x.items()}
        assert (fast(part)[0] - whole[rows]).abs().max() < 2e-6
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    part = {k: v[order] if k in ("coefficients", "residual", "scale", "target") else v for k, v in x.items()}
    assert (fast(part)[0] - whole[order]).abs().max() < 2e-6
    part = {**x, "values": x["values"][10:20], "coefficients": x["coefficients"][:, 10:20]}
    assert (fast(part)[0] - whole[:, 10:20]).abs().max() < 2e-6


def test_rows_of_a_base_are_the_base_of_those_rows():
    x = problem(9)
    _, _, base = fast(x)
    rows = torch.tensor([4, 1])
    part = {k: v[rows] if k in ("coefficients", "residual", "scale", "target") else v for k, v in x.items()}
    _, _, direct = fast(part)
    assert torch.allclose(base.rows(rows).gradient, direct.gradient, atol=1e-12)
    assert torch.allclose(base.rows(rows).of_target, direct.of_target, atol=1e-12)


@pytest.mark.parametrize("peak", [0.0, 1.0, 30.0], ids=["diffuse", "usual", "peaked"])
@pytest.mark.parametrize("step", [1e-6, 1e-3, 1.0, 20.0, 1e3])
def test_heads_agree_with_the_definition(step, peak):
    """A head: one LPI of the whole vector, which is not the sum of its neurons' LPIs."""
    x = problem(10, step=step, peak=peak)
    unembedding, base = base_of(x)
    neurons, heads = lpi.of_heads(unembedding, base, lpi.Neurons(x["values"], x["coefficients"]), 5)
    assert torch.equal(neurons, fast(x)[0])
    for head in range(5):
        own = slice(8 * head, 8 * head + 8)
        whole = (x["coefficients"][:, own].double() @ x["values"][own].double())[:, None]  # [P, 1, d]: one a prompt
        truth = torch.stack([of_one_prompt(x, p, whole[p]) for p in range(len(whole))])
        error = (heads[:, head] - truth).abs() / (1 + truth.abs())
        assert error.max() <= tolerance(neurons, x["coefficients"])
        assert ((lpi.of_vectors(unembedding, base, whole[:, 0]) - truth).abs() <= 1e-12 * (1 + truth.abs())).all()
        if step >= 1:
            assert (heads[:, head] - neurons[:, own].sum(1)).abs().max() > 1e-3


def of_one_prompt(x, p, vector):
    """LPI of one vector [1, d] added in one prompt."""
    one = {name: x[name][p : p + 1] for name in ("residual", "scale", "target")}
    return brute_force(**{**x, **one, "values": vector, "coefficients": torch.ones(1, 1)})[0, 0]


def test_experts_meet_only_their_own_prompts():
    """Parts of a site, each with its own prompts and neurons, share a tolerance and the distributions."""
    x = problem(13, step=3.0)
    unembedding, base = base_of(x)
    rows = [torch.tensor([1, 4, 10]), torch.tensor([0]), torch.arange(11)]
    parts = [lpi.Neurons(x["values"][i::3], x["coefficients"][r, i::3], r) for i, r in enumerate(rows)]
    truth = brute_force(**x)
    for i, (r, scores) in enumerate(zip(rows, lpi.of_neurons(unembedding, base, parts), strict=True)):
        assert ((scores - truth[r, i::3]).abs() <= 2e-6 * (1 + truth[r, i::3].abs())).all()


@pytest.mark.parametrize("step", [1e-8, 1e-2, 3.0, 300.0])
def test_soft_capped_logits_agree_with_the_definition(step):
    x = problem(14, step=step, peak=4.0)
    unembedding = lpi.Unembedding(x["weight"], x["offset"], cap=2.0)
    base = lpi.Base.of(unembedding, x["residual"], x["scale"], x["target"])
    neurons, heads = lpi.of_heads(unembedding, base, lpi.Neurons(x["values"], x["coefficients"]), 5)

    def log_probs(moved):
        z = x["offset"] + x["scale"][:, None].double() * (moved @ x["weight"].double().T)
        return (2 * torch.tanh(z / 2)).log_softmax(1).gather(1, x["target"][:, None])[:, 0]

    residual, values, coefficients = (x[name].double() for name in ("residual", "values", "coefficients"))
    before = log_probs(residual)
    truth = torch.stack([log_probs(residual + coefficients[:, [i]] * values[i]) - before for i in range(40)], 1)
    assert (neurons - truth).abs().max() <= 1e-12
    whole = log_probs(residual + coefficients[:, 8:16] @ values[8:16]) - before
    assert (heads[:, 1] - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("tile", [97 * 3, 97 * 40])
@pytest.mark.parametrize("block", [97 * 8, 97 * 40])
def test_results_do_not_depend_on_what_is_evaluated_at_once(tile, block, monkeypatch):
    """Tiles of the vocabulary, blocks of neurons, direct pairs, a few at a time: each meets its own prompt."""
    x = problem(12, step=20.0)
    unembedding, base = base_of(x)
    neurons, heads = lpi.of_heads(unembedding, base, lpi.Neurons(x["values"], x["coefficients"]), 5)
    monkeypatch.setattr(lpi, "_PROJECTED", block)
    monkeypatch.setattr(moments, "_TILE", tile)
    monkeypatch.setattr(moments, "_DIRECT", tile)
    monkeypatch.setattr(moments, "_LEAST", 8)
    monkeypatch.setattr(unembedding_module, "_DOUBLE", tile)
    unembedding, base = base_of(x)
    again = lpi.of_heads(unembedding, base, lpi.Neurons(x["values"], x["coefficients"]), 5)
    for mine, other in zip(again, (neurons, heads), strict=True):
        assert ((mine - other).abs() <= 2e-6 * (1 + other.abs())).all()


@pytest.mark.parametrize("peak", [0.0, 3.0, 30.0])
def test_a_distribution_is_that_of_float64_logits(peak):
    x = problem(15, vocabulary=3000, peak=peak)
    unembedding, base = base_of(x)
    z = x["offset"] + x["scale"][:, None].double() * (x["residual"].double() @ x["weight"].double().T)
    log_prob, weight = z.log_softmax(1), x["weight"].double()
    assert (base.prob.double() / log_prob.exp() - 1).abs()[log_prob > -60].max() < 4e-7
    assert torch.allclose(base.mean, log_prob.exp() @ weight, rtol=0, atol=1e-14)
    assert torch.allclose(base.gradient, weight[x["target"]] - log_prob.exp() @ weight, rtol=0, atol=1e-14)
    target = log_prob.gather(1, x["target"][:, None])[:, 0]
    assert torch.allclose(base.of_target, target, rtol=1e-14, atol=1e-13)
    again = lpi.target_log_prob(unembedding, x["residual"], x["scale"], x["target"])
    assert torch.allclose(again, target, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("centred", [False, True])
def test_the_unembedding_folds_norm_gain_centring_and_biases(centred):
    g = torch.Generator().manual_seed(1)
    head, gain, bias, head_bias = (torch.randn(*s, generator=g) for s in ((31, 8), (8,), (8,), (31,)))
    x = torch.randn(5, 8, generator=g)
    y = x - x.mean(1, keepdim=True) if centred else x
    scale = y.square().mean(1).add(1e-5).rsqrt()
    logits = (y * scale[:, None] * gain + bias).double() @ head.double().T + head_bias
    mine = lpi.Unembedding.of(head, gain, centred, bias, head_bias).log_probs(x, scale)
    assert (mine - logits.log_softmax(1)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["coefficients", "values", "residual"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_input_that_is_not_finite_is_an_error(name, bad):
    x = problem(11)
    x[name][0, 0] = bad
    with pytest.raises(lpi.NotFiniteError):
        fast(x)


@pytest.mark.parametrize("peak", [0.0, 3.0, 30.0], ids=["diffuse", "usual", "peaked"])
def test_a_vocabulary_of_150000(peak):
    x = problem(16, vocabulary=150_000, hidden=6, neurons=9, prompts=3, step=0.5, peak=peak, width=0.4)
    truth = brute_force(**x)
    scores, _, _ = fast(x)
    assert ((scores - truth).abs() <= tolerance(truth, x["coefficients"]) * (1 + truth.abs())).all()


@pytest.mark.parametrize("peak", [0.0, 5.0, 40.0], ids=["diffuse", "usual", "peaked"])
@pytest.mark.parametrize("shared", [0.0, 1.0], ids=["isotropic", "rows share a direction"])
def test_float32_rounds_no_more_than_the_bounds_allow_for(peak, shared):
    """Moments and directions at the size of a real vocabulary, against float64."""
    x = problem(17, vocabulary=50_000, hidden=256, neurons=16, prompts=6, peak=peak, width=256**-0.5)
    x["weight"] += shared / 16
    unembedding, base = base_of(x)
    projection = moments.Projection(unembedding, x["values"])
    w, expected = projection.steps(x["coefficients"], base)
    series = moments.Series(projection, w, expected, base, 1e-6)
    u = projection.unit @ (x["weight"].double() - unembedding.centre).T
    assert (projection.u - u).abs().max() <= moments.MISREAD
    for k in (2, 3, 4):
        absolute = base.prob.double() @ u.abs().pow(k).T
        error = (series._moment(None, k) - base.prob.double() @ projection.u.double().pow(k).T).abs()
        assert (error <= moments.ROUNDING * absolute).all()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_steps_that_move_the_whole_distribution(sign, share):
    """One token holds most of p and the step moves just that one, either way: E_p[exp(m b)] is far from 1."""
    vocabulary, neurons = 60, 80
    weight = torch.zeros(vocabulary, 4)
    weight[3, 0], weight[:, 1] = 1.0, torch.linspace(-0.01, 0.01, vocabulary)
    offset = torch.zeros(vocabulary, dtype=torch.float64)
    offset[3] = math.log(share / (1 - share) * (vocabulary - 1))
    values = torch.zeros(neurons, 4)
    values[:, 0] = 1.0
    steps = sign * torch.logspace(-4, 0.8, neurons)
    x = {
        "weight": weight,
        "offset": offset,
        "values": values,
        "coefficients": steps.expand(2, -1).clone(),
        "residual": torch.zeros(2, 4),
        "scale": torch.ones(2),
        "target": torch.tensor([3, 7]),
    }
    truth = brute_force(**x)
    scores, certificate, _ = fast(x)
    assert ((scores - truth).abs() <= tolerance(truth, x["coefficients"]) * (1 + truth.abs())).all()
    assert certificate["direct_share"] < 0.9, "the series must be tried"


@pytest.mark.parametrize("size", [12.0, 14.0, 16.0])
def test_one_token_that_dominates_equals(size):
    """One token is nearly all of each moment, the others are alike: float32 loses them one by one, all the same way."""
    x = problem(18, vocabulary=50_000, hidden=8, neurons=24, prompts=3, peak=0.0, width=0.5, step=1.0)
    x["offset"] = torch.zeros_like(x["offset"])
    x["offset"][11] = size
    x["coefficients"] = torch.logspace(-2, 1, 24).expand(3, -1).clone() / x["values"].norm(dim=1)
    for target in (11, 30):
        x["target"] = torch.full_like(x["target"], target)
        truth = brute_force(**x)
        scores, _, _ = fast(x)
        assert ((scores - truth).abs() <= tolerance(truth, x["coefficients"]) * (1 + truth.abs())).all()


def of_tokens(weight, offset, values, coefficients, targets):
    """A problem whose residual is 0: the distribution is that of the offset alone."""
    prompts = len(targets)
    return {
        "weight": weight,
        "offset": offset,
        "values": values,
        "coefficients": coefficients.expand(prompts, -1).clone(),
        "residual": torch.zeros(prompts, weight.shape[1]),
        "scale": torch.ones(prompts),
        "target": torch.tensor(targets),
    }


def all_within(x, heads):
    """Neurons and heads meet the guarantee."""
    unembedding, base = base_of(x)
    truth = brute_force(**x)
    allowed = tolerance(truth, x["coefficients"])
    neurons, of_heads = lpi.of_heads(unembedding, base, lpi.Neurons(x["values"], x["coefficients"]), heads)
    assert ((neurons - truth).abs() <= allowed * (1 + truth.abs())).all()
    width = len(x["values"]) // heads
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        whole = x["coefficients"][:, own].double() @ x["values"][own].double()
        truth = torch.stack([of_one_prompt(x, p, whole[p : p + 1]) for p in range(len(whole))])
        assert ((of_heads[:, head] - truth).abs() <= allowed * (1 + truth.abs())).all()


def likely(vocabulary, *tokens):
    """An offset that leaves all probability to some tokens."""
    offset = torch.full((vocabulary,), -40.0, dtype=torch.float64)
    offset[list(tokens)] = 0
    return offset


@pytest.mark.parametrize("step", [0.0525, 0.08, 0.1])
def test_a_head_among_tiny_neurons(step):
    """exp(x) - 1 in float32 is off by 2^-24 x, which a tolerance of 1e-9 sees."""
    weight = torch.zeros(200, 4)
    weight[0, 0], weight[1, 0], weight[2:, 1] = 1, -1, torch.linspace(-1, 1, 198)
    values = torch.zeros(64, 4)
    values[:, 0] = 1
    coefficients = torch.full((1, 64), 1e-9)
    coefficients[0, 0] = step
    all_within(of_tokens(weight, likely(200, 0, 1), values, coefficients, [0, 1]), 2)


@pytest.mark.parametrize("kind", ["dominant", "signed", "small first", "positive"])
def test_rows_that_one_element_dominates(kind):
    """Partial sums of W v as large as the whole round 2^-24 at every step, and two tokens see the difference."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    weight, values = 0.01 * randn(1000, 2048), 0.01 * randn(64, 2048)
    weight[:, 0] = {"signed": randn(1000).sign(), "small first": 1 + 0.002 * randn(1000)}.get(kind, 1)
    if kind == "positive":
        weight[:, 1:], values[:] = 0.01 * weight[:, 1:].abs(), values.abs()
    values[:, 0] = 1
    unembedding = lpi.Unembedding(weight, torch.zeros(1000).double())
    projection = moments.Projection(unembedding, values)
    error = projection.u - projection.unit @ (weight.double() - unembedding.centre).T
    assert (error.abs() <= projection.misread[:, None]).all()
    worst = error[0]
    offset = likely(1000, int(worst.argmax()), int(worst.argmin()))
    steps = torch.logspace(0, 4, 64)[None] / projection.size[0].float()
    all_within(of_tokens(weight, offset, values[:1].expand(64, -1).contiguous(), steps, [int(worst.argmax())]), 64)


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_heads_whose_mean_is_large_beside_the_likely_rows(size):
    """All probability lies on short rows, while the others share a direction that the head writes along."""
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        weight, values = 0.05 * torch.randn(400, 32, generator=g), 0.1 * torch.randn(64, 32, generator=g)
        weight[:, 0], values[:, 0] = -1, 1
        weight[:2] = size * torch.randn(2, 32, generator=g)
        for step in (1.0, 100.0, 1e5):
            coefficients = torch.full((1, 64), 1e-5 / size)
            coefficients[0, :8] = step / 8
            all_within(of_tokens(weight, likely(400, 0, 1), values, coefficients, [0, 1]), 8)


@pytest.mark.parametrize("step", [3e3, 7e3, 1e5, 1e7])
def test_a_direction_that_float32_loses(step):
    g = torch.Generator().manual_seed(0)
    weight = torch.ones(100, 2)
    weight[:, 1] = 2e-8 * torch.randn(100, generator=g).sign()
    values = torch.tensor([[1.0, 0.7]]).expand(16, -1).contiguous()
    coefficients = torch.full((1, 16), 1e-3)
    coefficients[0, 0] = step
    all_within(of_tokens(weight, torch.zeros(100).double(), values, coefficients, [1, 2]), 16)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e12])
def test_huge_steps_towards_the_target(size):
    """What is left is small beside what cancels."""
    x = problem(19, neurons=40, prompts=8, step=1.0)
    towards = (x["values"].double() @ x["weight"].double().T).argmax(1)
    x["coefficients"], x["target"] = torch.full_like(x["coefficients"], size), towards[:8].clone()
    all_within(x, 5)
    x["offset"][int(towards[0])] += 40
    x["target"][:] = towards[0]
    x["values"] = x["values"][:1].expand(40, -1).contiguous()
    all_within(x, 5)


@pytest.mark.parametrize("name", ["coefficients", "values"])
def test_a_soft_cap_does_not_swallow_an_infinity(name):
    x = problem(20)
    x[name][0, 0] = math.inf
    unembedding = lpi.Unembedding(x["weight"], x["offset"], cap=2.0)
    base = lpi.Base.of(unembedding, x["residual"], x["scale"], x["target"])
    with pytest.raises(lpi.NotFiniteError):
        lpi.of_neurons(unembedding, base, [lpi.Neurons(x["values"], x["coefficients"])])


def test_nothing_to_score_is_no_error_and_uneven_heads_are():
    x = problem(21)
    unembedding, base = base_of(x)
    assert lpi.of_neurons(unembedding, base, []) == []
    nobody = lpi.Neurons(x["values"], x["coefficients"][:0], torch.arange(0))
    none = lpi.Neurons(x["values"][:0], x["coefficients"][:, :0])
    assert [tuple(s.shape) for s in lpi.of_neurons(unembedding, base, [nobody, none])] == [(0, 40), (11, 0)]
    with pytest.raises(ValueError, match="40 neurons are not those of 7 heads"):
        lpi.of_heads(unembedding, base, lpi.Neurons(x["values"], x["coefficients"]), 7)
