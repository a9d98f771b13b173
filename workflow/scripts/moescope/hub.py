"""The hub: branches and commits of a repository, the files of a revision with their hashes, and whole downloads.

The network has one home. What can pass (rate limits, faults of the server, cut connections) is tried again with longer
and longer pauses; what cannot (no such repository, no access) is told in one line. The token is taken from where the
hub's own client keeps it and is never written anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moescope import files
from moescope.errors import MoescopeError

_log = logging.getLogger(__name__)
#: Attempts at one request or file; the first and the longest pause between two, and how long an answer may stand still
#: (seconds).
ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE, PATIENCE = 8, 1.0, 120.0, 30.0
_Result = TypeVar("_Result")


class HubError(MoescopeError):
    """What the hub does not give: a repository, a revision, a file, or an answer."""


class StoppedError(HubError):
    """A download that is not wanted any more."""


class DamagedError(HubError):
    """A download that is not the file that the listing names."""


def offline() -> bool:
    """Whether the hub is switched off (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def branches(repo: str) -> dict[str, str]:
    """Commit by name of every branch and tag of a repository. Raises HubError where it cannot be listed."""
    found = _asked(repo, lambda: _api().list_repo_refs(repo))
    return {ref.name: ref.target_commit for ref in (*found.tags, *found.branches)}


def listing(repo: str, revision: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """(commit, files by name) of a revision, without a download: of each file its ``bytes`` and its ``sha256``, or,
    where it is kept in git itself, its ``git_sha1``.

    Raises HubError where there is no such repository or revision.
    """
    commit = _asked(f"{repo} at {revision}", lambda: _api().model_info(repo, revision=revision).sha)
    return commit, _files(repo, commit)


def weights_size(repo: str, commit: str) -> int:
    """Bytes of the weight files of a commit, of the form that would be fetched: safetensors where there are any."""
    sizes = {name: facts["bytes"] for name, facts in _files(repo, commit).items()}
    for form in (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin", r".*\.safetensors"):
        if own := [size for name, size in sizes.items() if re.fullmatch(form, name)]:
            return sum(own)
    return 0


def config(repo: str, commit: str) -> dict:
    """The config.json of a commit."""
    listed = _files(repo, commit)
    if "config.json" not in listed:
        raise HubError(
            f"{repo} at {commit[:12]}: has no config.json, so it is no Hugging Face checkpoint; correct repo"
        )
    try:
        return json.loads(read(repo, commit, "config.json", listed["config.json"]))
    except ValueError as error:
        raise HubError(f"{repo} at {commit[:12]}: config.json is no JSON ({error}); correct repo") from error


def _files(repo: str, commit: str) -> dict[str, dict[str, Any]]:
    from huggingface_hub.hf_api import RepoFile

    tree = _asked(f"{repo} at {commit[:12]}", lambda: list(_api().list_repo_tree(repo, revision=commit)))
    return {file.path: _facts(file) for file in tree if isinstance(file, RepoFile)}


def _facts(file: Any) -> dict[str, Any]:
    return {"bytes": file.size, **({"sha256": file.lfs.sha256} if file.lfs else {"git_sha1": file.blob_id})}


def fetch(
    repo: str, commit: str, name: str, facts: dict[str, Any], folder: Path, stop: threading.Event | None = None
) -> Path:
    """Download a file of a commit into a folder: whole, of the size and the hash that the listing gave.

    What an earlier attempt left is taken up. Raises HubError where the hub does not give it, DamagedError where it
    gives something else, twice, StoppedError from ``stop`` on.
    """
    path = folder / files.require_inside(name, f"{repo} at {commit[:12]}")
    part = path.with_name(f"{path.name}.part")
    if path.is_file() and path.stat().st_size == facts["bytes"]:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        _continued(
            f"{repo} at {commit[:12]}, {name}",
            part,
            stop,
            lambda: _download(repo, commit, name, facts["bytes"], part, stop),
        )
        if hash_of(part, facts) == facts.get("sha256", facts.get("git_sha1")):
            os.replace(part, path)
            return path
        part.unlink()
        if last:
            break
        _log.warning("%s at %s: %s is damaged; it is fetched again", repo, commit[:12], name)
    raise DamagedError(
        f"{repo} at {commit[:12]}: {name} is not the file of the listing, twice; the repository is damaged, leave the "
        "step out"
    )


def read(repo: str, commit: str, name: str, facts: dict[str, Any]) -> bytes:
    """A small file of a commit, checked like any other."""
    with tempfile.TemporaryDirectory() as folder:
        return fetch(repo, commit, name, facts, Path(folder)).read_bytes()


def hash_of(path: Path, facts: dict[str, Any]) -> str:
    """The hash of a file of the kind that the listing gives: SHA-256, or the SHA-1 of a git blob."""
    if "sha256" in facts:
        return files.sha256(path)
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)  # git's, not for security
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def shapes(repo: str, commit: str, name: str) -> dict[str, list[int]]:
    """The shapes of the tensors of a safetensors file, by name, from its header alone."""
    found = _asked(f"{repo}, {name}", lambda: _api().parse_safetensors_file_metadata(repo, name, revision=commit))
    return {key: list(tensor.shape) for key, tensor in found.tensors.items()}


def _continued(what: str, part: Path, stop: threading.Event | None, download: Callable[[], None]) -> None:
    """Ask for the rest of a partial file for as long as that makes it longer."""
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _asked(what, download, stop)
        except HubError as error:
            passes = error.__cause__ is not None and _passes(error.__cause__)
            if not (passes and part.exists() and part.stat().st_size > before):
                raise


class _Part(io.FileIO):
    """A partial file that takes more at its end, until it is told to stop."""

    def __init__(self, path: Path, stop: threading.Event | None):
        super().__init__(path, "a")
        self._stop = stop

    def write(self, block: Any) -> int:
        if self._stop and self._stop.is_set():
            raise StoppedError("the download was stopped; what was fetched is kept")
        left = memoryview(block)
        while left:
            left = left[super().write(left) :]
        return len(block)


def _download(repo: str, commit: str, name: str, size: int, part: Path, stop: threading.Event | None) -> None:
    """Go on with a partial file until it has its size."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with _Part(part, stop) as file:
        if file.tell() > size:
            file.seek(0)
            file.truncate()
        http_get(
            hf_hub_url(repo, name, revision=commit),
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=size,
            displayed_filename=name,
        )


def _api() -> Any:
    """The hub's own client, which gives a request up that stands still."""
    from huggingface_hub import HfApi, get_session

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)
    return HfApi()


def _limit(request: Any) -> None:
    """Limit how long a request may stand still where the client has not: it lists without any limit."""
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {of: given.get(of) or PATIENCE for of in ("connect", "read", "write", "pool")}


def _asked(what: str, call: Callable[[], _Result], stop: threading.Event | None = None) -> _Result:
    """The answer to a request, tried again while that can help, until ``stop``; HubError, one line, where it cannot."""
    import tenacity

    until = {"stop": tenacity.stop_after_attempt(ATTEMPTS)}
    if stop:
        until = {"stop": until["stop"] | tenacity.stop_when_event_set(stop), "sleep": tenacity.sleep_using_event(stop)}
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passes),
        wait=_pause,
        **until,
        before_sleep=lambda state: _log.warning("%s: %s; tried again", what, _brief(state.outcome.exception())),
        reraise=True,
    )
    try:
        return retrying(call)
    except MoescopeError:
        raise
    except Exception as error:
        raise HubError(f"{what}: {_told(error)}") from error


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: BaseException) -> bool:
    """Whether an error may be gone at the next attempt."""
    import httpx2

    if (status := _status(error)) is not None:
        return status in (408, 429) or status >= 500
    cut = type(error) is OSError and error.errno is None  # fewer bytes came than were announced
    closed = type(error) is RuntimeError and "closed" in str(error)  # another thread lost its connection and began anew
    return cut or closed or isinstance(error, httpx2.TransportError | httpx2.DecodingError)


