"""The configuration: defaults, one-line errors, and a schema that cannot drift from the code."""

import copy
import dataclasses
import inspect

import jsonschema
import pytest
import yaml

from moescope import association, collaboration_report, config, expert_importance, pretraining
from tests.examples import ROOT

LOCAL = {"name": "mine", "source": "local", "path": "runs/step*"}
TRAINED = {"name": "mine", "source": "pretrain", "architecture": "olmoe"}


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def one(entry: dict, **changes) -> dict:
    return {"series": [{**entry, **changes}]}


def refused(raw: object) -> str:
    with pytest.raises(config.ConfigError) as error:
        config.effective(raw)
    message = str(error.value)
    assert "\n" not in message
    return message


def keys(part: dict, path: str = "") -> list[tuple[str, dict, bool]]:
    """Every key that the schema declares, with its schema, and whether it must stand there."""
    found = []
    for name, child in part.get("properties", {}).items():
        if set(child) - {"const", "enum", "$ref"}:  # what `if` compares is no declaration
            found.append((f"{path}.{name}", child, name in part.get("required", ())))
        found += keys(child, f"{path}.{name}")
    for branch in [*part.get("allOf", ()), *part.get("anyOf", ())]:
        found += keys(branch, path) + keys(branch.get("then", {}), path)
    if isinstance(part.get("items"), dict):
        found += keys(part["items"], f"{path}[]")
    return found


SCHEMA = config.schema()
FOUND = keys(SCHEMA) + [key for name, part in SCHEMA["$defs"].items() for key in keys(part, name)]
DECLARED = [(path, part) for path, part, _ in FOUND]


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert len(DECLARED) > 40  # the walk over it finds what there is


@pytest.mark.parametrize(("path", "part"), DECLARED, ids=[path for path, _ in DECLARED])
def test_every_key_is_described(path: str, part: dict):
    assert len(part["description"]) > 10
    if {"integer", "number"} & set(part.get("type", ())) or part.get("type") in ("integer", "number"):
        unitless = path.endswith((".seed", "[]"))
        assert unitless or "(" in part["description"], "a number says its unit in parentheses"


@pytest.mark.parametrize(("path", "part"), [(path, part) for path, part in DECLARED if "default" in part])
def test_a_default_is_allowed_by_its_own_key(path: str, part: dict):
    if part["default"] != {}:
        config._validator(part).validate(part["default"])


@pytest.mark.parametrize(("path", "part", "required"), FOUND, ids=[path for path, _, _ in FOUND])
def test_every_key_is_required_or_has_a_default(path: str, part: dict, required: bool):
    assert required != ("default" in part)


def test_defaults_of_the_training_are_those_of_the_library():
    training = config.effective(one(TRAINED))["series"][0]["training"]
    untold = {f.name: f.default for f in dataclasses.fields(pretraining.Training)}
    assert training == untold


def test_defaults_of_the_experiments_are_those_of_the_library():
    from moescope import experiments

    asked = config.effective(one(LOCAL))["collaboration"]
    told, untold = experiments.Asked.of({**asked, "seed": 0}), experiments.Asked()
    for name in (field.name for field in dataclasses.fields(untold)):
        given, own = getattr(told, name), getattr(untold, name)
        assert given == (list(own) if isinstance(own, tuple) else own), name
    search = inspect.signature(association.associate).parameters
    same = {"association": "by", "importance": "method", "permutations": "permutations", "strongest": "strongest"}
    assert {key: search[name].default for key, name in same.items()} == {key: asked[key] for key in same}


def test_every_choice_of_the_experiments_is_one_of_the_library():
    from moescope import expert_ablation

    part = SCHEMA["properties"]["collaboration"]["properties"]
    assert set(part["importance"]["enum"]) == set(expert_importance.METHODS) == set(collaboration_report.METHODS)
    assert set(part["semantics"]["items"]["enum"]) == set(expert_ablation.SEMANTICS)
    assert set(part["weights"]["items"]["enum"]) == set(expert_ablation.WEIGHTS)
    assert set(part["budgets"]["properties"]) == set(expert_ablation.MODES)
    assert tuple(part["association"]["enum"]) == association.BY


