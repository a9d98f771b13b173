"""The store: checkpoints on this disk for as long as they are needed, never more of them than ``keep``.

An entry is a folder with a name of its own (a digest of what it is made of). Whoever works with one holds a lock on
it, shared with others; whoever makes one holds it alone. What nobody holds makes way where room is needed, the longest
unused first. Locks are those of the operating system (flock) and end with the process that held them, however it ends.
So the store has to lie on a file system that has them, on a cluster best on the disk of each node.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moescope import files
from moescope.errors import MoescopeError

_log = logging.getLogger(__name__)
#: What an entry says of itself when it is whole: the sizes of its files.
RECORD = "entry.json"
#: Seconds between two looks for room, and for which an entry must have been unused to make way for one that nobody
#: needs yet.
PAUSE, IDLE = 0.5, 60.0
Make = Callable[[Path], None]


class StoreError(MoescopeError):
    """The store has no room, or its configuration is none."""


def folder() -> Path:
    """The folder of the store: ``MOESCOPE_STORE``, by default in the user's cache."""
    return Path(os.environ.get("MOESCOPE_STORE") or Path.home() / ".cache" / "moescope").expanduser()


def keep() -> int:
    """How many entries the store holds at most: ``MOESCOPE_KEEP``, by default 2."""
    given = os.environ.get("MOESCOPE_KEEP") or "2"
    if not given.isdecimal() or int(given) < 1:
        raise StoreError(f"MOESCOPE_KEEP: {given!r} is no number of checkpoints; write 1 or more")
    return int(given)


@contextlib.contextmanager
def held(key: str, make: Make, size: int) -> Iterator[Path]:
    """The folder of an entry while the block runs, made by ``make(folder)`` where it is not whole.

    ``size``: bytes that the making takes at most. ``make`` is given what an attempt that was cut short left behind.
    Waits while all that the store keeps is in use. Raises StoreError where the disk has no room.
    """
    place = _place(key)
    with _lock(key) as lock:
        waiting = False
        while not (_try(lock, fcntl.LOCK_SH) and _whole(place)):
            if _try(lock, fcntl.LOCK_EX) and _reserve(key, size, idle=0):
                make(place)
                files.write_json(
                    {"files": {str(p.relative_to(place)): p.stat().st_size for p in _files(place)}}, place / RECORD
                )
            else:
                fcntl.flock(lock, fcntl.LOCK_UN)  # who waits for room must not stand in the way of others who do
                if not waiting:
                    _log.info("waiting for room in %s, or for another job to fetch %s", folder(), key)
                waiting = True
                time.sleep(PAUSE)
        os.utime(place / RECORD)
        yield place
        os.utime(place / RECORD)


def ahead(key: str, begin: Make, size: int) -> None:
    """Begin an entry that will be needed, unless somebody else does, or room would have to be made of what may still be
    in use. It is left to ``held`` to complete."""
    with _lock(key) as lock:
        if _try(lock, fcntl.LOCK_EX) and not _whole(_place(key)) and _reserve(key, size, IDLE):
            begin(_place(key))


def whole(key: str) -> bool:
    """Whether an entry is there, complete, with files of the sizes that it was given."""
    return _whole(_place(key))


def _place(key: str) -> Path:
    return folder() / "entries" / key


def _whole(place: Path) -> bool:
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file())


@contextlib.contextmanager
def _lock(name: str) -> Iterator[int]:
    """An open lock file, locked by nobody yet; whatever lock it has ends with the block."""
    path = folder() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _try(lock: int, kind: int) -> bool:
    """Lock, or change the lock, if that is possible now."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reserve(key: str, size: int, idle: float) -> bool:
    """Make room for an entry and its folder: False where too many others are in use, or were ``idle`` seconds ago."""
    place = _place(key)
    with _lock("room") as room:
        fcntl.flock(room, fcntl.LOCK_EX)
        place.parent.mkdir(parents=True, exist_ok=True)
        others = sorted((p for p in place.parent.iterdir() if p.name != key), key=_last_use)
        surplus = len(others) - keep() + 1
        needed = size - sum(p.stat().st_size for p in _files(place))
        for other in others:
            if surplus <= 0 and shutil.disk_usage(place.parent).free >= needed:
                break
            surplus -= _evict(other, idle)
        if surplus > 0:
            return False
        if (free := shutil.disk_usage(place.parent).free) < needed:
            raise StoreError(
                f"{folder()}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room, or name "
                "another folder in MOESCOPE_STORE, then resume"
            )
        place.mkdir(exist_ok=True)
    return True


def _last_use(place: Path) -> float:
    """When an entry was last used, or worked on; 0 where nothing is in it."""
    record = place / RECORD
    if record.exists():
        return record.stat().st_mtime
    return max((path.stat().st_mtime for path in _files(place)), default=0)


def _evict(place: Path, idle: float) -> bool:
    """Remove an entry unless it is in use."""
    with _lock(place.name) as lock:
        if time.time() - _last_use(place) < idle or not _try(lock, fcntl.LOCK_EX):
            return False
        (place / RECORD).unlink(missing_ok=True)  # first, so that half an entry is never taken for one
        shutil.rmtree(place)
    return True
