"""What a user can get wrong: one line that names the thing and the cure, a status not zero, results untouched."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.examples import FACTS, write_facts
from tests.workflow.running import CONFIG, Finished, files_below, snakemake


@pytest.fixture(scope="module")
def folder(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder for all mistakes of this module: none may change what it holds."""
    return Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("mistakes") / "folder"))


def series(**keys) -> Callable[[dict], None]:
    """Change the first series."""
    return lambda config: config["series"][0].update(keys)


def another(**keys) -> Callable[[dict], None]:
    """Add a series."""
    return lambda config: config["series"].append({"source": "local", **keys})


def top(**keys) -> Callable[[dict], None]:
    """Change keys at the top of the configuration."""
    return lambda config: config.update(keys)


MISTAKES = {
    "unknown key": (series(stepps="all"), ["series[0].stepps: unknown key", "did you mean 'steps'?"]),
    "unknown key at the top": (top(relation={}), ["relation: unknown key", "did you mean 'relations'?"]),
    "unknown relation": (
        top(relations={"source": "facts.csv", "names": ["color"]}),
        ["color: no such relation", "did you mean colour?"],
    ),
    "series without checkpoints": (
        another(name="mine", path="runs/step*"),
        ["(mine)", "runs/step*", "correct"],
    ),
    "two series of one name": (another(name="moe", path="runs"), ["series[2].name", "'moe' already names series[0]"]),
    "reserved name": (another(name="logs", path="runs"), ["series[2].name", "'logs' is reserved", "choose another"]),
    "step that is not there": (
        series(steps=[5]),
        ["(moe)", "step 5 is not in", "neighbours are 0, 4, 8, 12"],
    ),
    "no prompts left": (
        top(relations={"source": "empty.csv"}),
        ["empty.csv", "no facts", "add a row"],
    ),
    "missing relation files": (
        top(relations={"source": "facts"}),
        ["facts: no such file", "embedded, lre"],
    ),
    "malformed fact": (top(relations={"source": "blank.csv"}), ["blank.csv: row 2", "object", "fill it in"]),
    "study": (top(studies=["dynamic"]), ["studies[0]", "'dynamic' is not known", "did you mean 'dynamics'?"]),
    "step of a study": (top(dynamics={"steps": [8]}), ["dynamics.steps (moe)", "step 8", "neighbours are 0, 4, 12"]),
    "pair of one kind": (
        top(dynamics={"pairs": [{"moe": "dense", "dense": "dense"}]}),
        ["dynamics.pairs[0].moe", "dense has no experts", "name another"],
    ),
    "study without its tables": (
        top(studies=["collaboration"], attribution={"uncertainty": "none"}),
        ["studies: collaboration needs", "set attribution.uncertainty to groups"],
    ),
    "more experts than a token is routed to": (
        top(studies=["collaboration"], collaboration={"budgets": {"top_n": [1, 3]}}),
        ["collaboration.budgets.top_n", "3 is above the 2 experts that moe routes", "ask for no more"],
    ),
    "head and expert of a pair the wrong way round": (
        top(collaboration={"pairs": [{"series": "moe", "head": [1, 0], "expert": [0, 3]}]}),
        ["collaboration.pairs[0]", "head 0 of layer 1 lies after expert 3 of layer 0", "name a head of layer 0"],
    ),
    "expert that is not there": (
        top(studies=["collaboration"], collaboration={"pairs": [{"series": "moe", "head": [0, 0], "expert": [1, 4]}]}),
        ["collaboration.pairs[0].expert", "4 is beyond the 4 experts of moe", "count from 0"],
    ),
    "checkpoint after the end": (
        series(training={**CONFIG["series"][0]["training"], "save_at": [0, 99]}),
        ["series[0] (moe): training.save_at", "99", "0..12"],
    ),
}


