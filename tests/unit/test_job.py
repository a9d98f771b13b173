"""What a job does with its output and its errors, and whether a killed run may be resumed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moescope import resume
from moescope.errors import MoescopeError
from moescope.job import device, job, memory
from tests.examples import ROOT


def rule(folder: Path) -> SimpleNamespace:
    """As much of the object ``snakemake`` as a job needs."""
    log = folder / "logs" / "a" / "job.log"
    return SimpleNamespace(rule="attribute_moe", wildcards=["tiny", "7"], log=[str(log)], resources={})


ADAPTER = """
import logging, sys, warnings
from types import SimpleNamespace
from moescope.job import job

with job(SimpleNamespace(rule="prompts", wildcards=[], log=["logs/job.log"], resources={})):
    print("said")
    print("complained", file=sys.stderr)
    warnings.warn("careful")
    logging.getLogger("moescope.relations").info("read")
    logging.getLogger("fontTools").info("noise")
"""


def test_prints_warnings_and_messages_go_to_the_log(tmp_path: Path):
    environment = {"PYTHONPATH": str(ROOT / "workflow/scripts"), "PATH": ""}
    command = [sys.executable, "-c", ADAPTER]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
    log = (tmp_path / "logs/job.log").read_text()
    assert all(word in log for word in ("said", "complained", "careful", "read"))
    assert "noise" not in log


def test_an_error_of_the_user_is_one_line_in_both(tmp_path: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as left, job(rule(tmp_path)):
        raise MoescopeError("facts.csv: row 2\nis empty; fill it in")
    assert left.value.code == 1
    line = "error: facts.csv: row 2 is empty; fill it in\n"
    assert capfd.readouterr() == ("", line)
    assert (tmp_path / "logs/a/job.log").read_text() == line


def test_any_other_error_leaves_its_traceback_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as left, job(rule(tmp_path)):
        raise ZeroDivisionError("a by b")
    assert left.value.code == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert all(part in said for part in ("attribute_moe tiny/7", "ZeroDivisionError: a by b", "job.log"))
    log = (tmp_path / "logs/a/job.log").read_text()
    assert "Traceback" in log
    assert "test_job.py" in log


def test_a_terminal_sees_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    terminal = SimpleNamespace(isatty=lambda: True, write=seen.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", terminal)
    with job(rule(tmp_path)):
        print("42%", file=sys.stderr)
    assert "42%" in "".join(seen)
    assert "42%" in (tmp_path / "logs/a/job.log").read_text()


def test_the_device_is_what_the_profile_gives(tmp_path: Path):
    asked = rule(tmp_path)
    assert device(asked) == "cpu"
    asked.resources = {"gpu": 0}
    assert device(asked) == "cpu"
    asked.resources = {"gpu": 1}
    assert device(asked) == "cuda"


def test_the_memory_is_what_the_profile_gives(tmp_path: Path):
    asked = rule(tmp_path)
    assert memory(asked) is None
    asked.resources = {"mem_mb": 4000}
    assert memory(asked) == 4000


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").write_text("results/prompts.parquet\n")
    return tmp_path


def sleeper(folder: Path, name: str) -> subprocess.Popen:
    """A process that looks like a run, or like one of its jobs, at work in a folder."""
    script = folder / name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, str(script)], cwd=folder, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


@pytest.mark.parametrize("name", ["bin/snakemake", ".snakemake/scripts/tmp1.pretrain.py"])
def test_a_live_run_keeps_its_folder(locked: Path, name: str):
    process = sleeper(locked, name)
    try:
        with pytest.raises(resume.InUseError, match=rf"process {process.pid}\); wait for it"):
            resume.check(locked)
    finally:
        process.kill()
        process.communicate()
    resume.check(locked)


def test_neither_others_nor_strangers_keep_a_folder(locked: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = sleeper(tmp_path_factory.mktemp("elsewhere"), "bin/snakemake")
    stranger = sleeper(locked, "bin/editor")
    try:
        resume.check(locked)
    finally:
        for process in (elsewhere, stranger):
            process.kill()
            process.communicate()


def test_without_a_lock_there_is_nothing_to_keep(tmp_path: Path):
    process = sleeper(tmp_path, "bin/snakemake")
    try:
        resume.check(tmp_path)
    finally:
        process.kill()
        process.communicate()
