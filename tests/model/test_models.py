"""A model for a notebook: from a directory or the hub, held while it lives, refused where it does not fit."""

import fcntl
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moescope
from moescope import hub, loading, tables
from moescope.decomposition import DecompositionError
from moescope.hub import HubError
from moescope.layout import CheckpointError
from tests.examples import ROOT
from tests.hub_server import Server, series, serving, use
from tests.model import models


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """Two models that fit and one that does not."""
    folders = {name: tmp_path / name for name in ("olmoe", "llama", "minimax")}
    for name, folder in folders.items():
        models.build(name, dtype=torch.bfloat16).save_pretrained(folder)
        models.tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture
def server(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub, with a branch for each; ``main`` is the mixture of experts."""
    monkeypatch.setenv("MOESCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(hub, "FIRST_PAUSE", 0.01)
    with serving(series("lab/models", {"main": saved["olmoe"], **saved})) as server:
        use(server, monkeypatch)
        yield server


def test_the_first_minutes(saved: dict[str, Path]):
    """What the README shows: load, attribute, and tables by the names of the schema."""
    model, tokenizer = moescope.load(saved["olmoe"])
    frames = moescope.attribute(model, tokenizer, models.prompts())
    assert set(frames) == {
        *("predictions", "layers", "heads", "routing", "active_sums", "top_active"),
        *(f"{component}_{kind}" for component in ("ffn", "attn") for kind in ("neurons", "groups")),
    }
    assert all(frame.equals(tables.check(frame, name)) for name, frame in frames.items())


@pytest.mark.parametrize(("revision", "name"), [("main", "olmoe"), ("llama", "llama")])
def test_a_repository_is_the_directory_it_was_made_of(server: Server, saved: dict[str, Path], revision: str, name: str):
    model, tokenizer = moescope.load("lab/models", revision)
    assert loading.fingerprint(model) == loading.fingerprint(moescope.load(saved[name])[0])
    assert tokenizer("Paris is")["input_ids"] == models.tokenizer()("Paris is")["input_ids"]


def test_a_checkpoint_is_held_for_as_long_as_its_model_lives(server: Server, tmp_path: Path):
    model, _ = moescope.load("lab/models")
    (lock,) = (file for file in (tmp_path / "store" / "locks").iterdir() if len(file.name) == 32)

    def held() -> bool:
        with open(lock, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    assert held()
    del model
    gc.collect()
    assert not held()


@pytest.mark.parametrize("where", ["directory", "repository"])
def test_what_does_not_fit_is_refused_on_load_with_the_error(server: Server, saved: dict[str, Path], where: str):
    place = {"directory": (saved["minimax"],), "repository": ("lab/models", "minimax")}[where]
    with pytest.raises(DecompositionError, match=r"miss the residual stream by \d\S+ of a layer's update"):
        moescope.load(*place)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("runs/step1000/deeper", CheckpointError, "runs/step1000/deeper: is no directory; name one, or a repository"),
        ("./step1000", CheckpointError, "is no directory"),
        ("step1000", CheckpointError, "is no directory"),
        ("tests/step1000", CheckpointError, "tests/step1000: is no directory"),  # a folder that is here
        ("README.md/step1000", CheckpointError, "is no directory"),
        ("lab/nothing", HubError, "lab/nothing"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(server: Server, where: str, error: type, message: str):
    with pytest.raises(error, match=message) as told:
        moescope.load(where)
    assert "\n" not in str(told.value)


def test_a_gguf_file_of_a_repository_is_no_option(server: Server):
    with pytest.raises(CheckpointError, match="lab/models: is no directory"):
        moescope.load("lab/models", gguf_file="model.gguf")


def test_the_lines_of_the_readme_run(tmp_path: Path, facts_csv: Path, monkeypatch: pytest.MonkeyPatch):
    """As they stand there, on a model of the shape of the trained one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python")[1].split("## Study")[0]
    lines = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    (place,) = re.findall(r'load\("(results/[^"]*)"\)', lines)
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 24}
    models.build("olmoe", **shape).save_pretrained(tmp_path / place)
    models.tokenizer().save_pretrained(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    assert facts_csv == tmp_path / "facts.csv"
    names: dict = {}
    exec(lines, names)
    assert len(names["broken"]) > 0
    assert set(names["found"]) == {"expert_interventions", "gates", "gradients"}
    assert set(names["routing"]) == set(range(4))