def _pause(state: Any) -> float:
    """Seconds to the next attempt: what the hub asks for, else up to twice as long as the last time, by chance."""
    import tenacity
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(state.outcome.exception(), "response", None), "headers", {})
    asked = headers.get("retry-after", "")
    if asked.isdecimal():
        return min(float(asked), LONGEST_PAUSE)
    if (limit := parse_ratelimit_headers(headers)) and not limit.remaining:
        return min(float(limit.reset_in_seconds), LONGEST_PAUSE)
    return tenacity.wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)(state)


def _told(error: Exception) -> str:
    """What went wrong, and the cure."""
    from huggingface_hub import errors

    known = {
        errors.OfflineModeIsEnabled: "is not known on this disk, and the hub is switched off; unset HF_HUB_OFFLINE",
        errors.GatedRepoError: "needs permission; accept its terms on the hub, then log in (hf auth login, HF_TOKEN)",
        errors.RevisionNotFoundError: "has no such revision; list what there is with make catalog",
        errors.RemoteEntryNotFoundError: "is listed but not there; the repository is damaged, leave the step out",
        errors.RepositoryNotFoundError: "is not on the hub, or private; correct repo or log in (hf auth login)",
    }
    for kind, line in known.items():
        if isinstance(error, kind):
            return line
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room, then resume (what was fetched is kept)"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be kept here ({error.strerror}); see to the folder, then resume (what was fetched is kept)"
    if _status(error) in (401, 403):
        return "is not for this token; log in with another (hf auth login, HF_TOKEN)"
    if _passes(error):
        return f"the hub does not answer ({_brief(error)}); resume later (what was fetched is kept)"
    return f"the hub refuses ({_brief(error)}); correct repo and revision"


def _brief(error: BaseException | None) -> str:
    """An error's type and first line, without addresses: those of downloads may hold a signature."""
    status = _status(error)
    first = re.sub(r"\S+://\S+", "...", (str(error).splitlines() or [""])[0])
    return f"HTTP {status}" if status else textwrap.shorten(f"{type(error).__name__}: {first}", 150, placeholder=" ...")
