"""What the embedded default costs: ``make bench-run`` prints each figure beside its target.

``snakemake --cores all`` on config.yaml, in an empty folder: attribution, then study dynamics, then study
collaboration, then the rest, which is the report; once more when there is nothing to do; and the statistics of one
series again. With ``--test`` the test suite too. Memory is that of all processes at once, pages they share counted once
(Linux: PSS).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
#: The statistics of study dynamics of one series of twelve checkpoints, by rule.
AGGREGATED = {
    "dynamics_neurons": "results/dynamics/tiny-olmoe/neuron_dynamics.parquet",
    "dynamics_layers": "results/dynamics/tiny-olmoe/layer_dynamics.parquet",
    "dynamics_robustness": "results/dynamics/tiny-olmoe/robustness.parquet",
}
INTERVAL = 0.5  # seconds between two looks at memory


@dataclass
class Cost:
    """What a command took: seconds, and bytes at its peak."""

    seconds: float
    peak_memory: int


def cost(command: list[str], folder: Path) -> Cost:
    """Run a command to its end; raises CalledProcessError if it fails."""
    start, peak, done = time.monotonic(), 0, threading.Event()
    process = subprocess.Popen(command, cwd=folder)

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, memory(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    if status:
        raise subprocess.CalledProcessError(status, command)
    return Cost(time.monotonic() - start, peak)


def memory(pid: int) -> int:
    """Bytes held by a process and all that it started."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_held(process) for process in tree)


def _held(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
    except psutil.Error:  # ended meanwhile
        return 0
    return getattr(info, "pss", info.rss)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", action="store_true", help="measure the test suite too")
    options = parser.parse_args()
    executables = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        run = [str(executables / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--cores", "all"]
        first = cost([*run, "attribution"], Path(folder))
        dynamics, collaboration = (cost([*run, study], Path(folder)) for study in ("dynamics", "collaboration"))
        report = cost(run, Path(folder))
        second = cost(run, Path(folder))
        statistics = cost([*run, "--forcerun", *AGGREGATED, "--", *AGGREGATED.values()], Path(folder))
    parts = first, dynamics, collaboration, report
    figures = [
        ("attribution", "<= 10 min", f"{first.seconds / 60:.1f} min"),
        ("study dynamics on top", "<= 6 min", f"{dynamics.seconds / 60:.1f} min"),
        ("study collaboration on top", "<= 4 min", f"{collaboration.seconds / 60:.1f} min"),
        ("the report on top", "<= 1 min", f"{report.seconds / 60:.1f} min"),
        ("peak memory", "<= 6 GB", f"{max(one.peak_memory for one in parts) / 1e9:.1f} GB"),
        ("statistics of 12 checkpoints", "<= 20 s", f"{statistics.seconds:.1f} s"),
        ("another run, nothing to do", "<= 5 s", f"{second.seconds:.1f} s"),
    ]
    if options.test:
        tests = cost([str(executables / "pytest"), "--quiet"], ROOT)
        figures.append(("tests", "<= 12 min", f"{tests.seconds / 60:.1f} min"))
    print(f"\n{'figure':30}{'target':>12}{'measured':>12}   ({psutil.cpu_count()} cores)")
    for name, target, measured in figures:
        print(f"{name:30}{target:>12}{measured:>12}")


if __name__ == "__main__":
    main()
