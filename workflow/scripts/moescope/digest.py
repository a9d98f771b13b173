"""What a result depends on besides its inputs: one hash over the code that made it.

Snakemake compares the modification time of a script and does not see the modules it imports. Every rule therefore
carries the digest of its adapter and of all library modules behind it as a parameter: an edit reruns what it can have
changed and nothing else, a touch or a fresh clone reruns nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = "moescope"


def code(adapter: str | Path, *data: str | Path) -> str:
    """SHA-256 (hexadecimal) over an adapter, the library modules behind it, and data files that they read.

    The library is looked for beside the adapter. Only names and contents count, never where the files are. The
    package's own ``__init__`` is left out, because it only forwards names to modules, which are imported by their own.
    """
    adapter = Path(adapter)
    files = {adapter.name: adapter, **modules(adapter), **{Path(path).name: Path(path) for path in data}}
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def modules(adapter: str | Path) -> dict[str, Path]:
    """The library modules behind an adapter, by dotted name.

    Raises ImportError where a name is imported from the package that is no module of it: it could not be followed.
    """
    folder = Path(adapter).parent
    found: dict[str, Path] = {}
    waiting = [Path(adapter)]
    while waiting:
        source = waiting.pop()
        for name in _imports(source):
            path = folder.joinpath(*name.split(".")).with_suffix(".py")
            if not path.is_file():
                raise ImportError(f"{source.name}: {name} is no module of the library; import the one that defines it")
            if name not in found:
                found[name] = path
                waiting.append(path)
    return found


def _imports(source: Path) -> tuple[str, ...]:
    """Dotted names of the library modules that a file imports, inside functions too."""
    return _named(source.read_text(encoding="utf-8"), str(source))


@functools.cache  # every rule asks for the same modules
def _named(text: str, filename: str) -> tuple[str, ...]:
    found = []
    for node in ast.walk(ast.parse(text, filename=filename)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}.")]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found += [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            found.append(node.module)
    return tuple(found)
