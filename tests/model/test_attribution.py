"""Every table of a checkpoint against the definitions, recomputed in float64 one prompt and one neuron at a time."""

import copy
import math

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from moescope import attribution, clean, lpi, memory, moments, precision, readout, scores, statistics, tables, targets
from moescope.decomposition import DecompositionError, decoder_of
from tests.model import models


class Reference:
    """LPI of one prompt by the definition: a float64 copy of the model run on the prompt alone, coefficients taken at
    the inputs of its writing matrices, and the model's own head behind the frozen final norm."""

    def __init__(self, model, tokens, target, local=False):
        self.model, self.target, self.inputs, self.local = copy.deepcopy(model).double(), target, {}, local
        self.model.set_experts_implementation("eager")  # the fused kernel has no float64
        decoder = decoder_of(self.model)
        hooks = [m.register_forward_pre_hook(self._keep(n)) for n, m in decoder.named_modules() if n]
        hooks.append(decoder.norm.register_forward_pre_hook(lambda m, a: setattr(self, "final", a[0][0, -1])))
        with torch.no_grad():
            self.logits = self.model(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1]
        for hook in hooks:
            hook.remove()
        self.decoder = decoder

    def _keep(self, name):
        def keep(module, args):
            if args:
                self.inputs[name] = [a.reshape(-1, a.shape[-1])[-1] for a in args if isinstance(a, torch.Tensor)]

        return keep

    def log_prob(self, residual):
        """log p(target) with the final norm's statistic frozen at the last residual, or measured anew (local)."""
        norm, final = self.decoder.norm, residual if self.local else self.final
        if type(norm).__name__ == "OlmoLayerNorm":
            normed = (residual - residual.mean()) / (final.var(unbiased=False) + 1e-5).sqrt()
        else:
            normed = norm.weight * residual / (final.square().mean() + norm.variance_epsilon).sqrt()
        return self.model.lm_head(normed).log_softmax(0)[self.target].item()

    def lpi(self, vector, base):
        return self.log_prob(base + vector) - self.log_prob(base)

    def attention(self, layer):
        """(coefficients, values [n, d], base residual) of the attention output."""
        module = self.decoder.layers[layer].self_attn.o_proj
        coefficients = self.inputs[f"layers.{layer}.self_attn.o_proj"][0]
        return coefficients, module.weight.T, self.inputs[f"layers.{layer}.input_layernorm"][0]

    def ffn_base(self, layer):
        return self.inputs[f"layers.{layer}.post_attention_layernorm"][0]

    def ffn(self, layer):
        """kind -> list of (expert, coefficients, values)."""
        mlp, name = self.decoder.layers[layer].mlp, f"layers.{layer}.mlp"
        if not hasattr(mlp, "experts"):
            return {"dense": [(None, self.inputs[f"{name}.down_proj"][0], mlp.down_proj.weight.T)]}
        hidden, index, weight = self.inputs[f"{name}.experts"]
        found = {"routed": []}
        for expert, g in zip(index.long().tolist(), weight.tolist(), strict=True):
            gate, up = (mlp.experts.gate_up_proj[expert] @ hidden).chunk(2)
            coefficients = g * torch.nn.functional.silu(gate) * up
            found["routed"].append((expert, coefficients, mlp.experts.down_proj[expert].T))
        if hasattr(mlp, "shared_expert"):
            gate = torch.sigmoid(mlp.shared_expert_gate(hidden))
            c = gate * self.inputs[f"{name}.shared_expert.down_proj"][0]
            found["shared"] = [(None, c, mlp.shared_expert.down_proj.weight.T)]
        return found


