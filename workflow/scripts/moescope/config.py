"""The configuration: checked against the schema, completed with its defaults, refused in one line.

The schema (workflow/schemas/config.schema.yaml) is the home of keys, units and defaults. It is a plain JSON schema;
only ``x-cure`` is ours: what the error tells the user to do.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from moescope.errors import MoescopeError
from moescope.pairs import Pair, PairError

SCHEMA = Path(__file__).parents[2] / "schemas" / "config.schema.yaml"
#: The configuration that others are laid over.
DEFAULT = Path(__file__).parents[3] / "config.yaml"
#: Folders and targets of the workflow, which no series may be named after.
RESERVED = (
    *("all", "attribution", "ablation", "figures", "tables", "catalogs", "logs", "report"),
    *("dynamics", "collaboration", "utilization", "localization", "relations", "prompts"),
)


#: What the types of a JSON schema are called in YAML.
_KINDS = {"array": "a list ([a, b])", "object": "keys and values ({key: value})", "string": "text", "null": "null"}


class ConfigError(MoescopeError):
    """The configuration asks for something that does not exist or cannot be."""


@functools.cache
def schema() -> dict:
    """The schema of config.yaml."""
    return yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))


def effective(raw: dict) -> dict:
    """The configuration with every default filled in; ``raw`` stays as it is.

    Raises ConfigError, one line with the key and the cure, on an unknown key, a value that the schema does not allow,
    two series of one name, a reserved name, a model that contradicts itself, and a study of series that are not there.
    """
    _validate(raw)
    config = _fill(copy.deepcopy(raw), schema())
    for i, entry in enumerate(config["series"]):
        _check_name(config["series"], i)
        if entry["source"] == "pretrain":
            _complete_shape(entry["shape"], f"series[{i}].shape")
        if entry["source"] == "hub":
            _check_revisions(entry, f"series[{i}]")
    _check_studies(config)
    _check_collaboration(config)
    return config


def read(paths: Iterable[str | Path]) -> dict:
    """The configuration in these files, later over earlier ones as Snakemake lays them: maps merge, lists replace.

    Raises ConfigError where one cannot be read.
    """
    merged: dict = {}
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); correct the file") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: the file must hold keys and values, beginning with series")
        _lay_over(merged, content)
    return merged


def read_in(directory: str | Path, paths: Iterable[str | Path]) -> dict:
    """The default configuration and those in these files over it; then go to the directory of the run, to which what
    stands in them is relative."""
    found = read([DEFAULT, *paths])
    try:
        os.chdir(directory)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be gone to ({error.strerror}); make the folder") from error
    return found


def _lay_over(below: dict, above: dict) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _lay_over(below[key], value)
        else:
            below[key] = value


# Defaults ------------------------------------------------------------------------------------------------------------


def _applied(part: dict, value: Any) -> Iterator[dict]:
    """The schemas that hold for a value: the part itself, what it refers to, and the branches that its keys choose."""
    if "$ref" in part:
        yield from _applied(_resolve(part["$ref"]), value)
    yield part
    for branch in part.get("allOf", ()):
        if "if" not in branch:
            yield from _applied(branch, value)
        elif _validator(branch["if"]).is_valid(value):
            yield from _applied(branch["then"], value)


def _resolve(reference: str) -> dict:
    return functools.reduce(lambda part, key: part[key], reference.removeprefix("#/").split("/"), schema())


def _properties(part: dict, value: Any) -> dict[str, dict]:
    """The keys that a mapping may hold, each with its schema."""
    keys: dict[str, dict] = {}
    for applied in _applied(part, value):
        for key, child in applied.get("properties", {}).items():
            keys[key] = {**_resolve(child["$ref"]), **child} if "$ref" in child else child
    return keys


def _fill(value: Any, part: dict) -> Any:
    """Put the defaults of a valid value in place, parents before children."""
    if isinstance(value, dict):
        for key, child in _properties(part, value).items():
            if key not in value and "default" in child:
                value[key] = copy.deepcopy(child["default"])
            if key in value:
                _fill(value[key], child)
    elif isinstance(value, list) and "items" in part:
        for item in value:
            _fill(item, part["items"])
    return value


# Errors --------------------------------------------------------------------------------------------------------------


def _validator(part: dict) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$defs": schema()["$defs"], **part})


def _validate(raw: dict) -> None:
    if not isinstance(raw, dict):
        raise ConfigError("config: the file must hold keys and values, beginning with series")
    errors = list(_validator(schema()).iter_errors(raw))
    lines = sorted((_rank(error), i, line) for i, error in enumerate(errors) if (line := _line(error)))
    if lines:
        raise ConfigError(lines[0][-1])


def _rank(error: jsonschema.ValidationError) -> int:
    """What is told first: a wrong choice (which decides what else may stand there), an unknown key, then the rest."""
    if error.validator == "enum" or (error.validator == "required" and "source" in _missing(error)):
        return 0
    return 1 if error.validator in ("additionalProperties", "unevaluatedProperties") else 2


def _line(error: jsonschema.ValidationError) -> str | None:
    """One line for a schema error; None where it only follows from another one."""
    path, part, value = _path(error.absolute_path), error.schema, error.instance
    match error.validator:
        case "additionalProperties" | "unevaluatedProperties":
            known = list(_properties(part, value))
            unknown = [key for key in value if key not in known]
            return _unknown_key(path, str(unknown[0]), known) if unknown else None
        case "required":
            missing = _missing(error)[0]
            about = _properties(part, value).get(missing, {}).get("description", "")
            return f"{path or 'config'}: key {missing!r} is missing; add it{f' ({_brief(about)})' if about else ''}"
        case "enum":
            return f"{path}: {value!r} is not known; {_choose(str(value), error.validator_value)}"
        case "anyOf":
            return f"{path}: {value!r} cannot stand here; write {_or([b['title'] for b in error.validator_value])}"
        case "type":
            wanted = _or([_KINDS.get(kind, kind) for kind in _list(error.validator_value)])
            return f"{path or 'config'}: {wanted} expected, not {value!r}{_as_number(value)}"
        case "const" | "if":
            return None
    if "x-cure" in part:
        return f"{path}: {value!r} cannot stand here; {part['x-cure']}"
    return f"{path}: {error.message} ({_brief(part.get('description', ''))})"


def _path(keys: Sequence[str | int]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def _missing(error: jsonschema.ValidationError) -> list[str]:
    return [key for key in error.validator_value if key not in error.instance]


def _unknown_key(path: str, key: str, known: Sequence[str]) -> str:
    return f"{path}.{key}: unknown key; {_choose(key, known)}".removeprefix(".")


def _choose(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(map(str, known))}"


def _brief(description: str) -> str:
    return re.split(r"[.;:](?:\s|$)", description, maxsplit=1)[0]


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _or(words: Sequence[Any]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, words[:-1])), str(words[-1])]))


def _as_number(value: Any) -> str:
    """YAML reads 2e-3 as text: say how to write it."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        number = math.nan
    return f"; write it as {number:.10g}" if math.isfinite(number) else ""


