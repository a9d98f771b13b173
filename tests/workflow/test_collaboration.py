"""Study collaboration through Snakemake: a run on three small models, and what each change makes it do again."""

import base64
import copy
import html
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from matplotlib.image import imread

from moescope import tables
from tests.examples import FACTS, ROOT, write_facts
from tests.hub_server import Repository, Server, series, serving
from tests.workflow.running import (
    CONFIG,
    SHAPE,
    TRAINING,
    Finished,
    clone,
    files_below,
    library,
    planned,
    snakemake,
    succeeds,
)

#: Few experiments: on the budget of all slots, which is the model itself, and on the one of the heaviest alone.
FEW = {
    "semantics": ["reroute"],
    "weights": ["family"],
    "budgets": {"top_n": [1, 2], "only_rank": [2], "drop_rank": []},
    "seeds": 1,
    "permutations": 19,
    "strongest": 1,
    "gradient_steps": 4,
}
#: A mixture of experts with a shared one, for this study alone.
SHARED = {
    "name": "shared",
    "source": "pretrain",
    "architecture": "qwen2_moe",
    "shape": {
        **SHAPE,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 16,
    },
    "training": {**TRAINING, "save_at": [12]},
    "studies": {"collaboration": "last"},
}
PAIR = {"series": "moe", "head": [0, 1], "expert": [1, 2]}
STUDY = {
    **CONFIG,
    "series": [*CONFIG["series"], SHARED],
    "studies": ["dynamics", "collaboration"],
    "collaboration": {**FEW, "pairs": [PAIR]},
}
EXPERIMENTS = ("expert_importance", "associations", "expert_interventions", "gates", "gradients")
TABLES = {
    "dense": {"gains"},
    "moe": {"gains", "budgets", "blocking", "expert_overlap", "causality"},
    "all": {"efficiency", "relation_accuracy", "beside_published"},
}
TABLES["shared"] = TABLES["moe"] | {"neuron_types", "shared_neurons", "neuron_overlap"}
FIGURES = {
    "moe": {"budget", "blocking", "expert_overlap", "association", "causality"},
    "all": {"efficiency", "gain_curves", "relation_accuracy"},
}
FIGURES["shared"] = FIGURES["moe"] | {"neuron_types", "neuron_overlap"}
#: Jobs of the study: of what is made of the experiments on a series, of what shows several series.
SUMMED_UP = {"collaboration_experts": 1, "csv_experts": 1, "collaboration_figures_experts": 1}
TOGETHER = {"collaboration_together": 1, "csv_together": 1, "collaboration_figures_together": 1, "report": 1}


def twice(jobs: dict[str, int]) -> dict[str, int]:
    """The same for both series with experts."""
    return {name: 2 * count for name, count in jobs.items()}


@dataclass(frozen=True)
class Studied:
    """A finished folder in which the study was run too: the jobs that were announced, the files that were there."""

    folder: Path
    jobs: dict[str, int]
    before: dict[str, tuple[int, int]]

    def planned(self, root: Path | None = None, **changes: dict) -> dict[str, int]:
        """Jobs that a changed configuration, or another clone, would run."""
        return planned(self.folder, root=root, config={**copy.deepcopy(STUDY), **changes})

    def asking(self, **changes) -> dict[str, int]:
        """The same of changes within the section of the study."""
        return self.planned(collaboration={**STUDY["collaboration"], **changes})


@pytest.fixture(scope="module")
def studied(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Studied:
    folder = Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("collaboration") / "folder"))
    jobs, before = planned(folder, config=STUDY), files_below(folder)
    succeeds(folder, "--cores", "2")
    return Studied(folder, jobs, before)


def read(studied: Studied, name: str, **where) -> pl.DataFrame:
    return tables.read(studied.folder / "results" / f"{name}.parquet").filter(**where)


# What a run makes


