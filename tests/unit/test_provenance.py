"""The record of a job: what ran, from which code, at what cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moescope import provenance
from tests.examples import ROOT


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_record_is_complete(tmp_path: Path):
    provenance.write(tmp_path / "p.json", {"target": "object"}, dtype="bfloat16", decomposition_error=1e-7)
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["cfg"] == {"target": "object"}
    assert (record["dtype"], record["decomposition_error"]) == ("bfloat16", 1e-7)
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["seconds"] >= 0
    assert 10e6 < record["peak_memory_bytes"] < 1e12
    assert str(tmp_path) not in json.dumps(record)


def test_versions_are_those_of_imported_packages_only():
    code = "import polars, json; from moescope import provenance; print(json.dumps(provenance.record()['versions']))"
    environment = {"PYTHONPATH": str(ROOT / "workflow/scripts"), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    versions = json.loads(result.stdout)
    assert versions.keys() == {"moescope", "python", "polars"}


def test_peak_memory_is_in_bytes():
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert provenance.record()["peak_memory_bytes"] >= len(block)


def test_a_commit_is_marked_where_files_differ_from_it(tmp_path: Path):
    assert provenance.commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "a.txt").write_text("one")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.commit(tmp_path) == head
    (tmp_path / "a.txt").write_text("two")
    assert provenance.commit(tmp_path) == f"{head}+"


def test_a_folder_inside_another_repository_is_not_that_repository(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "inner").mkdir()
    assert provenance.commit(tmp_path / "inner") is None


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_no_model_package_is_imported_for_it(missing: str):
    code = f"import sys; from moescope import provenance; provenance.record(); assert {missing!r} not in sys.modules"
    environment = {"PYTHONPATH": str(ROOT / "workflow/scripts"), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
