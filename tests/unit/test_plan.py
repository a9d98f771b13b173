"""What a configuration comes to on a disk, and what it is refused for before any job."""

import json
from pathlib import Path

import pytest
import yaml

from moescope import catalog, facts, plan, relations
from moescope.collaboration_published import MODELS
from moescope.errors import MoescopeError
from tests.examples import ROOT

TRAINED = {
    "name": "tiny",
    "source": "pretrain",
    "architecture": "olmoe",
    "training": {"steps": 100, "save_at": [0, 10, 100]},
}


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts_csv: Path):
    monkeypatch.chdir(tmp_path)


def checkpoint(folder: Path, **config) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def of(*series: dict, **keys) -> plan.Plan:
    return plan.read({"series": list(series), "relations": {"source": "facts.csv"}, **keys}, ROOT)


def test_a_trained_series_knows_its_files_before_they_exist():
    tiny = of(TRAINED).series["tiny"]
    assert tiny.steps == (0, 10, 100)
    assert "results/tiny/checkpoints/10/model.safetensors" in tiny.files[10]
    assert (tiny.pretrained, tiny.kind, tiny.architecture) == (True, "moe", "olmoe")
    assert tiny.size(10) == 0


def test_steps_select_and_saved_checkpoints_stay():
    tiny = of({**TRAINED, "steps": "last"}).series["tiny"]
    assert tiny.steps == (100,)
    assert list(tiny.files) == [0, 10, 100]


def test_a_local_series_is_what_lies_there(tmp_path: Path):
    for step in (5, 20):
        checkpoint(tmp_path / f"runs/step{step}")
    checkpoint(tmp_path / "one", model_type="olmoe", num_experts=8)
    found = of(
        {"name": "dense", "source": "local", "path": "runs/step*"}, {"name": "moe", "source": "local", "path": "one"}
    )
    dense, moe = found.series.values()
    assert (dense.steps, dense.kind, dense.architecture) == ((5, 20), "dense", "llama")
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert dense.files[5] == tuple(f"runs/step5/{name}" for name in names)
    assert (moe.steps, moe.kind) == ((0,), "moe")
    assert moe.size(0) == sum(path.stat().st_size for path in (tmp_path / "one").iterdir()) > 0
    assert (found.of_kind("moe"), found.of_kind("dense")) == (["moe"], ["dense"])


