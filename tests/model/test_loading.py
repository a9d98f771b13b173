"""Checkpoints from disk to memory: the weights that were stored, and float32 results whatever they are stored in."""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from moescope import checkpoints, loading, manifests
from moescope.checkpoints import CheckpointError
from moescope.precision import computing_in_float32, exact_products
from tests.model import models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(directory: Path, name: str, dtype: torch.dtype = torch.float32, **how: object) -> Path:
    """A checkpoint in Hugging Face format, by transformers itself."""
    models.build(name, dtype=dtype).save_pretrained(directory, **how)
    models.tokenizer().save_pretrained(directory)
    return directory


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The block raises a CheckpointError of one line that holds all the parts."""
    with pytest.raises(CheckpointError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    assert [part for part in parts if part not in message] == [], message


def assert_equal_weights(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if found[n].dtype != wanted[n].dtype or not torch.equal(found[n], wanted[n])] == []


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    """Prompts of uneven length, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocabulary, (5, 11), generator=generator)
    mask = (torch.arange(11) < torch.tensor([11, 4, 7, 1, 9])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Logits and every residual of a batch."""
    out = model(**batch(model.config.vocab_size), output_hidden_states=True, use_cache=False)
    return [out.logits, *out.hidden_states]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "step7", "llama")


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    return save(tmp_path / "step7", "olmoe")


def shape_of(model: nn.Module) -> dict[str, int]:
    """The shape of a model as its own weights have it."""
    layers = model.model.layers
    routed = [m for m in layers.modules() if getattr(m, "down_proj", None) is not None and hasattr(m, "gate_up_proj")]
    shared = [m.shared_expert for m in layers.modules() if hasattr(m, "shared_expert")]
    routers = [m for m in layers.modules() if hasattr(m, "top_k")]
    return {
        "layers": len(layers),
        "d": model.get_input_embeddings().weight.shape[1],
        "heads": model.config.num_attention_heads,
        "experts": routed[0].down_proj.shape[0] if routed else 0,
        "K": routers[0].top_k if routers else 0,
        "I": routed[0].down_proj.shape[2] if routed else layers[0].mlp.down_proj.weight.shape[1],
        "shared_I": shared[0].down_proj.weight.shape[1] if shared else 0,
        "parameters": sum(p.numel() for p in model.parameters()),  # tied ones once
    }


@pytest.mark.parametrize("name", models.FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.bfloat16, {}),  # one tensor an expert, as published checkpoints have them
        (torch.float32, {"save_original_format": False}),  # fused experts
        (torch.float32, {"max_shard_size": "40KB"}),  # several files
    ],
    ids=["published", "fused", "sharded"],
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, name: str, dtype: torch.dtype, how: dict):
    directory = save(tmp_path / "step7", name, dtype, **how)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == ("max_shard_size" in how)
    expected = models.build(name, dtype=dtype)
    model, tokenizer = checkpoints.load(directory)
    assert type(model) is type(expected)
    assert_equal_weights(model, expected)
    assert not model.training
    inv_freq = model.model.rotary_emb.inv_freq
    assert torch.equal(inv_freq, models.build(name).model.rotary_emb.inv_freq)  # float32 whatever the weights are
    text = "The capital of Italy is Rome"
    assert tokenizer(text).input_ids == models.tokenizer()(text).input_ids
    found = manifests.on_disk("s", 7, directory)["shape"]
    assert found == shape_of(expected)
    assert manifests.has_experts(manifests.read_config(directory)) == (found["experts"] > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_the_stored_dtype_and_others_cast(tmp_path: Path, dtype: str):
    directory = save(tmp_path / "step7", "olmoe", DTYPES[dtype])
    change_config(directory, dtype="float64")  # what the configuration claims does not count
    assert_equal_weights(checkpoints.load(directory)[0], models.build("olmoe", dtype=DTYPES[dtype]))
    stored = models.build("olmoe", dtype=DTYPES[dtype])
    for asked, wanted in DTYPES.items():
        assert_equal_weights(checkpoints.load(directory, asked)[0], stored.to(wanted))
        stored = models.build("olmoe", dtype=DTYPES[dtype])


def test_weights_of_two_dtypes_are_all_float32(olmoe: Path):
    change_weights(olmoe, lambda w: w.update({n: w[n].bfloat16() for n in list(w) if "experts" in n}))
    model, _ = checkpoints.load(olmoe)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = models.build("olmoe")
    for name, weight in expected.named_parameters():
        weight.data = weight.data.bfloat16().float() if "experts" in name else weight.data
    assert_equal_weights(model, expected)


def test_a_checkpoint_of_two_dtypes_stays_narrow_where_the_model_keeps_the_wide_ones(tmp_path: Path):
    """Ernie computes its routers in float32 whatever the rest is stored in: nothing is rounded, nothing is copied."""
    shape = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2}
    stored = models.build("ernie4_5_moe", **shape)
    routers = [
        n for n, _ in stored.named_parameters() if n.endswith(("gate.weight", "moe_statics.e_score_correction_bias"))
    ]
    assert routers
    for name, weight in stored.named_parameters():
        weight.data = weight.data if name in routers else weight.data.bfloat16()
    stored.save_pretrained(tmp_path, save_original_format=False)
    models.tokenizer().save_pretrained(tmp_path)
    model, _ = checkpoints.load(tmp_path)
    assert_equal_weights(model, stored)
    change_weights(tmp_path, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].float() * 1.001}))
    assert {p.dtype for p in checkpoints.load(tmp_path)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_frequencies_that_old_checkpoints_hold_do_not_count(tmp_path: Path, key: str):
    directory = save(tmp_path / "step7", "llama", torch.bfloat16)
    change_weights(directory, lambda w: w.update({key: torch.ones(4)}))
    assert_equal_weights(checkpoints.load(directory)[0], models.build("llama", dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "bad"), [("float32", float("nan")), ("bfloat16", float("inf")), ("float16", float("-inf"))]
)
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, dtype: str, bad: float):
    directory = save(tmp_path / "step7", "olmoe", DTYPES[dtype])
    whole = (directory / "model.safetensors").read_bytes()
    for stored, told in {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "model.layers.2.mlp.experts.3.up_proj.weight": "model.layers.2.mlp.experts.gate_up_proj",
        "lm_head.weight": "lm_head.weight",
    }.items():
        (directory / "model.safetensors").write_bytes(whole)
        change_weights(directory, lambda w, stored=stored: w[stored].view(-1).__setitem__(-1, bad))
        with refused(f"{directory}: {told} holds a NaN or an infinity", "leave the step out"):
            checkpoints.load(directory)


def test_a_cast_that_overflows_is_refused(llama: Path):
    """What float16 cannot hold is an infinity in the model, though the file is sound."""
    change_weights(llama, lambda w: w["model.norm.weight"].__setitem__(0, 1e6))
    checkpoints.load(llama, "bfloat16")
    with refused(f"{llama}: model.norm.weight holds a NaN or an infinity"):
        checkpoints.load(llama, "float16")


def test_a_missing_tensor_is_refused(llama: Path):
    change_weights(llama, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with refused(f"{llama}: model.layers.1.mlp.up_proj.weight is missing; fetch it again"):
        checkpoints.load(llama)


def test_missing_experts_are_refused(olmoe: Path):
    whole = (olmoe / "model.safetensors").read_bytes()
    part = "model.layers.1.mlp.experts."
    for lost in (f"{part}2.up_proj", f"{part}5.", f"{part}0.", part, f"{part}2.down_proj"):
        (olmoe / "model.safetensors").write_bytes(whole)
        change_weights(olmoe, lambda w, lost=lost: [w.pop(name) for name in list(w) if name.startswith(lost)])
        with refused(f"{olmoe}: "):
            checkpoints.load(olmoe)


def test_a_wrong_shape_is_refused(llama: Path):
    change_config(llama, intermediate_size=40)
    with refused(f"{llama}: model.layers.0.mlp.down_proj.weight has the wrong shape; fetch it again"):
        checkpoints.load(llama)


@pytest.mark.parametrize("change", [{"num_experts": 5}, {"num_experts": 7}, {"intermediate_size": 16}], ids=str)
def test_wrong_shapes_of_experts_are_refused(olmoe: Path, change: dict):
    change_config(olmoe, **change)
    with refused(f"{olmoe}: model.layers.0.mlp.experts.", "has the wrong shape"):
        checkpoints.load(olmoe)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("content", [lambda whole: whole[: len(whole) // 2], lambda _: b"\xff" * 100, lambda _: b""])
def test_damaged_weights_are_refused(llama: Path, content: Callable[[bytes], bytes], dtype: str):
    path = llama / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    with refused(str(llama), "fetch it again"):
        checkpoints.load(llama, dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no-such-type"},
        {"model_type": None},
        {"hidden_size": "wide"},
        {"num_attention_heads": 5},
        {"hidden_act": "no-such-function"},
        {"rope_parameters": {"rope_type": "no-such-type"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
    ids=str,
)
def test_configurations_that_fit_no_model_are_refused(llama: Path, change: dict):
    change_config(llama, **change)
    with refused(f"{llama}: the model cannot be loaded (", "fetch it again or leave the step out"):
        checkpoints.load(llama)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_broken_configurations_are_refused(llama: Path, content: str):
    (llama / "config.json").write_text(content)
    with refused(f"{llama}: the model cannot be loaded ("):
        checkpoints.load(llama)


@pytest.mark.parametrize(
    "content", [None, "{", "{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "No"}}']
)
def test_a_checkpoint_without_a_tokenizer_is_refused(llama: Path, content: str | None):
    for path in llama.glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (llama / "tokenizer.json").write_text(content)
    with refused(f"{llama}: the tokenizer cannot be loaded (", "put the files of tokenizer.save_pretrained there"):
        checkpoints.load(llama)


def test_pickled_weights_are_never_opened(llama: Path):
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with refused(f"{llama}: its weights are pickles, which can run code; save them as safetensors"):
        checkpoints.load(llama)


@pytest.mark.parametrize("known", [True, False], ids=["known type", "type of its own"])
def test_code_of_a_checkpoint_never_runs(llama: Path, monkeypatch: pytest.MonkeyPatch, known: bool):
    """Not even where somebody, or a script, says yes to every question."""
    marker = llama / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import *\n"
    kinds = {"Config": "LlamaConfig", "Model": "LlamaForCausalLM", "Words": "PreTrainedTokenizerFast"}
    for name, base in kinds.items():
        code += f"class {name}({base}):\n    model_type = 'mine'\n"
    (llama / "mine.py").write_text(code)
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": [None, "mine.Words"]}
    change_config(llama, auto_map=classes, **({} if known else {"model_type": "mine"}))
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if known:  # the library's own class of that type serves
        assert type(checkpoints.load(llama)[0]).__module__ == "transformers.models.llama.modeling_llama"
    else:
        with refused(f"{llama}: the model cannot be loaded (", "custom code"):
            checkpoints.load(llama)
    assert not marker.exists()


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path):
    with refused(f"{tmp_path / 'gone'}: there is no such folder"):
        checkpoints.load(tmp_path / "gone")
    with refused(f"{tmp_path}: has no config.json"):
        checkpoints.load(tmp_path)


# Float32 computation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "llama_tied", "olmo"])
def test_stored_in_16_bits_computes_as_stored_in_32(tmp_path: Path, name: str, dtype: torch.dtype):
    directory = save(tmp_path / "step7", name, dtype, save_original_format=False)  # fused: mapped from the file
    before = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    model, _ = checkpoints.load(directory)
    wide, _ = checkpoints.load(directory, "float32")
    assert {p.dtype for p in model.parameters()} == {dtype}
    places = {n: (p.data_ptr(), p.dtype, p.untyped_storage().nbytes()) for n, p in model.named_parameters()}
    expected = outputs(wide)
    rounded = outputs(model)
    with computing_in_float32(model):
        found = outputs(model)
        again = outputs(model)
    for one, two, other, narrow in zip(found, again, expected, rounded, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
        assert torch.equal(one, two)
        assert not torch.equal(narrow[:, :1].float(), other[:, :1]) or one is found[1]  # but for the embedding itself
    assert {n: (p.data_ptr(), p.dtype, p.untyped_storage().nbytes()) for n, p in model.named_parameters()} == places
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), rounded, strict=True))
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() == before


@pytest.mark.parametrize("name", ["gemma3_text", "granite", "cohere"])
def test_an_embedding_that_computes_does_so_in_float32(name: str):
    """Gemma multiplies inside its embedding, by a number that bfloat16 rounds; Granite behind it."""
    narrow = models.build(name, dtype=torch.bfloat16, **({"head_dim": 8} if "gemma" in name else {}))
    wide = models.build(name, **({"head_dim": 8} if "gemma" in name else {}))
    for parameter, stored in zip(wide.parameters(), narrow.parameters(), strict=True):
        parameter.data = stored.data.float()
    own = dict(wide.named_buffers())
    for key, buffer in narrow.named_buffers():  # what casting the model has rounded; loading does not
        buffer.data = own[key].data.clone()
    expected = outputs(wide)
    with computing_in_float32(narrow):
        assert all(torch.equal(one, other) for one, other in zip(outputs(narrow), expected, strict=True))


def test_of_an_embedding_only_the_rows_looked_up_are_upcast():
    model = models.build("llama", dtype=torch.bfloat16)
    embedding, seen = model.get_input_embeddings(), []
    place = embedding.weight.data_ptr()
    with computing_in_float32(model):
        embedding.register_forward_hook(lambda m, _, rows: seen.append((m.weight.data_ptr(), m.weight.dtype, rows)))
        outputs(model)
    ((pointer, dtype, rows),) = seen
    assert (pointer, dtype, rows.dtype) == (place, torch.bfloat16, torch.float32)
    assert torch.equal(rows, embedding.weight[batch(model.config.vocab_size)["input_ids"]].float())


@pytest.mark.skipif(not psutil.LINUX, reason="reads how memory is held from /proc")
def test_a_pass_over_a_mapped_model_holds_one_layer_in_float32(tmp_path: Path):
    """Six layers of 27 MB in bfloat16, 54 MB in float32, and an embedding and a head of 8 MB each."""
    shape = {"hidden_size": 256, "intermediate_size": 1088, "num_experts": 16, "num_hidden_layers": 6}
    model = models.build("olmoe", dtype=torch.bfloat16, vocab_size=16_000, **shape)
    model.save_pretrained(tmp_path, save_original_format=False)
    models.tokenizer().save_pretrained(tmp_path)
    del model
    model, _ = checkpoints.load(tmp_path)
    layers, during = model.model.layers, []
    for module in (*(layer.mlp for layer in layers), model.model.norm, model.lm_head):
        module.register_forward_hook(lambda *_: during.append(models.anonymous_memory()))
    layer = 4 * sum(p.numel() for p in layers[0].parameters())
    before = models.anonymous_memory()
    with torch.no_grad(), computing_in_float32(model):
        model(torch.arange(32)[None], use_cache=False)
    assert layer > 5e7
    assert max(during) - before < 1.2 * layer
    assert models.anonymous_memory() - before < 0.2 * layer


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_float32_model_is_left_alone():
    model = models.build("qwen2_moe")
    expected = outputs(model)
    before = hooks(model)  # transformers has some of its own, to collect residuals
    with computing_in_float32(model):
        assert hooks(model) == before
        assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))


@pytest.mark.parametrize("name", ["olmoe", "llama_tied"])
def test_one_block_at_a_time_is_in_float32(name: str):
    """While a layer runs, it alone is wide; between two passes, nothing is."""
    model = models.build(name, dtype=torch.bfloat16)
    wide: list[set[str]] = []

    def look(*_: object) -> None:
        wide.append({n for n, p in model.named_parameters() if p.dtype == torch.float32})

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    model.model.norm.register_forward_pre_hook(look)
    model.lm_head.register_forward_pre_hook(look)
    with computing_in_float32(model):
        outputs(model)
        look()
    names = [n for n, _ in model.named_parameters()]
    tied = model.config.tie_word_embeddings
    parts = [*(f"model.layers.{i}." for i in range(3)), "model.norm.", "model.embed" if tied else "lm_head.", None]
    assert wide == [{n for n in names if part and n.startswith(part)} for part in parts]
    assert all(wide[:-1])


@pytest.mark.parametrize(
    "place", ["model.embed_tokens", "model.layers.1", "model.layers.1.mlp.experts", "model.norm", "lm_head"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_a_pass_leaves_the_stored_weights(place: str, when: str):
    model = models.build("olmoe", dtype=torch.bfloat16)
    places = {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()}
    expected = outputs(model)
    before, module = hooks(model), model.get_submodule(place)

    def fail(*_: object) -> None:
        raise MemoryError("in the middle")

    def run() -> None:
        with computing_in_float32(model):
            register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
            handles.append(register(fail))
            outputs(model)

    handles = []
    with pytest.raises(MemoryError, match="in the middle"):
        run()
    handles.pop().remove()
    assert {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()} == places
    assert hooks(model) == before
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))


def test_hooks_of_others_see_the_wide_weights():
    """The decomposition reads weights in hooks that are registered before and inside the block."""
    model = models.build("olmoe", dtype=torch.bfloat16)
    seen = []
    layer = model.model.layers[1]

    def look(module: nn.Module, *_: object) -> None:
        seen.append({p.dtype for p in module.parameters()})

    layer.register_forward_pre_hook(look)
    with computing_in_float32(model):
        layer.register_forward_pre_hook(look)
        layer.mlp.experts.register_forward_pre_hook(look)
        model.model.norm.register_forward_pre_hook(look)
        outputs(model)
    assert seen == [{torch.float32}] * 4


@pytest.fixture
def product_settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.usefixtures("product_settings")
def test_shortcuts_of_products_are_off_inside_and_back_after(setting: str):
    torch.set_float32_matmul_precision(setting)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    assert tf32 == (setting != "highest")
    for block in (exact_products, lambda: computing_in_float32(models.build("llama"))):
        with contextlib.suppress(MemoryError), block():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            raise MemoryError
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cuda.matmul.allow_tf32 == tf32


@pytest.mark.parametrize(("conv", "rnn"), [("tf32", "tf32"), ("none", "none"), ("ieee", "ieee"), ("ieee", "tf32")])
def test_shortcuts_of_convolutions_are_off_inside_and_back_after(conv: str, rnn: str):
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn.conv
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, mkldnn.fp32_precision = conv, rnn, "bf16"
    try:
        with exact_products():
            assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, mkldnn.fp32_precision) == ("ieee",) * 3
            assert not cudnn.allow_tf32  # the old way to ask, which raises where old and new disagree
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, mkldnn.fp32_precision) == (conv, rnn, "bf16")
    finally:
        cudnn.allow_tf32 = True
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, mkldnn.fp32_precision = "tf32", "tf32", "none"


def test_autocast_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="not exact"), exact_products():
        pass


@pytest.mark.parametrize(("gpus", "size", "spread"), [(1, 10**12, False), (2, 10**9, False), (2, 60 * 10**9, True)])
def test_weights_that_one_gpu_does_not_hold_are_spread_over_all(gpus: int, size: int, spread: bool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (80 * 10**9, 80 * 10**9))
    found = loading._over_gpus("cuda", size)
    assert bool(found) == spread
    if spread:
        assert set(found["max_memory"]) == {0, 1}, "nothing may go to the CPU or the disk"
    assert loading._over_gpus("cpu", size) == {}


def test_weights_that_all_gpus_together_do_not_hold_are_refused(llama: Path, tmp_path: Path, monkeypatch):
    """accelerate then leaves the rest on the disk, where nothing can read or zero it."""
    rest = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "rest")}
    monkeypatch.setattr(loading, "_over_gpus", lambda *_: rest)
    with refused(f"{llama}: the GPUs together do not hold its weights"):
        checkpoints.load(llama, device="cuda")


# What identifies weights


def test_the_fingerprint_is_that_of_the_weights_however_they_are_stored(tmp_path: Path):
    whole = save(tmp_path / "whole", "olmoe", torch.bfloat16)
    same = {
        "sharded": save(tmp_path / "sharded", "olmoe", torch.bfloat16, max_shard_size="40KB"),
        "fused": save(tmp_path / "fused", "olmoe", torch.bfloat16, save_original_format=False),
    }
    first = loading.fingerprint(checkpoints.load(whole)[0])
    assert {name: loading.fingerprint(checkpoints.load(at)[0]) for name, at in same.items()} == dict.fromkeys(
        same, first
    )
    assert loading.fingerprint(checkpoints.load(whole, "float32")[0]) == first, "wider storage, the same numbers"
    change_weights(whole, lambda weights: [weight.mul_(1.01) for weight in weights.values()])
    assert loading.fingerprint(checkpoints.load(whole)[0]) != first


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_change_of_one_tensor_changes_the_fingerprint(llama: Path, name: str):
    first = loading.fingerprint(checkpoints.load(llama)[0])
    change_weights(llama, lambda weights: weights[name].add_(1e-3))
    assert loading.fingerprint(checkpoints.load(llama)[0]) != first


# Pickles


def as_pickles(directory: Path) -> Path:
    """The same checkpoint with its weights as a pickle."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickled_tensors_are_loaded_where_that_is_allowed(tmp_path: Path, dtype: torch.dtype):
    directory = save(tmp_path / "step7", "llama", dtype)
    safe, _ = checkpoints.load(directory)
    as_pickles(directory)
    with refused(str(directory), "its weights are pickles", "allow_pickle: true"):
        checkpoints.load(directory)
    model, _ = checkpoints.load(directory, allow_pickle=True)
    assert_equal_weights(model, safe)


class Trap:
    """A pickle that runs code when it is read."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


def test_the_code_of_a_pickle_is_not_run(llama: Path, tmp_path: Path):
    as_pickles(llama)
    torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, llama / "pytorch_model.bin")
    with refused(str(llama)):
        checkpoints.load(llama, allow_pickle=True)
    assert not (tmp_path / "sprung").exists()
    torch.load(llama / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sprung").exists(), "it would have been run otherwise"


# GGUF

#: What llama.cpp calls the matrices of a llama.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = ["<pad>", "<s>", "</s>"]
TEXTS = [
    "The capital of the Kingdom of Spain in Europe is",
    "In Switzerland they speak German",
    " two  spaces,\nlines; 1995 Curaçao – 東京",
    "",
]


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer in the way of GPT-2, with special tokens at the places that the models' configuration names."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL)
    model.train_from_iterator([*TEXTS, *models.prompts()["text"]], trainer)
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=pad, bos_token=bos, eos_token=eos)


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in GGUF_NAMES:
        return f"{GGUF_NAMES[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def rotary_pairs_side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix as llama.cpp has them: a rotated pair is (2i, 2i+1), in transformers (i, i+d/2)."""
    half = weight.shape[0] // heads // 2
    rows = [h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


def q8_0(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, what they stand for): blocks of 32 numbers along a row, a float16 scale and an int8 each."""
    blocks = weight.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    whole = np.clip(np.round(blocks / scale.astype(np.float32)), -127, 127).astype(np.int8)
    raw = np.concatenate([scale.view(np.uint8), whole.view(np.uint8)], axis=1).reshape(weight.shape[0], -1)
    return raw, (whole * scale.astype(np.float32)).reshape(weight.shape)


@torch.no_grad()
def write_gguf(path: Path, model: nn.Module, quantised: bool, add_bos: bool = False) -> nn.Module:
    """Write a llama with the tokenizer above; returns the model, its matrices rounded to what the file holds."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weight = parameter.numpy()
        if quantised and weight.ndim == 2:
            parameter.copy_(torch.from_numpy(q8_0(weight)[1]))
        matrix = name.split(".")[-2]
        weight = rotary_pairs_side_by_side(weight, heads[matrix]) if matrix in heads else weight
        if quantised and weight.ndim == 2:
            raw = q8_0(weight)[0]
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("quantised", [False, True], ids=["F32", "Q8_0"])
def test_a_gguf_file_computes_as_its_model(gguf_folder: Path, name: str, quantised: bool):
    file = f"{name}-{quantised}.gguf"
    model = models.build(name, intermediate_size=64, vocab_size=len(byte_level()))
    exact = [x.clone() for x in outputs(model)]
    model = write_gguf(gguf_folder / file, model, quantised)
    expected = outputs(model)
    assert torch.equal(exact[0], expected[0]) != quantised  # what is read back is what the file holds
    found, tokenizer = checkpoints.load(gguf_folder, gguf_file=file)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert found.config.tie_word_embeddings == model.config.tie_word_embeddings
    for one, other in zip(outputs(found), expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    for text in TEXTS:
        assert tokenizer(text).input_ids == byte_level()(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    shape = manifests.on_disk("s", 0, gguf_folder, gguf_file=file)["shape"]
    assert shape == shape_of(model)


def test_a_gguf_file_is_stored_in_the_dtype_asked_for(gguf_folder: Path):
    model = models.build("llama", intermediate_size=64, vocab_size=len(byte_level()))
    write_gguf(gguf_folder / "asked.gguf", model, quantised=False)
    found, _ = checkpoints.load(gguf_folder, "bfloat16", gguf_file="asked.gguf")
    assert_equal_weights(found, model.to(torch.bfloat16))


def test_a_gguf_tokenizer_that_begins_every_text(gguf_folder: Path):
    model = models.build("llama", intermediate_size=64, vocab_size=len(byte_level()))
    write_gguf(gguf_folder / "begins.gguf", model, quantised=False, add_bos=True)
    _, tokenizer = checkpoints.load(gguf_folder, gguf_file="begins.gguf")
    assert tokenizer(TEXTS[0]).input_ids == [1, *byte_level()(TEXTS[0]).input_ids]


def test_a_tokenizer_beside_a_gguf_file_counts_and_is_in_the_manifest(tmp_path: Path):
    model = models.build("llama", intermediate_size=64, vocab_size=len(byte_level()))
    write_gguf(tmp_path / "m.gguf", model, quantised=False)
    assert set(manifests.on_disk("s", 0, tmp_path, gguf_file="m.gguf")["files"]) == {"m.gguf"}
    models.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    found, tokenizer = checkpoints.load(tmp_path, gguf_file="m.gguf")
    assert_equal_weights(found, model)
    assert tokenizer(TEXTS[0]).input_ids == models.tokenizer()(TEXTS[0]).input_ids
    assert tokenizer(TEXTS[0]).input_ids != byte_level()(TEXTS[0]).input_ids
    named = set(manifests.on_disk("s", 0, tmp_path, gguf_file="m.gguf")["files"])
    assert named == {"m.gguf", "tokenizer.json", "tokenizer_config.json"}


def test_damaged_gguf_files_are_refused(gguf_folder: Path, tmp_path: Path):
    model = models.build("llama", intermediate_size=64, vocab_size=len(byte_level()))
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    write_gguf(gguf_folder / "nan.gguf", model, quantised=False)
    with refused(f"{gguf_folder / 'nan.gguf'}: model.layers.1.mlp.up_proj.weight holds a NaN or an infinity"):
        checkpoints.load(gguf_folder, gguf_file="nan.gguf")
    whole = (gguf_folder / "nan.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for content in (b"", whole[:100], whole[:1000], whole[: len(whole) // 2], b"\x93" * 5000):
        path.write_bytes(content)
        with refused(f"{path}: the model cannot be loaded (", "fetch it again or leave the step out"):
            checkpoints.load(tmp_path, gguf_file="cut.gguf")
    shutil.copyfile(gguf_folder / "nan.gguf", path)
    with refused(f"{tmp_path}: has no file gone.gguf"):
        checkpoints.load(tmp_path, gguf_file="gone.gguf")
