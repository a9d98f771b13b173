"""Files that are either whole or absent (written under a temporary name, then moved); names that stay in a folder."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from moescope.errors import MoescopeError


class UnsafeNameError(MoescopeError):
    """A file name of somebody else's that leads out of its folder."""


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``; it becomes ``path`` when the block ends well and is removed when it does not.

    The temporary name keeps the suffix, because some writers choose their format by it. What a killed process left of
    the same file is removed: no two jobs make one file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".[0-9]*.{glob.escape(path.name)}"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(data: object, path: str | os.PathLike) -> None:
    """Write ``data`` as indented JSON, whole."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(data: object) -> str:
    """Hexadecimal SHA-256 of ``data`` as JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def require_inside(name: object, where: str) -> str:
    """A file name that stays in its folder; UnsafeNameError for any other. ``where`` it came from."""
    if not isinstance(name, str) or name != posixpath.normpath(name) or re.match(r"/|\.\.?(/|$)", name) or "\0" in name:
        raise UnsafeNameError(f"{where}: the file name {name!r} leads out of its folder; do not use this checkpoint")
    return name
