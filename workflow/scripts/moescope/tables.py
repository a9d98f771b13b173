"""The one schema of every result table: names, dtypes, keys, sort order. Writers and readers check against it.

A table is known by the stem of its file: ``results/tiny-olmoe/700/heads.parquet`` is checked as ``heads``. Rows are
sorted by the key, which is unique; scores are Float32; nothing depends on time, so equal inputs give equal bytes.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from moescope import files
from moescope.errors import MoescopeError

ID, TEXT, COUNT, SCORE, FLAG = pl.Int32, pl.String, pl.Int64, pl.Float32, pl.Boolean
#: Order in which kinds of neurons and components are sorted: alphabetical, as polars sorts strings.
KINDS = ("dense", "routed", "shared")
COMPONENTS = ("attn", "ffn")


class TableError(MoescopeError):
    """A table does not have the columns, dtypes, key or values its name promises."""


@dataclass(frozen=True)
class Schema:
    """Columns of a table (a ``*`` in a name stands for a relation or another free part), its key and its nulls."""

    columns: dict[str, pl.DataType]
    key: tuple[str, ...]
    nullable: frozenset[str] = field(default_factory=frozenset)

    def expected(self, column: str) -> pl.DataType | None:
        """The dtype of a column, None where the table has no such column."""
        if column in self.columns:
            return self.columns[column]
        wildcards = (name for name in self.columns if "*" in name and fnmatch.fnmatchcase(column, name))
        return next((self.columns[name] for name in wildcards), None)

    @property
    def required(self) -> list[str]:
        return [name for name in self.columns if "*" not in name]


_FFN_NEURON = {"layer": ID, "kind": TEXT, "expert": ID, "neuron": ID}
_ATTN_NEURON = {"layer": ID, "head": ID, "neuron": ID}
_MEASURES = ("effect", "lpi", "gradient", "magnitude")
_GROUPS = {f"group_{g}": SCORE for g in range(10)}
_INTERVAL = {"value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
_NO_INTERVAL = frozenset({"value", "low", "high"})

#: The value without each of the ten groups of subjects.
_WITHOUT = {f"without_{g}": pl.Float64 for g in range(10)}
#: A head and an expert of the same layer or a later one.
_PAIR = dict.fromkeys(("head_layer", "head", "layer", "expert"), ID)
#: What tells one intervention on experts or heads of a checkpoint from another.
_INTERVENED = {
    **dict.fromkeys(("experiment", "mode", "semantics", "weights"), TEXT),
    "shared": FLAG,
    "size": ID,
    **dict.fromkeys(("importance", "relation"), TEXT),
    "fold": ID,
    "control": TEXT,
    **dict.fromkeys(("seed", "layer", "head", "expert"), ID),
}
#: What tells one ablation result of a checkpoint from another.
_ABLATED = {
    **dict.fromkeys(("site", "size", "ranking", "control"), TEXT),
    "crossfit": FLAG,
    **dict.fromkeys(("scope", "name", "average", "metric"), TEXT),
}

SCHEMAS: dict[str, Schema] = {
    "prompts": Schema(
        {
            **dict.fromkeys(("prompt_id", "relation", "category", "subject", "object", "template", "text"), TEXT),
            "group": ID,
        },
        key=("prompt_id",),
    ),
    "predictions": Schema(
        {
            **dict.fromkeys(("prompt_id", "relation", "category", "subject", "object"), TEXT),
            "target_id": ID,
            **dict.fromkeys(("single_token", "leaked", "boundary_merge"), FLAG),
            **dict.fromkeys(("rank", "rank_filtered"), COUNT),
            **dict.fromkeys(("log_prob", "log_prob_h0"), SCORE),
            "argmax_id": ID,
        },
        key=("prompt_id",),
    ),
    "layers": Schema(
        {"prompt_id": TEXT, "layer": ID, "component": TEXT, "lpi": SCORE}, key=("prompt_id", "layer", "component")
    ),
    "heads": Schema({"prompt_id": TEXT, "layer": ID, "head": ID, "lpi": SCORE}, key=("prompt_id", "layer", "head")),
    "ffn_neurons": Schema(
        {
            **_FFN_NEURON,
            "active": COUNT,
            "magnitude": SCORE,
            "importance": SCORE,
            "importance_*": SCORE,
            "active_*": COUNT,
        },
        key=tuple(_FFN_NEURON),
        nullable=frozenset({"expert"}),
    ),
    "attn_neurons": Schema(
        {**_ATTN_NEURON, "importance": SCORE, "importance_*": SCORE},
        key=tuple(_ATTN_NEURON),
        nullable=frozenset({"head"}),  # of what mixes tokens without heads
    ),
    "ffn_groups": Schema({**_FFN_NEURON, **_GROUPS}, key=tuple(_FFN_NEURON), nullable=frozenset({"expert"})),
    "attn_groups": Schema({**_ATTN_NEURON, **_GROUPS}, key=tuple(_ATTN_NEURON), nullable=frozenset({"head"})),
    "top_active": Schema(
        {
            "prompt_id": TEXT,
            "component": TEXT,
            "layer": ID,
            "kind": TEXT,
            "expert": ID,
            "head": ID,
            "neuron": ID,
            "lpi": SCORE,
        },
        key=("prompt_id", "component", "layer", "kind", "expert", "head", "neuron"),
        nullable=frozenset({"kind", "expert", "head"}),
    ),
    "active_sums": Schema(
        {
            "prompt_id": TEXT,
            "component": TEXT,
            "active": COUNT,
            **dict.fromkeys(("sum_positive", "sum_negative", "sum_positive_log"), pl.Float64),
        },
        key=("prompt_id", "component"),
    ),
    "routing": Schema(
        {
            "prompt_id": TEXT,
            "layer": ID,
            "expert": ID,
            "slot": ID,
            **dict.fromkeys(("weight", "probability", "lpi"), SCORE),
        },
        key=("prompt_id", "layer", "expert"),
        nullable=frozenset({"slot", "probability"}),
    ),
    # what breaks without a part: site head, ffn_neuron or none (the clean run); fold is the one the prompt is tested in
    "ablations": Schema(
        {
            **dict.fromkeys(("site", "size", "ranking", "control"), TEXT),
            **dict.fromkeys(("fold", "seed"), ID),
            "prompt_id": TEXT,
            "rank": COUNT,
            **dict.fromkeys(("log_prob", "removed"), SCORE),
        },
        key=("site", "size", "ranking", "control", "fold", "seed", "prompt_id"),
        nullable=frozenset({"ranking", "fold", "seed", "removed"}),
    ),
    # sampled neurons: means over the prompts in which each is active; and the same, prompt by prompt
    "faithfulness": Schema(
        {**_FFN_NEURON, "active": COUNT, **dict.fromkeys(_MEASURES, SCORE)},
        key=tuple(_FFN_NEURON),
        nullable=frozenset({"expert"}),
    ),
    "faithfulness_prompts": Schema(
        {**_FFN_NEURON, "prompt_id": TEXT, **dict.fromkeys(_MEASURES, SCORE)},
        key=(*_FFN_NEURON, "prompt_id"),
        nullable=frozenset({"expert"}),
    ),
    # a dense model whose neurons are kept, block by block, as a mixture of experts routed the same prompt
    "masked_groups": Schema(
        {"layer": ID, "neuron": ID, "seed": ID, "active": COUNT, "importance": SCORE, **_GROUPS},
        key=("layer", "neuron", "seed"),
    ),
    # study collaboration, of one checkpoint. The ten leading experts of a relation by every method; fold is the one
    # that is tested with them, they were found on the other (null: found on all prompts)
    "expert_importance": Schema(
        {
            **dict.fromkeys(("relation", "method"), TEXT),
            **dict.fromkeys(("fold", "rank", "layer", "expert"), ID),
            "importance": pl.Float64,
        },
        key=("relation", "method", "fold", "rank"),
        nullable=frozenset({"fold"}),
    ),
    # pairs of a head and an expert: r of LPI and probability where the pair was found, p and quantiles of the largest
    # |r| of as many unrelated pairs; r_tested and p_tested on the prompts of fold, from which the pair was not found
    "associations": Schema(
        {
            "relation": TEXT,
            "fold": ID,
            **_PAIR,
            **dict.fromkeys(("r", "p", "r_tested", "p_tested", "null_median", "null_95"), pl.Float64),
            **dict.fromkeys(("pairs", "prompts"), COUNT),
        },
        key=("relation", "fold", *_PAIR),
        nullable=frozenset({"relation", "fold", "r_tested", "p_tested"}),
    ),
    # what happens to the prompts when routers are given less to choose from, or a head or an expert is interfered with
    "expert_interventions": Schema(
        {**_INTERVENED, "prompt_id": TEXT, "rank": COUNT, "log_prob": SCORE},
        key=(*_INTERVENED, "prompt_id"),
        nullable=frozenset(_INTERVENED) - {"experiment", "control"},
    ),
    # probability that routers give at the last position, clean and without a head: to one expert, or (null) to the
    # clean top K together. layer, head are those of the pair, for which a control zeroes another head of the layer
    "gates": Schema(
        {
            **dict.fromkeys(("layer", "head"), ID),
            "control": TEXT,
            "seed": ID,
            "prompt_id": TEXT,
            **dict.fromkeys(("gate_layer", "expert"), ID),
            **dict.fromkeys(("clean", "suppressed"), SCORE),
        },
        key=("layer", "head", "control", "seed", "prompt_id", "gate_layer", "expert"),
        nullable=frozenset({"seed", "expert"}),
    ),
    # integrated gradients of an expert's probability by the heads of head_layer; null is the rest of the residual
    "gradients": Schema(
        {"prompt_id": TEXT, **_PAIR, **dict.fromkeys(("attribution", "gap"), SCORE)},
        key=("prompt_id", "head_layer", "layer", "expert", "head"),
        nullable=frozenset({"head"}),
    ),
    "exposure": Schema({"prompt_id": TEXT, "exposures": COUNT, "held_out": FLAG}, key=("prompt_id",)),
    "training": Schema({"step": COUNT, "tokens": COUNT, "loss": pl.Float64, "lr": pl.Float64}, key=("step",)),
    # results/attribution/<series>/: what the first figures show, with 95% intervals over subjects
    "accuracy": Schema(
        {
            "step": COUNT,
            "tokens": COUNT,
            **dict.fromkeys(("subset", "scope", "name", "average", "metric"), TEXT),
            **_INTERVAL,
            "prompts": COUNT,
        },
        key=("step", "subset", "scope", "name", "average", "metric"),
        nullable=frozenset({"step", "tokens", "name", "low", "high"}),
    ),
    "layer_importance": Schema(
        {"step": COUNT, "tokens": COUNT, "aggregate": TEXT, "layer": ID, "component": TEXT, **_INTERVAL},
        key=("step", "aggregate", "layer", "component"),
        nullable=frozenset({"step", "tokens", "layer", "low", "high"}),
    ),
    "top_experts": Schema(
        {
            "step": COUNT,
            "relation": TEXT,
            "rank": ID,
            "layer": ID,
            "expert": ID,
            **_INTERVAL,
            "routed": pl.Float64,
            "elsewhere": pl.Float64,
        },
        key=("relation", "rank"),
        nullable=frozenset({"step", "low", "high", "elsewhere"}),
    ),
    # results/dynamics/<series>/. The interval rests on without_0 to without_9, the value without one group of subjects,
    # on spread, the standard deviation between seeds, and on resolution, what one neuron more in a set is worth
    "neuron_dynamics": Schema(
        {
            **dict.fromkeys(("component", "population", "average", "metric"), TEXT),
            **dict.fromkeys(("step_from", "step", "tokens"), COUNT),
            **_INTERVAL,
            **dict.fromkeys(("spread", "resolution"), pl.Float64),
            **dict.fromkeys(("prompts", "left_out"), COUNT),
            **_WITHOUT,
        },
        key=("component", "population", "average", "metric", "step"),
        nullable=_NO_INTERVAL | {"step_from", "tokens", "spread", "resolution", "prompts", "left_out", *_WITHOUT},
    ),
    "prompt_dynamics": Schema(
        {
            **dict.fromkeys(("prompt_id", "component"), TEXT),
            **dict.fromkeys(("step_from", "step"), COUNT),
            **dict.fromkeys(("positive_share", "effective_share", "jaccard"), pl.Float64),
        },
        key=("component", "step", "prompt_id"),
        nullable=frozenset({"step_from", "positive_share", "effective_share", "jaccard"}),
    ),
    "overlap": Schema(
        {
            "component": TEXT,
            **dict.fromkeys(("step_from", "step"), COUNT),
            **dict.fromkeys(("jaccard", "survival"), pl.Float64),
            "identical": FLAG,
        },
        key=("component", "step_from", "step"),
    ),
    "layer_dynamics": Schema(
        {**dict.fromkeys(("component", "metric", "window"), TEXT), **_INTERVAL, "checkpoints": COUNT},
        key=("component", "metric", "window"),
        nullable=_NO_INTERVAL,
    ),
    "profile_similarity": Schema(
        {"component": TEXT, "metric": TEXT, "step": COUNT, "tokens": COUNT, **_INTERVAL},
        key=("component", "metric", "step"),
        nullable=_NO_INTERVAL | {"tokens"},
    ),
    "robustness": Schema(
        {
            "step": COUNT,
            "tokens": COUNT,
            **_ABLATED,
            **dict.fromkeys(("clean", "ablated"), pl.Float64),
            **_INTERVAL,
            **dict.fromkeys(("spread", "removed", "p"), pl.Float64),
            **dict.fromkeys(("units", "prompts", "seeds"), COUNT),
            "degenerate": FLAG,
        },
        key=("step", *_ABLATED),
        nullable=_NO_INTERVAL | {"tokens", "ranking", "name", "spread", "removed", "p"},
    ),
    "robustness_summary": Schema(
        {
            **_ABLATED,
            "statistic": TEXT,
            **_INTERVAL,
            "spread": pl.Float64,
            **dict.fromkeys(("checkpoints", "unavailable"), COUNT),
            "degenerate": FLAG,
        },
        key=(*_ABLATED, "statistic"),
        nullable=_NO_INTERVAL | {"ranking", "name", "spread"},
    ),
    "score_faithfulness": Schema(
        {"step": COUNT, "tokens": COUNT, "kind": TEXT, "score": TEXT, **_INTERVAL, "neurons": COUNT},
        key=("step", "kind", "score"),
        nullable=_NO_INTERVAL | {"tokens"},
    ),
    # results/dynamics/all/: series beside each other, and the tables of the paper
    "sparsity": Schema(
        {
            **dict.fromkeys(("moe", "dense", "claim", "test"), TEXT),
            **{f"{one}_{end}": pl.Float64 for one in ("moe", "dense", "difference") for end in _INTERVAL},
            "pairs": COUNT,
            "exceeds": FLAG,
        },
        key=("moe", "dense", "claim", "test"),
        nullable=frozenset(
            {f"{one}_{end}" for one in ("moe", "dense", "difference") for end in _INTERVAL} | {"exceeds"}
        ),
    ),
    "verdict": Schema(
        {**dict.fromkeys(("moe", "dense", "claim"), TEXT), "beyond_sparsity": FLAG, "because": TEXT},
        key=("moe", "dense", "claim"),
        nullable=frozenset({"beyond_sparsity"}),
    ),
    # results/collaboration/<series>/. gains: of a layer, up to it (cumulative; share: of the total), of a stage
    "gains": Schema(
        {
            "step": COUNT,
            **dict.fromkeys(("component", "quantity", "stage"), TEXT),
            "layer": ID,
            **_INTERVAL,
        },
        key=("step", "component", "quantity", "stage", "layer"),
        nullable=_NO_INTERVAL | {"step", "stage", "layer"},
    ),
    # value is the metric under a budget, drop what is lost of the clean one (relative; of log_prob: nats)
    "budgets": Schema(
        {
            "step": COUNT,
            "mode": TEXT,
            "size": ID,
            "weights": TEXT,
            "shared": FLAG,
            **dict.fromkeys(("scope", "name", "average", "metric"), TEXT),
            **_INTERVAL,
            **{f"drop_{end}": pl.Float64 for end in _INTERVAL},
            "prompts": COUNT,
        },
        key=("step", "mode", "size", "weights", "shared", "scope", "name", "average", "metric"),
        nullable=_NO_INTERVAL | {"step", "name", *(f"drop_{end}" for end in _INTERVAL)},
    ),
    # value is what is lost of the clean metric (relative; of log_prob: nats); excess: beyond the control of these names
    "blocking": Schema(
        {
            "step": COUNT,
            "semantics": TEXT,
            "size": ID,
            "control": TEXT,
            "crossfit": FLAG,
            **dict.fromkeys(("scope", "name", "average", "metric"), TEXT),
            **dict.fromkeys(("clean", "blocked"), pl.Float64),
            **_INTERVAL,
            **{f"excess_{end}": pl.Float64 for end in _INTERVAL},
            **dict.fromkeys(("spread", "p"), pl.Float64),
            **dict.fromkeys(("prompts", "seeds"), COUNT),
        },
        key=("step", "semantics", "size", "control", "crossfit", "scope", "name", "average", "metric"),
        nullable=_NO_INTERVAL | {"step", "name", "spread", "p", *(f"excess_{end}" for end in _INTERVAL)},
    ),
    # experts that two lists of a relation have in common; other: another method, or the paper (published)
    "expert_overlap": Schema(
        {
            "step": COUNT,
            **dict.fromkeys(("relation", "method", "other"), TEXT),
            **dict.fromkeys(("size", "other_size", "common"), COUNT),
            **dict.fromkeys(("chance", "chance_given_layers", "p"), pl.Float64),
        },
        key=("step", "relation", "method", "other"),
        nullable=frozenset({"step"}),
    ),
    # of every pair (null: all pairs, or those of a sign) what its head does to its expert, beside the control; sign: of
    # r where the pair was found; gate_layer: of later routers
    "causality": Schema(
        {
            "step": COUNT,
            **_PAIR,
            "fold": ID,
            "sign": TEXT,
            "quantity": TEXT,
            "gate_layer": ID,
            **_INTERVAL,
            **{f"control_{end}": pl.Float64 for end in _INTERVAL},
            **{f"excess_{end}": pl.Float64 for end in _INTERVAL},
            "prompts": COUNT,
        },
        key=("step", *_PAIR, "fold", "sign", "quantity", "gate_layer"),
        nullable=_NO_INTERVAL
        | {"step", *_PAIR, "fold", "sign", "gate_layer"}
        | {f"{one}_{end}" for one in ("control", "excess") for end in _INTERVAL},
    ),
    # share of a kind among the leading neurons; chance_active: among those active, chance_all: among all
    "neuron_types": Schema(
        {
            "step": COUNT,
            "top": COUNT,
            **dict.fromkeys(("ranking", "scope", "name", "kind"), TEXT),
            **_INTERVAL,
            **dict.fromkeys(("chance_active", "chance_all"), pl.Float64),
        },
        key=("step", "top", "ranking", "scope", "name", "kind"),
        nullable=_NO_INTERVAL | {"step", "name", "chance_active", "chance_all"},
    ),
    "shared_neurons": Schema(
        {
            "step": COUNT,
            **dict.fromkeys(("relation", "within"), TEXT),
            **dict.fromkeys(("rank", "layer", "neuron"), ID),
            "importance": pl.Float64,
        },
        key=("step", "relation", "within", "rank"),
        nullable=frozenset({"step"}),
    ),
    # Jaccard overlap of leading neurons: of two relations' (relations), of two prompts' of one relation (samples) or of
    # two (strangers)
    "neuron_overlap": Schema(
        {
            "step": COUNT,
            **dict.fromkeys(("kind", "comparison", "relation", "other"), TEXT),
            **_INTERVAL,
            "chance": pl.Float64,
        },
        key=("step", "kind", "comparison", "relation", "other"),
        nullable=_NO_INTERVAL | {"step", "relation", "other", "chance"},
    ),
    # results/collaboration/all/: series beside each other, and the published numbers
    "efficiency": Schema(
        {
            "series": TEXT,
            "step": COUNT,
            "quantity": TEXT,
            **_INTERVAL,
            "published": pl.Float64,
            "note": TEXT,
        },
        key=("series", "step", "quantity"),
        nullable=_NO_INTERVAL | {"step", "published", "note"},
    ),
    "relation_accuracy": Schema(
        {
            "series": TEXT,
            "step": COUNT,
            **dict.fromkeys(("relation", "metric"), TEXT),
            **_INTERVAL,
            "prompts": COUNT,
        },
        key=("series", "step", "relation", "metric"),
        nullable=_NO_INTERVAL | {"step"},
    ),
    "beside_published": Schema(
        {
            **dict.fromkeys(("series", "table", "quantity", "condition", "relation"), TEXT),
            **_INTERVAL,
            **{f"null_{end}": pl.Float64 for end in _INTERVAL},
            "null": TEXT,
            "published": pl.Float64,
            "note": TEXT,
        },
        key=("series", "table", "quantity", "condition", "relation"),
        nullable=_NO_INTERVAL | {"relation", "null_value", "null_low", "null_high", "null", "note"},
    ),
    **{
        f"table_{number}": Schema(
            {
                **dict.fromkeys(("series", "component", "quantity", "condition"), TEXT),
                **_INTERVAL,
                **{f"null_{end}": pl.Float64 for end in _INTERVAL},
                "null": TEXT,
                "checkpoints": COUNT,
                "published": pl.Float64,
                "note": TEXT,
            },
            key=("series", "component", "quantity", "condition"),
            nullable=_NO_INTERVAL | {"null_value", "null_low", "null_high", "null", "published", "note"},
        )
        for number in (2, 3, 4)
    },
}


def check(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """The frame in schema order, cast and sorted by its key.

    Raises TableError on an unknown table, a missing or unknown column, a value that the dtype cannot hold, a null or
    a non-finite number where none may stand, and a key that repeats.
    """
    if name not in SCHEMAS:
        raise TableError(f"{name}: no such table; known are {', '.join(sorted(SCHEMAS))}")
    schema = SCHEMAS[name]
    if missing := [c for c in schema.required if c not in frame.columns]:
        raise TableError(f"{name}: column {missing[0]} is missing")
    if unknown := [c for c in frame.columns if schema.expected(c) is None]:
        raise TableError(f"{name}: column {unknown[0]} is not part of the table")
    free = [c for c in frame.columns if c not in schema.columns]
    for column in frame.columns:
        if schema.expected(column).is_integer() and _cut_by_casting(frame[column]):
            raise TableError(f"{name}: column {column} holds a number that is not whole")
    try:
        frame = frame.select(pl.col(c).cast(schema.expected(c)) for c in [*schema.required, *free])
    except pl.exceptions.PolarsError as error:
        raise TableError(f"{name}: {str(error).splitlines()[0]}") from error
    for column in frame.columns:
        values = frame[column]
        if column not in schema.nullable and values.null_count():
            raise TableError(f"{name}: column {column} holds {values.null_count()} nulls")
        if values.dtype.is_float() and not values.drop_nulls().is_finite().all():
            raise TableError(f"{name}: column {column} holds a number that is not finite")
    if frame.select(schema.key).is_duplicated().any():
        raise TableError(f"{name}: two rows share one {', '.join(schema.key)}")
    return frame.sort(schema.key, nulls_last=True)


def _cut_by_casting(values: pl.Series) -> bool:
    """Whether a cast to integers would drop a fraction, which polars does without a word."""
    return values.dtype.is_float() and bool((values.is_finite() & (values != values.floor())).any())


def of_rows(rows: Sequence[tuple], name: str) -> pl.DataFrame:
    """The table of rows whose values stand in the order of its columns, checked; there may be none."""
    return check(pl.DataFrame(rows, schema=dict(SCHEMAS[name].columns), orient="row"), name)


def number(value: float) -> float | None:
    """A number for a column that may hold nulls: null where it is NaN or infinite, that is not available."""
    return float(value) if math.isfinite(value) else None


def write(frame: pl.DataFrame, path: str | os.PathLike) -> None:
    """Check the frame as the table its file is named after and put it there whole (temporary name, then moved)."""
    frame = check(frame, Path(path).stem)
    with files.atomic(path) as temporary:
        frame.write_parquet(temporary, compression="zstd")


def read(path: str | os.PathLike, columns: list[str] | None = None) -> pl.DataFrame:
    """A result table, or some of its columns; refuses a file whose columns are not the table's."""
    path = Path(path)
    name = path.stem
    if name not in SCHEMAS:
        raise TableError(f"{path}: no such table; known are {', '.join(sorted(SCHEMAS))}")
    schema = SCHEMAS[name]
    try:
        found = pl.read_parquet_schema(path)
    except pl.exceptions.PolarsError as error:
        raise TableError(f"{path}: is no Parquet file; delete the file and run again") from error
    if wrong := [c for c in schema.required if found.get(c) != schema.columns[c]]:
        raise TableError(f"{path}: column {wrong[0]} is missing or of another type; delete the file and run again")
    if foreign := [c for c, dtype in found.items() if schema.expected(c) != dtype]:
        raise TableError(f"{path}: column {foreign[0]} is not part of the table; delete the file and run again")
    return pl.read_parquet(path, columns=columns)
