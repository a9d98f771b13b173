"""Pre-training: what is trained on, that it is learned, and that the saved series is the one that was trained."""

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import polars as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope import pretraining, relations
from moescope.pretraining import EOS, PAD, PretrainingError, Training
from moescope.relations import Fact, Relation
from tests.examples import ROOT

CAPITALS = (
    "France Paris Spain Madrid Italy Rome Japan Tokyo Egypt Cairo Peru Lima Kenya Nairobi Cuba Havana Iran Tehran "
)
CAPITALS += "Iraq Baghdad Norway Oslo Greece Athens"
COLOURS = "lemons yellow cherries red limes green plums purple coal black snow white bricks brown skies blue ash grey "
COLOURS += "carrots orange flamingos pink coins golden"


def relation(name: str, words: str, *templates: str) -> Relation:
    words = words.split()
    facts = tuple(Fact(*pair) for pair in zip(words[::2], words[1::2], strict=True))
    return Relation(name, "micro", templates[:1], templates[1:], facts, source="")


RELATIONS = [
    relation("capital", CAPITALS, "The capital of {} is", "{} is governed from", "Fly to {} and land in"),
    relation("colour", COLOURS, "The usual colour of {} is", "People paint {} in", "Ask anyone: {} are always"),
]
MICRO = Training(steps=12, save_at=(0, 5, 12), batch=4, length=32, vocabulary=400, learning_rate=0.005, held_out=0.25)
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
SHAPES = {
    "olmoe": WIDTH | {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
    "olmo": WIDTH | {"intermediate_size": 64},
    "qwen2_moe": WIDTH
    | {
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
    },
    "llama": WIDTH | {"intermediate_size": 64},
}


def train(folder, architecture="olmoe", training=MICRO, facts=RELATIONS):
    return pretraining.pretrain(architecture, SHAPES[architecture], training, facts, folder, progress=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these lose time with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One micro-run of a mixture of experts: folder, table of the training, table of the exposure."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *train(folder)


@pytest.fixture
def windows(monkeypatch) -> list[list[int]]:
    """Every window that a model is given while the test runs, the batch after the last update included."""
    given = []

    def losses(model, ids, measure=pretraining._losses):
        given.extend(ids.tolist())
        return measure(model, ids)

    monkeypatch.setattr(pretraining, "_losses", losses)
    return given


def setup(training: Training, facts=RELATIONS):
    exposed = pretraining.corpus(facts, training)
    return exposed, pretraining.train_tokenizer((d for f in exposed for d in f.documents), training.vocabulary)


def decoded(tokenizer, ids) -> list[str]:
    """The documents of a window, read back from its tokens."""
    *documents, rest = tokenizer.decode(ids).split(EOS)
    assert rest.replace(PAD, "") == "", "a window ends with a whole document and padding"
    return [document.removeprefix(" ") for document in documents]


def drawn(training: Training, facts=RELATIONS) -> list[str]:
    """Every document of the run, in order, decoded from the windows; without training."""
    exposed, tokenizer = setup(training, facts)
    stream = pretraining.batches(exposed, tokenizer, training)
    windows = (window for _ in range(training.steps) for window in next(stream).ids)
    return [document for window in windows for document in decoded(tokenizer, window)]


def hashes(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What is trained on


def test_exposures_are_the_documents_in_the_windows(windows, tmp_path):
    """Counted from the text that the model was given: which fact each document shows, in any template."""
    _, exposure = train(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "0")
    trained = windows[: MICRO.steps * MICRO.batch]
    assert len(windows) == len(trained) + MICRO.batch
    facts = {
        f"{relation.name}/{row}": (fact, relation.all_templates)
        for relation in RELATIONS
        for row, fact in enumerate(relation.facts)
    }
    shown = Counter()
    for document in (document for window in trained for document in decoded(tokenizer, window)):
        (prompt_id,) = [
            prompt_id
            for prompt_id, (fact, templates) in facts.items()
            if document in [t.format(fact.subject) + f" {fact.object}." for t in templates]
        ]
        shown[prompt_id] += 1
    assert shown.total() > 100
    assert dict(exposure.select("prompt_id", "exposures").iter_rows()) == {p: shown[p] for p in facts}


def test_held_out_facts_are_never_seen_in_the_scored_template(windows, tmp_path):
    training = replace(MICRO, steps=60, save_at=(0,), batch=16, zipf=0.5)
    train(tmp_path, training=training)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "0")
    documents = [document for window in windows for document in decoded(tokenizer, window)]
    exposed = {fact.prompt_id: fact for fact in pretraining.corpus(RELATIONS, training)}
    for row in relations.prompts(RELATIONS):
        as_scored = [document for document in documents if document.startswith(row["text"] + " ")]
        about = [d for d in documents if row["subject"] in d and d.endswith(f" {row['object']}.")]
        assert about, "every fact is seen in some template"
        assert bool(as_scored) != exposed[row["prompt_id"]].held_out
    held = [prompt_id.split("/")[0] for prompt_id, fact in exposed.items() if fact.held_out]
    assert Counter(held) == {"capital": 3, "colour": 3}, "a quarter of each relation"


def test_held_out_subjects_take_all_their_facts_with_them():
    """Two objects of a subject share a prompt: one of them in training would show it."""
    both = relation("speaks", "Chad French Chad Arabic Mali French Togo French", "In {} they speak", "{} talks")
    for seed in range(8):
        first, second, *_ = pretraining.corpus([both], Training(seed=seed, held_out=0.34))
        assert first.held_out == second.held_out


@pytest.mark.parametrize("twin", ["the Capital  of {} is", "Everyone knows that the capital of {} is"])
def test_a_template_that_ends_like_the_scored_one_is_no_paraphrase(twin, caplog):
    facts = relation("capital", CAPITALS, "The capital of {} is", twin)
    assert not any(fact.held_out for fact in pretraining.corpus([facts], Training()))
    assert "capital: 0 of its 12 subjects have a template besides the scored one" in caplog.text


def test_a_single_template_cannot_be_held_out(caplog):
    alone = relation("capital", CAPITALS, "The capital of {} is")
    exposed = pretraining.corpus([alone, RELATIONS[1]], MICRO)
    assert {fact.prompt_id.split("/")[0] for fact in exposed if fact.held_out} == {"colour"}
    assert "capital: 0 of its 12 subjects" in caplog.text


def test_facts_with_templates_of_their_own_are_held_out_of_those():
    facts = (Fact("France", "Paris", "The capital of {} is"), Fact("Spain", "Madrid", "{} is ruled from"))
    own = Relation("capital", "user", ("The capital of {} is", "{} is ruled from"), (), facts, "")
    france, spain = pretraining.corpus([own], Training(held_out=0.99))
    assert france.documents == ("France is ruled from Paris.",)
    assert spain.documents == ("The capital of Spain is Madrid.",)


def test_what_is_held_out_depends_on_neither_the_order_nor_the_other_facts():
    def held(facts):
        return {f.prompt_id for f in pretraining.corpus(facts, MICRO) if f.held_out}

    assert held(RELATIONS[::-1]) == held(RELATIONS)
    assert held(RELATIONS[:1]) == {p for p in held(RELATIONS) if p.startswith("capital/")}
    assert {f.prompt_id for f in pretraining.corpus(RELATIONS, replace(MICRO, seed=1)) if f.held_out} != held(RELATIONS)


def test_exposure_follows_zipf():
    """Chi-square of the documents against 1/rank, and against laws that it is not."""
    training = replace(MICRO, zipf=1.0, batch=16)
    exposed, tokenizer = setup(training)
    stream = pretraining.batches(exposed, tokenizer, training)
    counts = Counter(fact for _ in range(300) for fact in next(stream).facts)
    observed = [counts[i] for i in sorted(range(24), key=lambda i: -exposed[i].share)]

    def chance(exponent):
        law = [rank**-exponent for rank in range(1, 25)]
        return stats.chisquare(observed, [sum(observed) * share / sum(law) for share in law]).pvalue

    assert sum(observed) > 10_000
    assert chance(1.0) > 1e-3
    assert chance(0.9) < 1e-6
    assert chance(1.1) < 1e-6
    ranks = [sorted(pretraining.corpus(RELATIONS, replace(training, seed=s)), key=lambda f: -f.share) for s in (0, 1)]
    assert [f.prompt_id for f in ranks[0]] != [f.prompt_id for f in ranks[1]]


def test_the_templates_of_a_fact_are_alike():
    """Its documents come in turn: equally often, but for the last round."""
    training = replace(MICRO, steps=300, batch=4, zipf=2.0)
    most = max(pretraining.corpus(RELATIONS, training), key=lambda fact: fact.share)
    seen = Counter(document for document in drawn(training) if document in most.documents)
    assert sum(seen.values()) > 1_000
    assert max(seen[d] for d in most.documents) - min(seen[d] for d in most.documents) <= 1


def test_a_fact_that_is_not_held_out_is_first_shown_in_its_scored_template():
    """So the seen part of the accuracy is seen: no fact is counted there whose scored prompt never came up."""
    facts = {fact.prompt_id: fact for fact in pretraining.corpus(RELATIONS, MICRO)}
    scored = {row["prompt_id"]: f"{row['text']} {row['object']}." for row in relations.prompts(RELATIONS)}
    # few steps, so that many facts have not been through all their documents
    shown = set(drawn(replace(MICRO, steps=10, save_at=(10,))))
    checked = 0
    for prompt_id, fact in facts.items():
        missing = set(fact.documents) - shown
        if missing and missing != set(fact.documents) and not fact.held_out:
            assert scored[prompt_id] in shown
            checked += 1
        assert not (fact.held_out and scored[prompt_id] in shown)
    assert checked > 5


def test_no_document_is_cut_or_lost():
    """Windows of another size hold the same documents: none is dropped where a batch ends."""
    narrow, wide = (drawn(replace(MICRO, length=n, steps=60)) for n in (24, 64))
    assert len(wide) > 2 * len(narrow) > 600
    # Within a batch the windows change the order, so a whole batch more of the wide ones is needed.
    assert not Counter(narrow) - Counter(wide[: len(narrow) + 60])


def test_padding_is_rare():
    exposed, tokenizer = setup(MICRO)
    stream = pretraining.batches(exposed, tokenizer, replace(MICRO, length=64))
    ids = torch.cat([torch.from_numpy(next(stream).ids) for _ in range(50)])
    assert (ids == tokenizer.pad_token_id).float().mean() < 0.15


# The tokenizer


def test_tokenizer_gives_texts_back_and_adds_no_special_token():
    _, tokenizer = setup(MICRO)
    for text in ["The capital of France is", "São Tomé's price: 12 €", "x  y\n", "日本"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids).removeprefix(" ") == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert len(tokenizer) == MICRO.vocabulary


def test_a_word_is_the_same_tokens_everywhere_and_objects_follow_their_prompt():
    _, tokenizer = setup(MICRO)
    assert tokenizer("France")["input_ids"] == tokenizer(" France")["input_ids"]
    for row in relations.prompts(RELATIONS):
        prompt, whole, answer = (
            tokenizer(text)["input_ids"]
            for text in (row["text"], f"{row['text']} {row['object']}", f" {row['object']}")
        )
        assert whole == prompt + answer
        assert tokenizer.decode(answer[:1]).strip(), "a bare blank would say nothing of the object"


def test_tokenizer_is_the_same_in_every_process():
    """Hash tables of another order must not change the merges."""
    code = "from tests.model.test_pretraining import *; print(setup(MICRO)[1].backend_tokenizer.to_str())"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'workflow/scripts'}"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert other.stdout.strip() == setup(MICRO)[1].backend_tokenizer.to_str()


# The training


@pytest.mark.parametrize("architecture", SHAPES)
def test_documents_of_a_window_are_read_apart(architecture):
    """The loss of packed windows is that of their documents alone, each from position 0, as a prompt is read."""
    exposed, tokenizer = setup(MICRO)
    ids = torch.from_numpy(next(pretraining.batches(exposed, tokenizer, MICRO)).ids)
    torch.manual_seed(3)
    config = pretraining.model_config(architecture, SHAPES[architecture], len(tokenizer))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # sharp attention, so that a wrong mask or position is felt
        loss, objective = pretraining._losses(model, ids)
        total, tokens = 0.0, 0
        for window in ids:
            for document in decoded(tokenizer, window):
                alone = torch.tensor([*tokenizer(document)["input_ids"], tokenizer.eos_token_id])
                logits = model(input_ids=alone[None]).logits[0]
                total += F.cross_entropy(logits[:-1], alone[1:], reduction="sum").item()
                tokens += len(alone) - 1
    assert loss == pytest.approx(total / tokens, rel=1e-5)
    assert (objective.item() > loss) == (architecture in ("olmoe", "qwen2_moe")), "experts are balanced"


def test_balance_loss_has_the_weight_of_the_architecture():
    exposed, tokenizer = setup(MICRO)
    ids = torch.from_numpy(next(pretraining.batches(exposed, tokenizer, MICRO)).ids)
    model = AutoModelForCausalLM.from_config(pretraining.model_config("olmoe", SHAPES["olmoe"], len(tokenizer))).eval()
    with torch.no_grad():
        loss, objective = pretraining._losses(model, ids)
        positions = pretraining._positions(ids)
        routers = model(input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True).router_logits
    probabilities = torch.cat(routers).softmax(dim=-1)
    routed = F.one_hot(probabilities.topk(2).indices, 8).float().sum(1).mean(0)
    balance = 8 * (routed * probabilities.mean(0)).sum().item()
    assert objective.item() - loss == pytest.approx(0.01 * balance, rel=1e-4)


def test_equal_seeds_give_equal_bytes_whatever_else_draws(run, tmp_path):
    folder, training, exposure = run
    torch.manual_seed(1234)
    torch.rand(7)
    before = torch.get_rng_state()
    again = train(tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left alone"
    assert not torch.are_deterministic_algorithms_enabled()
    assert hashes(tmp_path) == hashes(folder)
    assert again[0].equals(training)
    assert again[1].equals(exposure)


def test_equal_seeds_give_equal_bytes_with_two_threads(tmp_path, monkeypatch):
    """Where a token goes to four experts, so that their gradients could be added in any order."""
    monkeypatch.setitem(SHAPES, "olmoe", SHAPES["olmoe"] | {"num_experts_per_tok": 4})
    torch.set_num_threads(2)
    try:
        for name in "ab":
            train(tmp_path / name, training=replace(MICRO, steps=5, save_at=(5,), batch=32, length=64))
    finally:
        torch.set_num_threads(1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_another_seed_gives_another_series(run, tmp_path):
    folder, _, exposure = run
    other = train(tmp_path, training=replace(MICRO, seed=1))[1]
    weights = "0/model.safetensors"
    assert hashes(tmp_path)[weights] != hashes(folder)[weights]
    assert not other.equals(exposure)


def test_saved_files_and_nothing_else(run):
    folder, _, _ = run
    expected = {f"{step}/{name}" for step in MICRO.save_at for name in pretraining.CHECKPOINT_FILES}
    assert set(hashes(folder)) == expected
    config = json.loads((folder / "5/config.json").read_text())
    assert config["model_type"] == "olmoe"
    assert config["dtype"] == "float32"
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (MICRO.vocabulary, 0, 1)
    assert not config.get("output_router_logits"), "the saved model behaves as usual"


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_checkpoint_loads_as_it_was(architecture, tmp_path):
    _, tokenizer = setup(MICRO)
    config = pretraining.model_config(architecture, SHAPES[architecture], len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "left over").touch()
    pretraining.save_checkpoint(model, tokenizer, tmp_path / "7")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["7", *pretraining.CHECKPOINT_FILES])
    loaded, weights = AutoModelForCausalLM.from_pretrained(tmp_path / "7"), model.state_dict()
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "7")
    for text in ["The capital of France is", " Paris", "Paris", "ünïcode, isn't it?  2"]:
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (reloaded.eos_token_id, reloaded.pad_token_id) == (0, 1)


def test_the_table_describes_the_saved_checkpoints(run):
    """The loss of a saved step, computed anew on the batch that came next, stands in its row."""
    folder, training, _ = run
    exposed, tokenizer = setup(MICRO)
    stream = pretraining.batches(exposed, tokenizer, MICRO)
    rows, tokens = training.rows_by_key("step", unique=True, named=True), 0
    assert list(rows) == list(range(MICRO.steps + 1))
    for step in rows:
        ids = torch.from_numpy(next(stream).ids)
        assert rows[step]["tokens"] == tokens
        tokens += int((ids != tokenizer.pad_token_id).sum())
        if step in MICRO.save_at:
            model = AutoModelForCausalLM.from_pretrained(folder / str(step))
            with torch.no_grad():
                loss, _ = pretraining._losses(model, ids)
            assert rows[step]["loss"] == pytest.approx(loss, rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(math.log(MICRO.vocabulary), rel=0.02)
    assert [row["lr"] for row in rows.values()] == [
        0.0,
        *(pretraining.learning_rate(MICRO, step) for step in range(1, MICRO.steps + 1)),
    ]


def ranks(folder, facts=RELATIONS) -> pl.DataFrame:
    """Rank of the object's first token behind the scored prompt, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    with torch.no_grad():
        for row in relations.prompts(facts):
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0, -1]
            target = tokenizer(" " + row["object"])["input_ids"][0]
            rows.append((row["prompt_id"], int((logits > logits[target]).sum()) + 1))
    return pl.DataFrame(rows, schema=["prompt_id", "rank"], orient="row")


def test_facts_are_learned_in_held_out_words_too(tmp_path):
    """24 facts: unknown before the training, known after it, and not by their string only; frequent ones first."""
    training = replace(MICRO, steps=260, save_at=(0, 100, 260), batch=8, learning_rate=0.006, zipf=1.0, held_out=0.2)
    losses, exposure = train(tmp_path, training=training)
    assert losses["loss"][-10:].mean() < 0.3 * losses["loss"][:3].mean()
    known = {step: ranks(tmp_path / str(step)).join(exposure, on="prompt_id") for step in training.save_at}
    hit = {
        (step, held_out): part.select((pl.col("rank") <= 10).mean()).item()
        for step, frame in known.items()
        for (held_out,), part in frame.group_by("held_out")
    }
    assert hit[0, False] < 0.2
    assert hit[260, False] > 0.9
    assert hit[260, True] > hit[0, True] + 0.5
    first = known[260].filter(pl.col("rank") == 1)
    assert len(first) > 0.8 * len(known[260])
    early = known[100].sort("exposures")
    assert early.tail(8)["rank"].mean() < early.head(8)["rank"].mean()


# What cannot be trained


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "training.steps is 0; train for at least 1"),
        ({"steps": 10, "save_at": (0, 20)}, "training.save_at: step 20 is not within 0..10; remove it or raise"),
        ({"save_at": (-1,)}, "training.save_at: step -1 is not within 0..800"),
        ({"save_at": ()}, "training.save_at is empty"),
        ({"vocabulary": 257}, "training.vocabulary is 257; 256 bytes and 2 special tokens need at least 258"),
        ({"held_out": 1.0}, "training.held_out is 1.0"),
        ({"learning_rate": 0.0}, "training.learning_rate is 0.0"),
        ({"lerning_rate": 0.1}, "training.lerning_rate: unknown, did you mean learning_rate?"),
    ],
)
def test_a_training_that_cannot_be_is_refused(values, message):
    with pytest.raises(PretrainingError) as error:
        Training.of(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "shape", "message"),
    [
        ("olmoee", {}, "architecture olmoee: not a causal language model of transformers, did you mean olmoe"),
        ("bert", WIDTH | {"num_key_value_heads": None}, None),
        ("olmo", {"hiden_size": 8}, "shape.hiden_size: olmo has no such key, did you mean hidden_size"),
        ("olmo", {"num_experts": 8}, "shape.num_experts: olmo has no such key"),
        ("olmo", {"vocab_size": 8}, "shape.vocab_size: cannot be set here (training.vocabulary sets it)"),
        ("olmo", {"hidden_size": 30}, "shape: hidden_size 30 cannot be split into 4 num_attention_heads"),
        ("olmo", {"num_key_value_heads": 3}, "shape: 4 num_attention_heads cannot share 3 keys and values"),
        ("olmo", {"hidden_size": "wide"}, "shape: olmo refuses it"),
        ("olmo", {"hidden_act": "glow"}, "shape: olmo does not run with it"),
        ("olmo", {"max_position_embeddings": 16}, "shape.max_position_embeddings: 16 positions hold no window of 32"),
        ("olmoe", {"num_experts": 2, "num_experts_per_tok": 4}, "shape: num_experts_per_tok 4 is more than the 2"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_training(architecture, shape, message, tmp_path):
    if message is None:
        shape = {key: value for key, value in shape.items() if value is not None}
        message = "architecture bert: its predictions depend on later tokens"
    else:
        shape = SHAPES.get(architecture, {}) | shape
    with pytest.raises(PretrainingError) as error:
        pretraining.pretrain(architecture, shape, MICRO, RELATIONS, tmp_path, progress=False)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_a_document_longer_than_a_window_is_named(tmp_path):
    long = relation(
        "capital", CAPITALS, "The capital of {} is", "A very long way of putting it is that {} is ruled from"
    )
    with pytest.raises(PretrainingError, match=r"^capital/\d+: a document of \d+ tokens .* set training.length to"):
        train(tmp_path, facts=[long], training=replace(MICRO, length=10))


def test_a_loss_that_is_no_number_names_step_and_cure(tmp_path):
    with pytest.raises(PretrainingError, match=r"olmoe: the loss is \w+ after step \d+; lower training.learning_rate"):
        train(tmp_path, training=replace(MICRO, learning_rate=1e25))


def test_no_facts():
    with pytest.raises(PretrainingError, match="no facts to train on"):
        pretraining.corpus([], MICRO)


# The plan


def test_schedule():
    training = Training(steps=200, learning_rate=1.0)
    rates = [pretraining.learning_rate(training, step) for step in range(1, 201)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]), "5% of the steps up"
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1)
    assert rates[104] == pytest.approx(0.55, abs=0.01), "half-way down in the middle"


@pytest.mark.parametrize("steps", [1, 5, 30, 800, 100_000])
def test_saved_steps_are_log_spaced(steps):
    saved = list(Training(steps=steps).save_at)
    assert saved == sorted(set(saved))
    assert (saved[0], saved[-1]) == (0, steps)
    assert len(saved) == 12 or steps < 100
    if steps >= 800:
        ratios = [b / a for a, b in itertools.pairwise(saved[1:])]
        assert max(ratios) / min(ratios) < 1.15


def test_the_snakefile_needs_no_torch_to_plan():
    code = (
        "import sys; from moescope import pretraining as p; "
        "print(p.Training.of({'steps': 4, 'save_at': [0, 4]}).save_at, p.CHECKPOINT_FILES); "
        "sys.exit(str({'torch', 'transformers', 'numpy', 'polars'} & set(sys.modules) or '') or 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "workflow/scripts")}
    )


def test_the_shipped_pair_has_equal_total_parameters():
    """tiny-olmoe and tiny-olmo, as config.yaml and the schema shape them: within 0.1%; tiny-qwen2-moe near them."""
    from moescope import config

    entries = {
        entry["name"]: entry for entry in config.effective(yaml.safe_load((ROOT / "config.yaml").read_text()))["series"]
    }
    parameters = {}
    for name, entry in entries.items():
        training = Training.of(entry["training"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                pretraining.model_config(entry["architecture"], entry["shape"], training.vocabulary)
            )
        parameters[name] = sum(parameter.numel() for parameter in model.parameters())
    moe, dense = parameters["tiny-olmoe"], parameters["tiny-olmo"]
    assert abs(moe - dense) < 0.001 * moe
    assert abs(parameters["tiny-qwen2-moe"] - moe) < 0.01 * moe
