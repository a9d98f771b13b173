"""The hub's own client against a hub on this machine: what is listed, what is fetched, and what is told."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from moescope import hub
from moescope.files import UnsafeNameError
from moescope.hub import DamagedError, HubError
from tests.examples import ROOT
from tests.hub_server import SIGNATURE, Fault, Repository, Server, series, serving, use

REPO, TOKEN = "owner/model", "hf_aSecretOfThisTestThatNobodyMayRead"
WEIGHTS = save({"b": np.arange(2000, dtype=np.float32).reshape(40, 50), "a": np.ones(7, dtype=np.float16)})
FILES = {
    "config.json": json.dumps({"model_type": "olmo", "comment": "so long that it is sent in parts" * 100}).encode(),
    "greeting.txt": b"hello\n",
    "model.safetensors": WEIGHTS,
    "original/params.json": b"{}",
    "tokenizer.json": b'{"model": "%s"}' % (b"x" * 2000),
    "tokenizer_config.json": b"{}",
}
LATER = {**FILES, "model.safetensors": WEIGHTS[:-1] + b"!"}
#: How the hub's client cuts a body: what is short of a piece when a connection ends is lost.
PIECE = 1000


@pytest.fixture
def repository() -> Repository:
    return Repository(REPO, {"main": LATER, "stage1/step0": FILES, "v1": FILES}, tags=["v1"])


@pytest.fixture
def server(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub with one repository, and the client of this process pointed at it."""
    from huggingface_hub import constants

    with serving(repository) as running:
        use(running, monkeypatch)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
        yield running


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that somebody would have made, in seconds; nobody does."""
    made: list[float] = []
    monkeypatch.setattr("time.sleep", made.append)
    return made


@pytest.fixture
def fetched(server: Server, repository: Repository, tmp_path: Path):
    """Download a file of step 0, and make sure of it."""
    commit, listed = hub.listing(REPO, "stage1/step0")
    server.log.clear()

    def fetch(name: str) -> Path:
        path = hub.fetch(REPO, commit, name, listed[name], tmp_path / "store")
        assert path == tmp_path / "store" / name
        assert path.read_bytes() == FILES[name]
        assert not list((tmp_path / "store").rglob("*.part"))
        return path

    return fetch


@contextlib.contextmanager
def refused(*parts: str, kind: type[Exception] = HubError) -> Iterator[pytest.ExceptionInfo]:
    """The block raises an error of one line that holds all the parts."""
    with pytest.raises(kind) as error:
        yield error
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def ranges(server: Server, path: str) -> list[str | None]:
    """What was asked for, request by request, of the bodies that match."""
    return [answer.range for answer in server.asked(path) if answer.status in (200, 206)]


def test_branches_and_tags_have_commits(server, repository):
    assert hub.branches(REPO) == repository.heads
    assert len(set(repository.heads.values())) == 3


def test_a_listing_has_the_sizes_and_hashes_of_the_files(server, repository):
    commit, listed = hub.listing(REPO, "stage1/step0")
    assert commit == repository.heads["stage1/step0"]
    assert set(listed) == set(FILES) - {"original/params.json"}
    assert listed["greeting.txt"] == {"bytes": 6, "git_sha1": "ce013625030ba8dba906f756967f9e9ca394464a"}
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert listed["model.safetensors"] == {"bytes": len(WEIGHTS), "sha256": sha256}
    assert [sorted(facts)[1] for facts in listed.values()].count("sha256") == 2
    assert server.downloads("") == {}


def test_a_listing_comes_in_pages(server):
    whole = hub.listing(REPO, "main")
    server.page = 2
    assert hub.listing(REPO, "main") == whole
    assert len(server.asked("/tree/")) == 1 + 3


def test_a_commit_stays_when_its_branch_moves_on(server, repository):
    before = hub.listing(REPO, "main")
    commit = repository.move("main", {"config.json": b"{}"})
    assert hub.listing(REPO, "main") == (commit, {"config.json": hub._files(REPO, commit)["config.json"]})
    assert hub.listing(REPO, before[0]) == before


def test_what_is_known_of_the_weights_without_them(server, repository):
    commit = repository.heads["stage1/step0"]
    assert hub.weights_size(REPO, commit) == len(WEIGHTS)
    assert hub.shapes(REPO, commit, "model.safetensors") == {"a": [7], "b": [40, 50]}
    assert hub.config(REPO, commit) == json.loads(FILES["config.json"])


def test_the_size_of_pickles_counts_where_there_is_nothing_else(server, repository):
    parts = {f"pytorch_model-0000{part}-of-00002.bin": bytes(part * 100) for part in (1, 2)}
    assert hub.weights_size(REPO, repository.move("main", {"config.json": b"{}", **parts})) == 300
    assert hub.weights_size(REPO, repository.move("main", {**FILES, **parts})) == len(WEIGHTS)
    assert hub.weights_size(REPO, repository.move("main", {"config.json": b"{}"})) == 0


def test_a_repository_without_a_configuration_is_no_checkpoint(server, repository):
    with refused(REPO, "config.json", "correct repo"):
        hub.config(REPO, repository.move("main", {"README.md": b"..."}))
    with refused(REPO, "config.json is no JSON", "correct repo"):
        hub.config(REPO, repository.move("main", {"config.json": b"<html>"}))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_fetched_whole_and_once(name, server, repository, tmp_path):
    commit = repository.heads["v1"]
    facts = {"bytes": len(FILES[name]), "sha256": hashlib.sha256(FILES[name]).hexdigest()}
    for _ in range(2):
        assert hub.fetch(REPO, commit, name, facts, tmp_path).read_bytes() == FILES[name]
    assert server.downloads("") == {(commit, name): 1}


def test_a_small_file_is_checked_like_any_other(server, repository):
    commit, listed = hub.listing(REPO, "main")
    server.faults.append(Fault(r"greeting\.txt$", "corrupt"))
    assert hub.read(REPO, commit, "greeting.txt", listed["greeting.txt"]) == b"hello\n"
    assert server.downloads("greeting") == {(commit, "greeting.txt"): 2}


def test_folders_of_checkpoints_are_a_series(monkeypatch, tmp_path):
    for step, number in (("step1", b"1"), ("step2", b"22")):
        (tmp_path / step / "deep").mkdir(parents=True)
        (tmp_path / step / "pytorch_model.bin").write_bytes(number)
        (tmp_path / step / "deep" / "note").write_bytes(number)
    folders = {f"{step}-tokens1B": tmp_path / step for step in ("step1", "step2")}
    with serving(series(REPO, folders)) as server:
        use(server, monkeypatch)
        commits = hub.branches(REPO)
        assert sorted(commits) == sorted(folders)
        assert [hub.weights_size(REPO, commits[name]) for name in folders] == [1, 2]


# What is left of an earlier attempt


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_an_earlier_process_left_is_taken_up(name, server, fetched, tmp_path):
    left = len(FILES[name]) // 2
    part = tmp_path / "store" / f"{name}.part"
    part.parent.mkdir()
    part.write_bytes(FILES[name][:left])
    fetched(name)
    assert ranges(server, name) == [f"bytes={left}-"]
    assert sum(answer.sent for answer in server.log) == len(FILES[name]) - left


@pytest.mark.parametrize(
    ("left", "asked"),
    [
        pytest.param(WEIGHTS, [], id="all"),
        pytest.param(b"?" + WEIGHTS[1:], [None], id="as-long-but-damaged"),
        pytest.param(WEIGHTS + b"more", [None], id="too-long"),
        pytest.param(b"?" + WEIGHTS[1:-1], [f"bytes={len(WEIGHTS) - 1}-", None], id="damaged"),
    ],
)
def test_what_was_left_is_checked(left, asked, server, fetched, tmp_path):
    part = tmp_path / "store" / "model.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(left)
    fetched("model.safetensors")
    assert ranges(server, "model.safetensors") == asked


@pytest.mark.parametrize("kind", ["ignore_range", "gzip"])
def test_a_hub_that_cannot_go_on_starts_over(kind, server, fetched, tmp_path):
    part = tmp_path / "store" / "config.json.part"
    part.parent.mkdir()
    part.write_bytes(b"so far")
    server.faults.append(Fault(r"config\.json$", kind))
    fetched("config.json")
    assert ranges(server, "config.json") == ["bytes=6-"]


# What can pass


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_lost_connection_is_resumed(kind, server, fetched):
    server.faults += [Fault("^/cdn/", kind, after=4 * PIECE + 500), Fault("^/cdn/", kind, after=10)]
    fetched("model.safetensors")
    assert ranges(server, "^/cdn/") == [None, f"bytes={4 * PIECE}-", f"bytes={4 * PIECE}-"]


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_listing_that_breaks_off_is_asked_for_again(kind, server, repository):
    server.faults += [Fault(path, kind, times=2, after=20) for path in ("/refs$", "/revision/", "/tree/")]
    assert hub.branches(REPO) == repository.heads
    assert hub.listing(REPO, "main")[0] == repository.heads["main"]


def test_an_answer_that_stands_still_is_given_up(server, fetched, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    server.faults.append(Fault("^/cdn/", "slow", after=2 * PIECE, seconds=60))
    fetched("model.safetensors")
    assert ranges(server, "^/cdn/") == [None, f"bytes={2 * PIECE}-"]


@pytest.mark.parametrize("path", ["/refs$", "/revision/", "/tree/"])
def test_a_listing_that_stands_still_is_given_up(path, server, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    server.faults.append(Fault(path, "slow", after=5, seconds=60))
    hub.branches(REPO)
    hub.listing(REPO, "main")
    assert len(server.asked(path)) == 2


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_faults_of_the_server_are_waited_for(status, server, repository, fetched, pauses):
    paths = ("/refs$", "/revision/", "/tree/", "/resolve/", "^/cdn/")
    server.faults += [Fault(path, status, times=2) for path in paths]
    assert hub.branches(REPO) == repository.heads
    assert hub.shapes(REPO, repository.heads["main"], "model.safetensors")["a"] == [7]
    server.faults.append(Fault("/resolve/", status, times=2))
    fetched("model.safetensors")
    assert hub.listing(REPO, "main")[0] == repository.heads["main"]
    assert all(fault.times == 0 for fault in server.faults)
    assert len(pauses) == 12
    assert sum(pauses) < 60


def test_an_answer_that_cannot_be_unpacked_is_asked_for_again(server, repository):
    server.faults.append(Fault("/refs$", 200, headers={"Content-Encoding": "gzip"}))
    assert hub.branches(REPO) == repository.heads


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "17"}, 17),
        ({"Retry-After": "100000"}, hub.LONGEST_PAUSE),
        ({"RateLimit": '"api";r=0;t=23', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 23),
    ],
)
def test_the_hub_says_how_long_to_wait(headers, seconds, server, pauses):
    server.faults.append(Fault("/refs$", 429, headers=headers))
    hub.branches(REPO)
    assert pauses == [seconds]


def test_a_download_waits_as_long_as_the_hub_asks(server, fetched, pauses):
    server.faults.append(Fault("/resolve/", 429, headers={"Retry-After": "17"}))
    fetched("model.safetensors")
    assert sum(pauses) == pytest.approx(17, abs=1)


def test_a_fault_that_stays_is_told(server, pauses):
    server.faults.append(Fault("/refs$", 503, times=100))
    with refused(REPO, "does not answer (HTTP 503)", "resume later"):
        hub.branches(REPO)
    assert len(server.log) == hub.ATTEMPTS
    assert len(pauses) == hub.ATTEMPTS - 1
    assert max(pauses) <= hub.LONGEST_PAUSE


def test_a_hub_that_is_away_is_told(server, monkeypatch, pauses):
    with serving() as other:
        use(other, monkeypatch)
    with refused(REPO, "does not answer (ConnectError", "resume later"):
        hub.branches(REPO)
    assert len(pauses) == hub.ATTEMPTS - 1


def test_a_client_that_another_thread_closed_is_replaced(server, repository, monkeypatch):
    from huggingface_hub import close_session, get_session

    client, sent = get_session(), get_session().send

    def closed_before(*arguments, **options):
        close_session()
        return sent(*arguments, **options)

    monkeypatch.setattr(client, "send", closed_before)
    assert hub.branches(REPO) == repository.heads


def test_a_body_that_ends_too_early_is_completed(server, fetched):
    server.faults.append(Fault("^/cdn/", "truncated", after=2 * PIECE))
    fetched("model.safetensors")
    assert ranges(server, "^/cdn/") == [None, f"bytes={2 * PIECE}-"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_fetched_again(name, server, fetched, caplog):
    server.faults.append(Fault(name, "corrupt", after=30))
    fetched(name)
    assert ranges(server, name) == [None, None]
    assert f"{name} is damaged; it is fetched again" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_damaged_twice_is_refused(name, server, fetched, tmp_path):
    server.faults.append(Fault(name, "corrupt", times=2, after=30))
    with refused(REPO, name, "twice", "leave the step out", kind=DamagedError):
        fetched(name)
    assert list((tmp_path / "store").iterdir()) == []
    fetched(name)


# What cannot pass


def test_what_is_not_there_is_told_at_once(server, repository, tmp_path, pauses):
    with refused("owner/none: is not on the hub, or private", "correct repo"):
        hub.branches("owner/none")
    with refused("owner/none at main: is not on the hub, or private", "correct repo"):
        hub.listing("owner/none", "main")
    with refused(f"{REPO} at step7: has no such revision", "make catalog"):
        hub.listing(REPO, "step7")
    facts = {"bytes": 1, "sha256": "0" * 64}
    with refused(f"{REPO} at ", "absent.bin: is listed but not there", "leave the step out"):
        hub.fetch(REPO, repository.heads["main"], "absent.bin", facts, tmp_path)
    with refused(f"{REPO}, absent.bin: is listed but not there"):
        hub.shapes(REPO, repository.heads["main"], "absent.bin")
    with refused("owner/what/is/this", "correct repo"):
        hub.branches("owner/what/is/this")
    assert len(server.log) == 5
    assert pauses == []
    assert not (tmp_path / "absent.bin").exists()


@pytest.mark.parametrize(
    ("status", "headers", "cure"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "log in with another"),
        (403, {}, "log in with another"),
        (403, {"X-Error-Code": "GatedRepo"}, "accept its terms"),
        (404, {}, "correct repo"),
        (400, {}, "correct repo"),
    ],
)
def test_no_is_an_answer(status, headers, cure, server, fetched, pauses):
    server.faults += [Fault(path, status, headers=headers) for path in ("/refs$", "/tree/", "/resolve/")]
    with refused(f"{REPO}: ", cure):
        hub.branches(REPO)
    with refused(f"{REPO} at ", cure):
        hub.listing(REPO, "main")
    with refused(f"{REPO} at ", "model.safetensors", cure):
        fetched("model.safetensors")
    assert [answer.status for answer in server.log if answer.status != 200] == [status] * 3
    assert pauses == []


def test_a_gated_repository_opens_to_its_token(server, repository, fetched, monkeypatch, pauses):
    repository.token = TOKEN
    for token in ("", "hf_another"):
        monkeypatch.setenv("HF_TOKEN", token)
        with refused(REPO, "needs permission; accept its terms on the hub, then log in"):
            fetched("model.safetensors")
    assert [answer.status for answer in server.log] == [401, 403]
    assert pauses == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetched("model.safetensors")


def test_the_token_goes_to_the_hub_alone_and_is_never_told(server, repository, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_DEBUG", True)  # the client's log of all requests
    for name in ("moescope", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, name)
    commit, listed = hub.listing(REPO, "main")
    server.faults += [Fault("^/cdn/", "reset", after=10), Fault("^/cdn/", "cut", after=20), Fault("/resolve/", 503)]
    hub.branches(REPO)
    hub.shapes(REPO, commit, "model.safetensors")
    for name, facts in listed.items():
        hub.fetch(REPO, commit, name, facts, tmp_path)
    server.faults += [Fault(r"/resolve/.*model\.", 500, times=100), Fault("^/cdn/.*tokenizer", 400)]
    errors = []
    for name in ("model.safetensors", "tokenizer.json"):
        with refused(REPO, name) as error:
            hub.fetch(REPO, commit, name, listed[name], tmp_path / "again")
        errors.append(str(error.value))
    assert {(a.path.startswith("/cdn/"), a.authorized) for a in server.log} == {(True, False), (False, True)}
    assert "authenticated: True" in caplog.text
    assert TOKEN not in caplog.text + str(errors)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("moescope")]
    assert told
    assert SIGNATURE not in str(told + errors)


def test_a_hub_that_is_switched_off_is_not_asked(server, fetched, monkeypatch, pauses):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (lambda: hub.branches(REPO), lambda: hub.listing(REPO, "main"), lambda: fetched("model.safetensors")):
        with refused(REPO, "the hub is switched off; unset HF_HUB_OFFLINE"):
            call()
    assert server.log == []
    assert pauses == []


class _Failing(io.FileIO):
    """A file on a disk that takes no more than 3000 bytes."""

    error = errno.ENOSPC

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > 3000:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(data)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errno.ENOSPC, "the disk is full; make room, then resume"),
        (errno.EDQUOT, "the disk is full; make room, then resume"),
        (errno.EIO, "cannot be kept here (Input/output error)"),
    ],
)
def test_a_disk_that_takes_no_more_is_told_at_once(error, told, server, fetched, monkeypatch, tmp_path, pauses):
    monkeypatch.setattr(_Failing, "error", error)
    with monkeypatch.context() as full:
        full.setattr(hub, "_Part", lambda path, _: _Failing(path, "a"))
        with refused(REPO, "model.safetensors", told, "what was fetched is kept"):
            fetched("model.safetensors")
    assert ranges(server, "^/cdn/") == [None]
    assert pauses == []
    assert (tmp_path / "store" / "model.safetensors.part").read_bytes() == WEIGHTS[:3000]
    fetched("model.safetensors")
    assert ranges(server, "^/cdn/") == [None, "bytes=3000-"]


@pytest.mark.parametrize("name", ["../model.bin", "/etc/model.bin", "a/../../model.bin", "a//b", "..", ""])
def test_names_that_lead_out_of_the_folder_are_refused(name, server, repository, tmp_path):
    commit = repository.move("main", {name: b"evil"})
    facts = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    with refused(REPO, repr(name), "leads out of its folder", kind=UnsafeNameError):
        hub.fetch(REPO, commit, name, facts, tmp_path / "deep" / "store")
    assert server.log == []
    assert list(tmp_path.iterdir()) == []


def test_another_process_finds_the_hub_in_its_environment(server, repository):
    code = f"from moescope import hub; print(hub.branches({REPO!r})['main'])"
    environment = {**os.environ, **server.environment, "PYTHONPATH": str(ROOT / "workflow" / "scripts")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == repository.heads["main"] + "\n"
    assert Counter(answer.path for answer in server.log) == {f"/api/models/{REPO}/refs": 1}
