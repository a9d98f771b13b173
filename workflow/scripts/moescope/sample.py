"""The prompts as a sample: whom they ask about, in which relation; and tables of checkpoints laid over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import tables
from moescope.errors import MoescopeError
from moescope.statistics import SubjectBootstrap
from moescope.steps import step_name


class SampleError(MoescopeError):
    """Tables that do not fit the prompts."""


class Checkpoint(NamedTuple):
    """One table of one checkpoint: its step (null: ``main``), the tokens seen by then (null: unknown), the rows."""

    step: int | None
    tokens: int | None
    frame: pl.DataFrame


class Prompts:
    """What the summaries need to know of the prompts: relation, category and subject of each, and the draws."""

    def __init__(self, prompts: pl.DataFrame, seed: int) -> None:
        self.bootstrap = SubjectBootstrap.draw(prompts["subject"], seed)
        self.relations = prompts["relation"].unique().sort().to_list()
        categories = prompts.select("relation", "category").unique()
        if categories["relation"].is_duplicated().any():
            torn = categories.filter(pl.col("relation").is_duplicated())["relation"].min()
            raise SampleError(f"relation {torn} stands in two categories; give all its facts the same category")
        self.category = dict(categories.iter_rows())
        codes = {name: code for code, name in enumerate(self.relations)}
        self._rows = prompts.select(
            "prompt_id",
            _stratum=pl.col("relation").replace_strict(codes, return_dtype=pl.Int64),
            _subject=pl.Series(self.bootstrap.positions(prompts["subject"].to_list())),
        )

    def place(self, frame: pl.DataFrame, step: int | None) -> pl.DataFrame:
        """The frame with ``_stratum``, the relation's number, and ``_subject``, the position among the subjects."""
        placed = frame.join(self._rows, on="prompt_id", how="left", maintain_order="left")
        if placed["_stratum"].null_count():
            stranger = placed.filter(pl.col("_stratum").is_null())["prompt_id"][0]
            found = f"step {step_name(step)}: prompt {stranger} is not in prompts.parquet"
            raise SampleError(f"{found}; delete this step's results and run again")
        return placed

    def layers(self, frame: pl.DataFrame, step: int | None) -> tuple[pl.DataFrame, list[int], np.ndarray]:
        """A table ``layers`` as one placed row per prompt, the layers, and the increases [prompts, layers, components].

        Raises SampleError where a prompt lacks layers.
        """
        frame = self.place(frame, step).sort("prompt_id", "layer", "component")
        layers = frame["layer"].unique().sort().to_list()
        placed = frame.unique("prompt_id", maintain_order=True)
        shape = (len(placed), len(layers), len(tables.COMPONENTS))
        if len(frame) != np.prod(shape):
            found = f"step {step_name(step)}: a prompt lacks layers in layers.parquet"
            raise SampleError(f"{found}; delete the file and run again")
        return placed, layers, frame["lpi"].to_numpy().astype(np.float64).reshape(shape)

    def scopes(self, strata: set[int]) -> Iterator[tuple[str, str | None, list[int]]]:
        """(scope, name, numbers of its relations) for everything, each category and each relation with prompts."""
        yield "all", None, sorted(strata)
        for category in sorted({self.category[self.relations[s]] for s in strata}):
            yield "category", category, [s for s in sorted(strata) if self.category[self.relations[s]] == category]
        for stratum in sorted(strata):
            yield "relation", self.relations[stratum], [stratum]
