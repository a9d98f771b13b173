"""Checkpoints of a series, wherever they are: held on this disk while somebody works with one."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moescope import files, fused, hub, loading, manifests, store
from moescope.layout import CheckpointError
from moescope.loading import load
from moescope.steps import step_name

__all__ = ["CheckpointError", "acquire", "ahead", "load", "opened"]

#: Of an entry of the store, the folder of its fused copy.
_FUSED = "fused"
#: Seconds between two attempts to begin what will be needed, and that the end of a job waits for it.
_PAUSE = 5.0
Entry = Mapping[str, Any]


@contextlib.contextmanager
def acquire(entry: Entry) -> Iterator[Path]:
    """The directory to load the checkpoint from that a manifest describes, while the block runs: its own, or that of an
    entry of the store, fetched from the hub or made as a copy that can be mapped into memory (``fused``).

    Raises CheckpointError where a file on this disk is not the one of the manifest any more, or where transformers does
    not know what to do with it, HubError where the hub does not give it, FusedError where no copy can be made, and
    StoreError where there is no room.
    """
    if entry["source"] == "hub":
        _require_reachable(entry)
        with store.held(key(entry), lambda place: _fetch(place, entry), _room(entry)) as place:
            yield place / _FUSED if (place / _FUSED).is_dir() else place
        return
    directory = Path(entry["directory"])
    _require_sizes(directory, entry)
    if not store.whole(key(entry)):
        with loading.told_in_one_line(f"{directory}: the model", "fetch it again or leave the step out"):
            mappable = not fused.needed(directory, entry)
        if mappable:
            yield directory
            return
    with store.held(key(entry), lambda place: _copy(place, directory, entry), _room(entry)) as place:
        yield place / _FUSED


@contextlib.contextmanager
def opened(entry: Entry, dtype: str = "auto", device: str = "cpu") -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) of the checkpoint that a manifest describes, while the block runs (``acquire``, ``load``)."""
    with acquire(entry) as directory:
        checked = directory == store.place_of(key(entry)) / _FUSED
        yield load(directory, dtype, device, entry["gguf_file"], entry["allow_pickle"], checked)


@contextlib.contextmanager
def ahead(entry: Entry | None) -> Iterator[None]:
    """Fetch a checkpoint that will be needed next (None: nothing) while the block runs, where the store has room.

    What goes wrong, and what is unfinished when the block ends, is left to the job that needs it. Nothing here
    imports transformers: the block may, and that bears no company.
    """
    if entry is None or entry["source"] != "hub" or store.keep() < 2 or hub.offline():
        yield
        return
    stop = threading.Event()

    def fetch() -> None:
        with contextlib.suppress(Exception):
            while not store.ahead(key(entry), lambda place: _download(place, entry, stop), _room(entry)):
                if stop.wait(_PAUSE):
                    return

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_PAUSE)  # a connection that stands still must not hold the job up: it ends with the process


def selected(series: Path) -> dict[Path, Entry]:
    """The manifests in the folder of a series by the folder of their checkpoint, in the order of their steps: of those
    that its audit knows, because others may be left from a former selection."""
    audited = series / "audit.json"
    steps = json.loads(audited.read_text(encoding="utf-8"))["steps"] if audited.exists() else []
    paths = [path for step in steps if (path := series / step / "manifest.json").exists()]
    return {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def finding(entry: Entry, model: Any, tokenizer: Any, texts: list[str]) -> dict:
    """What tells a loaded checkpoint from others: its step and files, its weights however they are stored, the prompts
    and the tokens that its tokenizer makes of them."""
    return {
        "step": step_name(entry["step"]),
        "key": key(entry),
        "fingerprint": loading.fingerprint(model),
        "prompts": files.digest(texts),
        "tokens": files.digest(tokenizer(texts)["input_ids"]),
    }


def findings(others: Mapping[Path, Entry]) -> list[dict]:
    """The ``finding`` of each of these checkpoints (``selected``) that was scored, and is the same still."""
    paths = {folder: folder / "provenance" / "attribute.json" for folder in others}
    read = {f: json.loads(path.read_text(encoding="utf-8")) for f, path in paths.items() if path.exists()}
    found = {folder: one["checkpoint"] for folder, one in read.items() if "checkpoint" in one}
    return [one for folder, one in found.items() if one["key"] == key(others[folder])]


def following(entry: Entry, others: Mapping[Path, Entry], done: str) -> Entry | None:
    """The next of these manifests (``selected``) of a series whose folder has no file ``done`` yet."""
    later = (folder for folder, other in others.items() if (other["step"] or 0) > (entry["step"] or 0))
    return next((others[folder] for folder in later if not (folder / done).exists()), None)


def _require_reachable(entry: Entry) -> None:
    """Raises HubError where a checkpoint is not on this disk and the hub is switched off, before room is made."""
    place = store.place_of(key(entry))
    files_there = all((place / name).is_file() for name in entry["files"])
    if hub.offline() and not (store.whole(key(entry)) or (place / _FUSED).is_dir() or files_there):
        raise hub.HubError(
            f"{entry['repo']} at {entry['revision']}: is not on this disk, and the hub is switched off; "
            "unset HF_HUB_OFFLINE"
        )


def key(entry: Entry) -> str:
    """The name of an entry of the store: by what it is made of, and whether of a download or of files on this disk."""
    sources = {"hub": entry["source"] == "hub"} | manifests.hashes(entry, sorted(entry["files"]))
    return files.digest(sources)[:32]


def _room(entry: Entry) -> int:
    """Bytes that making an entry takes at most: beside what is fetched, the copy that is made of it."""
    size = sum(facts["bytes"] for facts in entry["files"].values())
    fetched = size if entry["source"] == "hub" else 0
    return fetched + (size if entry["shape"]["experts"] and size >= fused.LEAST else 0)


def _fetch(place: Path, entry: Entry) -> None:
    """Download the files of a checkpoint; a fused copy takes the place of the weights."""
    copy = place / _FUSED
    if copy.is_dir() and not fused.whole(copy):
        shutil.rmtree(copy)
    if not copy.is_dir():
        _download(place, entry)
        where = f"{entry['repo']} at {entry['revision']}: the model"
        with loading.told_in_one_line(where, "leave the step out"):
            if fused.needed(place, entry):
                fused.write(copy, place, entry)
    if copy.is_dir():
        for name in entry["files"]:
            (place / name).unlink(missing_ok=True)


def _download(place: Path, entry: Entry, stop: threading.Event | None = None) -> None:
    for name, facts in entry["files"].items():
        hub.fetch(entry["repo"], entry["commit"], name, facts, place, stop)


def _copy(place: Path, directory: Path, entry: Entry) -> None:
    """Make the fused copy of a checkpoint on this disk. A training run may have written new weights of the same sizes
    since the manifest was made: a copy of them would stand under the name of the old ones for good."""
    shutil.rmtree(place / _FUSED, ignore_errors=True)
    for name, facts in entry["files"].items():
        if files.sha256(directory / name) != facts["sha256"]:
            raise CheckpointError(
                f"{directory / name}: is not the file of the manifest any more; run the workflow again"
            )
    with loading.told_in_one_line(f"{directory}: the model", "fetch it again or leave the step out"):
        fused.write(place / _FUSED, directory, entry)


def _require_sizes(directory: Path, entry: Entry) -> None:
    for name, facts in entry["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path}: is not the file of the manifest any more; run the workflow again")