@pytest.mark.parametrize("architecture", ["olmoe", "olmo", "qwen2_moe", "llama"])
def test_default_shapes_are_keys_of_the_architecture(architecture: str):
    from transformers import CONFIG_MAPPING

    shape = config.effective(one(TRAINED, architecture=architecture))["series"][0]["shape"]
    known = CONFIG_MAPPING[architecture]().to_dict()
    assert shape.keys() <= known.keys()
    assert shape["num_key_value_heads"] == shape["num_attention_heads"]


def test_bring_your_own_is_its_own_keys_and_defaults():
    raw = read("configs/bring-your-own.yaml")
    own = {"name": "mine", "source": "local", "path": "runs/step*"}
    assert raw == {"series": [own]}
    assert config.effective(raw) == {
        "series": [
            {
                **own,
                "steps": "all",
                "studies": None,
                "dtype": "auto",
                "repo": None,
                "gguf_file": None,
                "allow_pickle": False,
                "allow_duplicates": False,
            }
        ],
        "relations": {"source": "embedded", "names": "all", "seed": 0},
        "attribution": {"target": "object", "norm": "final", "uncertainty": "groups"},
        "studies": ["dynamics", "collaboration"],
        "dynamics": {
            "series": "all",
            "steps": "all",
            "pairs": "auto",
            "windows": [[10000, 70000], [100000, 600000], [70000, 600000], [10000, 600000], [10000, 1200000]],
            "axis": "log",
        },
        "ablation": {"series": "all", "steps": {"log": 4}, "rankings": ["signed"], "seeds": 5, "neurons": 400},
        "collaboration": {
            "series": "all",
            "steps": "last",
            "stages": {},
            "importance": "top_neuron_frequency",
            "semantics": ["reroute", "reroute_logit", "min_logit", "zero_weight"],
            "budgets": {"top_n": "all", "only_rank": "all", "drop_rank": "all"},
            "weights": ["family", "keep"],
            "seeds": 5,
            "association": "probability",
            "permutations": 1000,
            "strongest": 10,
            "pairs": [],
            "gradient_steps": 64,
        },
    }


def test_nothing_leaks_from_the_embedded_default():
    """Snakemake merges a --configfile over config.yaml: maps merge, lists replace."""
    own, embedded = read("configs/bring-your-own.yaml"), read("config.yaml")
    assert embedded.keys() == {"series", "relations", "studies"}
    merged = copy.deepcopy(embedded)
    for key, value in own.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
    assert config.effective(merged) == config.effective(own)


def test_the_embedded_default_has_three_small_models():
    series = config.effective(read("config.yaml"))["series"]
    assert {entry["name"]: entry["architecture"] for entry in series} == {
        "tiny-olmoe": "olmoe",
        "tiny-olmo": "olmo",
        "tiny-qwen2-moe": "qwen2_moe",
    }


def test_the_raw_configuration_stays_as_it_is():
    raw = one(TRAINED)
    before = copy.deepcopy(raw)
    config.effective(raw)
    assert raw == before


def about_experts(**keys) -> dict:
    return {**one(LOCAL), "collaboration": keys}


def pair(head: list, expert: list, series: str = "mine") -> dict:
    return {"pairs": [{"series": series, "head": head, "expert": expert}]}


@pytest.mark.parametrize(
    "keys",
    [
        {"budgets": {"top_n": [0, 2], "only_rank": [], "drop_rank": [1]}},
        {"stages": {"mine": [1, 2]}},
        pair([21, 13], [21, 48]),
        {"strongest": 0, "permutations": 19, "seeds": 1, "gradient_steps": 2},
        {"steps": {"every": 2}, "series": ["mine"]},
    ],
)
def test_what_study_collaboration_can_be_asked(keys: dict):
    part = config.effective(about_experts(**keys))["collaboration"]
    assert {key: part[key] for key in keys} == keys


