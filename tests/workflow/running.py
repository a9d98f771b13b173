"""Running the workflow as a user would, and reading what it announces."""

import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.examples import ROOT

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TRAINING = {"steps": 12, "batch": 4, "length": 32, "vocabulary": 300}
#: Targets that only collect.
COLLECTING = ("all", "default", "attribution", "ablation", "dynamics", "collaboration", "audit")
#: A mixture of experts, scored at three of its four checkpoints, and a dense model, scored at both of its two.
CONFIG = {
    "series": [
        {
            "name": "moe",
            "source": "pretrain",
            "architecture": "olmoe",
            "shape": {**SHAPE, "intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
            "training": {**TRAINING, "save_at": [0, 4, 8, 12]},
            "steps": [0, 4, 12],
        },
        {
            "name": "dense",
            "source": "pretrain",
            "architecture": "olmo",
            "shape": {**SHAPE, "intermediate_size": 32},
            "training": {**TRAINING, "save_at": [0, 12]},
        },
    ],
    "relations": {"source": "facts.csv"},
    "studies": ["dynamics"],
    "ablation": {"steps": {"log": 2}, "seeds": 2, "neurons": 20},
}


def clone(target: Path) -> Path:
    """The workflow as a fresh clone would have it: the files that git knows or would add, with new times."""
    for name in _tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(workflow() / name, target / name, follow_symlinks=False)
    return target


@functools.cache
def workflow() -> Path:
    """A clone that all tests of a session use, so that nobody's edits change it under them."""
    target = Path(tempfile.mkdtemp(prefix="moescope-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    for name in _tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name, follow_symlinks=False)
    return target


@functools.cache
def _tracked() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and os.path.lexists(ROOT / name)]


def snakemake(
    folder: Path, *arguments: str, root: Path | None = None, config: dict | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Run Snakemake in a folder on the workflow (in ``root``), as a user would: nothing but its own environment, and
    these variables."""
    if config is not None:
        (folder / "config-of-test.yaml").write_text(yaml.safe_dump(config))
    command, given = command_in(folder, root), environment() | variables
    return subprocess.run([*command, *arguments], cwd=folder, env=given, capture_output=True, text=True, timeout=600)


def command_in(folder: Path, root: Path | None = None) -> list[str]:
    """Snakemake on the workflow, with the configuration of a folder if it has one."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str((root or workflow()) / "Snakefile")]
    return [*command, *(["--configfile", "config-of-test.yaml"] if (folder / "config-of-test.yaml").exists() else [])]


def environment() -> dict[str, str]:
    """The environment without what pytest or a developer added to it."""
    own = ("PYTHONPATH", "SNAKEMAKE_PROFILE", "MOESCOPE_STORE", "MOESCOPE_KEEP")
    return {key: value for key, value in os.environ.items() if key not in own}


def library(folder: Path, module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a module of the library in a folder, as the targets of the Makefile do."""
    given = environment() | {"PYTHONPATH": str(workflow() / "workflow" / "scripts")} | variables
    command = [sys.executable, "-m", f"moescope.{module}", *arguments]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=600)


def planned(folder: Path, *arguments: str, **options) -> dict[str, int]:
    """Number of jobs by rule that a dry run announces, targets that only collect aside; empty where nothing is."""
    result = snakemake(folder, "--dry-run", *arguments, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout + result.stderr
    if "Nothing to be done" in text:
        return {}
    table = re.search(r"^Job stats:\njob +count\n[- ]+\n(.*?)^total", text, re.MULTILINE | re.DOTALL)
    assert table, text
    jobs = {name: int(count) for name, count in (line.split() for line in table[1].splitlines())}
    return {name: count for name, count in jobs.items() if name not in COLLECTING}


def succeeds(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """A run that must end well."""
    result = snakemake(folder, *arguments, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of the results with its size and the time of its last change; logs aside."""
    found = (path for path in sorted((folder / "results").rglob("*")) if path.is_file())
    wanted = ((path.relative_to(folder), path.stat()) for path in found)
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in wanted if path.parts[1] != "logs"}


@dataclass(frozen=True)
class Finished:
    """A folder in which everything has been built, and what Snakemake printed."""

    folder: Path
    output: str
