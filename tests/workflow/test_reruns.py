"""Only what changed runs again, under every profile: what each change makes the workflow do, told by dry runs."""

import copy
import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

from tests.examples import FACTS, ROOT, write_facts
from tests.workflow.running import CONFIG, Finished, planned, snakemake, succeeds, workflow

#: All that hangs on the scores of one series, by rule: summaries, statistics, their CSV files and figures.
MOE_SUMMARIES = {"overview_moe": 1, "csv_attribution_moe": 1, "attribution_figures_moe": 1}
DENSE_SUMMARIES = {"overview_dense": 1, "csv_attribution_dense": 1, "attribution_figures_dense": 1}
COURSES = {"dynamics_neurons": 1, "dynamics_layers": 1, "csv_dynamics": 1, "dynamics_figures": 1}
ABLATED = {"dynamics_robustness": 1, "csv_ablation": 1, "ablation_figures": 1}
#: What shows several series at once.
OVER_ALL = {"dynamics_comparison": 1, "csv_comparison": 1, "comparison_figure": 1, "sparsity_figure": 1, "report": 1}
FIGURES = {
    "attribution_figures_moe": 1,
    "attribution_figures_dense": 1,
    "dynamics_figures": 2,
    "ablation_figures": 2,
    "comparison_figure": 1,
    "sparsity_figure": 1,
}


def twice(jobs: dict[str, int]) -> dict[str, int]:
    """The same for both series."""
    return {name: 2 * count for name, count in jobs.items()}


#: What hangs on ablations, beside the statistics of their series.
AFTER_ABLATION = {name: 1 for name in OVER_ALL if name != "comparison_figure"}
NEURONS_OF_DENSE = {"dynamics_neurons": 1, "csv_dynamics": 1, "dynamics_figures": 1}
SUMMARIES = {**MOE_SUMMARIES, **DENSE_SUMMARIES}
STUDY = {**twice(COURSES), **twice(ABLATED), **OVER_ALL}
MODELS = {"ablate": 3, "mask_dense": 2}


def edit(path: Path, text: str = "# edited\n") -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def changed(**series_changes: dict) -> dict:
    """The configuration with some keys of some series changed."""
    config = copy.deepcopy(CONFIG)
    for entry in config["series"]:
        entry.update(series_changes.get(entry["name"], {}))
    return config


def test_a_fresh_clone_with_the_results_reruns_nothing(fresh_clone: Path, profile):
    assert planned(fresh_clone, *profile(fresh_clone), root=fresh_clone) == {}


def test_touching_every_file_reruns_nothing(fresh_clone: Path, profile):
    """Inputs get newer times than what was made of them: results last first, then sources, config and facts."""
    results = sorted((path for path in (fresh_clone / "results").rglob("*") if path.is_file()), reverse=True)
    sources = [path for name in ("workflow", "profiles", "resources") for path in (fresh_clone / name).rglob("*")]
    others = [fresh_clone / name for name in ("Snakefile", "config.yaml", "facts.csv", "config-of-test.yaml")]
    for i, path in enumerate([*results, *sources, *others]):
        os.utime(path, (2e9 + i, 2e9 + i))
    assert planned(fresh_clone, *profile(fresh_clone), root=fresh_clone) == {}


@pytest.mark.parametrize(
    ("source", "jobs"),
    [
        ("scripts/moescope/drawing.py", {**FIGURES, "report": 1}),
        ("scripts/moescope/plots.py", {"attribution_figures_moe": 1, "attribution_figures_dense": 1, "report": 1}),
        ("scripts/moescope/dynamics_plots.py", {"dynamics_figures": 2, "report": 1}),
        ("scripts/ablation_figures.py", {"ablation_figures": 2, "report": 1}),
        ("report/accuracy.rst", {"report": 1}),
        ("report/stability.rst", {"report": 1}),
        ("scripts/moescope/report.py", {"report": 1}),
        ("scripts/moescope/overview.py", {**SUMMARIES, "comparison_figure": 1, "report": 1}),
        ("scripts/moescope/ablation.py", {"ablate": 3, **twice(ABLATED), **AFTER_ABLATION}),
        ("scripts/moescope/masking.py", {"mask_dense": 2, **NEURONS_OF_DENSE, **OVER_ALL}),
        (
            "scripts/moescope/lpi.py",
            {"attribute_moe": 3, "attribute_dense": 2, **MODELS, **SUMMARIES, **STUDY},
        ),
        ("scripts/moescope/config.py", {}),
        ("scripts/moescope/plan.py", {}),
        ("rules/attribution.smk", {}),
    ],
    ids=lambda value: Path(value).name if isinstance(value, str) else "",
)
def test_an_edited_source_reruns_what_it_can_have_changed(fresh_clone: Path, profile, source: str, jobs: dict):
    edit(fresh_clone / "workflow" / source, "\n.. edited\n" if source.endswith(".rst") else "# edited\n")
    assert planned(fresh_clone, *profile(fresh_clone), root=fresh_clone) == jobs