# What a schema cannot say --------------------------------------------------------------------------------------------


def _check_name(series: list[dict], i: int) -> None:
    name, earlier = series[i]["name"], [entry["name"] for entry in series[:i]]
    if name in RESERVED:
        raise ConfigError(f"series[{i}].name: {name!r} is reserved for a part of the workflow; choose another")
    if name in earlier:
        raise ConfigError(f"series[{i}].name: {name!r} already names series[{earlier.index(name)}]; choose another")


def _check_revisions(entry: dict, path: str) -> None:
    """Which revisions of a repository: one, or those whose names a pattern (or a stage of the known one) matches."""
    if entry["revision"] and (other := next((key for key in ("stage", "pattern") if entry[key]), None)):
        raise ConfigError(f"{path}.revision: is a single checkpoint, which has no {other}; drop one of the two")
    if entry["revision"] and entry["steps"] not in ("all", "last"):
        raise ConfigError(f"{path}.revision: is a single checkpoint, which has no steps; drop one of the two")
    if entry["pattern"] and entry["stage"]:
        raise ConfigError(f"{path}.pattern: stands for the known names, which have the stages; drop one of the two")
    try:
        groups = re.compile(entry["pattern"] or "(?P<step>)").groupindex
    except re.error as error:
        raise ConfigError(f"{path}.pattern: is no regular expression ({error}); correct it") from error
    if "step" not in groups:
        raise ConfigError(f"{path}.pattern: has no group for the step; write (?P<step>...) around it")


