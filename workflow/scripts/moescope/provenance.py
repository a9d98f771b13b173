"""How a result came to be: versions, code, settings, cost. One small JSON file beside the tables of a job."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import moescope
from moescope import files

#: Packages whose versions a result can depend on, reported where the job has imported them.
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "scipy", "polars", "snakemake")
_STARTED = time.monotonic()


def write(path: str | os.PathLike, cfg: dict, **facts: Any) -> None:
    """Write the record of this process: what it was told (``cfg``), what it found (``facts``), what it ran on and cost.

    facts: whatever the job knows of itself, such as dtype, device, decomposition_error.
    """
    files.write_json({**record(), "cfg": cfg, **facts}, path)


def record() -> dict[str, Any]:
    """Versions, git commit, machine, seconds since this module was imported, peak memory (bytes)."""
    return {
        "versions": {"moescope": moescope.__version__, "python": platform.python_version(), **_packages()},
        "commit": commit(Path(__file__).parents[3]),
        "machine": platform.machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "seconds": round(time.monotonic() - _STARTED, 1),
        "peak_memory_bytes": _peak_memory(),
        "peak_gpu_memory_bytes": _peak_gpu_memory(),
    }


def commit(folder: Path) -> str | None:
    """The git commit of a folder, with ``+`` where its files differ from it; None outside a git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _packages() -> dict[str, str]:
    """Versions of the packages that this process has imported."""
    found = {}
    for name in PACKAGES:
        if name in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_gpu_memory() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated()