def test_a_gguf_file_is_a_checkpoint(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/q8.gguf").write_bytes(b"GGUF")
    series = of({"name": "g", "source": "local", "path": "model", "gguf_file": "q8.gguf"}).series["g"]
    assert series.files == {0: ("model/q8.gguf",)}


def test_facts_of_the_user_are_inputs_and_ours_are_hashes():
    own = of(TRAINED).facts
    assert (own.inputs, own.shipped) == (("facts.csv",), {})
    assert own.names == ("capital", "language", "colour")
    ours = of(TRAINED, relations={"source": "embedded"}).facts
    assert ours.inputs == ()
    assert all(path.startswith("resources/relations/") and len(sha256) == 64 for path, sha256 in ours.shipped.items())
    assert len(ours.shipped) == len(ours.names) == 12


def test_a_choice_of_relations_depends_on_their_files_alone():
    chosen = of(TRAINED, relations={"source": "embedded", "names": ["fruit_inside_color"]}).facts
    assert [Path(path).stem for path in chosen.shipped] == ["fruit_inside_color"] == list(chosen.names)


def test_the_published_facts_need_not_be_there_yet():
    asked = of(TRAINED, relations={"source": "lre", "names": ["word_last_letter"]}).facts
    digest = relations.LRE_SHA256["data/linguistic/word_last_letter.json"]
    assert asked.shipped == {"resources/lre/data/linguistic/word_last_letter.json": digest}


def test_jobs_read_what_was_chosen():
    for keys in ({}, {"relations": {"source": "embedded", "names": ["adj_antonym", "work_location"]}}):
        asked = of(TRAINED, **keys).facts
        read = facts.read(json.loads(json.dumps(asked.cfg)), asked.inputs, ROOT)
        assert sorted(relation.name for relation in read) == sorted(asked.names)


def test_jobs_fetch_the_published_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder is filled before it is read, and only where the configuration asks for the published files."""
    fetched = []
    monkeypatch.setattr(relations, "fetch_lre", fetched.append)
    asked = of(TRAINED, relations={"source": "lre", "names": ["word_last_letter"]}).facts
    with pytest.raises(MoescopeError, match=r"word_last_letter\.json"):
        facts.read(asked.cfg, (), tmp_path)
    assert fetched == [tmp_path / "resources/lre"]


@pytest.mark.parametrize(
    ("series", "parts"),
    [
        ({"name": "mine", "source": "local", "path": "runs/step*"}, ["series[0] (mine)", "runs/step*"]),
        ({**TRAINED, "steps": [11]}, ["series[0] (tiny)", "step 11 is not in the series", "10, 100"]),
        ({**TRAINED, "training": {"steps": 5, "save_at": [6]}}, ["series[0] (tiny)", "training.save_at", "6", "0..5"]),
    ],
)
def test_refuses_series_that_cannot_be(series: dict, parts: list[str]):
    with pytest.raises(MoescopeError) as error:
        of(series)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_refuses_results_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "results").write_text("")
    with pytest.raises(plan.PlanError, match="results: cannot be written"):
        of(TRAINED)


def test_leaves_no_trace(tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    of(TRAINED)
    assert sorted(tmp_path.rglob("*")) == before


DENSE = {"name": "dense", "source": "pretrain", "architecture": "olmo", "training": TRAINED["training"]}
OTHER = {**TRAINED, "name": "other"}


def test_studies_choose_their_series_and_steps():
    whole = of(TRAINED, DENSE)
    assert whole.asks("dynamics")
    assert whole.dynamics == {"tiny": (0, 10, 100), "dense": (0, 10, 100)}
    assert whole.ablation == {"tiny": (10, 100), "dense": (10, 100)}  # log-spaced: step 0 stands on no log axis
    chosen = of(
        {**TRAINED, "steps": [10, 100]},
        {**DENSE, "studies": {"dynamics": "last"}},
        {**OTHER, "studies": {}},
        dynamics={"steps": {"every": 2}},
        ablation={"series": ["tiny"], "steps": "all"},
    )
    assert chosen.dynamics == {"tiny": (10,), "dense": (100,)}
    assert chosen.ablation == {"tiny": (10,)}
    assert not of(TRAINED, studies=[]).asks("dynamics")


def test_pairs_are_the_first_of_each_kind_or_as_told():
    assert of(TRAINED, OTHER, DENSE).routed_by == {"dense": "tiny"}
    assert of(TRAINED).routed_by == {}
    assert of(TRAINED, DENSE, dynamics={"pairs": []}).routed_by == {}
    assert of(TRAINED, DENSE, attribution={"uncertainty": "none"}, studies=["dynamics"]).routed_by == {}
    told = of(TRAINED, OTHER, DENSE, dynamics={"pairs": [{"moe": "other", "dense": "dense"}]})
    assert told.routed_by == {"dense": "other"}


def test_a_dense_step_is_matched_to_the_nearest_of_its_pair():
    whole = of({**TRAINED, "steps": [0, 10]}, {**DENSE, "training": {"steps": 100, "save_at": [5, 6, 100]}})
    assert [whole.matched_step("dense", step) for step in (5, 6, 100)] == [0, 10, 10]


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"dynamics": {"steps": [7]}}, ["dynamics.steps (tiny)", "step 7", "neighbours are 0, 10, 100"]),
        (
            {"dynamics": {"series": ["dense"]}, "ablation": {"series": ["tiny"]}},
            ["ablation.series", "tiny takes no part"],
        ),
        ({"dynamics": {"pairs": [{"moe": "dense", "dense": "dense"}]}}, ["dynamics.pairs[0].moe", "has no experts"]),
        ({"dynamics": {"pairs": [{"moe": "tiny", "dense": "tiny"}]}}, ["dynamics.pairs[0].dense", "has experts"]),
        (
            {"dynamics": {"series": ["tiny"], "pairs": [{"moe": "tiny", "dense": "dense"}]}},
            ["dynamics.pairs[0].dense", "dense takes no part"],
        ),
        (
            {
                "dynamics": {"pairs": [{"moe": "tiny", "dense": "dense"}]},
                "attribution": {"uncertainty": "none"},
                "studies": ["dynamics"],
            },
            ["dynamics.pairs", "uncertainty to groups"],
        ),
        ({"collaboration": {"steps": [7]}}, ["collaboration.steps (tiny)", "step 7", "neighbours are 0, 10, 100"]),
    ],
)
def test_a_study_that_cannot_be_is_refused(keys: dict, parts: list[str]):
    with pytest.raises(MoescopeError) as error:
        of(TRAINED, DENSE, **keys)
    assert all(part in str(error.value) for part in parts), str(error.value)


SHARED = {**TRAINED, "name": "shared", "architecture": "qwen2_moe"}


def test_study_collaboration_takes_the_last_checkpoint_of_every_series():
    assert of(TRAINED, DENSE).collaboration == {"tiny": (100,), "dense": (100,)}
    chosen = of(
        {**TRAINED, "steps": [0, 10]},
        {**DENSE, "studies": {"collaboration": "all"}},
        {**OTHER, "studies": {"dynamics": "all"}},
        {**SHARED, "studies": {}},
    )
    assert chosen.collaboration == {"tiny": (10,), "dense": (0, 10, 100)}
    assert list(chosen.dynamics) == ["tiny", "other"]
    told = of(TRAINED, DENSE, SHARED, collaboration={"series": ["shared", "dense"], "steps": {"every": 2}})
    assert told.collaboration == {"dense": (0, 100), "shared": (0, 100)}
    assert not of(TRAINED, studies=["dynamics"]).asks("collaboration")


def test_whether_a_shared_expert_stands_beside_the_routed_ones(tmp_path: Path):
    checkpoint(
        tmp_path / "deepseek", model_type="deepseek_v2", n_routed_experts=8, moe_intermediate_size=4, n_shared_experts=2
    )
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/q8.gguf").write_bytes(b"GGUF")
    on_disk = {"name": "deep", "source": "local", "path": "deepseek"}
    gguf = {"name": "g", "source": "local", "path": "gguf", "gguf_file": "q8.gguf"}
    found = of(TRAINED, DENSE, SHARED, on_disk, gguf).series
    assert [name for name, one in found.items() if one.has_experts] == ["tiny", "shared", "deep"]
    assert [name for name, one in found.items() if one.has_shared] == ["shared", "deep"]


def experiments(**keys) -> dict:
    return {"collaboration": keys}


def pair(series: str, head: list[int], expert: list[int]) -> dict:
    return experiments(pairs=[{"series": series, "head": head, "expert": expert}])


@pytest.mark.parametrize(
    "keys",
    [
        experiments(budgets={"top_n": [0, 4], "only_rank": [4], "drop_rank": [1]}),
        experiments(stages={"tiny": [2, 3], "dense": [1, 2]}),
        pair("tiny", [3, 7], [3, 31]),
        pair("tiny", [0, 0], [3, 0]),
        # what does not take part, or does not route, has nothing to exceed
        {**experiments(budgets={"top_n": [5]}), "studies": ["dynamics"]},
        experiments(budgets={"top_n": [5]}, series=["dense"]),
        experiments(stages={"tiny": [2, 9]}, series=["dense"]),
    ],
)
def test_experiments_that_the_models_allow(keys: dict):
    """Layers, heads and experts: 4, 8 and 32, of which 4 at a time, all counted from 0; ranks from 1."""
    asked = of(TRAINED, DENSE, **keys).config["collaboration"]
    assert {key: asked[key] for key in keys["collaboration"] if key != "budgets"}.items() <= asked.items()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            experiments(budgets={"top_n": [0, 4, 5]}),
            "collaboration.budgets.top_n: 5 is above the 4 experts that tiny routes a token to; ask for no more",
        ),
        (
            experiments(budgets={"only_rank": [5]}),
            "collaboration.budgets.only_rank: 5 is above the 4 experts that",
        ),
        (
            experiments(budgets={"drop_rank": [9]}),
            "collaboration.budgets.drop_rank: 9 is above the 4 experts that",
        ),
        (
            experiments(stages={"dense": [1, 4]}),
            "collaboration.stages.dense: it has 4 layers, counted from 0; name earlier ones",
        ),
        (experiments(stages={"tiny": [2, 7]}), "collaboration.stages.tiny: it has 4 layers"),
        (
            pair("dense", [0, 0], [1, 0]),
            "collaboration.pairs[0].series: series dense has no experts; name another series",
        ),
        (
            {"collaboration": {**pair("tiny", [0, 0], [1, 0])["collaboration"], "series": ["dense"]}},
            "collaboration.pairs[0].series: series tiny takes no part in the study; add it or drop the pair",
        ),
        (
            pair("tiny", [4, 0], [4, 0]),
            "collaboration.pairs[0].head: 4 is beyond the 4 layers of tiny; they count from 0",
        ),
        (pair("tiny", [0, 8], [1, 0]), "collaboration.pairs[0].head: 8 is beyond the 8 heads of tiny"),
        (pair("tiny", [0, 0], [4, 0]), "collaboration.pairs[0].expert: 4 is beyond the 4 layers of tiny"),
        (pair("tiny", [0, 0], [1, 32]), "collaboration.pairs[0].expert: 32 is beyond the 32 experts of tiny"),
        (pair("tiny", [2, 0], [1, 0]), "collaboration.pairs[0]: head 0 of layer 2 lies after expert 0 of layer 1"),
    ],
)
def test_experiments_that_a_model_cannot_have_are_refused(keys: dict, told: str):
    with pytest.raises(MoescopeError) as error:
        of(TRAINED, DENSE, **keys)
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


def listed(repo: str, *revisions: str, size: int | None = 7, **model) -> None:
    """A catalog of a hub repository, as listing it would write it."""
    folder = Path(catalog.FOLDER)
    rows = [{"revision": r, "commit": "ab" * 20, "bytes": size, "step": catalog.named(r)[0]} for r in revisions]
    catalog.write(rows, folder / catalog.file_name(repo))
    (folder / catalog.file_name(repo, ".json")).write_text(json.dumps({"model_type": "olmoe", **model}))


HUB = {"name": "there", "source": "hub", "repo": "lab/model"}


def test_a_series_of_the_hub_is_what_its_catalog_says():
    listed("lab/model", "step0", "step10-tokens2B", "step20-tokens4B", "main", num_experts=8)
    found = of({**HUB, "steps": {"every": 2}}).series["there"]
    assert (found.steps, found.kind, found.architecture, found.on_hub) == ((0, 20), "moe", "olmoe", True)
    assert found.files == {0: (), 10: (), 20: ()}
    assert (found.revisions[20].revision, found.revisions[20].tokens, found.size(20)) == (
        "step20-tokens4B",
        4 * 10**9,
        7,
    )
    listed("lab/model", "step0", size=None)
    dense = of(HUB).series["there"]
    assert (dense.kind, dense.size(0)) == ("dense", None)


def test_a_single_revision_is_step_main_and_has_no_course():
    listed("lab/model", "main")
    found = of({**HUB, "revision": "main"}, TRAINED)
    assert found.series["there"].steps == ("main",)
    assert found.series["there"].size("main") == 7
    assert list(found.dynamics) == list(found.ablation) == ["tiny"]
    assert found.collaboration == {"there": ("main",), "tiny": (100,)}
    assert of({**HUB, "revision": "v2"}).series["there"].size("main") is None


@pytest.mark.parametrize(
    ("entry", "keys", "taking_part"),
    [
        ({"studies": {"collaboration": "last"}}, {}, True),
        ({"studies": {"dynamics": "last"}}, {}, False),
        ({"studies": {}}, {}, False),
        ({}, {"series": ["there"], "steps": {"every": 3}}, True),
        ({}, {"series": ["tiny"]}, False),
    ],
)
def test_whether_a_single_revision_takes_part_in_study_collaboration(entry: dict, keys: dict, taking_part: bool):
    listed("lab/model", "main")
    found = of({**HUB, "revision": "main", **entry}, TRAINED, collaboration=keys).collaboration
    assert (found.get("there") == ("main",)) is taking_part


def test_the_steps_of_the_papers():
    pair = [{**HUB, "name": n, "repo": r, "steps": "paper"} for n, r in zip("ab", catalog.PAPER, strict=True)]
    found = of(*pair, ablation={"steps": "paper"})
    assert [len(found.series[name].steps) for name in "ab"] == [19, 13]
    assert found.series["b"].steps[-1] == 557_000
    assert found.ablation == found.dynamics
    assert found.routed_by == {"b": "a"}
    assert found.matched_step("b", 557_000) == 600_000


#: What the configurations of the six models of study collaboration say, in the names of transformers.
SIX = {
    "Qwen/Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    **{
        repo: {"model_type": kind, "num_hidden_layers": 32, "num_attention_heads": 32}
        for repo, kind in {
            "Qwen/Qwen1.5-7B": "qwen2",
            "huggyllama/llama-7b": "llama",
            "mistralai/Mistral-7B-v0.1": "mistral",
        }.items()
    },
}


def test_the_six_models_of_study_collaboration():
    """The shipped configuration: every pair and every stage is one that the models have, but the route that runs
    backwards."""
    for repo, model in SIX.items():
        listed(repo, "main", **model)
    raw = yaml.safe_load((ROOT / "configs" / "collaboration.yaml").read_text())
    found = plan.read(raw, ROOT)
    assert [one.entry["repo"] for one in found.series.values()] == list(MODELS)
    assert found.collaboration == dict.fromkeys(found.series, ("main",))
    assert (found.dynamics, found.asks("dynamics")) == ({}, False)
    assert found.of_kind("dense") == ["qwen", "llama", "mistral"]
    assert [name for name, one in found.series.items() if one.has_shared] == ["qwen-moe"]
    backwards = {"series": "qwen-moe", "head": [22, 13], "expert": [21, 48]}
    raw["collaboration"]["pairs"].append(backwards)
    with pytest.raises(MoescopeError, match=r"pairs\[2\]: head 13 of layer 22 lies after expert 48 of layer 21"):
        plan.read(raw, ROOT)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"repo": "lab/other"}, r"series\[0\] \(there\): lab/other has no catalog; run: make catalog"),
        ({"steps": [5]}, r"step 5 is not in the series; its neighbours are 0, 10"),
        ({"steps": "paper"}, r"no paper reports steps of this repository; write them as a list"),
        ({"stage": "stage1"}, r"no branch of lab/model is a training step by its name"),
        ({"pattern": "("}, r"series\[0\].pattern: is no regular expression"),
        ({"pattern": "step.*"}, r"series\[0\].pattern: has no group for the step"),
        ({"pattern": "step(?P<step>.*)"}, r"are no whole numbers; correct pattern"),
        ({"pattern": "(?P<step>)", "stage": "stage1"}, r"series\[0\].pattern: stands for the known names"),
        ({"revision": "main", "stage": "stage1"}, r"series\[0\].revision: is a single checkpoint, which has no stage"),
        ({"revision": "main", "steps": [5]}, r"series\[0\].revision: is a single checkpoint, which has no steps"),
        ({"repo": "model"}, r"write owner/name"),
        ({"repo": "../etc/passwd"}, r"write owner/name"),
        ({"path": "runs"}, r"series\[0\].path: unknown key"),
    ],
)
def test_what_a_series_of_the_hub_is_refused_for(given: dict, told: str):
    listed("lab/model", "step0", "step10", "stepx")
    with pytest.raises(MoescopeError, match=told):
        of({**HUB, **given})