def _check_studies(config: dict) -> None:
    names = [entry["name"] for entry in config["series"]]

    def check(path: str, name: str) -> None:
        if name not in names:
            raise ConfigError(f"{path}: there is no series {name!r}; {_choose(name, names)}")

    for part in ("dynamics", "ablation", "collaboration"):
        for i, name in enumerate(config[part]["series"] if config[part]["series"] != "all" else ()):
            check(f"{part}.series[{i}]", name)
    pairs = config["dynamics"]["pairs"] if config["dynamics"]["pairs"] != "auto" else ()
    for i, pair in enumerate(pairs):
        for key, name in pair.items():
            check(f"dynamics.pairs[{i}].{key}", name)
        if pair["dense"] in [earlier["dense"] for earlier in pairs[:i]]:
            path = f"dynamics.pairs[{i}].dense"
            raise ConfigError(f"{path}: {pair['dense']!r} stands in an earlier pair; name each dense series once")
    for i, (first, last) in enumerate(config["dynamics"]["windows"]):
        if first >= last:
            raise ConfigError(f"dynamics.windows[{i}]: {first} is not before {last}; write the earlier step first")


def _check_collaboration(config: dict) -> None:
    asked, names = config["collaboration"], [entry["name"] for entry in config["series"]]
    named = {f"collaboration.stages.{name}": name for name in asked["stages"]}
    named |= {f"collaboration.pairs[{i}].series": pair["series"] for i, pair in enumerate(asked["pairs"])}
    for path, name in named.items():
        if name not in names:
            raise ConfigError(f"{path}: there is no series {name!r}; {_choose(name, names)}")
    for name, (middle, late) in asked["stages"].items():
        if middle >= late:
            raise ConfigError(
                f"collaboration.stages.{name}: {middle} is not before {late}; write the earlier layer first"
            )
    for i, pair in enumerate(asked["pairs"]):
        try:
            Pair(*pair["head"], *pair["expert"]).require_causal()
        except PairError as error:
            raise ConfigError(f"collaboration.pairs[{i}]: {error}") from None
    if "collaboration" in config["studies"] and config["attribution"]["uncertainty"] != "groups":
        raise ConfigError(
            "studies: collaboration needs the leading neurons of each prompt; set attribution.uncertainty to groups, "
            "or leave the study out"
        )
    for mode, sizes in asked["budgets"].items():
        if mode != "top_n" and sizes != "all" and 0 in sizes:
            raise ConfigError(f"collaboration.budgets.{mode}: ranks count from 1; drop the 0")


def _complete_shape(shape: dict, path: str) -> None:
    heads, width = shape["num_attention_heads"], shape["hidden_size"]
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or heads
    if width % (2 * heads):
        raise ConfigError(f"{path}.hidden_size: {width} is not twice a multiple of the {heads} heads; make it one")
    if heads % shape["num_key_value_heads"]:
        problem = f"{shape['num_key_value_heads']} does not divide the {heads} heads"
        raise ConfigError(f"{path}.num_key_value_heads: {problem}; choose a divisor")
    if shape.get("num_experts_per_tok", 0) > shape.get("num_experts", 0):
        problem = f"{shape['num_experts_per_tok']} is more than the {shape['num_experts']} experts"
        raise ConfigError(f"{path}.num_experts_per_tok: {problem}; choose fewer")
