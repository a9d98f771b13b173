"""The copy of a checkpoint that can be mapped: the same weights bit by bit, made once, never taken for whole when it is
not, and untouched by what is done to a model that was loaded from it."""

import hashlib
import json

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moescope import checkpoints, fused, interventions
from moescope.decomposition import Decomposition
from tests.model import models


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A store of its own, and no checkpoint too small for it."""
    monkeypatch.setenv("MOESCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(fused, "LEAST", 0)
    return tmp_path / "store"


def saved(folder, name="olmoe", **over):
    """The manifest of a checkpoint with one tensor per expert."""
    model = models.build(name, dtype=torch.bfloat16, **over)
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return checkpoints.manifest("series", 7, "local", folder)


def copies(place):
    return sorted(p.name for p in (place / "fused").iterdir()) if (place / "fused").exists() else []


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "mixtral"])
def test_a_copy_holds_the_same_weights(name, tmp_path, place):
    entry = saved(tmp_path / "it", name, **({"num_local_experts": 4} if name == "mixtral" else {}))
    with checkpoints.acquire(entry) as directory:
        assert directory.parent == place / "fused"
        mine, tokenizer = checkpoints.load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "it", dtype=torch.bfloat16)
    other = theirs.state_dict()
    assert mine.state_dict().keys() == other.keys()
    for key, weight in mine.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, other[key]), key
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert torch.equal(mine(ids).logits, theirs(ids).logits)


def test_a_copy_is_made_once_and_again_when_its_source_changes(tmp_path, place):
    entry = saved(tmp_path / "it")
    for _ in range(2):
        with checkpoints.acquire(entry) as directory:
            first = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}
    assert copies(place) == [directory.name]
    with checkpoints.acquire(entry) as again:
        assert {p.name: p.stat().st_mtime_ns for p in again.iterdir()} == first
    changed = saved(tmp_path / "it", num_hidden_layers=2)
    with checkpoints.acquire(changed) as other:
        assert other != directory
    assert len(copies(place)) == 2


@pytest.mark.parametrize("damage", ["cut", "gone", "record"])
def test_a_copy_that_is_not_whole_is_made_again(damage, tmp_path):
    entry = saved(tmp_path / "it")
    with checkpoints.acquire(entry) as directory:
        weights = next(directory.glob("*.safetensors"))
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        (weights if damage == "gone" else directory / fused.RECORD).unlink()
    with checkpoints.acquire(entry) as again:
        assert again == directory
        checkpoints.load(again)


def test_what_the_record_says_is_true(tmp_path):
    entry = saved(tmp_path / "it")
    with checkpoints.acquire(entry) as directory:
        record = json.loads((directory / fused.RECORD).read_text())
    assert record["made_from"] == {name: facts["sha256"] for name, facts in entry["files"].items()}
    for name, facts in record["files"].items():
        assert facts["sha256"] == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def test_dense_small_and_fused_checkpoints_stay_where_they_are(tmp_path, place, monkeypatch):
    dense = saved(tmp_path / "dense", "olmo")
    models.build("olmoe").save_pretrained(tmp_path / "fused", save_original_format=False)
    for entry in (dense, checkpoints.manifest("series", 7, "local", tmp_path / "fused")):
        with checkpoints.acquire(entry) as directory:
            assert str(directory) == entry["directory"]
    small = saved(tmp_path / "small")
    monkeypatch.setattr(fused, "LEAST", 2**40)
    with checkpoints.acquire(small) as directory:
        assert directory == tmp_path / "small"
    assert copies(place) == []


def test_weights_that_are_not_finite_are_refused(tmp_path, place):
    saved(tmp_path / "it")
    path = tmp_path / "it" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.experts.3.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    entry = checkpoints.manifest("series", 7, "local", tmp_path / "it")
    with (
        pytest.raises(fused.FusedError, match=r"layers\.1\.mlp\.experts\.down_proj holds a NaN"),
        checkpoints.acquire(entry),
    ):
        pass
    assert copies(place) == []


def test_zeroing_neurons_leaves_the_mapped_file_alone(tmp_path):
    entry = saved(tmp_path / "it")
    with checkpoints.acquire(entry) as directory:
        model, _ = checkpoints.load(directory)
        before = {p.name: p.read_bytes() for p in directory.iterdir()}
        decomposition = Decomposition(model)
        targets = [interventions.Target(0, "routed", [1, 2], expert=3), interventions.head(decomposition, 1, 2)]
        with interventions.zeroed(decomposition, targets):
            assert (decomposition.at(0, "routed")[0].stored(3)[[1, 2]] == 0).all()
            assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


@pytest.mark.skipif(not psutil.LINUX, reason="reads how memory is held from /proc")
def test_a_mapped_model_takes_no_memory_of_its_own(tmp_path):
    """200 MB of experts: loaded from a copy, they stay on disk."""
    entry = saved(tmp_path / "it", hidden_size=512, intermediate_size=512, num_experts=64, num_hidden_layers=2)
    size = sum(facts["bytes"] for facts in entry["files"].values())
    with checkpoints.acquire(entry) as directory:
        before = anonymous()
        model, _ = checkpoints.load(directory)
        assert anonymous() - before < 0.2 * size
        assert size > 2e8
    del model


def anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
