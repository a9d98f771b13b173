"""What breaks without heads and neurons, against copied models whose weights are deleted, one prompt at a time."""

import copy

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from moescope import ablation, attribution, clean, passes, precision, replay, selection, tables, targets
from moescope.decomposition import decoder_of
from tests.model import models

FAMILIES = ["llama", "olmo", "olmoe", "qwen2_moe"]
KEY = ["site", "size", "ranking", "control", "fold", "seed"]


def prompts():
    """Two copies of the facts, whose subjects are in both folds."""
    return models.prompts(2).with_columns(group=pl.col("subject").rank("dense").cast(pl.Int32) * 3 % 10)


def scored(name, **over):
    model = models.build(name, **over)
    return model, attribution.attribute(model, models.tokenizer(), prompts())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """(model, its scores, its ablations by every ranking)."""
    model, frames = scored(request.param)
    found = ablation.ablate(model, models.tokenizer(), prompts(), frames, selection.RANKINGS, seeds=1)
    return model, frames, found["ablations"]


def without(model, units):
    """A copy in which the weights of heads or neurons (rows of the tables) are deleted, by name."""
    model = copy.deepcopy(model)
    width = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        for unit in units:
            block = decoder_of(model).layers[unit["layer"]]
            if "head" in unit:
                block.self_attn.o_proj.weight[:, unit["head"] * width : (unit["head"] + 1) * width] = 0
            elif unit["kind"] == "routed":
                block.mlp.experts.down_proj[unit["expert"], :, unit["neuron"]] = 0
            else:
                mlp = block.mlp.shared_expert if unit["kind"] == "shared" else block.mlp
                mlp.down_proj.weight[:, unit["neuron"]] = 0
    return model


@torch.no_grad()
def feed_forward(model, tokens):
    """The feed-forward parts and what they read at the last position: [(module, [1, 1, d])]."""
    seen, parts = [], [layer.mlp for layer in decoder_of(model).layers]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, -1:])) for m in parts]
    model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return list(zip(parts, seen, strict=True))


@torch.no_grad()
def test_the_whole_table_against_copied_models(case):
    """Rank, log-probability and the share of F that is removed, of every intervention and prompt; and no row else."""
    model, frames, found = case
    rows = tables.check(prompts(), "prompts")
    wanted = targets.find(models.tokenizer(), rows.to_dicts())
    rows_of = found.partition_by(KEY, as_dict=True)
    clean_parts = [feed_forward(model, target.tokens) for target in wanted]
    plan = selection.plan(frames, rows, selection.RANKINGS, seeds=1)
    undisturbed = dict(frames["predictions"].select("prompt_id", "log_prob").rows())
    expected, cache = {}, {}
    for i in plan.interventions:
        units = plan.index[i.site][i.units].to_dicts()
        broken = cache.setdefault((i.site, i.units.tobytes()), without(model, units))
        for p in i.prompts:
            logits = broken(torch.tensor([wanted[p].tokens])).logits[0, -1]
            at = wanted[p].target_id
            share = None
            if i.site == "ffn_neuron":
                broken_parts = [layer.mlp for layer in decoder_of(broken).layers]
                both = [(part(x), other(x)) for (part, x), other in zip(clean_parts[p], broken_parts, strict=True)]
                share = sum((a - b).square().sum() for a, b in both) / sum(a.square().sum() for a, _ in both)
            key = tuple(getattr(i, name) for name in KEY)
            value = (1 + int((logits > logits[at]).sum()), logits.double().log_softmax(-1)[at].item(), share)
            expected.setdefault(key, {})[rows["prompt_id"][int(p)]] = value
    rows_of.pop(("none", "0", None, "none", None, None))
    assert set(rows_of) == set(expected)
    moved = 0
    for key, part in rows_of.items():
        assert set(part["prompt_id"]) == set(expected[key])
        for row in part.to_dicts():
            rank, log_prob, share = expected[key][row["prompt_id"]]
            assert row["log_prob"] == pytest.approx(log_prob, abs=2e-5)
            assert abs(row["rank"] - rank) <= (1 if row["rank"] > 20 else 0)  # two logits nearer than rounding
            assert (row["removed"] is None) == (share is None)
            assert share is None or row["removed"] == pytest.approx(share.item(), rel=1e-4, abs=1e-7)
            moved += abs(log_prob - undisturbed[row["prompt_id"]]) > 1e-3
    assert moved > len(found) / 3, "the case must arise: interventions that change something"


