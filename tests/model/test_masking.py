"""A dense model seen through a routing: against scores of single prompts, masked by hand."""

import numpy as np
import polars as pl
import pytest
import torch

from moescope import attribution, clean, masking, precision, tables
from tests.model.models import build, prompts, tokenizer

EXPERTS, ROUTED_LAYERS = 6, 2


@pytest.fixture(scope="module")
def asked() -> pl.DataFrame:
    return prompts()


@pytest.fixture(scope="module")
def routing(asked: pl.DataFrame) -> pl.DataFrame:
    """Two experts a prompt and layer, at random."""
    random, rows = np.random.default_rng(1), []
    for prompt in asked["prompt_id"]:
        for layer in range(ROUTED_LAYERS):
            chosen = random.choice(EXPERTS, 2, replace=False).tolist()
            rows += [
                (prompt, layer, e, chosen.index(e) if e in chosen else None, 0.5 * (e in chosen), 1 / EXPERTS, 0.0)
                for e in range(EXPERTS)
            ]
    frame = pl.DataFrame(rows, schema=list(tables.SCHEMAS["routing"].columns), orient="row")
    return tables.check(frame, "routing")


def masked(asked: pl.DataFrame, routing: pl.DataFrame, model: torch.nn.Module, seed: int = 0) -> pl.DataFrame:
    with torch.no_grad(), precision.computing_in_float32(model):
        return masking.masked_groups(clean.CleanRun.of(model, tokenizer(), asked), routing, seed)


def test_masked_sums_are_those_of_single_prompts(asked: pl.DataFrame, routing: pl.DataFrame):
    """Each prompt scored alone, kept or not by the definition, summed by hand."""
    model = build("llama")
    found = masked(asked, routing, model, seed=3)
    layers, neurons = 3, 48
    sums = np.zeros((masking.SEEDS, layers, neurons, 10))
    active = np.zeros((masking.SEEDS, layers, neurons), dtype=int)
    for row in asked.iter_slices(1):
        alone = attribution.attribute(model, tokenizer(), row)["ffn_neurons"]
        scores = alone.sort("layer", "neuron")["importance"].to_numpy().reshape(layers, neurons)
        mine = routing.filter(pl.col("prompt_id") == row["prompt_id"][0], pl.col("slot").is_not_null())
        for layer in range(layers):
            routed_layer = [0, 1, 1][layer]  # floor((l + 1/2) 2 / 3)
            experts = set(mine.filter(pl.col("layer") == routed_layer)["expert"])
            for seed, block in enumerate(masking.blocks(neurons, EXPERTS, layer, seed=3)):
                keeps = np.array([b in experts for b in block])
                sums[seed, layer, :, row["group"][0]] += np.where(keeps, scores[layer], 0)
                active[seed, layer] += keeps
    for row in found.iter_rows(named=True):
        at = row["seed"], row["layer"], row["neuron"]
        assert row["active"] == active[at]
        assert np.allclose([row[f"group_{g}"] for g in range(10)], sums[at], atol=1e-6)
        assert np.isclose(row["importance"], sums[at].sum() / len(asked), atol=1e-6)
    assert len(found) == sums[..., 0].size
    assert 0 < active.mean() < len(asked)


def test_where_every_expert_is_routed_nothing_is_masked(asked: pl.DataFrame, routing: pl.DataFrame):
    model = build("olmo")
    everywhere = routing.with_columns(slot=pl.col("expert"))
    whole = attribution.attribute(model, tokenizer(), asked)["ffn_groups"].drop("kind", "expert")
    for _, rows in masked(asked, everywhere, model).group_by("seed"):
        pairs = rows.sort("layer", "neuron").select(whole.columns)
        assert np.allclose(pairs.to_numpy(), whole.sort("layer", "neuron").to_numpy(), atol=1e-7)
        assert (rows["active"] == len(asked)).all()


@pytest.mark.parametrize(
    ("layer", "layers", "routed", "expected"), [(0, 32, 16, 0), (31, 32, 16, 15), (15, 32, 16, 7), (2, 4, 24, 15)]
)
def test_layers_match_at_equal_depth(layer: int, layers: int, routed: int, expected: int):
    assert masking.matched_layer(layer, layers, routed) == expected


def test_blocks_are_even_differ_by_layer_and_seed_and_never_change():
    first = list(masking.blocks(100, 8, layer=1, seed=0))
    assert len(first) == masking.SEEDS
    for block in first:
        assert set(np.bincount(block, minlength=8)) == {12, 13}
    assert all((a == b).all() for a, b in zip(first, masking.blocks(100, 8, layer=1, seed=0), strict=True))
    others = [*first[1:], *masking.blocks(100, 8, layer=2, seed=0), *masking.blocks(100, 8, layer=1, seed=1)]
    assert all((first[0] != other).mean() > 0.5 for other in others)


def test_what_cannot_be_masked_is_refused(asked: pl.DataFrame, routing: pl.DataFrame):
    with pytest.raises(masking.MaskingError, match="other prompts"):
        masked(asked, routing.filter(pl.col("prompt_id") != asked["prompt_id"][0]), build("llama"))
    with pytest.raises(masking.MaskingError, match="fewer than the 64 experts"):
        list(masking.blocks(48, 64, layer=0))
    with pytest.raises(Exception, match="no dense feed-forward part"):
        masked(asked, routing, build("olmoe"))