def test_an_edit_of_pretraining_trains_again(fresh_clone: Path, profile):
    edit(fresh_clone / "workflow/scripts/moescope/pretraining.py")
    jobs = planned(fresh_clone, *profile(fresh_clone), root=fresh_clone)
    assert jobs == {
        "pretrain_moe": 1,
        "pretrain_dense": 1,
        "manifest": 5,
        "audit_series": 2,
        "attribute_moe": 3,
        "attribute_dense": 2,
        **MODELS,
        **SUMMARIES,
        **STUDY,
    }


def test_new_steps_run_only_themselves(finished: Finished, copied: Path, profile):
    jobs = planned(copied, *profile(workflow()), config=changed(moe={"steps": "all"}))
    assert jobs == {"manifest": 1, "audit_series": 1, "attribute_moe": 1, **MOE_SUMMARIES, **COURSES, **OVER_ALL}


def test_fewer_steps_score_nothing(copied: Path, profile):
    """Without step 0 of the mixture, step 0 of the dense series is held against its step 4."""
    jobs = planned(copied, *profile(workflow()), config=changed(moe={"steps": [4, 12]}))
    both = {"mask_dense": 1, "dynamics_neurons": 2, "dynamics_layers": 1, "csv_dynamics": 2, "dynamics_figures": 2}
    assert jobs == {"audit_series": 1, **MOE_SUMMARIES, **both, **OVER_ALL}


def test_another_precision_scores_that_series_alone(copied: Path):
    jobs = planned(copied, config=changed(moe={"dtype": "bfloat16"}))
    study = {**COURSES, **ABLATED, **OVER_ALL, "dynamics_neurons": 2, "csv_dynamics": 2, "dynamics_figures": 2}
    assert jobs == {"attribute_moe": 3, "ablate": 2, "mask_dense": 2, **MOE_SUMMARIES, **study}


def test_one_series_less_keeps_the_other(copied: Path):
    config = changed()
    del config["series"][1]
    assert planned(copied, config=config) == {"dynamics_comparison": 1, "csv_comparison": 1, "report": 1}


def test_a_study_more_or_less_runs_nothing_of_the_others(copied: Path):
    assert planned(copied, config={**changed(), "studies": []}) == {"report": 1}


def test_another_axis_redraws_courses_only(copied: Path):
    jobs = planned(copied, config={**changed(), "dynamics": {"axis": "step"}})
    courses = {"dynamics_figures": 2, "ablation_figures": 2, "comparison_figure": 1, "sparsity_figure": 1}
    assert jobs == {**courses, "report": 1}


def test_more_controls_ablate_again(copied: Path):
    jobs = planned(copied, config={**changed(), "ablation": {**CONFIG["ablation"], "seeds": 3}})
    assert jobs == {"ablate": 3, **twice(ABLATED), **AFTER_ABLATION}


def test_a_new_fact_is_trained_on_and_asked(copied: Path):
    write_facts(copied / "facts.csv", [*FACTS, ("colour", "plum", "purple", "The colour of a {} is", "things")])
    jobs = planned(copied)
    assert jobs.items() >= {"prompts": 1, "pretrain_moe": 1, "pretrain_dense": 1, "attribute_moe": 3}.items()