def test_a_study_more_runs_itself_alone(studied: Studied):
    own = {"associate": 2, "intervene": 2, "collaboration_gains": 3, "csv_gains": 3, **twice(SUMMED_UP), **TOGETHER}
    with_shared = {"collaboration_neurons": 1, "csv_shared_experts": 1, "collaboration_figures_shared": 1}
    new = {"pretrain_shared": 1, "manifest": 1, "audit_series": 1, "attribute_moe": 1, "overview_moe": 1}
    new |= {"csv_attribution_moe": 1, "attribution_figures_moe": 1}
    assert studied.jobs == {**own, **with_shared, **new}
    after = files_below(studied.folder)
    assert {name for name, known in studied.before.items() if after[name] != known} == {"results/report.html"}
    assert studied.planned() == {}


def test_every_promised_file_is_there(studied: Studied):
    expected = set()
    for name in ("moe", "shared"):
        expected |= {f"{name}/12/{table}.parquet" for table in EXPERIMENTS} | {f"{name}/12/provenance/intervene.json"}
    for name, found in TABLES.items():
        expected |= {f"collaboration/{name}/{table}.parquet" for table in found}
        expected |= {f"tables/collaboration/{name}/{table}.csv" for table in found}
    for name, found in FIGURES.items():
        expected |= {f"figures/collaboration/{name}/{figure}.{end}" for figure in found for end in ("pdf", "png")}
    new = {name.removeprefix("results/") for name in files_below(studied.folder).keys() - studied.before.keys()}
    of_scoring = re.compile(r"shared/|(figures|tables)/attribution/shared/|attribution/shared/")
    assert {name for name in new if name in expected or not of_scoring.match(name)} == expected


def test_every_table_keeps_its_schema_and_is_also_there_as_csv(studied: Studied):
    results = studied.folder / "results"
    experiments = [results / name / "12" / f"{table}.parquet" for name in ("moe", "shared") for table in EXPERIMENTS]
    for path in [*experiments, *(results / "collaboration").rglob("*.parquet")]:
        frame = tables.read(path)
        assert len(frame) or path.stem == "beside_published", path  # other facts than the published ones
        assert frame.equals(tables.check(frame, path.stem)), path
        if path not in experiments:
            csv = pl.read_csv(results / "tables" / path.relative_to(results).with_suffix(".csv"), infer_schema=False)
            assert (csv.columns, len(csv)) == (frame.columns, len(frame)), path
            for column in ("value", "low", "high") if "value" in frame.columns else ():
                mine, theirs = (one[column].cast(pl.Float64) for one in (csv, frame))
                assert mine.equals(theirs, null_equal=True), (path, column)


@pytest.mark.parametrize("name", ["moe", "shared"])
def test_a_budget_of_all_slots_is_the_model_itself(studied: Studied, name: str):
    """Through six jobs: what the study finds clean is what attribution found."""
    accuracy = read(studied, f"attribution/{name}/accuracy", step=12, subset="all", scope="all", average="micro")
    known = {metric: accuracy.filter(metric=metric)["value"].item() for metric in ("hit@10", "mrr")}
    budgets = read(studied, f"collaboration/{name}/budgets", mode="top_n", scope="all", average="micro")
    efficiency = read(studied, "collaboration/all/efficiency", series=name)
    for metric, value in known.items():
        row = budgets.filter(metric=metric, size=2, shared=True)
        assert row["value"].item() == pytest.approx(value, rel=1e-6), metric
        assert row["drop_value"].item() == pytest.approx(0, abs=1e-6), metric
        assert efficiency.filter(quantity=metric)["value"].item() == pytest.approx(value, rel=1e-6), metric
    assert budgets["shared"].n_unique() == (2 if name == "shared" else 1)
    ran, scored = read(studied, f"{name}/12/expert_interventions"), read(studied, f"{name}/12/predictions")
    clean = ran.filter(experiment="clean")
    for column in ("prompt_id", "rank"):
        assert clean[column].to_list() == scored[column].to_list()
    assert np.allclose(clean["log_prob"], scored["log_prob"], atol=1e-5)


def test_what_the_layers_gain_is_what_attribution_says(studied: Studied):
    for name in ("dense", "moe", "shared"):
        layers = read(studied, f"{name}/12/layers", component="ffn")
        gained = read(studied, "collaboration/all/efficiency", series=name, quantity="ffn_gain")["value"].item()
        assert gained == pytest.approx(layers["lpi"].sum() / layers["prompt_id"].n_unique(), abs=1e-6)


