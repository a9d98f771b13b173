"""The store under several processes: never more than it keeps, nothing in use is removed, nothing half made is used."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from moescope import store

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOESCOPE_KEEP", "2")
    monkeypatch.setattr(store, "PAUSE", 0.01)
    return tmp_path / "store" / "entries"


def writes(content: str = "weights"):
    """A way to make an entry."""
    return lambda folder: (folder / "model").write_text(content)


def entries(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def use(key: str) -> None:
    with store.held(key, writes(key), 10):
        pass


def last_used(key: str, when: float) -> None:
    """Pretend that an entry was last used then (seconds since 1970)."""
    os.utime(store.folder() / "locks" / key, (when, when))


def test_an_entry_is_made_once_and_stays():
    made = []
    for _ in range(2):
        with store.held("a", lambda folder: made.append(folder) or writes()(folder), 10) as folder:
            assert (folder / "model").read_text() == "weights"
    assert len(made) == 1
    assert store.whole("a")
    assert not store.whole("b")


def test_the_longest_unused_makes_way(place: Path):
    for key, when in (("a", 1), ("b", 2)):
        use(key)
        last_used(key, when)
    use("a")  # now b is the longer unused
    use("c")
    assert entries(place) == ["a", "c"]


def test_of_those_used_a_moment_ago_the_one_made_first_makes_way(place: Path):
    """The jobs of a checkpoint follow one another: b is about to be used again, though a was used after it."""
    for key, when in (("a", 1000), ("b", 2000)):
        use(key)
        os.utime(place / key / store.RECORD, (when, when))
    last_used("b", time.time() - 5)
    last_used("a", time.time())
    use("c")
    assert entries(place) == ["b", "c"]


def test_what_is_in_use_never_makes_way(place: Path):
    with store.held("a", writes(), 10):
        last_used("a", 1)
        for key in "bcd":
            use(key)
        assert entries(place) == ["a", "d"]


def test_who_finds_no_room_waits_until_there_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESCOPE_KEEP", "1")
    done = []
    with store.held("a", writes(), 10):
        waiting = threading.Thread(target=lambda: (use("b"), done.append("b")))
        waiting.start()
        time.sleep(0.2)
        assert store.whole("a")
        assert not done
    waiting.join(10)
    assert done == ["b"]
    assert not store.whole("a")


def test_many_users_share_an_entry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESCOPE_KEEP", "1")
    with store.held("a", writes(), 10), store.held("a", writes(), 10) as folder:
        assert (folder / "model").exists()


def test_an_entry_that_lost_a_file_is_made_again(place: Path):
    use("a")
    (place / "a" / "model").write_text("cut")
    with store.held("a", writes(), 10) as folder:
        assert (folder / "model").read_text() == "weights"


def test_a_failed_making_leaves_its_part_and_no_entry(place: Path):
    def cut(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise OSError("the line is cut")

    with pytest.raises(OSError, match="the line is cut"), store.held("a", cut, 10):
        raise AssertionError("the block must not run")
    assert not store.whole("a")
    found = []
    with store.held("a", lambda folder: found.extend(p.name for p in folder.iterdir()) or writes()(folder), 10):
        assert found == ["part"]


def test_a_killed_maker_leaves_neither_a_lock_nor_an_entry(place: Path):
    def slow(folder: Path) -> None:
        (folder / "part").write_text("half")
        time.sleep(60)

    process = PROCESSES.Process(target=lambda: store.held("a", slow, 10).__enter__())
    process.start()
    while not (place / "a" / "part").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with store.held("a", writes(), 10) as folder:
        assert (folder / "part").read_text() == "half"
        assert (folder / "model").exists()


def hammer(seed: int, keys: str, out: Path) -> None:
    """Take entries in a random order and look whether they are whole all the while."""
    import random

    choose = random.Random(seed)
    for _ in range(12):
        key = choose.choice(keys)

        def make(folder: Path, key: str = key) -> None:
            (folder / "model").write_text(key[:1])
            time.sleep(choose.random() / 200)
            (folder / "model").write_text(key * 100)

        with store.held(key, make, 100) as folder:
            for _ in range(3):
                assert (folder / "model").read_text() == key * 100
                time.sleep(choose.random() / 300)
        if choose.random() < 0.3:
            store.ahead(choose.choice(keys), lambda folder: (folder / "model").write_text(folder.name * 100), 100)
    (out / str(seed)).write_text("well")


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_processes_that_compete_never_exceed_it(kept: int, place: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MOESCOPE_KEEP", str(kept))
    monkeypatch.setattr(store, "IDLE", 0)
    jobs = [PROCESSES.Process(target=hammer, args=(seed, "abcdef", tmp_path)) for seed in range(4)]
    for job in jobs:
        job.start()
    most = 0
    while any(job.is_alive() for job in jobs):
        most = max(most, len(entries(place)) if place.exists() else 0)
        time.sleep(0.002)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["0", "1", "2", "3"]
    assert 0 < most <= kept


def test_ahead_takes_free_room_and_what_is_long_unused_only(place: Path, monkeypatch: pytest.MonkeyPatch):
    with store.held("a", writes(), 10):
        store.ahead("b", writes(), 10)
        assert not store.whole("b"), "who needs it completes it"
        store.ahead("c", writes(), 10)  # a is in use, b was begun a moment ago
        assert entries(place) == ["a", "b"]
        last_used("b", 1)
        store.ahead("c", writes(), 10)
        assert entries(place) == ["a", "c"]
        with store.held("c", lambda folder: None, 10) as folder:
            assert (folder / "model").read_text() == "weights"


def test_a_full_disk_is_told_before_anything_is_made(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(store.StoreError, match=r"1\.00 GB are needed and 0\.00 GB are free; make room"):
        store.held("a", writes(), 10**9).__enter__()
    assert not store.whole("a")


def test_a_disk_that_is_nearly_full_is_cleared_of_what_nobody_uses(place: Path, monkeypatch: pytest.MonkeyPatch):
    use("a")
    free = lambda _: shutil._ntuple_diskusage(10**9, 0, 0 if (place / "a").exists() else 10**9)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", free)
    use("b")
    assert entries(place) == ["b"]


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_to_keep_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESCOPE_KEEP", wrong)
    with pytest.raises(store.StoreError, match=r"MOESCOPE_KEEP: .* write 1 or more"):
        use("a")
