"""What a configuration takes, against calculations by hand, measured figures and what is really there."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from moescope import (
    catalog,
    checkpoints,
    clean,
    costs,
    coupling,
    estimate,
    expert_ablation,
    expert_sets,
    masking,
    plan,
    store,
)
from moescope.costs import Machine, Prompts, Shape
from moescope.estimate import Amount, Held
from tests.examples import ROOT
from tests.hub_server import Fault, Repository, Server, serving, use

REPO = "owner/tiny"
#: A mixture of experts: 2 layers, 4 of 8 experts of 3 neurons.
CONFIG = {
    "model_type": "olmoe",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "vocab_size": 100,
    "num_attention_heads": 2,
    "intermediate_size": 3,
    "num_experts": 8,
    "num_experts_per_tok": 4,
}
SERIES = {"name": "tiny", "source": "hub", "repo": REPO}
#: A teraflop and 100 MB a second.
MACHINE = Machine(rate=1e12, threads=2, bandwidth=1e8)
#: The machine that was measured on, and the 906 published prompts of about 12 tokens.
MEASURED, PUBLISHED = Machine(336e9, 2, 1e8), Prompts(906, 906 * 12, 20, 12)
DEFAULTS = {"seeds": 5, "rankings": ["signed"], "neurons": 400}
#: What study collaboration asks of a checkpoint.
EXPERIMENTS = {
    "semantics": ["reroute", "reroute_logit", "min_logit", "zero_weight"],
    "budgets": {"top_n": "all", "only_rank": "all", "drop_rank": "all"},
    "weights": ["family", "keep"],
    "seeds": 5,
    "strongest": 10,
    "pairs": [],
    "gradient_steps": 64,
}
TOLD = {"attribution": {"uncertainty": "groups"}, "ablation": DEFAULTS, "collaboration": EXPERIMENTS}
SHIPPED = {
    name: Shape.of(json.loads((ROOT / "resources" / "catalogs" / f"allenai--{name}.json").read_text()))
    for name in ("OLMoE-1B-7B-0924", "OLMo-7B-hf")
}
OLMOE, OLMO = SHIPPED.values()


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts_csv: Path):
    """Ten prompts of three relations, a store of its own and no hub."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("MOESCOPE_KEEP", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(Machine, "measured", lambda bandwidth: Machine(MACHINE.rate, MACHINE.threads, bandwidth))


def listed(sizes: dict[int, int | None], config: dict = CONFIG, repo: str = REPO) -> None:
    """A catalog of a repository whose steps have these bytes."""
    path = Path(catalog.FOLDER) / catalog.file_name(repo)
    catalog.write([{"step": step, "revision": f"step{step}", "bytes": size} for step, size in sizes.items()], path)
    path.with_suffix(".json").write_text(json.dumps(config))


def asked(*series: dict, **keys) -> plan.Plan:
    return plan.read({"series": list(series or [SERIES]), "relations": {"source": "facts.csv"}, **keys}, ROOT)


def of(*series: dict, **keys) -> estimate.Estimate:
    return estimate.estimate(asked(*series, **keys), MACHINE)