def test_pairs_are_tested_on_the_series_that_they_name(studied: Studied):
    """The one that is named on all prompts of its series, those that were found on the other fold of theirs."""
    prompts = read(studied, "prompts")
    for name in ("moe", "shared"):
        found = read(studied, f"{name}/12/associations").filter(pl.col("relation").is_null())
        wanted = {
            (f"H({h},{i})-E({e},{j})", fold)
            for fold, h, i, e, j in found.select("fold", "head_layer", "head", "layer", "expert").iter_rows()
            if fold is not None
        } | ({("H(0,1)-E(1,2)", None)} if name == "moe" else set())
        ran = read(studied, f"{name}/12/expert_interventions", experiment="forcing", control="none")
        assert set(ran.select("mode", "fold").iter_rows()) == wanted
        for (fold,), frame in ran.partition_by("fold", as_dict=True).items():
            groups = range(10) if fold is None else range(5 * fold, 5 * fold + 5)
            inside = prompts.filter(pl.col("group").is_in(list(groups)))["prompt_id"]
            assert set(frame["prompt_id"]) == set(inside), (name, fold)


def test_provenance_says_what_was_asked(studied: Studied):
    record = json.loads((studied.folder / "results/moe/12/provenance/intervene.json").read_text())
    told = {key: FEW[key] for key in ("semantics", "weights", "budgets", "seeds", "gradient_steps")}
    assert record["cfg"].items() >= {**told, "pairs": [[0, 1, 1, 2]], "importance": "top_neuron_frequency"}.items()
    assert record["replay_error"] < 1e-4
    assert record["versions"].keys() >= {"torch", "transformers"}
    assert any("matched control" in line for line in record["notes"]), "four experts a layer leave few controls"
    other = json.loads((studied.folder / "results/shared/12/provenance/intervene.json").read_text())
    assert other["cfg"]["pairs"] == []


def test_figures_show_something(studied: Studied):
    for path in (studied.folder / "results/figures/collaboration").rglob("*.png"):
        image = imread(path)[..., :3]
        assert image.shape[1] > 600, path
        assert image.shape[0] > 150, f"{path}: a strip that says that there is nothing to draw"
        assert image.std() > 0.02, path
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF"), path


def section(page: str) -> str:
    """The part of a report that is about this study."""
    return page.partition('<h2 id="collaboration">')[2].partition('<h2 id="definitions">')[0]


def test_the_report_has_a_section(studied: Studied):
    text = section((studied.folder / "results/report.html").read_text())
    shown = sorted(base64.b64decode(one) for one in re.findall(r'src="data:image/png;base64,([^"]+)"', text))
    drawn = (studied.folder / "results/figures/collaboration").rglob("*.png")
    assert shown == sorted(path.read_bytes() for path in drawn)
    assert "dense: no experts, so there is nothing to block." in text
    assert "moe: has no shared expert." in text
    for name in ("moe", "shared"):
        record = json.loads((studied.folder / f"results/{name}/12/provenance/intervene.json").read_text())
        assert all(f"{name}: {line}" in html.unescape(text) for line in record["notes"]), name
    for heading in ("Efficiency", "Routing budgets", "Blocking the leading experts", "Leading experts by relation"):
        assert heading in text, heading


# What runs again


@pytest.mark.parametrize(
    ("source", "jobs"),
    [
        (
            "scripts/moescope/coupling_plots.py",
            {"collaboration_figures_experts": 2, "collaboration_figures_shared": 1, "report": 1},
        ),
        ("scripts/collaboration_figures_together.py", {"collaboration_figures_together": 1, "report": 1}),
        ("report/causality.rst", {"report": 1}),
        ("scripts/moescope/causality.py", {**twice(SUMMED_UP), **TOGETHER}),
        ("scripts/moescope/coupling.py", {"intervene": 2, **twice(SUMMED_UP), **TOGETHER}),
        ("rules/collaboration.smk", {}),
    ],
    ids=lambda value: Path(value).name if isinstance(value, str) else "",
)
def test_an_edited_source_reruns_what_it_can_have_changed(studied: Studied, tmp_path: Path, source: str, jobs: dict):
    root = clone(tmp_path / "clone")
    with open(root / "workflow" / source, "a", encoding="utf-8") as file:
        file.write("\n.. edited\n" if source.endswith(".rst") else "# edited\n")
    assert studied.planned(root) == jobs


