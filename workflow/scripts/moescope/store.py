"""The store: checkpoints on this disk for as long as they are needed, never more of them than ``keep``.

An entry is a folder with a name of its own (a digest of what it is made of). Whoever works with one holds a lock on
it, shared with others; whoever makes one holds it alone. What nobody holds makes way where room is needed: the
longest unused first, and of those that were used a moment ago the one that was made first, because the jobs of a
checkpoint follow one another, and between two of them nobody holds it. Locks are those of the operating system
(flock) and end with the process that held them, however it ends. So the store has to lie on a file system that has
them, on a cluster best on the disk of each node.
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
#: Seconds between two looks for room, and for which an entry that was used may well be needed again.
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
    place = place_of(key)
    with _lock(key) as lock:
        waiting = False
        while not (_try(lock, fcntl.LOCK_SH) and _whole(place)):
            if _try(lock, fcntl.LOCK_EX) and _reserve(key, size, idle=0):
                make(place)
                sizes = {name: stat.st_size for name, stat in sorted(_files(place).items())}
                files.write_json({"files": sizes}, place / RECORD)
            else:
                fcntl.flock(lock, fcntl.LOCK_UN)  # who waits for room must not stand in the way of others who do
                if not waiting:
                    _log.info("waiting for room in %s, or for another job to fetch %s", folder(), key)
                waiting = True
                time.sleep(PAUSE)
        os.utime(lock)
        yield place
        os.utime(lock)


def ahead(key: str, begin: Make, size: int) -> bool:
    """Begin an entry that will be needed, which is left to ``held`` to complete. False, and nothing, where room would
    have to be made of what may still be in use; True too where it is there, or somebody else is at it."""
    with _lock(key) as lock:
        if not _try(lock, fcntl.LOCK_EX) or _whole(place_of(key)):
            return True
        if not _reserve(key, size, IDLE):
            return False
        begin(place_of(key))
    return True


def whole(key: str) -> bool:
    """Whether an entry is there, complete, with files of the sizes that it was given."""
    return _whole(place_of(key))


def place_of(key: str) -> Path:
    """Where an entry lies, or would."""
    return folder() / "entries" / key


def _whole(place: Path) -> bool:
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _files(place: Path) -> dict[str, os.stat_result]:
    """What an entry holds by its name in it; others may be at work there, so what is gone meanwhile is left out."""
    found = {}
    for folder, _, names in os.walk(place):
        for path in (Path(folder) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(place))] = path.stat()
    return found


def _held_bytes(place: Path) -> int:
    return sum(stat.st_size for stat in _files(place).values())


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
    """Make room for an entry and its folder: False where too many others are in use, or were ``idle`` seconds ago, or
    where the disk will hold it only when they have made way."""
    place = place_of(key)
    with _lock("room") as room:
        fcntl.flock(room, fcntl.LOCK_EX)
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in folder().glob("evicted-*"):  # by a process that was killed
            shutil.rmtree(left)
        others = sorted((p for p in place.parent.iterdir() if p.is_dir() and p.name != key), key=_turn)
        needed = size - _held_bytes(place)
        while others and (len(others) >= keep() or _free(others) < needed):
            if not (gone := next((other for other in others if _evict(other, idle)), None)):
                break
            others.remove(gone)
        if len(others) >= keep() or (others and _free(others) < needed):
            return False
        if (free := _free(others)) < needed:
            raise StoreError(
                f"{folder()}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room, or name "
                "another folder in MOESCOPE_STORE, then resume"
            )
        place.mkdir(exist_ok=True)
        _promise(key, size)
    return True


def _free(others: list[Path]) -> int:
    """Bytes of the disk that nobody has and that no other entry, still being made, was promised."""
    missing = (max(0, _promised(other.name) - _held_bytes(other)) for other in others if not _whole(other))
    return shutil.disk_usage(folder() / "entries").free - sum(missing)


def _promise(key: str, size: int) -> None:
    """Note in its lock file what an entry may take."""
    (folder() / "locks" / key).write_text(str(size))


def _promised(key: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((folder() / "locks" / key).read_text())
    return 0


def _last_use(place: Path) -> float:
    """When an entry was last used, or room was made for it: the time of its lock file."""
    with contextlib.suppress(FileNotFoundError):
        return (folder() / "locks" / place.name).stat().st_mtime
    return 0


def _turn(place: Path) -> tuple[bool, float]:
    """The order in which entries make way; those that hold nothing first."""
    found, used = _files(place), _last_use(place)
    if not found or time.time() - used >= IDLE:
        return False, used if found else 0
    return True, found[RECORD].st_mtime if RECORD in found else time.time()


def _evict(place: Path, idle: float) -> bool:
    """Remove an entry unless it is in use."""
    with _lock(place.name) as lock:
        if time.time() - _last_use(place) < idle or not _try(lock, fcntl.LOCK_EX):
            return False
        aside = folder() / f"evicted-{place.name}"  # so that half an entry is never taken for one
        os.rename(place, aside)
        shutil.rmtree(aside)
    return True