CASES = ["llama", "llama_tied", "olmo", "olmoe", "olmoe_normed", "qwen2_moe", "olmo, local", "qwen2_moe, local"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(model, prompts, frames, one reference per prompt, the prompts' targets)."""
    name, _, local = request.param.partition(", ")
    model = models.build(name)
    prompts = models.prompts()
    frames = attribution.attribute(model, models.tokenizer(), prompts, norm=local or "final")
    found = targets.find(models.tokenizer(), prompts.to_dicts())
    with torch.no_grad():
        references = [Reference(model, t.tokens, t.target_id, bool(local)) for t in found]
    return model, prompts, frames, references, found


def close(mine, truth, tolerance=5e-6):
    """Nearer than the guarantee allows for, with room for the float32 forward pass."""
    return abs(mine - truth) <= tolerance * (1 + abs(truth))


@torch.no_grad()
def test_predictions(case):
    _, _, frames, references, found = case
    for row, reference, target in zip(frames["predictions"].to_dicts(), references, found, strict=True):
        logits = reference.logits
        assert row["target_id"] == target.target_id
        assert row["rank"] == 1 + int((logits > logits[target.target_id]).sum())
        assert row["argmax_id"] == int(logits.argmax())
        assert close(row["log_prob"], logits.log_softmax(0)[target.target_id].item(), 1e-5)
        assert close(row["log_prob_h0"], reference.log_prob(reference.inputs["layers.0.input_layernorm"][0]), 1e-5)


@torch.no_grad()
def test_layer_components_and_heads(case):
    model, prompts, frames, references, _ = case
    layers = {(r["prompt_id"], r["layer"], r["component"]): r["lpi"] for r in frames["layers"].to_dicts()}
    heads = {(r["prompt_id"], r["layer"], r["head"]): r["lpi"] for r in frames["heads"].to_dicts()}
    count = model.config.num_attention_heads
    for prompt, reference in zip(prompts["prompt_id"], references, strict=True):
        for layer in range(model.config.num_hidden_layers):
            c, v, base = reference.attention(layer)
            assert close(layers[prompt, layer, "attn"], reference.lpi(c @ v, base), 2e-5)
            for head, (ch, vh) in enumerate(zip(c.chunk(count), v.chunk(count), strict=True)):
                assert close(heads[prompt, layer, head], reference.lpi(ch @ vh, base), 2e-5)
            whole = sum(c @ v for parts in reference.ffn(layer).values() for _, c, v in parts)
            assert close(layers[prompt, layer, "ffn"], reference.lpi(whole, reference.ffn_base(layer)), 2e-5)


@torch.no_grad()
def test_neurons_of_every_kind(case):
    """Importance, activity, magnitude, relation means and group sums, recomputed from the LPI of every single pair."""
    _, prompts, frames, references, _ = case
    ids, total = ["layer", "kind", "expert", "neuron"], len(prompts)
    truth, attention = {}, {}
    for prompt, reference in zip(prompts.to_dicts(), references, strict=True):
        for layer in range(3):
            c, v, base = reference.attention(layer)
            for j in range(len(c)):
                score = reference.lpi(c[j] * v[j], base)
                attention.setdefault((layer, j // 8, j % 8), []).append((prompt, score))
            for kind, parts in reference.ffn(layer).items():
                for expert, c, v in parts:
                    for j in range(len(c)):
                        score = reference.lpi(c[j] * v[j], reference.ffn_base(layer))
                        size = abs(c[j].item()) * v[j].norm().item()
                        truth.setdefault((layer, kind, expert, j), []).append((prompt, score, size))
    groups = {tuple(r[i] for i in ids): r for r in frames["ffn_groups"].to_dicts()}
    routed_away = 0
    for row in frames["ffn_neurons"].to_dicts():
        key = tuple(row[i] for i in ids)
        seen = truth.pop(key, [])
        routed_away += not seen
        assert row["active"] == len(seen)
        assert close(row["magnitude"], sum(s for *_, s in seen) / total)
        assert close(row["importance"], sum(s for _, s, _ in seen) / total)
        for relation in prompts["relation"].unique():
            mine = [s for p, s, _ in seen if p["relation"] == relation]
            assert row[f"active_{relation}"] == len(mine)
            assert close(row[f"importance_{relation}"], sum(mine) / (prompts["relation"] == relation).sum())
        for g in range(10):
            assert close(groups[key][f"group_{g}"], sum(s for p, s, _ in seen if p["group"] == g))
    assert not truth  # every neuron that was active has its row
    attn_groups = {(r["layer"], r["head"], r["neuron"]): r for r in frames["attn_groups"].to_dicts()}
    for row in frames["attn_neurons"].to_dicts():
        key = row["layer"], row["head"], row["neuron"]
        assert close(row["importance"], sum(s for _, s in attention[key]) / total)
        for g in range(10):
            assert close(attn_groups[key][f"group_{g}"], sum(s for p, s in attention[key] if p["group"] == g))
    assert len(attention) == len(attn_groups) == 3 * 32
    assert routed_away or "routing" not in frames


@torch.no_grad()
def test_active_sums_and_top_active(case):
    """Per prompt: the sums over active neurons, and the union of the largest by |LPI| and by signed LPI."""
    _, prompts, frames, references, _ = case
    top = frames["top_active"].partition_by("prompt_id", "component", as_dict=True)
    sums = {(r["prompt_id"], r["component"]): r for r in frames["active_sums"].to_dicts()}
    for prompt, reference in zip(prompts["prompt_id"], references, strict=True):
        scores = {"attn": {}, "ffn": {}}
        for layer in range(3):
            c, v, base = reference.attention(layer)
            for j in range(len(c)):
                scores["attn"][layer, None, None, j // 8, j % 8] = reference.lpi(c[j] * v[j], base)
            for kind, parts in reference.ffn(layer).items():
                for expert, c, v in parts:
                    for j in range(len(c)):
                        score = reference.lpi(c[j] * v[j], reference.ffn_base(layer))
                        scores["ffn"][layer, kind, expert, None, j] = score
        for component, of in scores.items():
            row, size = sums[prompt, component], len(of)
            positive = [s for s in of.values() if s > statistics.ZERO]
            assert row["active"] == size
            assert close(row["sum_positive"], sum(positive), 1e-5)
            assert close(row["sum_negative"], sum(s for s in of.values() if s < -statistics.ZERO), 1e-5)
            assert close(row["sum_positive_log"], sum(s * math.log(s) for s in positive), 1e-4)
            share = math.ceil(0.02 * size)
            by_size = sorted(of, key=lambda k: -abs(of[k]))[:share]
            by_sign = sorted(of, key=lambda k: -of[k])[: max(share, min(size, 300))]
            listed = {
                (r["layer"], r["kind"], r["expert"], r["head"], r["neuron"]): r["lpi"]
                for r in top[prompt, component].to_dicts()
            }
            assert set(listed) == set(by_size) | set(by_sign)
            assert all(close(listed[k], of[k]) for k in listed)


@torch.no_grad()
def test_routing(case):
    model, prompts, frames, references, _ = case
    if not hasattr(model.config, "num_experts"):
        assert "routing" not in frames
        return
    rows = {(r["prompt_id"], r["layer"], r["expert"]): r for r in frames["routing"].to_dicts()}
    for prompt, reference in zip(prompts["prompt_id"], references, strict=True):
        for layer in range(3):
            if "routed" not in (parts := reference.ffn(layer)):
                assert (prompt, layer, 0) not in rows
                continue
            mlp, name = reference.decoder.layers[layer].mlp, f"layers.{layer}.mlp"
            hidden, index, weight = reference.inputs[f"{name}.experts"]
            probability = (mlp.gate.weight @ hidden).softmax(0)
            slots = dict(zip(index.long().tolist(), weight.tolist(), strict=True))
            order = sorted(slots, key=lambda e: -slots[e])
            for expert in range(model.config.num_experts):
                row = rows[prompt, layer, expert]
                assert close(row["probability"], probability[expert].item())
                assert close(row["weight"], slots.get(expert, 0.0))
                assert row["slot"] == (order.index(expert) if expert in slots else None)
                c, v = next(((c, v) for e, c, v in parts["routed"] if e == expert), (torch.zeros(0), None))
                total = sum(reference.lpi(c[j] * v[j], reference.ffn_base(layer)) for j in range(len(c)))
                assert close(row["lpi"], total, 2e-5)


def test_telescoping_identity(case):
    """Attention and FFN gains add up to what the whole stack does to the target's log-probability."""
    _, _, frames, _, _ = case
    total = frames["layers"].group_by("prompt_id").agg(pl.col("lpi").cast(pl.Float64).sum())
    joined = total.join(frames["predictions"], on="prompt_id")
    gap = (joined["lpi"] - (joined["log_prob"].cast(pl.Float64) - joined["log_prob_h0"])).abs()
    assert gap.max() < 5e-6 * (1 + joined["log_prob_h0"].abs().max())


def test_the_tables_are_those_of_the_design(case):
    model, _, frames, _, _ = case
    dense = {"predictions", "layers", "heads", "ffn_neurons", "attn_neurons", "ffn_groups", "attn_groups"}
    dense |= {"top_active", "active_sums"}
    assert set(frames) == dense | ({"routing"} if hasattr(model.config, "num_experts") else set())
    for name, frame in frames.items():
        assert_frame_equal(frame, tables.check(frame, name))
    assert len(frames["ffn_neurons"]) == len(frames["ffn_groups"])


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "llama_tied", "olmo"])
def test_weights_stored_in_bfloat16_give_the_float32_results(name):
    """The same weights, stored in bfloat16 or in float32: equal tables, and the stored weights untouched."""
    stored = models.build(name).to(torch.bfloat16)
    # casting a model as a whole rounds its rotary buffers, which loading a checkpoint does not
    whole = models.build(name)
    with torch.no_grad():
        for a, b in zip(whole.parameters(), stored.parameters(), strict=True):
            a.copy_(b.float())
    for module in stored.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = whole.get_submodule(_path(stored, module))._buffers[key].clone()
    before = [p.clone() for p in stored.parameters()]
    one, two = (attribution.attribute(m, models.tokenizer(), models.prompts()) for m in (stored, whole))
    for table in one:
        assert_frame_equal(one[table], two[table], check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(before, stored.parameters(), strict=True))


def _path(model, module):
    return next(n for n, m in model.named_modules() if m is module)


@pytest.mark.parametrize("name", ["qwen2_moe", "olmo"])
def test_results_do_not_depend_on_batch_or_prompt_order(name, monkeypatch):
    model, prompts = models.build(name), models.prompts(2)
    together = attribution.attribute(model, models.tokenizer(), prompts)
    monkeypatch.setattr(clean, "BATCH_TOKENS", 1)  # one prompt a batch
    alone = attribution.attribute(model, models.tokenizer(), prompts.sample(fraction=1, shuffle=True, seed=1))
    for table in ("predictions", "layers", "heads", "ffn_neurons", "attn_neurons", "routing", "active_sums"):
        if table in together:
            assert_frame_equal(together[table], alone[table], abs_tol=2e-5, rel_tol=2e-5)


def test_scores_of_a_dense_layer_are_those_of_the_tables():
    """What is masked prompt by prompt is what was averaged; a layer of experts has no dense neurons."""
    model, prompts = models.build("qwen2_moe"), models.prompts()
    neurons = attribution.attribute(model, models.tokenizer(), prompts)["ffn_neurons"]
    with torch.no_grad(), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, models.tokenizer(), prompts)
        found = attribution.ffn_scores(1, run, lpi.Certificate())
        with pytest.raises(DecompositionError, match="layer 0 has no dense feed-forward part"):
            attribution.ffn_scores(0, run, lpi.Certificate())
    expected = neurons.filter(pl.col("layer") == 1)["importance"].to_torch()
    assert found.shape == (len(prompts), 48)
    assert torch.allclose(found.mean(0).float(), expected)


def test_argmax_targets_the_models_own_token():
    model = models.build("olmoe")
    frames = attribution.attribute(model, models.tokenizer(), models.prompts(), target="argmax")
    predictions = frames["predictions"]
    assert (predictions["target_id"] == predictions["argmax_id"]).all()
    assert (predictions["rank"] == 1).all()


def test_uncertainty_none_leaves_out_groups_and_lists():
    model = models.build("olmoe")
    full = attribution.attribute(model, models.tokenizer(), models.prompts())
    lean = attribution.attribute(model, models.tokenizer(), models.prompts(), uncertainty="none")
    assert set(full) - set(lean) == {"ffn_groups", "attn_groups", "top_active"}
    for name, frame in lean.items():
        assert_frame_equal(frame, full[name], check_exact=True)


def test_filtered_rank_leaves_out_the_other_right_objects():
    """Switzerland has two languages: each prompt's rank_filtered ignores the other's target."""
    model, prompts = models.build("llama"), models.prompts()
    frames = attribution.attribute(model, models.tokenizer(), prompts)
    found = targets.find(models.tokenizer(), prompts.to_dicts())
    rows = frames["predictions"].to_dicts()
    swiss = [i for i, r in enumerate(rows) if r["subject"] == "Switzerland"]
    one, other = swiss
    assert found[one].target_id != found[other].target_id
    first, second = sorted((rows[one], rows[other]), key=lambda r: r["rank"])
    assert first["rank_filtered"] == first["rank"]
    assert second["rank_filtered"] == second["rank"] - 1
    rest = [r for i, r in enumerate(rows) if i not in swiss]
    assert all(r["rank"] == r["rank_filtered"] for r in rest)


def test_logits_that_are_not_affine_are_refused():
    """A soft cap on the logits: the read-out of partial residuals would be wrong, so nothing is scored."""
    model = models.build("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: 3 * torch.tanh(head(x) / 3)
    with pytest.raises(readout.ReadoutError, match="not an affine map"):
        attribution.attribute(model, models.tokenizer(), models.prompts())


@pytest.mark.parametrize("name", ["olmo", "qwen2_moe"])
def test_scores_do_not_depend_on_what_is_scored_together(name, monkeypatch):
    """Fewer prompts at once, other tiles and blocks, other threads: nothing beyond the guarantee changes."""
    model, prompts = models.build(name), models.prompts(2)
    whole = attribution.attribute(model, models.tokenizer(), prompts)
    monkeypatch.setattr(memory, "plan", lambda *_, **__: memory.Plan(5, 0))
    monkeypatch.setattr(lpi, "_PROJECTED", 320 * 12)
    monkeypatch.setattr(moments, "_TILE", 320 * 7)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        parts = attribution.attribute(model, models.tokenizer(), prompts)
    finally:
        torch.set_num_threads(threads)
    for table in ("layers", "heads", "ffn_neurons", "attn_neurons", "ffn_groups", "active_sums", "routing"):
        if table in whole:
            numbers = [c for c, t in whole[table].schema.items() if t == pl.Float32]
            for column in numbers:
                mine, other = parts[table][column].to_numpy(), whole[table][column].to_numpy()
                assert np.abs(mine - other).max() <= 2e-6 * len(prompts) * (1 + np.abs(other).max()), (table, column)


def test_too_little_memory_is_said_before_anything_runs():
    model = models.build("llama")
    with pytest.raises(memory.MemoryPlanError, match=r"scoring needs [\d,]+ MB of memory and may use 100 MB"):
        attribution.attribute(model, models.tokenizer(), models.prompts(), mem_mb=100)


def test_report_counts_every_pair():
    model, prompts = models.build("qwen2_moe"), models.prompts()
    _, report = attribution.attribute_with_report(model, models.tokenizer(), prompts)
    per_prompt = 3 * 32 + 2 * (2 * 24 + 32) + 48  # attention; two MoE layers: routed and shared; one dense
    certificate = report["certificate"]
    assert certificate["pairs"] == len(prompts) * per_prompt
    assert set(certificate["seconds"]) == {"forward", "distributions", "attention", "feed_forward", "tables"}
    spent = certificate["seconds"]["attention"] + certificate["seconds"]["feed_forward"]
    assert certificate["flops_per_second"] == pytest.approx(certificate["flops"] / spent, rel=0.05)
    assert certificate["flops_per_second_of_a_product"] > 0
    assert report["prompts_at_once"] == len(prompts)
    assert report["decomposition_error"] < 1e-5


@pytest.mark.parametrize("name", ["llama", "olmoe", "qwen2_moe"])
def test_top_active_lists_the_largest_where_more_are_active(name, monkeypatch):
    """Both rankings cut short; a list that holds every active neuron, as those of tiny models do, shows no order."""
    model, prompts, key = models.build(name), models.prompts(), ["layer", "kind", "expert", "head", "neuron"]
    everything = attribution.attribute(model, models.tokenizer(), prompts)["top_active"]
    monkeypatch.setattr(scores, "TOP_SHARE", 0.1)
    monkeypatch.setattr(scores, "TOP_LEAST", 12)
    short = attribution.attribute(model, models.tokenizer(), prompts)["top_active"].partition_by(
        "prompt_id", "component", as_dict=True
    )
    negative = 0
    for which, rows in everything.partition_by("prompt_id", "component", as_dict=True).items():
        share = math.ceil(0.1 * len(rows))
        assert 10 * share > len(rows), "rounding up must matter"
        largest = rows.sort(pl.col("lpi").abs(), descending=True).head(share)
        highest = rows.sort("lpi", descending=True).head(max(share, 12))
        expected = set(largest.select(key).rows()) | set(highest.select(key).rows())
        assert set(short[which].select(key).rows()) == expected
        negative += len(expected) > max(share, 12)
    assert negative, "large negative LPI must be listed too"


def test_what_counts_as_zero_and_how_many_are_listed():
    """The definitions, which the tests above vary."""
    assert (statistics.ZERO, scores.TOP_SHARE, scores.TOP_LEAST) == (1e-7, 0.02, 300)


def test_equal_scores_are_listed_by_index(monkeypatch):
    """Experts that write nothing leave all their neurons at 0: the first ones are listed, over all layers."""
    monkeypatch.setattr(scores, "TOP_LEAST", 5)
    model = models.build("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
    frames = attribution.attribute(model, models.tokenizer(), models.prompts())
    routed = frames["routing"].filter(pl.col("slot").is_not_null(), pl.col("layer") == 0)
    for prompt, expert in routed.group_by("prompt_id").agg(pl.col("expert").min()).rows():
        listed = frames["top_active"].filter(pl.col("prompt_id") == prompt, pl.col("component") == "ffn")
        assert listed.select("layer", "expert", "neuron", "lpi").rows() == [(0, expert, j, 0.0) for j in range(5)]


def test_scores_below_1e_7_count_as_zero_in_sums():
    """All neurons are listed in ``top_active`` here; a mean gain of 4e-5 is usual, so the bar must be far below it."""
    prompts, sums = models.prompts(), []
    for size in (1e-9, 1e-6):
        model = models.build("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight *= size
        frames = attribution.attribute(model, models.tokenizer(), prompts)
        found = frames["active_sums"].filter(pl.col("component") == "ffn").sort("prompt_id")
        sums.append(found)
        lpis = frames["top_active"].filter(pl.col("component") == "ffn").with_columns(pl.col("lpi").cast(pl.Float64))
        for (prompt,), rows in lpis.partition_by("prompt_id", as_dict=True).items():
            row = found.row(by_predicate=pl.col("prompt_id") == prompt, named=True)
            positive = [x for x in rows["lpi"] if x > 1e-7]
            assert row["sum_positive"] == pytest.approx(sum(positive), rel=1e-5, abs=0)
            assert row["sum_negative"] == pytest.approx(sum(x for x in rows["lpi"] if x < -1e-7), rel=1e-5, abs=0)
            assert row["sum_positive_log"] == pytest.approx(sum(x * math.log(x) for x in positive), rel=1e-5, abs=0)
        small = (lpis["lpi"].abs() < 1e-7) & (lpis["lpi"] != 0)
        assert small.any(), "the case must arise"
    assert (sums[0]["sum_positive"] == 0).all()
    assert (sums[1]["sum_positive"] > 0).all()