@pytest.mark.parametrize(
    ("changes", "jobs"),
    [
        ({"seeds": 2}, {"intervene": 2, **twice(SUMMED_UP), **TOGETHER}),
        ({"pairs": []}, {"intervene": 1, **SUMMED_UP, **TOGETHER}),
        ({"strongest": 2}, {"associate": 2, "intervene": 2, **twice(SUMMED_UP), **TOGETHER}),
        ({"stages": {"dense": [1, 2]}}, None),
        ({"series": ["moe"]}, TOGETHER),  # of the others only the one that chooses its studies itself stays
    ],
)
def test_another_wish_reruns_what_it_changes(studied: Studied, changes: dict, jobs: dict | None):
    """Never the scores. Two layers have no late stage."""
    if jobs is None:
        result = snakemake(
            studied.folder,
            "--dry-run",
            config={**STUDY, "collaboration": {**STUDY["collaboration"], **changes}},
        )
        assert "collaboration.stages.dense: it has 2 layers" in result.stderr
    else:
        assert studied.asking(**changes) == jobs


def test_a_study_less_runs_nothing_of_the_others(studied: Studied):
    assert studied.planned(studies=["dynamics"]) == {"report": 1}


def test_a_lost_result_is_made_again(studied: Studied, tmp_path: Path):
    folder = Path(shutil.copytree(studied.folder, tmp_path / "copied"))
    lost = folder / "results/moe/12/gradients.parquet"
    before = lost.read_bytes()
    lost.unlink()
    assert planned(folder, config=STUDY) == {"intervene": 1, **SUMMED_UP, **TOGETHER}
    succeeds(folder, "--cores", "2", "results/moe/12/gradients.parquet")
    assert lost.read_bytes() == before


# What there is little of


def test_a_dense_model_has_no_experts_to_ask_about(finished: Finished, tmp_path: Path):
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copied"))
    config = {**CONFIG, "series": CONFIG["series"][1:], "studies": ["collaboration"]}
    jobs = planned(folder, config=config)
    assert jobs == {"collaboration_gains": 1, "csv_gains": 1, **TOGETHER}
    succeeds(folder, "--cores", "2")
    assert [path.name for path in sorted((folder / "results/collaboration").iterdir())] == ["all", "dense"]
    assert "dense: no experts, so there is nothing to route." in section((folder / "results/report.html").read_text())


def test_a_single_fact(finished: Finished, tmp_path: Path):
    """No other fold, no correlation, no pair, no interval: the study says so and goes on."""
    write_facts(tmp_path / "facts.csv", FACTS[:1])
    shutil.copytree(finished.folder / "results/moe/checkpoints/12", tmp_path / "mine")
    entry = {"name": "mine", "source": "local", "path": "mine"}
    config = {**CONFIG, "series": [entry], "studies": ["collaboration"], "collaboration": FEW}
    succeeds(tmp_path, "--cores", "2", config=config)
    results = tmp_path / "results"
    for name in ("mine/0/associations", "mine/0/gates", "mine/0/gradients", "collaboration/mine/causality"):
        assert tables.read(results / f"{name}.parquet").is_empty(), name
    budgets = tables.read(results / "collaboration/mine/budgets.parquet")
    assert budgets["value"].null_count() == 0
    assert budgets["low"].null_count() == len(budgets)
    assert "Study: collaboration" in (results / "report.html").read_text()


# Of the hub


def prepare(folder: Path, server: Server, config: dict) -> dict[str, str]:
    """Facts, a configuration and catalogs in a folder; returns the environment in which the server is the hub."""
    write_facts(folder / "facts.csv")
    (folder / "config-of-test.yaml").write_text(yaml.safe_dump(config))
    variables = {**server.environment, "MOESCOPE_STORE": str(folder / "store")}
    listed = library(folder, "cataloguing", "--configfile", "config-of-test.yaml", **variables)
    assert listed.returncode == 0, listed.stderr
    return variables


