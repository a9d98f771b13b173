"""What study dynamics costs on long series of large models: ``python benchmarks/aggregation.py --checkpoints 244``.

Makes tables of the size of OLMoE-1B-7B and OLMo-7B on 906 prompts, filled with random numbers, in a temporary folder,
and aggregates them as the workflow does: one process a series. Few distinct checkpoints are made (some 120 MB each)
and taken in turn, so that a long series needs little disk; no two neighbours are the same file, and those further
apart that are must be found identical, no others. Prints the peak memory of the process and the seconds per pair.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from moescope import prompt_dynamics, tables
from moescope.dynamics import Checkpoint, neuron_dynamics

TARGET = 4.0  # GB
RELATIONS, GROUPS, SEEDS = 12, 10, 5


@dataclass(frozen=True)
class Size:
    """Neurons of a model: layers; experts a layer (0: dense), of which so many are routed to; neurons an expert (dense:
    a layer); heads and neurons a head."""

    name: str
    layers: int
    experts: int
    routed: int
    width: int
    heads: int
    head_width: int

    @property
    def active(self) -> dict[str, int]:
        return {
            "attn": self.layers * self.heads * self.head_width,
            "ffn": self.layers * (self.routed or 1) * self.width,
        }


REAL = (Size("OLMoE-1B-7B", 16, 64, 8, 1024, 16, 128), Size("OLMo-7B", 32, 0, 0, 11008, 32, 128))
TINY = (Size("tiny mixture", 4, 32, 4, 32, 4, 32), Size("tiny dense", 4, 0, 0, 1036, 4, 32))


# Making tables -------------------------------------------------------------------------------------------------------


def prompt_table(prompts: int) -> pl.DataFrame:
    """Prompts of twelve relations, two prompts to a subject."""
    names = [f"relation_{i % RELATIONS:02d}/{i}" for i in range(prompts)]
    columns = {
        "prompt_id": names,
        "relation": [name.split("/")[0] for name in names],
        "subject": [f"subject {i // 2}" for i in range(prompts)],
        "group": [i // 2 % GROUPS for i in range(prompts)],
    }
    others = dict.fromkeys(("category", "object", "template", "text"), pl.lit("-"))
    return tables.check(pl.DataFrame(columns).with_columns(**others), "prompts")


def make(size: Size, prompts: pl.DataFrame, folder: Path, seed: int) -> None:
    """The tables of one checkpoint that the study reads."""
    random = np.random.default_rng([seed, size.layers])
    folder.mkdir(parents=True)
    ids = {"ffn": ffn_ids(size), "attn": grid(layer=size.layers, head=size.heads, neuron=size.head_width)}
    for component, neurons in ids.items():
        lasting = np.random.default_rng(size.layers).standard_t(2, (len(neurons), 1))
        lpi = (lasting + random.standard_t(2, (len(neurons), RELATIONS))) * 1e-4
        columns = {f"importance_relation_{r:02d}": lpi[:, r].astype(np.float32) for r in range(RELATIONS)}
        columns["importance"] = lpi.mean(axis=1).astype(np.float32)
        if component == "ffn":
            columns |= dict.fromkeys([f"active_relation_{r:02d}" for r in range(RELATIONS)], np.arange(len(neurons)))
            columns |= {"active": np.arange(len(neurons)), "magnitude": columns["importance"]}
        tables.write(neurons.with_columns(**series(columns)), folder / f"{component}_neurons.parquet")
        groups = {f"group_{g}": (lpi[:, g] * len(prompts) / GROUPS).astype(np.float32) for g in range(GROUPS)}
        tables.write(neurons.with_columns(**series(groups)), folder / f"{component}_groups.parquet")
    if size.experts:
        routed = np.argsort(random.random((len(prompts), size.layers, size.experts)))[..., : size.routed]
        tables.write(routing(size, prompts, routed), folder / "routing.parquet")
    else:
        routed = None
        neurons = ids["ffn"].select("layer", "neuron").join(pl.DataFrame({"seed": range(SEEDS)}), how="cross")
        sums = {f"group_{g}": random.standard_t(2, len(neurons)).astype(np.float32) * 1e-3 for g in range(GROUPS)}
        masked = neurons.with_columns(active=1, importance=0.0, **series(sums))
        tables.write(masked, folder / "masked_groups.parquet")
    listed = [top_active(size, prompts, component, routed, random) for component in tables.COMPONENTS]
    tables.write(pl.concat(listed, how="diagonal_relaxed"), folder / "top_active.parquet")
    sums = pl.concat(
        prompts.select(
            "prompt_id", component=pl.lit(component), active=pl.lit(active), sum_positive=pl.lit(5.0),
            sum_negative=pl.lit(-5.0), sum_positive_log=pl.lit(-30.0),
        )
        for component, active in size.active.items()
    )  # fmt: skip
    tables.write(sums, folder / "active_sums.parquet")


def series(columns: dict[str, np.ndarray]) -> dict[str, pl.Series]:
    """Columns that polars takes."""
    return {name: pl.Series(values) for name, values in columns.items()}


def grid(**lengths: int) -> pl.DataFrame:
    """Every combination of numbers below these lengths, the last running fastest."""
    places = np.indices(tuple(lengths.values()), dtype=np.int32).reshape(len(lengths), -1)
    return pl.DataFrame(dict(zip(lengths, places, strict=True)))


def ffn_ids(size: Size) -> pl.DataFrame:
    """The FFN neurons of a model."""
    if size.experts:
        ids = grid(layer=size.layers, expert=size.experts, neuron=size.width)
        return ids.select("layer", pl.lit("routed").alias("kind"), "expert", "neuron")
    nothing = pl.lit(None, tables.ID).alias("expert")
    return grid(layer=size.layers, neuron=size.width).select("layer", pl.lit("dense").alias("kind"), nothing, "neuron")


def routing(size: Size, prompts: pl.DataFrame, routed: np.ndarray) -> pl.DataFrame:
    """``routed`` [prompts, layers, slots] as the table ``routing``."""
    slot = np.full((len(prompts), size.layers, size.experts), -1, dtype=np.int32)
    np.put_along_axis(slot, routed, np.arange(size.routed, dtype=np.int32), axis=2)
    frame = grid(prompt=len(prompts), layer=size.layers, expert=size.experts)
    scores = dict.fromkeys(("weight", "probability", "lpi"), pl.lit(0.1))
    slots = pl.Series(slot.ravel()).replace(-1, None)
    named = frame.with_columns(prompt_id=prompts["prompt_id"].gather(frame["prompt"]), slot=slots, **scores)
    return named.drop("prompt")


def top_active(
    size: Size, prompts: pl.DataFrame, component: str, routed: np.ndarray | None, random: np.random.Generator
) -> pl.DataFrame:
    """As many active neurons of every prompt as two lists of 2% that share a third."""
    active = size.active[component]
    listed = min(active, max(int(0.02 * active * 5 / 3) + 1, 300))
    # every step of a random width: distinct, and spread over all active neurons
    chosen = np.sort(random.random((len(prompts), listed)))
    chosen = (chosen * (active - listed)).astype(np.int64) + np.arange(listed)
    lengths = (size.heads, size.head_width) if component == "attn" else (size.routed or 1, size.width)
    layer, part, neuron = np.unravel_index(chosen, (size.layers, *lengths))
    prompt = np.repeat(np.arange(len(prompts)), listed)
    columns = {
        "layer": layer.ravel(),
        "neuron": neuron.ravel(),
        "lpi": random.standard_t(2, chosen.size).astype(np.float32) * 1e-2,
    }
    kind = None
    if component == "attn":
        columns["head"] = part.ravel()
    elif routed is not None:
        kind, columns["expert"] = "routed", routed[prompt, layer.ravel(), part.ravel()]
    else:
        kind = "dense"
    frame = pl.DataFrame({"prompt_id": prompts["prompt_id"].gather(prompt), **columns})
    blank = [pl.lit(None, tables.ID).alias(name) for name in ("head", "expert") if name not in columns]
    return frame.with_columns(*blank, component=pl.lit(component), kind=pl.lit(kind, pl.String))


# Aggregating ---------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path, count: int) -> Iterator[Checkpoint]:
    """So many checkpoints, from the folders that there are, in turn."""
    made = sorted(folder.iterdir())

    def reader(at: Path):
        def table(name: str, columns: list[str]) -> pl.DataFrame | None:
            path = at / f"{name}.parquet"
            return tables.read(path, columns) if path.exists() else None

        return table

    for i in range(count):
        yield Checkpoint(1000 * i, None, reader(made[i % len(made)]))


def aggregate(folder: Path, prompts: pl.DataFrame, count: int, figures: multiprocessing.Queue) -> None:
    """Every neuron-level statistic of a series; puts (part, seconds, peak memory in GB so far) into ``figures``."""
    distinct = len(list(folder.iterdir()))
    for component in ("ffn", "attn"):
        start = time.monotonic()
        _, overlap = neuron_dynamics(checkpoints(folder, count), prompts, component)
        figures.put((component, time.monotonic() - start, peak()))
        steps = overlap.select("identical", alike=(pl.col("step") - pl.col("step_from")) % (1000 * distinct) == 0)
        apart = overlap["step_from"] < overlap["step"]
        if not (steps["identical"] == (steps["alike"] & apart)).all():
            raise RuntimeError("checkpoints are flagged as identical that are not, or the other way round")
    start = time.monotonic()
    frame = prompt_dynamics.prompt_dynamics(checkpoints(folder, count), prompts)
    prompt_dynamics.summary(frame, prompts, {})
    figures.put(("prompts", time.monotonic() - start, peak()))


def peak() -> float:
    """The most memory that this process has held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    """Make, aggregate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=6, help="length of each series")
    parser.add_argument("--distinct", type=int, default=3, help="checkpoints that are made; at least 2")
    parser.add_argument("--tiny", action="store_true", help="the size of the models of the embedded run")
    options = parser.parse_args()
    if options.distinct < 2:
        parser.error("--distinct: neighbours must differ, take 2 or more")
    prompts = prompt_table(996 if options.tiny else 906)
    processes = multiprocessing.get_context("spawn")
    print(f"{'series':16}{'part':10}{'seconds':>10}{'a pair':>10}{'peak so far':>14}{'target':>10}")
    for size in TINY if options.tiny else REAL:
        with tempfile.TemporaryDirectory() as folder, processes.Manager() as manager:
            for i in range(min(options.distinct, options.checkpoints)):
                run(processes, make, size, prompts, Path(folder) / f"{i:03d}", i)
            figures = manager.Queue()
            run(processes, aggregate, Path(folder), prompts, options.checkpoints, figures)
            while not figures.empty():
                part, seconds, memory = figures.get()
                pair = seconds / max(options.checkpoints - 1, 1)
                target = f"<= {TARGET:.0f} GB"
                print(f"{size.name:16}{part:10}{seconds:10.1f}{pair:10.2f}{memory:11.2f} GB{target:>10}", flush=True)


def run(processes: multiprocessing.context.BaseContext, target, *arguments: object) -> None:
    """Call a function in a process of its own, so that its memory is its own; raises if it fails."""
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed")


if __name__ == "__main__":
    main()