def done(step: int | str, table: str = "predictions", name: str = "tiny") -> None:
    path = Path("results", name, str(step), f"{table}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def printed(*arguments: str, series: list[dict] | None = None, **keys) -> tuple[int, str, str]:
    """Status, output and errors of the command."""
    Path("mine.yaml").write_text(
        json.dumps({"series": series or [SERIES], "relations": {"source": "facts.csv"}, **keys})
    )
    out, status, told = io.StringIO(), 0, ""
    with contextlib.redirect_stdout(out):
        try:
            estimate.main(["--configfile", "mine.yaml", *arguments])
        except SystemExit as end:
            status, told = 1, str(end.code)
    return status, out.getvalue(), told


# Sums that may not be whole


def test_a_sum_says_what_it_does_not_know():
    shown = "{:.0f}".format
    assert Amount.sum([Amount(1), Amount(2)]).text(shown) == "3"
    assert Amount.sum([Amount(1), Amount.of(None)]).text(shown) == "at least 1"
    assert Amount.sum([Amount.of(None), Amount(0)]).text(shown) == "unknown"
    assert Amount.sum([]).text(shown) == "0"


# Shapes


def test_parameters_of_the_published_models():
    """Norms aside: 6,919,161,856 and 6,888,095,744 numbers in their files."""
    assert OLMOE.parameters == 16 * (4 * 2048**2 + 64 * 3 * 2048 * 1024 + 64 * 2048) + 2 * 50_304 * 2048
    assert OLMOE.parameters == pytest.approx(6_919_161_856, rel=1e-4)
    assert OLMO.parameters == 6_888_095_744
    assert OLMOE.active_parameters == pytest.approx(1.2e9, rel=0.05)


def test_heads_that_share_keys_and_a_shared_expert():
    shape = Shape.of({**CONFIG, "num_key_value_heads": 1, "head_dim": 6, "shared_expert_intermediate_size": 5})
    assert (shape.width, shape.keys, shape.ffn, shape.active) == (12, 6, 8 * 3 + 5, 4 * 3 + 5)
    assert shape.layer(10) == 8 * 12 * 2 + 8 * 6 * 2 + 3 * 8 * 10 + 8 * 8


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_experts_per_tok"])
def test_a_configuration_that_does_not_tell(key: str):
    model = {**CONFIG}
    del model[key]
    assert Shape.of(model) is None
    listed({1: 10**9}, model)
    (series,) = of().series
    assert series.download.known == 10**9
    assert not any(amount.complete for amount in (series.results, series.memory, series.hours["attribute"]))
    assert "unknown" in printed()[1]


def test_the_shape_of_a_gguf_file():
    from gguf import GGUFWriter

    Path("one").mkdir()
    writer = GGUFWriter("one/m.gguf", "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("token_embd.weight", np.zeros((50, 16), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = {"name": "mine", "source": "local", "path": "one", "gguf_file": "m.gguf"}
    found = estimate.shape_of(asked(entry).series["mine"], ROOT)
    assert found == Shape(3, 16, 50, 4, width=16, keys=8, experts=0, routed=0, neurons=40, shared=0)
    whole, mapped = (costs.memory_of(found, 10, False, held) for held in (True, False))
    assert whole - mapped == 4 * found.parameters
    Path("one/m.gguf").write_bytes(b"GGUF")
    status, _, told = printed(series=[entry])
    assert (status, told.startswith("error: one/m.gguf: cannot be read as GGUF")) == (1, True)


# Prompts


def test_prompts_are_counted_and_their_tokens_estimated():
    found = Prompts.of(asked({"name": "mine", "source": "local", "path": local()}).facts, ROOT)
    characters = [24, 23, 23, 23, 22, 21, 24, 24, 25, 9]  # "The capital of France is", ...
    tokens = [8, 8, 8, 8, 8, 7, 8, 8, 9, 3]
    assert [-(-c // 3) for c in characters] == tokens
    assert found == Prompts(10, sum(tokens), lengths=4, relations=3)


def test_published_prompts_need_not_be_there(tmp_path: Path):
    mine = {"name": "mine", "source": "local", "path": local()}
    assert Prompts.of(asked(mine, relations={"source": "lre"}).facts, tmp_path) == Prompts(906, 11_083, 20, 12)
    names = ["adj_antonym", "name_religion", "word_first_letter"]
    some = asked(mine, relations={"source": "lre", "names": names}).facts
    assert Prompts.of(some, tmp_path) == Prompts(906 // 4, 11_083 // 4, 20, 3)


# Hours


def test_operations_of_scoring_by_hand():
    """One loop a product: of every layer, expert, neuron and prompt."""
    shape, prompts = Shape.of(CONFIG), Prompts(10, 50, 2, 3)
    products = bases = 0.0
    for _ in range(2):  # layers
        for _ in ("attention", "feed-forward"):
            bases += 2 * (2 * 10 * 100 * 8)  # logits, expected rows
        for _ in range(8 + 8 * 3):  # attention neurons, then those of experts
            products += 2 * 100 * 8
        for _ in range(10):  # prompts
            products += (8 + 4 * 3) * 1.6 * 2 * 100  # active neurons
            products += 2 * 100 * 8 + 2 * 100 * costs.OF_HEAD  # heads
    active = 2 * (4 * 8 * 8 + 4 * 3 * 8 * 3 + 8 * 8) + 100 * 8
    weights = 2 * (4 * 8 * 8 + 8 * 3 * 8 * 3 + 8 * 8) + 2 * 100 * 8
    forward = 2 * active * 1.4 * 50 + (costs.WIDENING + costs.FIRST) * weights
    assert costs.attribute(shape, prompts) == pytest.approx(forward + 2 * bases + products)


def test_operations_of_masking_by_hand():
    shape, prompts = Shape.of({**CONFIG, "num_experts": 0}), Prompts(10, 50, 2, 3)
    weights = 2 * (4 * 8 * 8 + 3 * 3 * 8)
    read = costs.WIDENING + costs.FIRST
    forward = 2 * (weights + 100 * 8) * 1.4 * 50 + read * (weights + 2 * 100 * 8)
    scoring = 2 * (2 * 2 * (2 * 10 * 100 * 8) + 3 * 2 * 100 * 8 + 1.6 * 2 * 100 * 10 * 3)
    assert costs.mask_dense(shape, prompts) == pytest.approx(forward + scoring)


def test_measured_times_are_met():
    """The shape of OLMoE-1B-7B, 906 prompts: 31 minutes in all, on two cores of 336 GFLOP/s together."""
    minutes = 60 * MEASURED.hours(costs.attribute(OLMOE, PUBLISHED), costs.JOB)
    assert minutes == pytest.approx(31, rel=0.25)

    stages = {
        "forward": (costs.forward(OLMOE, PUBLISHED.tokens), 551),
        "distributions": (costs.distributions(OLMOE, 906, 2), 102),
        "experts": (costs.scores(OLMOE, 906, OLMOE.ffn, OLMOE.active), 926),
    }
    rest = costs.attribute(OLMOE, PUBLISHED) - sum(operations for operations, _ in stages.values())
    for operations, measured in [*stages.values(), (rest, 207)]:  # the rest is attention
        assert 3600 * MEASURED.hours(operations) == pytest.approx(measured, rel=0.25)


def test_hours_fall_with_the_rate():
    assert Machine(4e12, 2, 1).hours(1e15) == pytest.approx(Machine(1e12, 2, 1).hours(1e15) / 4)
    assert MACHINE.hours(3600 * 0.7e12) == pytest.approx(1)
    assert MACHINE.hours(3600 * 0.7e12, alone=True) == pytest.approx(2)
    assert MACHINE.hours(0, 1800) == pytest.approx(0.5)
    listed({1: 10**9, 2: 10**9}, json.loads((ROOT / "resources/catalogs/allenai--OLMo-7B-hf.json").read_text()))
    (slow,), (fast,) = (estimate.estimate(asked(), Machine(rate, 2, 1e8)).series for rate in (1e9, 2e9))
    assert set(slow.hours) == {"download", "attribute", "ablate"}
    for stage in ("attribute", "ablate"):
        assert slow.hours[stage].known == pytest.approx(2 * fast.hours[stage].known, rel=0.01)
    assert slow.hours["download"] == fast.hours["download"] == Amount(20 / 3600)


def test_a_batch_more_reads_all_weights_again():
    shape = Shape.of(CONFIG)
    one, two = (costs.forward(shape, tokens) for tokens in (4_096 // 1.4, 4_096 // 1.4 + 1))
    assert two - one == pytest.approx(costs.WIDENING * shape.parameters + 2.8 * shape.active_parameters)


def test_passes_of_an_ablation():
    """Three sizes of heads (of 256: 1, 3, 10) and four of a million neurons, with 5 + 1 + 1 + 5 passes each."""
    assert costs.passes(OLMOE, DEFAULTS) == dict.fromkeys((1, 3, 10, 1_049, 3_146, 10_486, 31_458), 12)
    both = {"seeds": 19, "rankings": ["signed", "per_relation"]}
    assert costs.passes(OLMOE, both).total() == 7 * (19 + (1 + 1 + 19) + (1 + 19))
    tiny = Shape.of({**CONFIG, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 32})
    assert costs.passes(tiny, DEFAULTS).total() == 6 * 12  # measured, sets in common counted once: 62


def test_an_ablation_by_hand():
    """Of four heads one is taken away, of 48 neurons 1 and 2 (3%)."""
    shape, prompts = Shape.of(CONFIG), Prompts(10, 50, 3, 3)
    batches = 3 * costs.WIDENING * shape.parameters  # one a length
    one = 2 * shape.active_parameters * 0.75 * 50 + batches / 3  # a pass widens each layer once
    without = costs.ablate(shape, prompts, {**DEFAULTS, "neurons": 0})
    assert without == pytest.approx(costs.forward(shape, 50) + one * 12 * (1 / 2 + 1 / 2 + 2 / 3))
    single = costs.ablate(shape, prompts, DEFAULTS) - without
    half_of_the_layers = 2 * shape.active_parameters / 2
    assert single == pytest.approx(400 * (10 / 2) * half_of_the_layers + 3 * batches)  # half of the experts work


@pytest.mark.parametrize("sizes", ["all", [1, 2]])
def test_budgets_are_those_that_run(sizes: str | list[int]):
    asked = dict.fromkeys(expert_ablation.MODES, sizes)
    for slots in (2, 4, 8):
        shape = Shape.of({**CONFIG, "num_experts_per_tok": slots})
        run = expert_ablation.budgets(asked, ["keep"], slots, shared=False)
        assert costs.budgets(shape, asked) == [budget.kept(slots) for budget in run]


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("seeds", [1, 5])
def test_passes_of_budgets_and_blocking(shared: int, seeds: int):
    """As many as the library finds to do for three relations: budgets that change something else, sets that differ."""
    shape = Shape.of({**CONFIG, "num_experts": 48, "shared_expert_intermediate_size": shared})
    asked = {**EXPERIMENTS, "seeds": seeds}
    budgets = expert_ablation.budgets(asked["budgets"], asked["weights"], 4, shared > 0)
    run = {(b.kept(4), b.weights if 0 < len(b.kept(4)) < 4 else "", b.shared) for b in budgets}
    assert len(run) == (2 + 2 * (3 + 3 + 3)) * (1 + (shared > 0))  # of one slot, two, three; and none or all

    parts = [(relation, fold) for relation in "abc" for fold in (0, 1)]
    rows = [
        (relation, "summed_lpi", fold, rank, rank % 2, 8 * "abc".index(relation) + rank // 2, 1.0)
        for relation in "abc"
        for fold in (None, 0, 1)
        for rank in range(1, 11)
    ]
    columns = ["relation", "method", "fold", "rank", "layer", "expert", "importance"]
    hits = {layer: np.arange(6 * 48).reshape(6, 48) for layer in (0, 1)}
    found, left_out = expert_sets.plan(pl.DataFrame(rows, columns, orient="row"), "summed_lpi", parts, hits, seeds)
    assert not left_out
    passes = costs.experiments(shape, 3, asked)
    assert passes.total() == 2 + len(run) + 4 * len(found)
    for size in expert_sets.SIZES:
        own = [one for one in found if one.size == size and one.control != "random"]
        random = [one for one in found if one.size == size and one.control == "random"]
        assert passes[3 * size] == 4 * len(own)
        assert passes[size] == 4 * len(random)
        assert {len(set().union(*one.sets.values())) for one in random} == {size}


def test_controls_of_a_pair_are_as_many_as_there_are():
    """Of two heads and eight experts."""
    shape = Shape.of(CONFIG)
    for seeds in (1, 5, 19):
        heads, experts = (coupling._others(units, 0, seeds, [0]) for units in (2, 8))
        assert costs.trials(shape, {"seeds": seeds}) == 1 + len(heads) + 1 + len(experts)
    assert costs.trials(OLMOE, {"seeds": 5}) == 2 * (1 + 5)


def test_gradients_by_hand():
    """Averaged over all pairs whose head is not behind the expert; one loop a length, prompt, step and layer."""
    shape, prompts, steps = Shape.of({**CONFIG, "num_hidden_layers": 3}), Prompts(10, 50, 2, 3), 6
    active, weights = (4 * 8 * 8 + n * 3 * 8 * 3 + 8 * 8 for n in (4, 8))  # of a layer
    paths = []
    for head in range(3):
        for expert in range(head, 3):
            operations = 0.0
            for _ in range(head, expert + 1):
                for _ in range(10):
                    operations += 2 * 2 * active + steps * (2 * active + 2 * active)  # forward, and back to the heads
                operations += (
                    2 * 4 * costs.WIDENING * weights
                )  # of both lengths: the two ends, all steps there and back
            paths.append(operations)
    held = 2 * shape.active_parameters * 50 + 2 * costs.WIDENING * shape.parameters
    assert costs.gradients(shape, prompts, steps) == pytest.approx(held + np.mean(paths))


def test_more_rows_than_run_at_once_widen_the_layers_again():
    shape = Shape.of(CONFIG)
    steps, prompts = costs.ROWS // 64, Prompts(64, 300, 1, 3)
    few, many = (costs.gradients(shape, prompts, n) for n in (steps - 1, steps))
    rows = 4 / 3 * 64 * 4 * shape.layer(shape.active)
    assert many - few == pytest.approx(rows + 2 * 4 / 3 * costs.WIDENING * shape.layer(shape.ffn))


def test_experiments_on_experts_by_hand():
    """One pair on either half, and one on all prompts; nothing else but clean passes and one budget."""
    shape, prompts, half = Shape.of(CONFIG), Prompts(10, 50, 3, 3), Prompts(5, 25, 3, 3)
    few = {"top_n": [0], "only_rank": [], "drop_rank": []}
    asked = {**EXPERIMENTS, "budgets": few, "semantics": [], "seeds": 1, "strongest": 0}
    once = costs.WIDENING * shape.parameters
    one, other = (2 * shape.active_parameters * 0.75 * tokens + once for tokens in (50, 25))
    none = costs.intervene(shape, prompts, asked, 0)
    assert none == pytest.approx(costs.forward(shape, 50) + 3 * one * 16 / 17)
    halves = costs.intervene(shape, prompts, {**asked, "strongest": 1}, 0) - none
    assert halves == pytest.approx(2 * (4 * other * 2 / 3 + costs.gradients(shape, half, 64)))
    named = costs.intervene(shape, prompts, asked, 1) - none
    assert named == pytest.approx(4 * one * 2 / 3 + costs.gradients(shape, prompts, 64))
    blocked = costs.intervene(shape, prompts, {**asked, "semantics": ["reroute"]}, 0) - none
    own, random = ([n / (n + 1) for n in sizes] for sizes in ((3, 15, 30), (1, 5, 10)))
    assert blocked == pytest.approx(one * (3 * sum(own) + sum(random)))


def test_seconds_of_passes_whatever_the_model():
    fixed = costs.overhead(OLMOE, PUBLISHED, EXPERIMENTS, 2)
    passes = 2 + (2 + 2 * (7 + 7 + 7)) + 3 * 4 * (2 + 2 * 5)
    assert fixed == pytest.approx(0.3 * (passes + 12 * 12) + 12 * costs.PATH)
    machine = Machine(1e30, 2, 1e8)  # only they are left
    listed({1: 10**8})
    (found,) = estimate.estimate(asked(), machine).series
    prompts = Prompts.of(asked().facts, ROOT)
    seconds = costs.JOB + costs.overhead(Shape.of(CONFIG), prompts, asked().config["collaboration"], 0)
    assert 3600 * found.hours["intervene"].known == pytest.approx(seconds)


def test_training_is_on_one_thread():
    trained = {
        "name": "tiny",
        "source": "pretrain",
        "architecture": "olmo",
        "shape": {"hidden_size": 64, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 4},
        "training": {"steps": 1000, "batch": 4, "length": 32, "vocabulary": 300, "save_at": [0, 1000]},
    }
    (found,) = of(trained, studies=[]).series
    parameters = 4 * 64 * 64 + 3 * 64 * 10 + 300 * 64
    seconds = 6 * parameters * 1000 * 4 * 32 / (0.7e12 / 2) + costs.JOB + 1000 * costs.UPDATE
    assert 3600 * found.hours["training"].known == pytest.approx(seconds)
    assert found.results.known > 2 * 4 * (parameters + 300 * 64)
    for files in asked(trained).series["tiny"].files.values():
        for file in map(Path, files):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    (found,) = of(trained, studies=[]).series
    assert set(found.hours) == {"attribute"}


# Disk and memory


def test_results_are_as_large_as_measured():
    for shape, groups, mb in [(OLMOE, True, 100), (OLMO, True, 95), (OLMOE, False, 36), (OLMO, False, 28)]:
        told = {**TOLD, "attribution": {"uncertainty": "groups" if groups else "none"}}
        assert costs.tables_of(shape, PUBLISHED, told)["attribute"] / 1e6 == pytest.approx(mb, rel=0.15)


def test_tables_by_hand():
    found = costs.tables_of(Shape.of({**CONFIG, "num_experts": 0}), Prompts(10, 50, 2, 3), TOLD)
    del found["intervene"]  # of a dense model nobody asks for it
    neurons, attn = 2 * 3, 2 * 8
    scored = 4 * (3 + 2) * (neurons + attn) + 10 * 2 * 4 * 2 + 40 * (neurons + attn) + 4 * 10 * (300 + 300)
    assert found == {
        "attribute": pytest.approx(scored),
        "ablate": pytest.approx(10 * (7 * 2 * 12 + 15 * 400)),  # one of four heads, one of six neurons
        "mask_dense": 42 * 5 * neurons,
    }


def test_tables_of_experiments_are_as_large_as_measured():
    """The small mixture of experts of the default configuration: 289,836 + 191,196 + 89,640 rows."""
    tiny = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "num_experts": 32}
    shape = Shape.of({**CONFIG, **tiny, "intermediate_size": 32})
    prompts = Prompts(996, 11_731, 14, 12)
    found = costs.tables_of(shape, prompts, TOLD)["intervene"]
    assert found == pytest.approx(847_048 + 797_527 + 377_454, rel=0.15)
    rows = 1 + 2 * 13 + 3 * 4 * 12 + 10 * 12
    assert rows * 996 == 289_836
    assert (10 * 9) * 996 == 89_640
    gates = 10 * 6 * 4  # of suppressed heads, at three layers on average and for the pair's expert
    assert found == pytest.approx(996 * (2.9 * rows + 4.2 * (gates + 90)))
    more = costs.tables_of(shape, prompts, TOLD, named=1)["intervene"] - found
    assert more == pytest.approx(996 * (2.9 * 12 + 4.2 * (6 * 4 + 9)))


def test_memory_is_that_of_the_plan():
    from moescope import memory

    layer = 4 * (4 * 2048**2 + 3 * 2048 * 65_536 + 64 * 2048)
    shape = memory.Shape(50_304, 2048, 2048, layer, 4 * (8 * 2048 + 8 * (2 * 2048 + 3 * 2048)))
    assert costs.memory_of(OLMOE, 906, False, False) == memory.plan(shape, 906, 10**6).bytes
    assert 4e9 < costs.memory_of(OLMOE, 906, False, False) < 6e9
    more = costs.memory_of(OLMOE, 906, True, False) - costs.memory_of(OLMOE, 906, False, False)
    assert more == 4 * 906 * 50_304


def test_constants_are_those_of_the_library():
    assert (costs.BATCH, costs.SPLITS) == (clean.BATCH_TOKENS, masking.SEEDS)
    assert (costs.HELD, costs.ROWS) == (coupling._PROMPTS, coupling._ROWS)


def test_the_store_at_its_peak():
    held = [Held(10, False), Held(30, False), Held(20, True)]
    assert estimate.store_peak(held, 2) == Amount(2 * 30 + 20)
    assert estimate.store_peak(held, 9) == Amount(3 * 30 + 20)
    assert estimate.store_peak(held[:1], 2) == Amount(10)
    assert estimate.store_peak([*held, Held(None, True)], 1) == Amount(30 + 20, complete=False)
    assert estimate.store_peak([], 2) == Amount(0)


def local(size: int = 0, name: str = "model.layers.0.mlp.experts.7.up_proj.weight", folder: str = "runs/step1") -> str:
    """A mixture of experts on this disk with one tensor of so many bytes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
    Path(folder, "tokenizer.json").write_text("{}")
    save_file({name: np.zeros(size, dtype=np.uint8)}, Path(folder, "model.safetensors"))
    return "runs/step*"


def test_a_large_mixture_on_this_disk_is_copied_where_it_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moescope.fused.LEAST", 1000)
    entry = {"name": "mine", "source": "local", "path": local(2000), "steps": "last"}
    size = sum(path.stat().st_size for path in Path("runs/step1").iterdir())
    found = of(entry)
    assert found.store == Amount(size)
    assert found.series[0].download == Amount(0)
    assert "download" not in found.series[0].hours
    local(2000, "model.layers.0.mlp.experts.up_proj")
    assert of(entry).store == Amount(0)
    local(1, folder="runs/step1")
    assert of(entry).store == Amount(0)


# What is still to be done


def test_scored_checkpoints_are_left_out():
    listed({1: 3 * 10**8, 2: 10**8, 3: 4 * 10**8})
    found = of(studies=[])
    assert (found.series[0].checkpoints, found.series[0].scored) == (3, 0)
    assert found.series[0].download == Amount(8 * 10**8)
    assert found.store == Amount(2 * 4 * 10**8 + 4 * 10**8)
    done(3)
    after = of(studies=[])
    assert (after.series[0].checkpoints, after.series[0].scored) == (3, 1)
    assert after.series[0].download == Amount(4 * 10**8)
    assert after.series[0].hours["attribute"].known == pytest.approx(2 / 3 * found.series[0].hours["attribute"].known)
    assert after.series[0].results.known == pytest.approx(2 / 3 * found.series[0].results.known)
    assert after.store == Amount(2 * 3 * 10**8 + 3 * 10**8)
    done(1)
    done(2)
    over = of(studies=[])
    assert (over.series[0].scored, over.series[0].hours, over.store) == (3, {}, Amount(0))
    assert over.series[0].download == over.series[0].results == Amount(0)


def test_what_is_scored_but_not_ablated_is_needed_again():
    listed({1: 10**8, 2: 10**8})
    done(1)
    done(2)
    (found,) = of(ablation={"steps": "last"}, studies=["dynamics"]).series
    assert (found.scored, found.download, set(found.hours)) == (2, Amount(10**8), {"download", "ablate"})
    done(2, "ablations")
    assert of(ablation={"steps": "last"}, studies=["dynamics"]).series[0].download == Amount(0)


def test_experiments_on_experts_are_left_to_be_done():
    listed({1: 10**8, 2: 10**8})
    done(1)
    done(2)
    assert of(studies=[]).series[0].hours == {}
    (found,) = of(studies=["collaboration"]).series
    assert (found.scored, found.download, set(found.hours)) == (2, Amount(10**8), {"download", "intervene"})
    (both,) = of(studies=["collaboration"], collaboration={"steps": "all"}).series
    for one, two in ((found.hours["intervene"], both.hours["intervene"]), (found.results, both.results)):
        assert two.known == pytest.approx(2 * one.known) != 0
    done(2, "expert_interventions")
    (after,) = of(studies=["collaboration"]).series
    assert (after.download, after.hours, after.results) == (Amount(0), {}, Amount(0))


def test_series_with_experts_that_take_part_are_experimented_on():
    listed({1: 10**8})
    listed({1: 10**7}, {**CONFIG, "model_type": "olmo", "num_experts": 0}, "owner/dense")
    listed({1: 10**8}, repo="owner/other")
    others = [{"name": name, "source": "hub", "repo": f"owner/{name}"} for name in ("dense", "other")]
    pairs = [{"series": "tiny", "head": [0, 1], "expert": [1, 7]}]
    told = {"series": ["tiny", "other", "dense"], "pairs": pairs}
    tiny, dense, other = of(SERIES, *others, studies=["collaboration"], collaboration=told).series
    assert set(tiny.hours) == set(other.hours) == {"download", "attribute", "intervene"}
    assert "intervene" not in dense.hours
    more = tiny.hours["intervene"].known - other.hours["intervene"].known  # the pair that is named
    shape, prompts = Shape.of(CONFIG), Prompts.of(asked().facts, ROOT)
    seconds, operations = (
        f(shape, prompts, EXPERIMENTS, 1) - f(shape, prompts, EXPERIMENTS, 0) for f in (costs.overhead, costs.intervene)
    )
    assert more == pytest.approx(MACHINE.hours(operations, seconds))
    assert tiny.results.known > other.results.known
    tiny, _, other = of(SERIES, *others, studies=["collaboration"], collaboration={"series": ["tiny"]}).series
    assert set(tiny.hours) - set(other.hours) == {"intervene"}


def test_a_dense_series_that_is_held_against_a_mixture_is_masked():
    listed({1: 10**8, 2: 10**8})
    listed({1: 10**7, 2: 10**7}, {**CONFIG, "model_type": "olmo", "num_experts": 0}, "owner/dense")
    moe, dense = of(SERIES, {"name": "dense", "source": "hub", "repo": "owner/dense"}).series
    assert set(dense.hours) - set(moe.hours) == {"mask_dense"}
    assert set(moe.hours) - set(dense.hours) == {"intervene"}


def test_what_the_store_holds_whole_is_not_fetched_again(tmp_path: Path):
    listed({1: 10**8, 2: 10**8})
    entry = {
        "source": "hub",
        "files": {"model.safetensors": {"bytes": 5, "sha256": "a"}, "config.json": {"bytes": 2, "git_sha1": "b"}},
    }
    Path("results/tiny/1").mkdir(parents=True)
    Path("results/tiny/1/manifest.json").write_text(json.dumps(entry))
    assert of(studies=[]).series[0].download == Amount(10**8 + 7)  # the manifest knows better than the catalog
    with store.held(checkpoints.key(entry), lambda place: (place / "weights").write_bytes(b"12345"), 5):
        pass
    assert of(studies=[]).series[0].download == Amount(10**8)
    record = tmp_path / "store" / "entries" / checkpoints.key(entry) / store.RECORD
    assert estimate.store_room() == shutil.disk_usage(tmp_path).free + 5 + record.stat().st_size
    record.unlink()
    assert of(studies=[]).series[0].download == Amount(10**8 + 7)


# What nobody tells


def test_bytes_that_nobody_tells_are_unknown():
    listed({1: None, 2: None})
    found = of(studies=[])
    (series,) = found.series
    assert series.download == series.hours["download"] == found.store == Amount(0, complete=False)
    assert series.hours["attribute"].complete
    status, out, told = printed(studies=[])
    assert (status, told) == (0, "")
    assert re.search(r"^tiny +2 +0 +unknown ", out, re.MULTILINE)
    assert "store: unknown at its peak" in out
    assert "make catalog lists them" in out


def test_what_is_known_of_a_sum_is_told():
    listed({1: None, 2: 3 * 10**9})
    found = of(studies=[])
    assert found.series[0].download == Amount(3 * 10**9, complete=False)
    assert found.store == Amount(2 * 3 * 10**9 + 3 * 10**9, complete=False)
    assert re.search(r"^total +2 +0 +at least 3.0 GB ", printed(studies=[])[1], re.MULTILINE)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub with three steps of 10, 20 and 30 bytes, and one without weights."""
    weights = {f"step{step}": {"model.safetensors": b"x" * 10 * step, "config.json": b"{}"} for step in (1, 2, 3)}
    weights["step0"] = {"config.json": b"{}"}
    with serving(Repository(REPO, weights)) as running:
        use(running, monkeypatch)
        monkeypatch.setattr("time.sleep", lambda _: None)
        monkeypatch.setattr("moescope.hub.ATTEMPTS", 2)
        yield running


def test_the_hub_is_asked_once_for_each_unknown_checkpoint(server: Server):
    listed({1: None, 2: 5, 3: None})
    (series,) = of(studies=[]).series
    assert series.download == Amount(10 + 5 + 30)
    assert sorted(answer.path.partition("?")[0][-5:] for answer in server.asked("/tree/")) == ["step1", "step3"]
    assert not server.downloads("")


def test_a_commit_is_asked_for_where_it_is_known(server: Server):
    (repository,) = server.repositories.values()
    path = Path(catalog.FOLDER) / catalog.file_name(REPO)
    listed({1: None})
    catalog.write([{"step": 1, "revision": "step1", "commit": repository.heads["step2"]}], path)
    assert of(studies=[]).series[0].download == Amount(20)


def test_no_weights_are_no_bytes_that_are_known(server: Server):
    listed({0: None, 3: None})
    assert of(studies=[]).series[0].download == Amount(30, complete=False)


@pytest.mark.parametrize("kind", [404, 503])
def test_a_hub_that_fails_is_no_failure(server: Server, kind: int):
    listed({1: None, 2: 5, 3: None})
    server.faults.append(Fault("/tree/", kind, times=1000))
    assert of(studies=[]).series[0].download == Amount(5, complete=False)
    assert printed(studies=[])[0] == 0


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    import threading

    monkeypatch.setattr(estimate, "_PATIENCE", 0.05)
    asked_for, never = [], threading.Event()
    monkeypatch.setattr("moescope.hub.weights_size", lambda *revision: asked_for.append(revision) or never.wait(5))
    assert estimate.of_hub([("a", "1"), ("a", "2")]) == [None, None]
    assert asked_for == [("a", "1")]
    never.set()


# The command


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**15, 0, size))


def test_a_disk_that_is_too_small_for_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    listed({1: 5 * 10**9, 2: 4 * 10**9})
    free(monkeypatch, 15 * 10**9)
    assert printed()[0] == 0
    free(monkeypatch, 15 * 10**9 - 1)
    status, out, told = printed()
    assert (status, "\n" in told) == (1, False)
    assert told.startswith(f"error: the store needs 15.0 GB and 15.0 GB are to be had in {tmp_path}/store: make room")
    assert "store: 15.0 GB at its peak" in out
    monkeypatch.setenv("MOESCOPE_KEEP", "1")
    assert printed()[0] == 0


def test_too_small_for_what_is_known_is_too_small(monkeypatch: pytest.MonkeyPatch):
    listed({1: 5 * 10**9, 2: None})
    free(monkeypatch, 10**9)
    assert printed()[2].startswith("error: the store needs at least 15.0 GB and 1.0 GB are to be had in ")
    listed({1: None, 2: None})
    assert printed()[0] == 0


def test_what_is_printed_for_a_series_on_this_disk():
    local()
    status, out, _ = printed("--bandwidth", "50", series=[{"name": "mine", "source": "local", "path": "runs/step*"}])
    assert status == 0
    head, mine, total, _, hours, *_ = out.splitlines()
    heads = ["series", "checkpoints", "scored", "to download", "results to come", "memory of a job"]
    assert re.split(r" {2,}", head) == heads
    assert re.split(r" {2,}", mine)[:4] == ["mine", "1", "0", "0"]
    assert mine.replace("mine ", "total") == total
    assert hours.split() == ["hours", "(estimate)", "attribute", "ablate", "intervene", "sum"]
    assert "(2 threads, 1,000 GFLOP/s just now), one job at a time; downloads at 50 MB/s" in out
    assert "estimate, for the CPU of this machine" in out


def test_a_slower_norm_is_mentioned():
    local()
    mine = [{"name": "mine", "source": "local", "path": "runs/step*"}]
    assert "norm is local" in printed(series=mine, attribution={"norm": "local"})[1]
    assert "norm is local" not in printed(series=mine)[1]


def test_errors_are_one_line():
    assert printed(series=[{"name": "x", "source": "hub", "repo": "no/catalog"}])[2] == (
        "error: series[0] (x): no/catalog has no catalog; run: make catalog ARGS=no/catalog"
    )
    listed({1: 1})
    assert printed("--bandwidth", "0")[2].startswith("error: --bandwidth: 0 MB/s")


def test_the_default_configuration_is_read():
    """Three small models that are trained here, without any file of one's own."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        estimate.main([])
    assert re.search(r"^tiny-olmoe +12 +0 +0 ", out.getvalue(), re.MULTILINE)
    assert "training" in out.getvalue()