@pytest.mark.parametrize(("mistake", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_told_before_any_job(folder: Path, mistake: Callable[[dict], None], parts: list[str]):
    write_facts(folder / "empty.csv", [])
    write_facts(folder / "blank.csv", [("colour", "lemon", "", "The colour of a {} is", "things")])
    before = files_below(folder)
    config = copy.deepcopy(CONFIG)
    mistake(config)
    result = snakemake(folder, "--cores", "2", config=config)
    assert_told_in_one_line(result.stderr + result.stdout, parts)
    assert result.returncode != 0
    assert files_below(folder) == before


def assert_told_in_one_line(text: str, parts: list[str]) -> None:
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert all(part in lines[0] for part in parts), lines[0]
    assert "Traceback" not in text
    assert "rule " not in text


def test_results_that_are_no_folder(tmp_path: Path):
    write_facts(tmp_path / "facts.csv")
    (tmp_path / "results").write_text("mine")
    result = snakemake(tmp_path, "--cores", "2", config=CONFIG)
    assert result.returncode != 0
    assert_told_in_one_line(result.stderr + result.stdout, ["results: cannot be written", "writable folder"])
    assert (tmp_path / "results").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_results_that_are_read_only(tmp_path: Path):
    write_facts(tmp_path / "facts.csv")
    (tmp_path / "results").mkdir(mode=0o555)
    result = snakemake(tmp_path, "--cores", "2", config=CONFIG)
    assert result.returncode != 0
    assert_told_in_one_line(result.stderr + result.stdout, ["results: cannot be written", "writable folder"])


def with_nan(checkpoint: Path) -> None:
    """Spoil one number of one weight."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def with_few_words(checkpoint: Path) -> None:
    """Give the checkpoint a tokenizer of whole words that does not know Tokyo."""
    words = {word.strip(",") for fact in FACTS for part in fact[1:4] for word in part.replace("{}", "").split()}
    vocabulary = {"<unk>": 0, ",": 1, **{word: i for i, word in enumerate(sorted(words - {"Tokyo"}), start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_series_of_two_models_is_told_by_the_study(copied: Path):
    """Two checkpoints of one name but of different width: each can be scored, together they are no series."""
    trained = copied / "results/dense/checkpoints"
    shutil.copytree(trained / "0", copied / "runs/step1")
    narrow = Path(shutil.copytree(trained / "12", copied / "runs/step2"))
    weights = load_file(narrow / "model.safetensors")
    for name, weight in weights.items():
        if ".mlp." in name:
            weights[name] = np.ascontiguousarray(weight[:, :16] if "down_proj" in name else weight[:16])
    save_file(weights, narrow / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**settings, "intermediate_size": 16}))
    config = {**CONFIG, "series": [*CONFIG["series"], {"name": "mine", "source": "local", "path": "runs/step*"}]}
    result = snakemake(copied, "--cores", "2", "results/dynamics/mine/neuron_dynamics.parquet", config=config)
    assert result.returncode != 0
    line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(part in line for part in ("steps 1 and 2", "not the same ffn neurons", "take the others out")), line
    assert not (copied / "results/dynamics/mine/neuron_dynamics.parquet").exists()


def test_told_by_the_job_that_finds_it(copied: Path):
    """Two spoilt checkpoints, each told in one line; neither stops the other, nor touches what is finished."""
    before = files_below(copied)
    config = copy.deepcopy(CONFIG)
    for name, spoil in {"spoilt": with_nan, "wordy": with_few_words}.items():
        spoil(Path(shutil.copytree(copied / "results/moe/checkpoints/4", copied / name)))
        config["series"].append({"name": name, "source": "local", "path": name})
    wanted = [f"results/{name}/0/layers.parquet" for name in ("spoilt", "wordy")]
    result = snakemake(copied, "--cores", "2", "--keep-going", *wanted, config=config)
    assert result.returncode != 0
    wordy, spoilt = sorted(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(part in spoilt for part in ("spoilt", "model.norm.weight holds a NaN", "leave the step out"))
    assert all(part in wordy for part in ("capital/3", "Tokyo", "tokenizer"))
    assert "Traceback" not in result.stderr
    for name, line in {"spoilt": spoilt, "wordy": wordy}.items():
        assert line in (copied / f"results/logs/attribute/{name}/0.log").read_text()
    after = files_below(copied)
    assert before.items() <= after.items()
    assert not any(path.endswith(".parquet") for path in after.keys() - before.keys())
