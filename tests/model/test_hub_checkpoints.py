"""Checkpoints of the hub from listing to memory: the same manifest facts, the same weights, nothing left half done."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from moescope import checkpoints, files, fused, hub, layout, loading, manifests, store
from tests.hub_server import Fault, Repository, Server, series, serving, use
from tests.model import models


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own, and no mixture of experts too small for a fused copy."""
    monkeypatch.setenv("MOESCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOESCOPE_KEEP", "2")
    monkeypatch.setattr(fused, "LEAST", 0)
    monkeypatch.setattr(hub, "FIRST_PAUSE", 0.01)
    return tmp_path / "store" / "entries"


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """A mixture of experts and a dense model, in several files each."""
    folders = {name: tmp_path / name for name in ("olmoe", "olmo")}
    for name, folder in folders.items():
        models.build(name, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
        models.tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture
def server(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub, with a branch for each of the two."""
    with serving(series("lab/models", saved)) as server:
        use(server, monkeypatch)
        yield server


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def listed(name: str, step: int = 1) -> dict:
    """The manifest of one of them, as JSON keeps it."""
    return json.loads(json.dumps(manifests.on_hub("there", step, "lab/models", name)))


@pytest.mark.parametrize("name", ["olmoe", "olmo"])
def test_a_manifest_says_the_same_as_one_of_the_disk(name: str, saved: dict[str, Path], server: Server):
    there, here = listed(name), manifests.on_disk("there", 1, saved[name])
    assert there["shape"] == here["shape"]
    assert {n: f["bytes"] for n, f in there["files"].items()} == {n: f["bytes"] for n, f in here["files"].items()}
    assert {n: f.get("sha256", here["files"][n]["sha256"]) for n, f in there["files"].items()} == {
        n: f["sha256"] for n, f in here["files"].items()
    }
    assert all("sha256" in there["files"][n] for n in manifests.weights(there))
    assert (there["repo"], there["revision"], len(there["commit"])) == ("lab/models", name, 40)
    whole = [a for a in server.asked(r"\.safetensors$") if a.sent and not a.range]
    assert whole == [], "weights are not fetched for a listing"


@pytest.mark.parametrize("name", ["olmoe", "olmo"])
def test_the_weights_are_those_of_the_repository(name: str, saved: dict[str, Path], server: Server, place: Path):
    entry = listed(name)
    with checkpoints.opened(entry) as (model, tokenizer):
        expected, _ = checkpoints.load(saved[name])
        for key, weight in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], weight), key
        assert tokenizer("Paris is")["input_ids"] == models.tokenizer()("Paris is")["input_ids"]
        assert loading.fingerprint(model) == loading.fingerprint(expected)
    (folder,) = place.iterdir()
    assert (folder / "fused").is_dir() == (name == "olmoe"), "a copy that can be mapped takes the place of the shards"
    assert bool(list(folder.glob("*.safetensors"))) == (name == "olmo")
    sent = len(server.log)
    with checkpoints.opened(entry):
        pass
    assert len(server.log) == sent, "it is there already"


def test_a_copy_that_was_cut_short_goes_on_without_another_download(server: Server, place: Path, monkeypatch):
    entry, write = listed("olmoe"), fused._write

    def dies(part: Path, *rest: object) -> None:
        write(part, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(fused, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.acquire(entry).__enter__()
    monkeypatch.setattr(fused, "_write", write)
    sent = len(server.log)
    with checkpoints.opened(entry):
        pass
    assert not [answer for answer in server.log[sent:] if answer.sent]


def test_a_copy_whose_shards_are_half_removed_is_whole(server: Server, place: Path, monkeypatch):
    entry, unlink = listed("olmoe"), Path.unlink

    def dies(path: Path, **how: object) -> None:
        if path.suffix == ".safetensors" and "fused" not in path.parts:
            raise KeyboardInterrupt
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.acquire(entry).__enter__()
    monkeypatch.setattr(Path, "unlink", unlink)
    sent = len(server.log)
    with checkpoints.opened(entry):
        pass
    assert not [answer for answer in server.log[sent:] if answer.sent]
    assert not list(place.glob("*/*.safetensors"))


def test_a_cut_in_the_middle_is_gone_on_from(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a cut costs: ten megabytes otherwise
    entry = listed("olmo")
    largest = max(manifests.weights(entry), key=lambda name: entry["files"][name]["bytes"])
    server.faults.append(Fault(largest, "cut", after=20_000))
    with checkpoints.opened(entry):
        pass
    assert [a.range for a in server.asked(largest) if a.range and a.range.endswith("-")], (
        "a range from where it was cut"
    )


def test_the_next_checkpoint_is_fetched_ahead(server: Server, place: Path, tmp_path: Path):
    for step, name in ((5, "olmoe"), (7, "olmo"), (20, "olmo"), (100, "olmo")):  # 7 is selected no more
        folder = tmp_path / "results" / "there" / str(step)
        folder.mkdir(parents=True)
        files.write_json(listed(name, step), folder / "manifest.json")
    assert checkpoints.selected(tmp_path / "results/there") == {}, "nothing is known of what is selected"
    files.write_json({"steps": ["5", "20", "100"]}, tmp_path / "results/there/audit.json")
    others = checkpoints.selected(tmp_path / "results/there")
    first, _, last = others.values()
    assert [other["step"] for other in others.values()] == [5, 20, 100]
    assert checkpoints.following(first, others, "predictions.parquet")["step"] == 20
    (tmp_path / "results/there/20/predictions.parquet").touch()
    entry = checkpoints.following(first, others, "predictions.parquet")
    assert entry["step"] == 100
    assert checkpoints.following(last, others, "predictions.parquet") is None
    with checkpoints.acquire(listed("olmoe")), checkpoints.ahead(entry):
        wait_for(lambda: all((place / checkpoints.key(entry) / name).exists() for name in entry["files"]))
    sent = len(server.log)
    with checkpoints.acquire(entry):
        pass
    assert len(server.log) == sent


def test_what_is_fetched_ahead_is_stopped_with_its_job_and_gone_on_from(server: Server, place: Path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    entry = listed("olmo")
    largest = max(manifests.weights(entry), key=lambda name: entry["files"][name]["bytes"])
    server.faults.append(Fault(largest, "slow", after=20_000, seconds=2))
    with checkpoints.ahead(entry):
        part = place / checkpoints.key(entry) / f"{largest}.part"
        wait_for(lambda: part.exists() and part.stat().st_size > 5000)
        began = time.monotonic()
    assert time.monotonic() - began < 4
    assert part.exists()
    with checkpoints.opened(entry):
        pass
    assert [a.range for a in server.asked(largest) if a.range and a.range.endswith("-")], (
        "a range from where it stopped"
    )


def test_one_checkpoint_at_a_time_fetches_nothing_ahead(server: Server, place: Path, monkeypatch):
    monkeypatch.setenv("MOESCOPE_KEEP", "1")
    with checkpoints.ahead(listed("olmo")), checkpoints.ahead(None):
        time.sleep(0.3)
    assert not place.exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f.pop("config.json"), "has no config.json; the revision is damaged, leave the step out"),
        (lambda f: f.pop(next(n for n in f if n.startswith("model-"))), "the revision is damaged, leave the step out"),
        (lambda f: [f.pop(n) for n in list(f) if n.startswith("model")], "has no weights; put in safetensors"),
        (lambda f: f.update({"config.json": b"<html>"}), "config.json: cannot be read as JSON"),
        (lambda f: f.update({"model.safetensors.index.json": b"[]"}), "is no index of weight files"),
        (
            lambda f: f.update({"model.safetensors.index.json": b'{"weight_map": {"w": "../../secret"}}'}),
            r"the file name '../../secret' leads out of its folder",
        ),
        (
            lambda f: f.update({n: b"no tensors" for n in f if n.endswith(".safetensors")}),
            "the hub refuses|is no whole safetensors",
        ),
    ],
)
def test_a_damaged_revision_is_told_at_its_listing(change, told: str, saved: dict[str, Path], monkeypatch):
    content = {path.name: path.read_bytes() for path in saved["olmo"].iterdir()}
    change(content)
    with serving(Repository("lab/models", {"olmo": content})) as server:
        use(server, monkeypatch)
        with pytest.raises(layout.MoescopeError, match=told) as error:
            listed("olmo")
    assert "\n" not in str(error.value)
    assert "lab/models" in str(error.value)


def test_weights_that_are_not_finite_are_refused(saved: dict[str, Path], place: Path, monkeypatch):
    path = next(path for path in saved["olmoe"].glob("*.safetensors") if "lm_head.weight" in load_file(path))
    weights = load_file(path)
    weights["lm_head.weight"][3, 3] = torch.inf
    save_file(weights, path, metadata={"format": "pt"})
    with serving(series("lab/models", saved)) as server:
        use(server, monkeypatch)
        with pytest.raises(fused.FusedError, match=r"lm_head\.weight holds a NaN or an infinity"):
            checkpoints.acquire(listed("olmoe")).__enter__()
    assert not list(place.glob(f"*/{store.RECORD}"))


def test_pickles_of_the_hub_are_read_only_where_that_is_allowed(tmp_path: Path, saved: dict[str, Path], monkeypatch):
    model, _ = checkpoints.load(saved["olmo"])
    kept = {path.name: path.read_bytes() for path in saved["olmo"].iterdir() if not path.name.startswith("model")}
    torch.save(model.state_dict(), tmp_path / "pickle")
    with serving(Repository("lab/models", {"olmo": {**kept, "pytorch_model.bin": tmp_path / "pickle"}})) as server:
        use(server, monkeypatch)
        with pytest.raises(layout.CheckpointError, match="its weights are pickles, which can run code"):
            listed("olmo")
        entry = manifests.on_hub("there", 1, "lab/models", "olmo", allow_pickle=True)
        assert entry["shape"]["parameters"] is None
        with checkpoints.opened(entry) as (found, _):
            assert loading.fingerprint(found) == loading.fingerprint(model)


def test_the_commit_of_the_manifest_is_fetched_wherever_its_branch_has_moved(
    saved: dict[str, Path], server: Server, place: Path
):
    entry = listed("olmo")
    server.repositories["lab/models"].move("olmo", {path.name: path for path in saved["olmoe"].iterdir()})
    with checkpoints.opened(entry) as (model, _):
        expected, _ = checkpoints.load(saved["olmo"])
        assert loading.fingerprint(model) == loading.fingerprint(expected)


def test_only_what_a_checkpoint_consists_of_is_fetched(saved: dict[str, Path], place: Path, monkeypatch):
    content = {path.name: path.read_bytes() for path in saved["olmo"].iterdir()}
    others = {"README.md": b"-", "optimizer.pt": b"-" * 5000, "consolidated.safetensors": b"-", "mine.py": b"raise"}
    with serving(Repository("lab/models", {"olmo": content | others})) as server:
        use(server, monkeypatch)
        with checkpoints.opened(listed("olmo")):
            pass
        assert {answer.file for answer in server.log if answer.file} <= content.keys()
    (folder,) = place.iterdir()
    assert {path.name for path in folder.iterdir()} <= {*content, store.RECORD}


@pytest.mark.parametrize("damage", ["record", "tokenizer", "cut"])
def test_a_copy_of_which_a_part_is_gone_is_made_again(damage: str, server: Server, place: Path):
    """As an eviction that was killed, or a faulty disk, would leave it."""
    entry = listed("olmoe")
    with checkpoints.acquire(entry) as directory:
        weights = next(directory.glob("*.safetensors"))
    if damage == "cut":
        weights.write_bytes(b"")
    else:
        (directory / {"record": fused.RECORD, "tokenizer": "tokenizer.json"}[damage]).unlink()
    (directory.parent / store.RECORD).unlink()
    with checkpoints.opened(entry) as (model, tokenizer):
        assert len(tokenizer) > 10
        assert sum(weight.numel() for weight in model.parameters()) > 1000


def test_with_the_hub_switched_off_nothing_makes_way(server: Server, place: Path, monkeypatch):
    monkeypatch.setenv("MOESCOPE_KEEP", "1")
    there, elsewhere = listed("olmo"), listed("olmoe")
    with checkpoints.opened(there):
        pass
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="is not on this disk, and the hub is switched off; unset HF_HUB_OFFLINE"):
        checkpoints.acquire(elsewhere).__enter__()
    with checkpoints.opened(there), checkpoints.ahead(elsewhere):
        pass
    assert [path.name for path in place.iterdir()] == [checkpoints.key(there)]


def test_a_file_called_like_a_record_vouches_for_nothing(saved: dict[str, Path]):
    """Neither beside the weights of a stranger nor as one of them."""
    index = saved["olmo"] / "model.safetensors.index.json"
    path = saved["olmo"] / next(iter(json.loads(index.read_text())["weight_map"].values()))
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    (saved["olmo"] / fused.RECORD).write_text("{}")
    with pytest.raises(layout.CheckpointError, match="holds a NaN"):
        checkpoints.load(saved["olmo"])
    index.write_text(json.dumps({"weight_map": {"w": store.RECORD}}))
    with pytest.raises(layout.CheckpointError, match=r"names 'entry.json', which is no weight file"):
        checkpoints.load(saved["olmo"])


def test_a_connection_that_stands_still_does_not_hold_the_job_up(server: Server, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PAUSE", 0.2)
    entry = listed("olmo")
    server.faults.append(Fault(r"\.safetensors$", 429, headers={"Retry-After": "3"}))
    began = time.monotonic()
    with checkpoints.ahead(entry):
        wait_for(lambda: any(answer.status == 429 for answer in server.log))
    assert time.monotonic() - began < 2


def test_a_download_that_goes_on_is_not_given_up(server: Server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    monkeypatch.setattr(hub, "ATTEMPTS", 2)
    monkeypatch.setattr(hub, "FIRST_PAUSE", 0.0)
    entry = listed("olmo")
    largest = max(manifests.weights(entry), key=lambda name: entry["files"][name]["bytes"])
    server.faults.append(Fault(largest, "reset", times=6, after=3_000))
    with checkpoints.acquire(entry):
        pass
    assert len(server.asked(largest)) > 6