def test_leading_neurons_are_needed_by_the_study_that_reads_them():
    without = {**one(LOCAL), "attribution": {"uncertainty": "none"}}
    for studies in ([], ["dynamics"]):
        assert config.effective({**without, "studies": studies})["studies"] == studies
    for studies in ({}, {"studies": ["collaboration"]}):  # by default all are asked
        assert "studies: collaboration needs the leading neurons" in refused({**without, **studies})


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (one(LOCAL, pth="x"), ["series[0].pth: unknown key", "did you mean 'path'?"]),
        (one(LOCAL, architecture="olmoe"), ["series[0].architecture: unknown key", "known are"]),
        ({"series": [{"name": "mine", "source": "local", "pth": "x"}]}, ["series[0].pth", "'path'"]),
        ({"serie": []}, ["serie: unknown key", "'series'"]),
        ({}, ["'series' is missing"]),
        ({"series": [{"source": "local", "path": "x"}]}, ["series[0]", "'name' is missing"]),
        ({"series": [{"name": "mine", "path": "x"}]}, ["series[0]", "'source' is missing", "pretrain", "local"]),
        (one(LOCAL, source="web"), ["series[0].source", "'web'", "known are pretrain, local, hub"]),
        (one(LOCAL, dtype="bfloat"), ["series[0].dtype", "did you mean 'bfloat16'?"]),
        (one(LOCAL, steps="lst"), ["series[0].steps", "{every: n}", "{nearest: [..]}"]),
        (one(LOCAL, steps={"evry": 2}), ["series[0].steps", "{every: n}"]),
        (one(LOCAL, steps={"every": 0}), ["series[0].steps", "{every: n}"]),
        (one(LOCAL, name="my model"), ["series[0].name", "'my model'", "starts with a letter"]),
        (one(LOCAL, name="figures"), ["series[0].name", "'figures' is reserved"]),
        ({"series": [LOCAL, {**LOCAL, "path": "y"}]}, ["series[1].name", "'mine' already names series[0]"]),
        (one(TRAINED, architecture="gpt2"), ["series[0].architecture", "olmoe"]),
        (one(TRAINED, shape={"num_expert": 4}), ["series[0].shape.num_expert", "'num_experts'"]),
        (one(TRAINED, architecture="olmo", shape={"num_experts": 4}), ["series[0].shape.num_experts: unknown key"]),
        (one(TRAINED, shape={"hidden_size": 100}), ["series[0].shape.hidden_size", "8 heads"]),
        (one(TRAINED, shape={"num_key_value_heads": 3}), ["series[0].shape.num_key_value_heads", "divisor"]),
        (one(TRAINED, shape={"num_experts_per_tok": 64}), ["series[0].shape.num_experts_per_tok", "32 experts"]),
        (one(TRAINED, training={"learning_rate": "2e-3"}), ["training.learning_rate", "write it as 0.002"]),
        (one(TRAINED, training={"steps": 0}), ["series[0].training.steps", "minimum of 1"]),
        ({**one(LOCAL), "studies": ["dynamic"]}, ["studies[0]", "did you mean 'dynamics'?"]),
        (one(LOCAL, studies={"dynamic": "all"}), ["series[0].studies", "did you mean 'dynamics'?"]),
        (one(LOCAL, studies={"dynamics": "al"}), ["series[0].studies.dynamics", "{every: n}"]),
        ({**one(LOCAL), "dynamics": {"series": ["mein"]}}, ["dynamics.series[0]", "'mein'", "did you mean 'mine'?"]),
        ({**one(LOCAL), "ablation": {"series": ["mein"]}}, ["ablation.series[0]", "'mein'", "did you mean 'mine'?"]),
        ({**one(LOCAL), "ablation": {"rankings": ["sign"]}}, ["ablation.rankings[0]", "did you mean 'signed'?"]),
        ({**one(LOCAL), "ablation": {"seeds": 0}}, ["ablation.seeds", "minimum of 1"]),
        ({**one(LOCAL), "dynamics": {"axis": "time"}}, ["dynamics.axis", "log, step, tokens"]),
        ({**one(LOCAL), "dynamics": {"windows": [[5, 5]]}}, ["dynamics.windows[0]", "earlier step first"]),
        ({**one(LOCAL), "dynamics": {"pairs": [{"moe": "mine"}]}}, ["dynamics.pairs", "{moe: name, dense: name}"]),
        (
            {**one(LOCAL), "dynamics": {"pairs": [{"moe": "mine", "dense": "olmo"}]}},
            ["dynamics.pairs[0].dense", "there is no series 'olmo'", "known are mine"],
        ),
        (
            {"series": [LOCAL, {**LOCAL, "name": "x"}], "dynamics": {"pairs": [{"moe": "mine", "dense": "x"}] * 2}},
            ["dynamics.pairs[1].dense", "'x' stands in an earlier pair"],
        ),
        (one(LOCAL, name="collaboration"), ["series[0].name", "'collaboration' is reserved"]),
        ({**one(LOCAL), "studies": ["colaboration"]}, ["studies[0]", "did you mean 'collaboration'?"]),
        (one(LOCAL, studies={"colaboration": "last"}), ["series[0].studies", "did you mean 'collaboration'?"]),
        (about_experts(series=["mein"]), ["collaboration.series[0]", "'mein'", "did you mean 'mine'?"]),
        (about_experts(steps="lst"), ["collaboration.steps", "{nearest: [..]}"]),
        (about_experts(semantic=["reroute"]), ["collaboration.semantic: unknown key", "did you mean 'semantics'?"]),
        (about_experts(semantics=["rerout"]), ["collaboration.semantics[0]", "'rerout'", "did you mean 'reroute'?"]),
        (about_experts(semantics=[]), ["collaboration.semantics", "How experts are blocked"]),
        (about_experts(weights=["kep"]), ["collaboration.weights[0]", "did you mean 'keep'?"]),
        (about_experts(importance="routing_freq"), ["collaboration.importance", "did you mean 'routing_frequency'?"]),
        (about_experts(association="weights"), ["collaboration.association", "did you mean 'weight'?"]),
        (about_experts(budgets={"topn": [1]}), ["collaboration.budgets.topn: unknown key", "'top_n'"]),
        (about_experts(budgets={"top_n": 2}), ["collaboration.budgets.top_n", "write all or a list of numbers"]),
        (about_experts(budgets={"only_rank": [1, 0]}), ["collaboration.budgets.only_rank", "count from 1; drop the 0"]),
        (about_experts(budgets={"drop_rank": [0]}), ["collaboration.budgets.drop_rank", "count from 1; drop the 0"]),
        (about_experts(seeds=0), ["collaboration.seeds", "minimum of 1"]),
        (about_experts(permutations=18), ["collaboration.permutations", "minimum of 19"]),
        (about_experts(strongest=-1), ["collaboration.strongest", "minimum of 0"]),
        (about_experts(gradient_steps=1), ["collaboration.gradient_steps", "minimum of 2"]),
        (about_experts(stages={"mein": [1, 2]}), ["collaboration.stages.mein", "did you mean 'mine'?"]),
        (about_experts(stages={"mine": [13, 6]}), ["collaboration.stages.mine: 13 is not before 6", "earlier layer"]),
        (about_experts(stages={"mine": [6, 6]}), ["collaboration.stages.mine: 6 is not before 6"]),
        (about_experts(stages={"mine": [0, 6]}), ["collaboration.stages.mine[0]", "write 1 or more"]),
        (about_experts(stages={"mine": [6]}), ["collaboration.stages.mine", "write first middle and first late layer"]),
        (about_experts(**pair([1, 0], [2, 0], "mein")), ["collaboration.pairs[0].series", "did you mean 'mine'?"]),
        (about_experts(**pair([1], [2, 0])), ["collaboration.pairs[0].head: [1]", "write layer and number"]),
        (about_experts(**pair([1, 0], [2, 0, 0])), ["collaboration.pairs[0].expert: [2, 0, 0]", "layer and number"]),
        (about_experts(**pair([1, 0], [2, -1])), ["collaboration.pairs[0].expert[1]", "minimum of 0"]),
        (
            about_experts(pairs=[{"series": "mine", "head": [1, 0]}]),
            ["collaboration.pairs[0]: key 'expert' is missing", "such as [20, 59]"],
        ),
        (
            about_experts(**pair([22, 13], [21, 48])),
            [
                "collaboration.pairs[0]: head 13 of layer 22 lies after expert 48 of layer 21",
                "name a head of layer 21 or before",
            ],
        ),
        ({**one(LOCAL), "relations": "lre"}, ["relations", "keys and values ({key: value}) expected"]),
        ({**one(LOCAL), "relations": {"names": "colour"}}, ["relations.names", "a list of relation names"]),
        (
            {**one(LOCAL), "attribution": {"target": "subject"}},
            ["attribution.target", "'subject'", "mean 'object'?"],
        ),
        ([], ["config"]),
    ],
)
def test_an_error_is_one_line_with_the_key_and_the_cure(raw: object, parts: list[str]):
    message = refused(raw)
    assert all(part in message for part in parts), message


def test_environments_pin_what_the_lock_pins():
    """Two places for one version drift apart unless something looks."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for path in (ROOT / "envs").glob("*.yaml"):
        (packages,) = (d["pip"] for d in yaml.safe_load(path.read_text())["dependencies"] if isinstance(d, dict))
        pinned = dict(package.split(" ==") for package in packages)
        assert pinned == {name: locked[name] for name in pinned}, path
