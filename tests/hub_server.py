"""A hub on this machine: it speaks the Hugging Face hub's API with the hub's own client, and fails on demand.

    with serving(series("owner/name", {"step1": folder})) as server:
        server.faults.append(Fault(r"model\\.safetensors$", "cut", after=1000))
        subprocess.run(..., env={**os.environ, **server.environment})
        assert server.downloads("safetensors") == {(commit, "model.safetensors"): 2}

Large files are kept on another host (localhost beside 127.0.0.1), to which the hub redirects with a signed address. A
request that brings a token there is refused.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import pytest

#: What the redirects to large files carry in their addresses; a secret, as far as it goes.
SIGNATURE = "aWYgeW91IHJlYWQgdGhpcyBpdCBsZWFrZWQ"
Content = bytes | Path


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests to a path.

    ``kind`` is a status, which any request gets, with ``headers``, or what becomes of the next body that is sent:

    - cut: the connection ends ``after`` so many bytes; reset: the same, rudely
    - slow: nothing comes for some ``seconds`` ``after`` so many bytes
    - truncated: the answer is whole, but holds the first ``after`` bytes alone, or half
    - corrupt: the byte ``after`` so many is another
    - ignore_range: all comes, whatever part was asked for; gzip: the same, and compressed
    """

    match: str
    kind: int | str
    times: int = 1
    after: int = 0
    seconds: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """A request, and what it was answered. ``commit`` and ``file``: what it was about, where that is a file."""

    method: str
    path: str
    range: str | None
    authorized: bool
    status: int = 0
    sent: int = 0
    commit: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class File:
    """A file of a commit. Large ones are kept beside git, which has a pointer to them in their place."""

    content: Content
    size: int
    git_sha1: str
    sha256: str | None
    pointer_size: int

    @classmethod
    def of(cls, name: str, content: Content) -> File:
        data = _bytes(content)
        large = name.endswith((".safetensors", ".bin", ".gguf")) or (
            name.endswith("tokenizer.json") and len(data) > 1024
        )
        sha256 = hashlib.sha256(data).hexdigest() if large else None
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        kept = pointer if large else data
        return cls(content, len(data), hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest(), sha256, len(pointer))

    @property
    def facts(self) -> dict[str, Any]:
        """What the tree of a repository says of a file."""
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}}
        return {"type": "file", "oid": self.git_sha1, "size": self.size, **(lfs if self.sha256 else {})}


class Repository:
    """A model repository: revisions, of which those in ``tags`` are tags and the others branches, and their commits.

    Its files need ``token`` where one is given (the repository is gated).
    """

    def __init__(
        self,
        name: str,
        revisions: Mapping[str, Mapping[str, Content]],
        tags: Collection[str] = (),
        token: str | None = None,
    ) -> None:
        self.name, self.tags, self.token = name, tags, token
        self.heads: dict[str, str] = {}
        self.commits: dict[str, dict[str, File]] = {}
        for revision, files in revisions.items():
            self.move(revision, files)

    def move(self, revision: str, files: Mapping[str, Content]) -> str:
        """Put a revision on a commit of these files, and return its id. What it was on before keeps its own."""
        made = {name: File.of(name, content) for name, content in sorted(files.items())}
        listed = [self.name, revision, *(f"{name} {file.git_sha1}" for name, file in made.items())]
        commit = hashlib.sha1("\n".join(listed).encode()).hexdigest()
        self.commits[commit] = made
        self.heads[revision] = commit
        return commit


