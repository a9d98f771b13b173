"""What every job of the workflow does alike: write its log, and tell the user in one line why it failed.

An adapter is ``with job(snakemake): ...`` around one library call.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from moescope.errors import MoescopeError

#: What every library says when the disk is full, whatever type of error it raises.
_FULL = os.strerror(errno.ENOSPC)


class _Tee:
    """A stream that writes to a log and to a terminal, where progress bars belong too."""

    def __init__(self, *streams: TextIO):
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Send what the job prints to its log (and, on a terminal, to the terminal); leave with status 1 when it fails.

    A MoescopeError becomes its message alone, one line in the log and on stderr; any other exception keeps its
    traceback in the log, and stderr names the rule, the exception and the log.
    """
    path = Path(snakemake.log[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    console = sys.stderr
    with open(path, "w", buffering=1, encoding="utf-8") as log:
        stream = _Tee(log, console) if console.isatty() else log
        logging.basicConfig(stream=stream, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("moescope").setLevel(logging.INFO)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            try:
                yield
                return
            except MoescopeError as error:
                line = f"error: {' '.join(str(error).split())}"
                log.write(f"{line}\n")
            except Exception as error:
                traceback.print_exc(file=log)
                what = " ".join(f"{type(error).__name__}: {error}".split())
                cure = "make room, then resume" if _FULL in what else f"the traceback is in {os.path.relpath(path)}"
                line = f"error: {name(snakemake)} failed ({what}); {cure}"
    print(line, file=console, flush=True)
    sys.exit(1)


def name(snakemake: Any) -> str:
    """The rule and its wildcards, as ``attribute_moe tiny-olmoe/700``."""
    return " ".join([snakemake.rule, "/".join(map(str, snakemake.wildcards))]).strip()


def device(snakemake: Any) -> str:
    """``cuda`` where the profile gives the job a GPU, else ``cpu``."""
    return "cuda" if int(snakemake.resources.get("gpu", 0)) > 0 else "cpu"


def memory(snakemake: Any) -> int | None:
    """Megabytes that the profile gives the job, None where it says nothing."""
    given = snakemake.resources.get("mem_mb")
    return None if given is None else int(given)
