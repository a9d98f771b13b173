"""The copy of a checkpoint that can be mapped: the same weights bit by bit, made once, never taken for whole when it is
not, and untouched by what is done to a model that was loaded from it."""

import hashlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks import olmoe_shape
from moescope import checkpoints, fused, interventions, manifests, store
from moescope.checkpoints import CheckpointError
from moescope.decomposition import Decomposition
from tests.model import models

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
#: Latent attention, groups of experts, dense layers first, shared experts: as deepseek_v3 has them.
ATTENTION = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
DEEPSEEK = {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
#: Families whose experts are published one by one, under several names; what the tests of other modules lack.
PUBLISHED = {
    "olmoe": {},
    "qwen2_moe": {},
    "mixtral": LOCAL,
    "qwen3_moe": {**MOE, "head_dim": 12, "mlp_only_layers": [1]},
    "deepseek_v3": {**MOE, **ATTENTION, **DEEPSEEK, "num_key_value_heads": 4},
    "phimoe": LOCAL,
    "jamba": {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2},
}


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
    return manifests.on_disk("series", 7, folder)


def copies(place):
    """The names of the complete entries of the store."""
    return sorted(path.parent.name for path in place.glob(f"entries/*/{store.RECORD}"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_copy_holds_the_same_weights(name, tmp_path, place):
    entry = saved(tmp_path / "it", name, **PUBLISHED[name])
    with checkpoints.acquire(entry) as directory:
        assert directory.parent.parent == place / "entries"
        mine, tokenizer = checkpoints.load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "it", dtype=torch.bfloat16)
    other = theirs.state_dict()
    assert mine.state_dict().keys() == other.keys()
    for key, weight in mine.state_dict().items():
        assert weight.dtype == other[key].dtype  # bfloat16 but for routers that a family keeps in float32
        assert torch.equal(weight, other[key]), key
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert torch.equal(mine(ids).logits, theirs(ids).logits)
    stored = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (no dictionary)
    assert stored.keys() == other.keys() - set(theirs.all_tied_weights_keys), "mapped under the model's own names"
    assert not [key for key in stored if "experts.0" in key]


def test_a_copy_is_made_once_and_again_when_its_source_changes(tmp_path, place):
    entry = saved(tmp_path / "it")
    for _ in range(2):
        with checkpoints.acquire(entry) as directory:
            first = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}
    assert copies(place) == [directory.parent.name]
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
    for entry in (dense, manifests.on_disk("series", 7, tmp_path / "fused")):
        with checkpoints.acquire(entry) as directory:
            assert str(directory) == entry["directory"]
    small = saved(tmp_path / "small")
    monkeypatch.setattr(fused, "LEAST", 2**40)
    with checkpoints.acquire(small) as directory:
        assert directory == tmp_path / "small"
    assert copies(place) == []


def test_two_jobs_that_want_one_copy_at_once(tmp_path, place, monkeypatch):
    """One makes it, the other waits for it."""
    entry, made, write = saved(tmp_path / "it"), [], fused._write
    monkeypatch.setattr(fused, "_write", lambda part, *rest: made.append(part) or write(part, *rest))
    both, alone, targets = threading.Barrier(2, timeout=60), threading.Lock(), fused._targets

    def one_after_the_other(*arguments):
        with alone:  # transformers sets the default dtype while it builds a model: no two threads at once
            return targets(*arguments)

    def job(_):
        both.wait()
        with checkpoints.acquire(entry) as directory:
            return directory

    monkeypatch.setattr(fused, "_targets", one_after_the_other)
    with ThreadPoolExecutor(2) as jobs:
        one, other = jobs.map(job, range(2))
    assert len(made) == 1
    assert one == other
    assert copies(place) == [one.parent.name]
    mine, theirs = (checkpoints.load(at)[0].state_dict() for at in (one, tmp_path / "it"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_source_that_was_overwritten_is_refused(tmp_path, place):
    """New weights of the same size under the manifest of the old ones: their copy would have the old ones' name."""
    entry = saved(tmp_path / "it")
    path = tmp_path / "it" / "model.safetensors"
    save_file({key: weight + 1 for key, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    assert path.stat().st_size == entry["files"][path.name]["bytes"]
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors: is not the file of the manifest any more"),
        checkpoints.acquire(entry),
    ):
        pass
    assert copies(place) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, place, monkeypatch):
    entry = saved(tmp_path / "it")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(store.StoreError, match=r"0\.00 GB are free; make room, .* MOESCOPE_STORE"):
        checkpoints.acquire(entry).__enter__()
    assert copies(place) == []


def test_what_the_disk_gives_back_otherwise_is_refused(tmp_path, place, monkeypatch):
    entry, save = saved(tmp_path / "it"), safetensors.torch.save_file

    def faulty(tensors, path, metadata):
        save(tensors, path, metadata)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(safetensors.torch, "save_file", faulty)
    with pytest.raises(fused.FusedError, match="is not what was written; check the disk"):
        checkpoints.acquire(entry).__enter__()
    assert copies(place) == []


@pytest.mark.parametrize(("change", "told"), [("type", "model type `mine`"), ("code", "custom code")])
def test_a_model_that_is_not_known_is_refused_in_one_line(change, told, tmp_path, place, monkeypatch):
    saved(tmp_path / "it")
    path = tmp_path / "it" / "config.json"
    code = {"auto_map": {"AutoConfig": "mine.Config"}} if change == "code" else {}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mine", **code}))
    (tmp_path / "it" / "mine.py").write_text("raise SystemExit('code of the checkpoint was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    entry = manifests.on_disk("series", 7, tmp_path / "it")
    with pytest.raises(CheckpointError, match=told) as error:
        checkpoints.acquire(entry).__enter__()
    assert "\n" not in str(error.value)
    assert copies(place) == []


def test_weights_that_are_not_finite_are_refused(tmp_path, place):
    saved(tmp_path / "it")
    path = tmp_path / "it" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.experts.3.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    entry = manifests.on_disk("series", 7, tmp_path / "it")
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


LARGE = {"hidden_size": 512, "intermediate_size": 512, "num_experts": 64, "num_hidden_layers": 2}


@pytest.mark.skipif(not psutil.LINUX, reason="reads how memory is held from /proc")
def test_a_mapped_model_takes_no_memory_of_its_own(tmp_path):
    """200 MB of experts: loaded from a copy, they stay on disk."""
    entry = saved(tmp_path / "it", **LARGE)
    size = sum(facts["bytes"] for facts in entry["files"].values())
    with checkpoints.acquire(entry) as directory:
        before = models.anonymous_memory()
        model, _ = checkpoints.load(directory)
        assert models.anonymous_memory() - before < 0.2 * size
        assert size > 2e8
    del model


@pytest.mark.skipif(not psutil.LINUX, reason="reads how memory is held from /proc")
def test_a_copy_is_made_in_the_memory_of_one_layer(tmp_path, monkeypatch):
    """Eight layers of 25 MB each; the most that stands at once is a weight file beside the tensor that is made."""
    entry = saved(tmp_path / "it", **{**LARGE, "num_experts": 16, "num_hidden_layers": 8})
    size, finite, during = sum(facts["bytes"] for facts in entry["files"].values()), fused.finite, []
    monkeypatch.setattr(fused, "_SHARD", 2**24)
    monkeypatch.setattr(fused, "finite", lambda t: during.append(models.anonymous_memory()) or finite(t))
    before = models.anonymous_memory()
    with checkpoints.acquire(entry) as directory:
        assert len(list(directory.glob("*.safetensors"))) >= 8
    assert max(during) - before < 0.4 * size
    assert size > 2e8


def test_a_random_checkpoint_of_a_shape_is_mapped_where_it_lies(tmp_path, place):
    """The generator of the benchmark: one weight file a layer, the same every time, spread over the experts."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 16}
    shape |= {"intermediate_size": 24, "vocab_size": 640, "eos_token_id": 2}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        olmoe_shape.write(tmp_path / name, layers=3, seed=seed, **shape)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 4
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()}
    assert files != {p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()}
    entry = manifests.on_disk("series", 0, tmp_path / "one")
    expected = {"layers": 3, "d": 64, "heads": 4, "experts": 16, "K": 8, "I": 24, "shared_I": 0}
    assert {name: entry["shape"][name] for name in expected} == expected
    with checkpoints.acquire(entry) as directory:
        assert directory == tmp_path / "one"
        model, tokenizer = checkpoints.load(directory)
    assert copies(place) == []
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(tokenizer) <= model.config.vocab_size
    layers = [layer.mlp.experts.down_proj.detach() for layer in model.model.layers]
    assert not torch.equal(layers[0], layers[1])
    assert layers[0].float().std() == pytest.approx(0.02, rel=0.02)