def series(repo: str, folders: Mapping[str, Path]) -> Repository:
    """A repository of folders on this disk, by the names of their revisions."""
    return Repository(
        repo,
        {
            revision: {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
            for revision, folder in folders.items()
        },
    )


class Server(ThreadingHTTPServer):
    """The hub. ``faults`` wait for their requests, ``log`` has all answers, listings have pages of ``page`` entries."""

    request_queue_size = 64

    def __init__(self, repositories: Collection[Repository]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {repository.name: repository for repository in repositories}
        self.faults: list[Fault] = []
        self.log: list[Answer] = []
        self.page = 1000
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What points another process at this hub, without the token and the settings of whoever runs the tests."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_TOKEN_PATH": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def asked(self, path: str) -> list[Answer]:
        """The answers to requests for paths that match, in order."""
        return [answer for answer in self.log if re.search(path, answer.path)]

    def downloads(self, name: str) -> Counter[tuple[str, str]]:
        """How often bytes of the files whose names match were sent, by commit and file."""
        sent = (a for a in self.log if a.file and a.sent and a.status in (200, 206) and re.search(name, a.file))
        return Counter((answer.commit, answer.file) for answer in sent)

    def take(self, path: str, kind: type) -> Fault | None:
        """The first fault of a kind (of number or name) that waits for a path, once less from now on."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and isinstance(fault.kind, kind) and re.search(fault.match, path):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(*repositories: Repository) -> Iterator[Server]:
    """A hub with these repositories while the block runs, for as many processes as want it."""
    with Server(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client of this process at a server: it read the environment when it was imported."""
    from huggingface_hub import close_session, constants

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    close_session()  # the next one heeds NO_PROXY


class _Refusal(Exception):
    """A status other than 200, with the headers by which the client tells one from the other."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Handler(BaseHTTPRequestHandler):
    """A connection to the hub, or to the other host."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        self.answer = Answer(
            self.command, unquote(path), self.headers.get("Range"), authorized="Authorization" in self.headers
        )
        try:
            if fault := self.server.take(self.answer.path, int):
                raise _Refusal(fault.kind, "a fault", **fault.headers)
            for form, respond in self._ROUTES.items():
                if match := re.fullmatch(form, path):
                    return respond(self, *map(unquote, match.groups()))
            raise _Refusal(404, "no such page")
        except _Refusal as refusal:
            self._give(json.dumps({"error": refusal.message}).encode(), refusal.headers, refusal.status)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        """Answers are kept in the log, not printed."""

    def _refs(self, repo: str) -> None:
        repository = self._repository(repo)
        branches, tags = [], []
        for name, commit in repository.heads.items():
            place, kind = (tags, "tags") if name in repository.tags else (branches, "heads")
            place.append({"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit})
        self._give_json({"branches": branches, "converts": [], "tags": tags})

    def _info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        commit = self._commit(repository, revision)
        siblings = [{"rfilename": name} for name in repository.commits[commit]]
        gated = "manual" if repository.token else False
        self._give_json({"id": repo, "sha": commit, "private": False, "gated": gated, "siblings": siblings})

    def _tree(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        files = repository.commits[self._commit(repository, revision)]
        flat = self.query.get("recursive") != "true"
        folders = sorted({name.split("/")[0] for name in files if "/" in name})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in folders]
        entries += [{**file.facts, "path": name} for name, file in files.items() if not (flat and "/" in name)]
        start = int(self.query.get("cursor", 0))
        end = start + self.server.page
        address = f"{self.server.endpoint}{self.path.partition('?')[0]}?recursive={str(not flat).lower()}&cursor={end}"
        self._give_json(entries[start:end], {"Link": f'<{address}>; rel="next"'} if end < len(entries) else {})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        repository = self._repository(repo)
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            status = 403 if self.answer.authorized else 401
            raise _Refusal(status, f"Access to model {repo} is restricted.", "GatedRepo")
        commit = self._commit(repository, revision)
        if (file := repository.commits[commit].get(name)) is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        self.answer.commit, self.answer.file = commit, name
        headers = {"X-Repo-Commit": commit}
        if not file.sha256:
            return self._give(_bytes(file.content), {**headers, "ETag": f'"{file.git_sha1}"'})
        address = f"/cdn/{repo}/{commit}/{quote(name)}?Expires=4102444800&Signature={SIGNATURE}"
        headers |= {"Location": f"http://localhost:{self.server.server_port}{address}", "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        return self._give(b"", headers, 302)

    def _cdn(self, repo: str, commit: str, name: str) -> None:
        if self.answer.authorized:
            raise _Refusal(400, "a token came here beside the signature")
        if self.query.get("Signature") != SIGNATURE:
            raise _Refusal(403, "the signature is wrong")
        self.answer.commit, self.answer.file = commit, name
        file = self.server.repositories[repo].commits[commit][name]
        self._give(_bytes(file.content), {"ETag": f'"{file.sha256}"'})

    _ROUTES = {  # noqa: RUF012
        r"/api/models/([^/]+/[^/]+)/refs": _refs,
        r"/api/models/([^/]+/[^/]+)": _info,
        r"/api/models/([^/]+/[^/]+)/revision/([^/]+)": _info,
        r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": _tree,
        r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)": _cdn,
        r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": _resolve,
    }

    def _repository(self, name: str) -> Repository:
        if name not in self.server.repositories:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return self.server.repositories[name]

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.heads.get(revision, revision)
        if commit not in repository.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _give_json(self, data: object, headers: Mapping[str, str] = {}) -> None:
        self._give(json.dumps(data).encode(), {"Content-Type": "application/json", **headers})

    def _give(self, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        """Answer with a body, or the part that is asked for, as well as a fault lets it through."""
        headers = dict(headers)
        wanted = status == 200 and self.command == "GET"
        fault = (self.server.take(self.answer.path, str) if wanted else None) or Fault("", "none")
        if status == 200 and self.answer.file:
            headers["Accept-Ranges"] = "bytes"
            if self.answer.range and fault.kind not in ("ignore_range", "gzip"):
                status, body = self._part(body, headers)
        match fault.kind:
            case "truncated":
                body = body[: fault.after or len(body) // 2]
            case "corrupt":
                body = body[: fault.after] + bytes([body[fault.after] ^ 1]) + body[fault.after + 1 :]
            case "gzip":
                headers["Content-Encoding"], body = "gzip", gzip.compress(body)
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self._send(body, fault)

    def _part(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Status and body of an answer to a request for a part."""
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.answer.range).groups()
        start, end = int(first), min(int(last) + 1, len(body)) if last else len(body)
        if start >= len(body):
            headers["Content-Range"] = f"bytes */{len(body)}"
            return 416, b""
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        return 206, body[start:end]

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.answer.status = status
        self.server.log.append(self.answer)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, body: bytes, fault: Fault) -> None:
        stop = fault.after if fault.kind in ("cut", "reset", "slow") else len(body)
        self._write(body[:stop])
        match fault.kind:
            case "slow":
                self.server.closing.wait(fault.seconds)
                self._write(body[stop:])
            case "cut":
                self.close_connection = True
            case "reset":
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # the last but one to hold the connection
                self.connection.close()

    def _write(self, block: bytes) -> None:
        self.answer.sent += len(block)  # before the client can know of it
        self.wfile.write(block)


def _bytes(content: Content) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content