def test_changed_facts_score_a_series_again(copied: Path):
    """What was found of its other checkpoints with the former facts is no reason to refuse one."""
    for step in (4, 12):
        shutil.copytree(copied / f"results/moe/checkpoints/{step}", copied / f"runs/step{step}")
    config = {**CONFIG, "series": [{"name": "mine", "source": "local", "path": "runs/step*"}], "studies": []}
    succeeds(copied, "--cores", "2", "attribution", config=config)
    before = pl.read_parquet(copied / "results/mine/12/predictions.parquet")
    write_facts(copied / "facts.csv", [*FACTS, ("colour", "plum", "purple", "The colour of a {} is", "things")])
    succeeds(copied, "--cores", "2", "attribution")
    assert len(pl.read_parquet(copied / "results/mine/12/predictions.parquet")) == len(before) + 1


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        (
            "moe/4/heads.parquet",
            {"attribute_moe": 1, "ablate": 1, **MOE_SUMMARIES, **COURSES, **ABLATED, **OVER_ALL},
        ),
        ("dense/12/ablations.parquet", {"ablate": 1, **ABLATED, **AFTER_ABLATION}),
        ("dense/0/masked_groups.parquet", {"mask_dense": 1, **NEURONS_OF_DENSE, **OVER_ALL}),
        ("dynamics/moe/robustness.parquet", {**ABLATED, **AFTER_ABLATION}),
        ("attribution/dense/accuracy.parquet", {**DENSE_SUMMARIES, "comparison_figure": 1, "report": 1}),
        ("tables/attribution/moe/accuracy.csv", {"csv_attribution_moe": 1}),
        ("figures/attribution/moe/accuracy.pdf", {"attribution_figures_moe": 1, "report": 1}),
        ("figures/dynamics/all/sparsity.png", {"sparsity_figure": 1, "report": 1}),
        ("report.html", {"report": 1}),
    ],
)
def test_a_deleted_result_is_made_again(copied: Path, profile, name: str, jobs: dict):
    (copied / "results" / name).unlink()
    assert planned(copied, *profile(workflow())) == jobs


def test_a_deleted_table_comes_back_the_same(copied: Path):
    table = copied / "results/tables/attribution/moe/accuracy.csv"
    before = table.read_bytes()
    table.unlink()
    succeeds(copied, "--cores", "1")
    assert table.read_bytes() == before


def test_a_local_series_computes_only_its_new_checkpoints(copied: Path):
    """Checkpoints on the user's disk, one more later, one that changed, one that was only touched."""
    trained = copied / "results/moe/checkpoints"
    shutil.copytree(trained / "4", copied / "runs/step4")
    local = {"name": "mine", "source": "local", "path": "runs/step*"}
    config = {**CONFIG, "series": [*CONFIG["series"], local]}
    listed = {"manifest": 1, "audit_series": 1}
    new = {**listed, "attribute_moe": 1, "ablate": 1, **MOE_SUMMARIES, **COURSES, **ABLATED, **OVER_ALL}
    alone = {name: count for name, count in new.items() if name != "dynamics_figures"}  # one checkpoint has no course
    assert planned(copied, config=config) == alone
    succeeds(copied, "--cores", "2")
    page = (copied / "results/report.html").read_text()
    assert "mine has one checkpoint: stability, gains and consolidation need two" in page
    manifest = json.loads((copied / "results/mine/4/manifest.json").read_text())
    assert (manifest["step"], manifest["tokens"], manifest["source"]) == (4, None, "local")
    assert planned(copied) == {}
    shutil.copytree(trained / "12", copied / "runs/step12")
    assert planned(copied) == new
    shutil.rmtree(copied / "runs/step12")
    (copied / "runs/step4/model.safetensors").touch()
    assert planned(copied) == {}
    shutil.copyfile(trained / "12/model.safetensors", copied / "runs/step4/model.safetensors")
    assert planned(copied) == alone


def test_every_profile_keeps_the_promise():
    for path in sorted((ROOT / "profiles").glob("*/config.yaml")):
        settings = yaml.safe_load(path.read_text())
        assert set(settings["rerun-triggers"]) == {"mtime", "params", "input", "software-env"}, path
        assert settings["rerun-incomplete"] is True, path
        assert settings["max-checksum-file-size"], path


def test_one_core_more_or_a_gpu_reruns_nothing(finished: Finished):
    for arguments in (
        ["--cores", "1"],
        ["--set-threads", "attribute_moe=2"],
        ["--set-resources", "attribute_moe:gpu=1"],
    ):
        assert planned(finished.folder, *arguments) == {}
    assert snakemake(finished.folder, "--summary").returncode == 0
