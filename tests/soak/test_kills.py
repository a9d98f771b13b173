"""Runs that are killed at random moments, over and over: in the end the results are those of an undisturbed run."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from tests.examples import write_facts
from tests.hub_server import Server, series, serving
from tests.workflow.running import CONFIG, command_in, environment, library, snakemake, succeeds

KILLS = 30
#: The longest that a run is left alone (seconds): enough for a few jobs.
LONGEST = 9.0
HUB = {
    **CONFIG,
    "series": [
        {"name": "moe", "source": "hub", "repo": "lab/moe"},
        {"name": "dense", "source": "hub", "repo": "lab/dense"},
    ],
}
TARGETS = ("attribution", "dynamics")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the two small series were trained, and nothing else was done."""
    folder = tmp_path_factory.mktemp("trained")
    write_facts(folder / "facts.csv")
    wanted = [f"results/{entry['name']}/exposure.parquet" for entry in CONFIG["series"]]
    succeeds(folder, "--cores", "2", *wanted, config=CONFIG)
    return folder


@pytest.fixture(scope="module")
def hub(trained: Path) -> Iterator[Server]:
    """The hub, with a branch for every checkpoint of the two series."""
    folders = {entry["name"]: trained / "results" / entry["name"] / "checkpoints" for entry in CONFIG["series"]}
    steps = {name: {f"step{path.name}": path for path in sorted(at.iterdir())} for name, at in folders.items()}
    with serving(*(series(f"lab/{name}", found) for name, found in steps.items())) as server:
        yield server


def prepared(folder: Path, server: Server, store: Path) -> dict[str, str]:
    """A folder ready to run, and the environment in which the server is the hub."""
    folder.mkdir()
    write_facts(folder / "facts.csv")
    reached = {**server.environment, "MOESCOPE_STORE": str(store)}
    snakemake(folder, "--version", config=HUB)
    listed = library(folder, "cataloguing", "--configfile", "config-of-test.yaml", **reached)
    assert listed.returncode == 0, listed.stderr
    return reached


def tables_of(folder: Path) -> dict[str, pl.DataFrame]:
    """Every result table by its path."""
    found = sorted((folder / "results").rglob("*.parquet"))
    return {str(path.relative_to(folder)): pl.read_parquet(path) for path in found}


def finished(folder: Path) -> dict[str, int]:
    """What Snakemake has recorded as made by a job that ended well: the time of its last change by path."""
    half_made = {path.name for path in (folder / ".snakemake" / "incomplete").rglob("*") if path.is_file()}
    paths = [path for path in (folder / "results").rglob("*.parquet") if not path.name.startswith(".")]
    if half_made:
        paths = [path for path in paths if _record(path.relative_to(folder)) not in half_made]
    return {str(path): path.stat().st_mtime_ns for path in paths}


def _record(path: Path) -> str:
    """The name under which Snakemake notes a file that is being made."""
    import base64

    return base64.b64encode(str(path).encode(), b"_-").decode()


def resume(folder: Path, reached: dict[str, str], *arguments: str) -> subprocess.Popen:
    """``make resume``: nobody may be at work, unlock, go on; as a process group that can be killed."""
    free = library(folder, "resume", ".")
    assert free.returncode == 0, free.stderr
    unlocked = snakemake(folder, "--unlock", **reached)
    assert unlocked.returncode == 0, unlocked.stderr
    with open(folder / "run.log", "ab") as log:
        command = [*command_in(folder), "--cores", "2", *arguments]
        given = environment() | reached
        return subprocess.Popen(command, cwd=folder, env=given, stdout=log, stderr=log, start_new_session=True)


def test_thirty_kills_change_nothing(hub: Server, tmp_path: Path):
    undisturbed = prepared(tmp_path / "calm", hub, tmp_path / "calm-store")
    succeeds(tmp_path / "calm", "--cores", "2", *TARGETS, **undisturbed)
    expected, chance, kills, rounds = tables_of(tmp_path / "calm"), random.Random(0), 0, 0
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / f"killed-{rounds}"
        reached = prepared(folder, hub, tmp_path / f"store-{rounds}")
        before: dict[str, int] = {}
        while True:
            run = resume(folder, reached, *TARGETS)
            try:
                code = run.wait(chance.uniform(0.5, LONGEST) if kills < KILLS else 600)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
                kills += 1
                code = None
            now = finished(folder)
            assert {path: now.get(path) for path in before} == before, "what was finished is made again"
            before = now
            if code is not None:
                break
            time.sleep(0.1)
        assert code == 0, (folder / "run.log").read_text()[-5000:]
        found = tables_of(folder)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not found[name].equals(expected[name], null_equal=True)] == []
        assert [path for path in (folder / "results").rglob(".*") if path.is_file()] == [], "temporary files are left"


def test_two_runs_at_once(hub: Server, tmp_path: Path):
    """On one folder the second refuses, and says so; two folders share one store."""
    reached = prepared(tmp_path / "one", hub, tmp_path / "store")
    prepared(tmp_path / "two", hub, tmp_path / "store")
    run = resume(tmp_path / "one", reached, "attribution")
    try:
        while not (tmp_path / "one" / ".snakemake" / "locks").is_dir():
            time.sleep(0.05)
        time.sleep(1)
        second = snakemake(tmp_path / "one", "--cores", "1", "attribution", **reached)
        assert second.returncode != 0
        assert "cannot be locked" in (second.stdout + second.stderr)
        assert "still at work here" in library(tmp_path / "one", "resume", ".").stderr
        other = snakemake(tmp_path / "two", "--cores", "1", "attribution", **reached)
        assert other.returncode == 0, other.stderr
        assert run.wait(600) == 0, (tmp_path / "one" / "run.log").read_text()[-5000:]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    one, two = tables_of(tmp_path / "one"), tables_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name].equals(two[name], null_equal=True) for name in one)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("what", ["store", "results"])
def test_a_disk_that_is_full_is_told_and_the_resumed_run_finishes(what: str, hub: Server, tmp_path: Path):
    reached = prepared(tmp_path / "run", hub, tmp_path / "store")
    disk = tmp_path / "store" if what == "store" else tmp_path / "run" / "results" / "moe"
    disk.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("small file systems cannot be mounted here")
    try:
        full = snakemake(tmp_path / "run", "--cores", "2", "attribution", **reached)
        assert full.returncode != 0
        told = [line for line in full.stderr.splitlines() if line.startswith("error:")]
        assert any("make room" in line for line in told), full.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        resumed = resume(tmp_path / "run", reached, "attribution")
        assert resumed.wait(600) == 0, (tmp_path / "run" / "run.log").read_text()[-5000:]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
