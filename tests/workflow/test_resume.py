"""A killed run is taken up again by ``make resume``; a live one is left alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.examples import write_facts
from tests.workflow.running import CONFIG, clone, environment, planned, snakemake

TARGET = "results/moe/12/manifest.json"


def make(folder: Path, target: str, *variables: str) -> subprocess.CompletedProcess:
    """A make target in a clone, with the packages of this environment instead of a new one."""
    command = ["make", target, f"BIN={Path(sys.executable).parent}", "READY=", *variables]
    installed = {**environment(), "PYTHONPATH": str(folder / "workflow/scripts")}
    return subprocess.run(command, cwd=folder, env=installed, capture_output=True, text=True, timeout=300)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_killed_run_is_resumed_and_a_live_one_is_not(tmp_path: Path):
    folder = clone(tmp_path / "clone")
    write_facts(folder / "facts.csv")
    assert snakemake(folder, "--dry-run", root=folder, config=CONFIG).returncode == 0
    command = [sys.executable, "-m", "snakemake", "--cores", "1", TARGET, "--configfile", "config-of-test.yaml"]
    log = folder / "results/logs/pretrain/moe.log"
    run = subprocess.Popen(
        command, cwd=folder, env=environment(), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        wait_for(log.exists)  # the training job has begun
        job = next(child for child in psutil.Process(run.pid).children(recursive=True) if "python" in child.name())
        refused = make(folder, "resume")
        assert refused.returncode != 0
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
        assert str(run.pid) in line
        assert "wait for it" in line

        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        if job.is_running() and job.status() != psutil.STATUS_ZOMBIE:  # what a run left behind counts as alive
            orphaned = make(folder, "resume")
            assert orphaned.returncode != 0
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
    wait_for(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE)
    locked = snakemake(folder, "--cores", "1", TARGET, root=folder)
    assert locked.returncode != 0
    assert "lock" in (locked.stdout + locked.stderr).lower()

    resumed = make(folder, "resume", f"ARGS={TARGET} --configfile config-of-test.yaml")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (folder / TARGET).exists()
    assert planned(folder, TARGET, root=folder) == {}