def test_the_clean_run_is_that_of_the_predictions(case):
    _, frames, found = case
    none = found.filter(pl.col("site") == "none")
    assert none.select(KEY).unique().rows() == [("none", "0", None, "none", None, None)]
    assert (none["removed"] == 0).all()
    assert_frame_equal(
        none.select("prompt_id", "rank", "log_prob"), frames["predictions"].select("prompt_id", "rank", "log_prob")
    )


def test_a_fold_tests_its_own_prompts_only(case):
    _, _, found = case
    groups = dict(prompts().select("prompt_id", "group").rows())
    for fold, mine in selection.FOLDS.items():
        part = found.filter(pl.col("fold") == fold)
        every = {p for p, g in groups.items() if g in mine}
        assert 0 < len(every) < len(groups)
        for tested in part.partition_by(KEY):
            assert set(tested["prompt_id"]) == every
    for whole in found.filter(pl.col("fold").is_null()).partition_by(KEY):
        assert set(whole["prompt_id"]) == set(groups)


@pytest.mark.parametrize("name", ["qwen2_moe", "olmo"])
def test_results_do_not_depend_on_the_batch(name, monkeypatch):
    model, frames = scored(name)
    stored = [p.clone() for p in model.parameters()]
    together = ablation.ablate(model, models.tokenizer(), prompts(), frames, seeds=1)["ablations"]
    monkeypatch.setattr(passes, "_CACHED_TOKENS", 1)  # one prompt a batch
    shuffled = prompts().sample(fraction=1, shuffle=True, seed=1)
    alone = ablation.ablate(model, models.tokenizer(), shuffled, frames, seeds=1)["ablations"]
    assert_frame_equal(together, alone, abs_tol=2e-5, rel_tol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(stored, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_weights_stored_in_bfloat16_give_the_float32_results(name):
    stored, frames = scored(name, dtype=torch.bfloat16)
    whole = copy.deepcopy(stored)
    for parameter in whole.parameters():
        parameter.data = parameter.data.float()
    one, two = (
        ablation.ablate(m, models.tokenizer(), prompts(), frames, seeds=1)["ablations"] for m in (stored, whole)
    )
    assert_frame_equal(one, two, abs_tol=2e-5, rel_tol=2e-5)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_the_report_tells_what_was_shared_and_what_is_missing():
    """Sets run once for all that asks for them, on the union of the prompts; nothing is left out in silence."""
    model, frames = scored("olmoe")
    del frames["ffn_groups"]
    with torch.no_grad(), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, models.tokenizer(), prompts())
        found, report = ablation.ablate_run(run, frames, ("signed", "abs"), seeds=3, seed=5)
    plan = selection.plan(frames, run.prompts, ("signed", "abs"), 3, 5)
    asked = {}
    for i in plan.interventions:
        asked.setdefault((i.site, tuple(i.units)), set()).update(i.prompts.tolist())
    assert report["interventions"] == len(plan.interventions)
    assert report["sets"] == len(asked) < len(plan.interventions)
    assert report["passes"] == pytest.approx(sum(map(len, asked.values())) / len(run.prompts))
    assert report["replay_error"] < 1e-5
    assert "ffn_neuron, signed, cross-fit: there are no group sums (uncertainty: none)" in report["left_out"]
    assert set(report["matched"]) == {f"{s} {r}" for s in selection.SIZES["ffn_neuron"] for r in ("signed", "abs")}
    neurons = found.filter(pl.col("site") == "ffn_neuron")
    assert neurons["fold"].null_count() == len(neurons)


def test_the_target_may_be_the_models_own_token():
    model = models.build("llama")
    frames = attribution.attribute(model, models.tokenizer(), prompts(), target="argmax")
    found = ablation.ablate(model, models.tokenizer(), prompts(), frames, seeds=1, target="argmax")["ablations"]
    assert (found.filter(pl.col("site") == "none")["rank"] == 1).all()


@pytest.mark.filterwarnings("ignore")
def test_a_feed_forward_part_that_looks_elsewhere_is_noticed():
    """Work is left out on the ground that it sees one position: a part that mixes positions is refused, not misread."""
    model = models.build("llama")
    mlp = model.model.layers[-1].mlp
    mlp.forward = lambda x, forward=mlp.forward: forward(x + x.cumsum(1))
    frames = attribution.attribute(model, models.tokenizer(), prompts())
    with pytest.raises(replay.ReplayError, match="taken up in the middle misses the whole one by"):
        ablation.ablate(model, models.tokenizer(), prompts(), frames)