def test_a_single_revision_gives_the_same(finished: Finished, studied: Studied, tmp_path: Path):
    """As the six models of the paper are asked: not a step of a series, but ``main``."""
    entry = {"name": "moe", "source": "hub", "repo": "lab/one", "revision": "main"}
    config = {**STUDY, "series": [entry], "studies": ["collaboration"]}
    with serving(series("lab/one", {"main": finished.folder / "results/moe/checkpoints/12"})) as server:
        variables = prepare(tmp_path, server, config)
        succeeds(tmp_path, "--cores", "2", **variables)
        assert planned(tmp_path, **variables) == {}
    for name in (*(f"moe/main/{table}" for table in EXPERIMENTS), *(f"collaboration/moe/{t}" for t in TABLES["moe"])):
        mine, theirs = (
            pl.read_parquet(folder / "results" / f"{name.replace('/main/', f'/{step}/')}.parquet")
            for folder, step in ((tmp_path, "main"), (studied.folder, "12"))
        )
        if "step" in mine.columns:
            assert mine["step"].null_count() == len(mine), name
            mine, theirs = mine.drop("step"), theirs.drop("step")
        assert mine.equals(theirs, null_equal=True), name
    assert "lab/one" in (tmp_path / "results/report.html").read_text()


#: The sizes of the six models of the paper, as their configurations give them.
SIX = {
    "Qwen/Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_size": 2048,
        "vocab_size": 151936,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "allenai/OLMoE-1B-7B-0924": {
        "model_type": "olmoe",
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "hidden_size": 2048,
        "vocab_size": 50304,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 1024,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
    },
    "Qwen/Qwen1.5-7B": {"model_type": "qwen2", "vocab_size": 151936},
    "huggyllama/llama-7b": {"model_type": "llama", "vocab_size": 32000},
    "mistralai/Mistral-7B-v0.1": {"model_type": "mistral", "vocab_size": 32000, "intermediate_size": 14336},
}
DENSE = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 11008}


@pytest.fixture(scope="module")
def hub() -> Iterator[Server]:
    """A hub that has the configurations of the six models, and no weights."""
    contents = {repo: json.dumps({**DENSE, **model}).encode() for repo, model in SIX.items()}
    with serving(
        *(Repository(repo, {"main": {"config.json": content}}) for repo, content in contents.items())
    ) as server:
        yield server


def test_the_experiment_of_the_paper_is_planned(hub: Server, tmp_path: Path):
    """From the catalogs alone, which one command lists; without them it is named."""
    config = yaml.safe_load((ROOT / "configs/collaboration.yaml").read_text())
    missing = snakemake(tmp_path, "--dry-run", config=config)
    assert missing.returncode == 1
    assert "(qwen-moe): Qwen/Qwen1.5-MoE-A2.7B has no catalog; run: make catalog" in missing.stderr
    assert "Traceback" not in missing.stderr
    prepare(tmp_path, hub, config)
    jobs = planned(tmp_path)
    of_experts = {"associate": 3, "intervene": 3, "collaboration_experts": 3, "csv_experts": 3}
    of_shared = {"collaboration_neurons": 1, "csv_shared_experts": 1, "collaboration_figures_shared": 1}
    of_all = {"collaboration_gains": 6, "csv_gains": 6, **TOGETHER}
    assert jobs.items() >= {**of_experts, **of_shared, **of_all, "attribute_moe": 3, "attribute_dense": 3}.items()
    assert jobs["collaboration_figures_experts"] == 3
    assert not jobs.keys() & {"ablate", "mask_dense", "dynamics_comparison"}


def test_the_pairs_of_the_paper_go_to_its_model_alone(hub: Server, tmp_path: Path):
    """Also its correlations: they are read off the tables of the model that the paper names pairs of."""
    prepare(tmp_path, hub, yaml.safe_load((ROOT / "configs/collaboration.yaml").read_text()))
    told = snakemake(tmp_path, "--dry-run").stdout
    reason = re.search(r"Holding the series against each other.*\n *Reason: .*updated by another job: (.*)", told)
    read = [path for path in reason[1].split(", ") if path.endswith(("heads.parquet", "routing.parquet"))]
    assert sorted(read) == ["results/qwen-moe/main/heads.parquet", "results/qwen-moe/main/routing.parquet"]
