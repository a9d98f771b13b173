"""After a kill: may this folder's run be taken up again? ``python -m moescope.resume [folder]`` before unlocking.

Snakemake's lock outlives a killed run and does not say whose it is. A folder is in use while a Snakemake process, or a
job that one left behind, works in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from moescope.errors import MoescopeError


class InUseError(MoescopeError):
    """A run still owns the folder."""


def check(folder: str | Path) -> None:
    """Raises InUseError where the folder is locked and a process of the run that locked it is alive on this machine."""
    folder = Path(folder).resolve()
    if locked(folder) and (alive := processes(folder)):
        pids = ", ".join(map(str, sorted(alive)))
        raise InUseError(f"{folder}: a run is still at work here (process {pids}); wait for it or end it, then resume")


def locked(folder: Path) -> bool:
    """Whether a run has locked the folder, alive or not."""
    locks = folder / ".snakemake" / "locks"
    return locks.is_dir() and any(locks.iterdir())


def processes(folder: Path) -> list[int]:
    """Ids of the processes of Snakemake and of its jobs that work in the folder, callers of this one aside."""
    me = psutil.Process()
    mine = {me.pid, *(parent.pid for parent in me.parents())}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in mine and Path(process.cwd()) == folder and _is_snakemake(process.cmdline()):
                found.append(process.pid)
        except (psutil.Error, OSError):  # gone meanwhile, or another user's
            continue
    return found


def _is_snakemake(command: list[str]) -> bool:
    """``snakemake ...``, ``python -m snakemake ...`` or the script of a job, which lies in .snakemake/scripts."""
    return any(Path(word).name == "snakemake" or ".snakemake/scripts/" in word for word in command)


if __name__ == "__main__":
    try:
        check(sys.argv[1] if len(sys.argv) > 1 else ".")
    except InUseError as error:
        sys.exit(f"error: {error}")
