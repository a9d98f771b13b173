"""The study through ``source: hub``: a loopback server that speaks the hub's API, the real client, real runs."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import yaml

from tests.examples import write_facts
from tests.hub_server import Server, series, serving
from tests.workflow.running import CONFIG, Finished, library, planned, snakemake, succeeds

REPOSITORIES = {"moe": "lab/moe", "dense": "lab/dense"}
HUB = {
    **CONFIG,
    "series": [
        {"name": "moe", "source": "hub", "repo": "lab/moe", "steps": [0, 4, 12]},
        {"name": "dense", "source": "hub", "repo": "lab/dense"},
    ],
}


@pytest.fixture(scope="module")
def hub(finished: Finished) -> Iterator[Server]:
    """A server with the two series that the small configuration trains, a branch a step."""
    repositories = []
    for name, repo in REPOSITORIES.items():
        found = sorted((finished.folder / "results" / name / "checkpoints").iterdir())
        repositories.append(series(repo, {f"step{path.name}": path for path in found}))
    with serving(*repositories) as server:
        yield server


def reached(server: Server, folder: Path) -> dict[str, str]:
    """The environment in which the server is the hub, and the folder has a store of its own."""
    return {**server.environment, "MOESCOPE_STORE": str(folder / "store")}


def most_entries(store: Path, stop: threading.Event) -> int:
    """How many entries a store held at most until the event."""
    most = 0
    while not stop.wait(0.02):
        most = max(most, sum(1 for _ in store.glob("entries/*")))
    return most


def comparable(path: Path) -> pl.DataFrame:
    """A table without what only a series that is trained here has: exact tokens, and which facts were met."""
    table = pl.read_parquet(path)
    if "subset" in table.columns:
        table = table.filter(pl.col("subset").is_in(["all", "flagged", "unflagged"]))
    return table.drop(column for column in ("tokens",) if column in table.columns)


@dataclass(frozen=True)
class Studied:
    """The study through the hub: where it was done, how many entries its store held at most, which weights were sent
    whole (commits, in order)."""

    folder: Path
    most: int
    sent: list[str]


@pytest.fixture(scope="module")
def studied(hub: Server, tmp_path_factory: pytest.TempPathFactory) -> Studied:
    folder = tmp_path_factory.mktemp("studied")
    prepare(folder, hub, HUB)
    stop, found = threading.Event(), []
    watch = threading.Thread(target=lambda: found.append(most_entries(folder / "store", stop)))
    watch.start()
    try:
        result = snakemake(folder, "--cores", "2", "dynamics", **reached(hub, folder))
    finally:
        stop.set()
        watch.join()
    assert result.returncode == 0, result.stdout + result.stderr
    sent = [answer.commit for answer in hub.asked(r"model\.safetensors") if answer.sent and not answer.range]
    return Studied(folder, found[0], sent)


def prepare(folder: Path, server: Server, config: dict) -> None:
    """Facts, a configuration and fresh catalogs in a folder."""
    write_facts(folder / "facts.csv")
    (folder / "config-of-test.yaml").write_text(yaml.safe_dump(config))
    listed = library(folder, "cataloguing", "--configfile", "config-of-test.yaml", **reached(server, folder))
    assert listed.returncode == 0, listed.stderr


def test_without_a_catalog_the_command_is_named(hub: Server, tmp_path: Path):
    write_facts(tmp_path / "facts.csv")
    missing = snakemake(tmp_path, "--dry-run", config=HUB)
    assert missing.returncode == 1
    assert "series[0] (moe): lab/moe has no catalog; run: make catalog" in missing.stderr
    listed = library(tmp_path, "cataloguing", "--configfile", "config-of-test.yaml", **reached(hub, tmp_path))
    assert "lab--moe.tsv: 4 of 4 branches are training steps" in listed.stdout, listed.stderr
    assert snakemake(tmp_path, "--dry-run").returncode == 0


def test_the_study_through_the_hub_gives_the_same_tables(finished: Finished, studied: Studied):
    tables = sorted((studied.folder / "results").rglob("*.parquet"))
    for path in tables:
        name = path.relative_to(studied.folder)
        mine, theirs = (comparable(folder / name) for folder in (studied.folder, finished.folder))
        assert mine.equals(theirs, null_equal=True), name
    assert len(tables) > 60


def test_the_disk_is_bounded_and_each_step_is_fetched_once(studied: Studied):
    assert 0 < studied.most <= 2
    assert len(studied.sent) == len(set(studied.sent)) == 5, "three steps of the one, two of the other"


def test_nothing_is_left_to_do(hub: Server, studied: Studied):
    assert planned(studied.folder, "dynamics", **reached(hub, studied.folder)) == {}


def test_what_is_there_needs_no_network(hub: Server, studied: Studied, tmp_path: Path):
    """The last checkpoint is still in the store: it is scored again with the hub switched off."""
    folder = Path(shutil.copytree(studied.folder, tmp_path / "copied"))
    lost = folder / "results/dense/12/heads.parquet"
    before = pl.read_parquet(lost)
    lost.unlink()
    offline = {**reached(hub, folder), "HF_HUB_OFFLINE": "1"}
    succeeds(folder, "--cores", "2", "results/dense/12/heads.parquet", **offline)
    assert pl.read_parquet(lost).equals(before)
    shutil.rmtree(folder / "store")
    lost.unlink()
    refused = snakemake(folder, "--cores", "2", "results/dense/12/heads.parquet", **offline)
    assert refused.returncode != 0
    assert "is not on this disk, and the hub is switched off; unset HF_HUB_OFFLINE" in refused.stderr


def test_a_branch_that_serves_another_steps_weights_is_found_before_they_are_fetched(
    finished: Finished, tmp_path: Path
):
    at = finished.folder / "results/moe/checkpoints"
    steps = {"step0": at / "0", "step4": at / "4", "step8": at / "8", "step12": at / "8"}
    config = {**CONFIG, "series": [{"name": "moe", "source": "hub", "repo": "lab/moe"}], "studies": []}
    with serving(series("lab/moe", steps)) as server:
        prepare(tmp_path, server, config)
        refused = snakemake(tmp_path, "--cores", "2", "attribution", **reached(server, tmp_path))
        assert refused.returncode != 0
        assert "error: moe: steps 8 and 12 have the same weights" in refused.stderr
        whole = {a.commit for a in server.asked(r"model\.safetensors") if a.sent and not a.range}
        assert not whole & {server.repositories["lab/moe"].heads[name] for name in ("step8", "step12")}
        config["series"][0]["allow_duplicates"] = True
        succeeds(tmp_path, "--cores", "2", "audit", config=config, **reached(server, tmp_path))
        assert json.loads((tmp_path / "results/moe/audit.json").read_text())["duplicates"] == [["8", "12"]]

        server.repositories["lab/moe"].move("step4", {path.name: path for path in (at / "12").iterdir()})
        prepare(tmp_path, server, config)
        moved = snakemake(tmp_path, "--cores", "2", "audit", **reached(server, tmp_path))
        assert moved.returncode != 0
        assert "delete results/moe/4 to score it anew" in moved.stderr


def test_a_single_revision(finished: Finished, tmp_path: Path):
    """A repository without steps: one checkpoint, called main, and everything but a course."""
    entry = {"name": "one", "source": "hub", "repo": "lab/one", "revision": "main"}
    with serving(series("lab/one", {"main": finished.folder / "results/dense/checkpoints/12"})) as server:
        prepare(tmp_path, server, {**CONFIG, "series": [entry]})
        succeeds(tmp_path, "--cores", "2", **reached(server, tmp_path))
    mine, theirs = (
        pl.read_parquet(folder / "heads.parquet")
        for folder in (tmp_path / "results/one/main", finished.folder / "results/dense/12")
    )
    assert mine.equals(theirs)
    assert pl.read_parquet(tmp_path / "results/attribution/one/accuracy.parquet")["step"].null_count() > 0
    page = (tmp_path / "results/report.html").read_text()
    assert "lab/one" in page
