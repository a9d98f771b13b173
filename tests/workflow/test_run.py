"""The whole workflow on a seconds-small configuration."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moescope import tables
from tests.examples import ROOT
from tests.workflow.running import CONFIG, Finished, environment, files_below, planned, snakemake, succeeds, workflow

SCORED = {"moe": [0, 4, 12], "dense": [0, 12]}
ABLATED = {"moe": [4, 12], "dense": [12]}
OF_CHECKPOINT = {
    *("predictions", "layers", "heads", "ffn_neurons", "attn_neurons", "active_sums"),
    *("ffn_groups", "attn_groups", "top_active"),
}
OF_STUDY = {
    *("neuron_dynamics", "overlap", "prompt_dynamics", "layer_dynamics", "profile_similarity"),
    *("robustness", "robustness_summary", "score_faithfulness"),
}
OVER_ALL = {"table_2", "table_3", "table_4", "sparsity", "verdict"}
STUDY_FIGURES = {
    *("stability", "concentration", "survival", "consolidation"),
    *("robustness", "dose_response", "faithfulness"),
}


def test_every_promised_file_is_there(finished: Finished):
    saved = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    expected = {"prompts.parquet", "report.html"}
    for series, steps in SCORED.items():
        names = OF_CHECKPOINT | ({"routing"} if series == "moe" else set())
        for step in steps:
            expected |= {f"{series}/{step}/{name}.parquet" for name in names}
            expected |= {f"{series}/{step}/manifest.json", f"{series}/{step}/provenance/attribute.json"}
        for step in [0, 4, 8, 12] if series == "moe" else [0, 12]:
            expected |= {f"{series}/checkpoints/{step}/{name}" for name in saved}
        expected |= {
            f"{series}/{name}"
            for name in ("audit.json", "exposure.parquet", "training.parquet", "provenance/pretrain.json")
        }
        summaries = {"accuracy", "layer_importance"} | ({"top_experts"} if series == "moe" else set())
        for name in summaries:
            expected |= {f"attribution/{series}/{name}.parquet", f"tables/attribution/{series}/{name}.csv"}
        for name in {*summaries, "layer_profiles"}:
            expected |= {f"figures/attribution/{series}/{name}.{end}" for end in ("pdf", "png")}
        for step in ABLATED[series]:
            ablated = {"ablations", "faithfulness", "faithfulness_prompts"}
            expected |= {f"{series}/{step}/{name}.parquet" for name in ablated}
            expected.add(f"{series}/{step}/provenance/ablate.json")
    for step in SCORED["dense"]:
        expected |= {f"dense/{step}/masked_groups.parquet", f"dense/{step}/provenance/mask_dense.json"}
    for series, names in {"moe": OF_STUDY, "dense": OF_STUDY, "all": OVER_ALL}.items():
        expected |= {f"dynamics/{series}/{name}.parquet" for name in names}
        expected |= {f"tables/dynamics/{series}/{name}.csv" for name in names}
        figures = {"comparison", "sparsity"} if series == "all" else STUDY_FIGURES
        expected |= {f"figures/dynamics/{series}/{name}.{end}" for name in figures for end in ("pdf", "png")}
    assert {name.removeprefix("results/") for name in files_below(finished.folder)} == expected


def test_every_table_keeps_its_schema(finished: Finished):
    found = sorted(finished.folder.rglob("*.parquet"))
    assert len(found) > 40
    for path in found:
        frame = tables.read(path)
        assert len(frame), path
        assert frame.equals(tables.check(frame, path.stem)), path


def test_tables_tell_one_story(finished: Finished):
    """Numbers that travel through several jobs: prompts, steps, tokens, exposure."""
    results = finished.folder / "results"
    prompts = tables.read(results / "prompts.parquet")["prompt_id"].to_list()
    rows = {"capital": 4, "colour": 3, "language": 3}
    assert prompts == [f"{relation}/{i}" for relation, count in rows.items() for i in range(count)]
    assert tables.read(results / "moe/4/predictions.parquet")["prompt_id"].to_list() == prompts
    assert tables.read(results / "moe/exposure.parquet")["prompt_id"].to_list() == prompts
    training = dict(tables.read(results / "moe/training.parquet").select("step", "tokens").iter_rows())
    summary = tables.read(results / "attribution/moe/accuracy.parquet")
    assert dict(summary.select("step", "tokens").unique().iter_rows()) == {step: training[step] for step in (0, 4, 12)}
    csv = pl.read_csv(results / "tables/attribution/moe/accuracy.csv")
    assert np.allclose(csv["value"], summary["value"])
    experts = tables.read(results / "attribution/moe/top_experts.parquet")
    assert experts["step"].unique().to_list() == [12]


def test_provenance_says_what_it_took(finished: Finished):
    record = json.loads((finished.folder / "results/moe/12/provenance/attribute.json").read_text())
    assert record["cfg"] == {"dtype": "auto", "target": "object", "norm": "final", "uncertainty": "groups"}
    assert (record["dtype"], record["device"], record["threads"]) == ("float32", "cpu", 1)
    assert record["versions"].keys() >= {"moescope", "python", "torch", "transformers", "polars"}
    assert record["decomposition_error"] < 1e-4
    trained = json.loads((finished.folder / "results/moe/provenance/pretrain.json").read_text())
    assert (trained["threads"], trained["cfg"]["training"]["save_at"]) == (1, [0, 4, 8, 12])
    ablated = json.loads((finished.folder / "results/moe/12/provenance/ablate.json").read_text())
    assert ablated["cfg"]["seeds"] == 2
    assert 0 < ablated["sets"] <= ablated["interventions"]
    assert ablated["replay_error"] < 1e-4
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 50e6


def test_then_nothing_is_to_be_done(finished: Finished):
    assert planned(finished.folder) == {}


def test_from_another_working_directory(finished: Finished, tmp_path: Path):
    assert snakemake(tmp_path, "--directory", str(finished.folder), "--dry-run", config=CONFIG).returncode == 0
    assert planned(tmp_path, "--directory", str(finished.folder), config=CONFIG) == {}
    assert not (tmp_path / "results").exists()


def outputs(folder: Path, snakefile: str) -> list[str]:
    """Every file that the workflow would make, sorted."""
    result = succeeds(folder, "--snakefile", str(workflow() / snakefile), "--summary", config=CONFIG)
    return sorted(line.split("\t")[0] for line in result.stdout.splitlines() if line.startswith("results/"))


def test_the_snakefile_in_workflow_builds_the_same(finished: Finished, tmp_path: Path):
    shutil.copyfile(finished.folder / "facts.csv", tmp_path / "facts.csv")
    first = outputs(tmp_path, "Snakefile")
    assert "results/report.html" in first
    assert outputs(tmp_path, "workflow/Snakefile") == first
    arguments = ["--snakefile", str(workflow() / "workflow/Snakefile")]
    assert planned(tmp_path, *arguments) == planned(tmp_path)
    assert planned(finished.folder, *arguments) == {}


def test_the_embedded_default_is_planned_in_an_empty_folder(tmp_path: Path):
    jobs = planned(tmp_path)
    assert {name for name in jobs if name.startswith("pretrain")} == {
        "pretrain_tiny-olmoe",
        "pretrain_tiny-olmo",
        "pretrain_tiny-qwen2-moe",
    }
    assert jobs["attribute_moe"] == 2 * jobs["attribute_dense"] >= 20
    assert (jobs["ablate"], jobs["mask_dense"], jobs["dynamics_neurons"]) == (12, jobs["attribute_dense"], 3)
    assert not (tmp_path / "results").exists()


def test_one_core_and_two_agree(finished: Finished, tmp_path: Path):
    """The same from --cores 1, and from two threads where the finished run had one."""
    shutil.copyfile(finished.folder / "facts.csv", tmp_path / "facts.csv")
    wanted = [f"results/moe/12/{name}.parquet" for name in OF_CHECKPOINT]
    succeeds(tmp_path, "--cores", "1", *wanted, config=CONFIG)
    compare(finished.folder, tmp_path, wanted)
    weights = "results/moe/checkpoints/12/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (finished.folder / weights).read_bytes()
    succeeds(tmp_path, "--cores", "2", "--set-threads", "attribute_moe=2", "--forcerun", "attribute_moe", "--", *wanted)
    assert json.loads((tmp_path / "results/moe/12/provenance/attribute.json").read_text())["threads"] == 2
    compare(finished.folder, tmp_path, wanted)


def compare(one: Path, other: Path, names: list[str]) -> None:
    for name in names:
        left, right = tables.read(one / name), tables.read(other / name)
        keys = [column for column, dtype in left.schema.items() if not dtype.is_float()]
        assert left.select(keys).equals(right.select(keys)), name
        for column in set(left.columns) - set(keys):
            assert np.allclose(left[column], right[column], rtol=1e-6, atol=1e-6), (name, column)


def test_a_run_without_the_profile_is_warned_of(copied: Path):
    (copied / "results/tables/attribution/moe/accuracy.csv").unlink()
    target = "results/tables/attribution/moe/accuracy.csv"
    result = succeeds(copied, "--workflow-profile", "none", "--cores", "1", target)
    assert "profiles/default" in result.stderr
    again = succeeds(copied, "--cores", "1", "--forcerun", "csv_attribution_moe", "--", target)
    assert "Rerun trigger 'code'" not in again.stderr


class _Images(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sources.append(dict(attributes)["src"] or "")


def test_the_report_holds_every_figure(finished: Finished):
    parser = _Images()
    parser.feed((finished.folder / "results/report.html").read_text())
    shown = sorted(base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in parser.sources)
    drawn = sorted(path.read_bytes() for path in (finished.folder / "results/figures").rglob("*.png"))
    assert len(drawn) == 7 + 2 * len(STUDY_FIGURES) + 2
    assert shown == drawn


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed (CI installs it from Debian)")
def test_the_report_opens_in_a_browser(finished: Finished, tmp_path: Path):
    """Every image is decoded and has a width, with the network off and nothing but the file."""
    page = (finished.folder / "results/report.html").read_text()
    probe = (
        "<script>addEventListener('load', () => document.body.setAttribute('data-widths',"
        " [...document.images].map(image => image.complete ? image.naturalWidth : 0).join(' ')))</script>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{probe}</body>"))
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=20000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    widths = re.search(r'data-widths="([\d ]*)"', result.stdout)
    assert widths, result.stderr
    assert len(widths[1].split()) == 7 + 2 * len(STUDY_FIGURES) + 2
    assert all(int(width) > 300 for width in widths[1].split())


def test_the_library_of_a_clone_serves_its_jobs(fresh_clone: Path):
    """Whatever other clone is installed in the environment."""
    with open(fresh_clone / "workflow/scripts/moescope/job.py", "a") as file:
        file.write("print('in the clone')\n")
    target = "results/tables/attribution/moe/accuracy.csv"
    options = ["--allowed-rules", "csv_attribution_moe", "--forcerun", "csv_attribution_moe"]
    result = succeeds(fresh_clone, *options, "--cores", "1", "--", target, root=fresh_clone)
    assert "in the clone" in result.stdout


def test_what_results_depend_on_names_no_place(finished: Finished):
    """Neither the workflow's folder nor the working directory may stand in a parameter or an input."""
    paths = [path for path in (finished.folder / ".snakemake/metadata").rglob("*") if path.is_file()]
    assert len(paths) > 50
    records = [json.loads(path.read_text()) for path in paths]
    for record in records:
        assert str(workflow()) not in str(record["params"])
        assert str(finished.folder) not in str(record["params"] + record["input"])


def test_a_conda_environment_is_named_by_every_rule():
    result = subprocess.run(
        [sys.executable, "-m", "snakemake", "--lint"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
