"""Made-up models of a few hundred neurons: their LPI, prompt by prompt, as the tables of checkpoints."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from moescope import tables
from moescope.dynamics import Checkpoint


def prompt_table(prompts: int, relations: int = 3, groups: int = 10) -> pl.DataFrame:
    """Prompts whose subjects, two prompts to each, are dealt to groups; the relations are of unequal size."""
    names = [f"r{min(i % (relations + 2), relations - 1)}/{i:03d}" for i in range(prompts)]
    columns = {
        "prompt_id": names,
        "relation": [name.split("/")[0] for name in names],
        "subject": [f"s{i // 2}" for i in range(prompts)],
        "group": [(i // 2) % groups for i in range(prompts)],
    }
    frame = pl.DataFrame(columns).with_columns(**dict.fromkeys(("category", "object", "template", "text"), pl.lit("-")))
    return tables.check(frame, "prompts")


@dataclass(frozen=True)
class Model:
    """Layers of FFN neurons (``experts`` = 0: dense, ``width`` a layer; else a mixture, ``width`` an expert, and after
    them ``shared`` neurons; but ``dense`` layers have as many as one expert), and of attention neurons."""

    layers: int = 2
    experts: int = 0
    width: int = 100
    shared: int = 0
    heads: int = 2
    head_width: int = 10
    dense: tuple[int, ...] = ()

    @property
    def ffn(self) -> pl.DataFrame:
        """The ids of the FFN neurons, a row each."""
        parts = [("routed", e, self.width) for e in range(self.experts)] or [("dense", None, self.width)]
        parts += [("shared", None, self.shared)] if self.shared else []
        parts = [[("dense", None, self.width)] if i in self.dense else parts for i in range(self.layers)]
        rows = [(i, *part[:2], n) for i in range(self.layers) for part in parts[i] for n in range(part[2])]
        names = ("layer", "kind", "expert", "neuron")
        return pl.DataFrame(
            rows, schema={name: tables.SCHEMAS["ffn_groups"].columns[name] for name in names}, orient="row"
        )

    @property
    def attn(self) -> pl.DataFrame:
        """The ids of the attention neurons, a row each."""
        shape = (self.layers, self.heads, self.head_width)
        return pl.DataFrame(np.indices(shape).reshape(3, -1).T.astype(np.int32), schema=["layer", "head", "neuron"])

    def active(self, routed: np.ndarray | None, prompts: int) -> np.ndarray:
        """Which FFN neurons are active in a prompt, [prompts, neurons], from ``routed`` [prompts, layers, slots]."""
        if routed is None:
            return np.ones((prompts, len(self.ffn)), dtype=bool)
        layer, expert = self.ffn["layer"].to_numpy(), self.ffn["expert"].fill_null(-1).to_numpy()
        return (routed[:, layer] == expert[None, :, None]).any(axis=2) | (expert < 0)

    def checkpoint(
        self,
        step: int,
        prompts: pl.DataFrame,
        ffn: np.ndarray,
        attn: np.ndarray | None = None,
        routed: np.ndarray | None = None,
        without: tuple[str, ...] = (),
        masked: pl.DataFrame | None = None,
    ) -> Checkpoint:
        """A checkpoint from the LPI [prompts, neurons] of its neurons; ``without`` names tables that it lacks."""
        attn = np.ones((len(prompts), len(self.attn))) if attn is None else attn
        active = {"ffn": self.active(routed, len(prompts)), "attn": np.ones(attn.shape, dtype=bool)}
        lpi, ids = {"ffn": ffn * active["ffn"], "attn": attn}, {"ffn": self.ffn, "attn": self.attn}
        makers: dict[str, Callable[[], pl.DataFrame]] = {
            "active_sums": lambda: pl.concat(_sums(prompts, c, lpi[c], active[c]) for c in lpi),
            "top_active": lambda: pl.concat(
                (_listed(prompts, c, lpi[c], active[c], ids[c]) for c in lpi), how="diagonal"
            ),
        }
        for c in lpi:
            makers[f"{c}_groups"] = lambda c=c: ids[c].with_columns(**_by_group(prompts, lpi[c]))
            makers[f"{c}_neurons"] = lambda c=c: ids[c].with_columns(**_by_relation(prompts, lpi[c], active[c], c))
        if routed is not None:
            makers["routing"] = lambda: _routing(prompts, routed, self.experts).filter(
                ~pl.col("layer").is_in(self.dense)
            )
        if masked is not None:
            makers["masked_groups"] = lambda: masked
        made: dict[str, pl.DataFrame] = {}

        def table(name: str, columns: list[str]) -> pl.DataFrame | None:
            if name in without or name not in makers:
                return None
            if name not in made:
                made[name] = tables.check(makers[name](), name)
            return made[name].select(columns)

        return Checkpoint(step, 1000 * step, table)


def _by_group(prompts: pl.DataFrame, lpi: np.ndarray) -> dict[str, pl.Series]:
    group = prompts["group"].to_numpy()
    return {f"group_{g}": pl.Series(lpi[group == g].sum(axis=0)) for g in range(10)}


def _by_relation(prompts: pl.DataFrame, lpi: np.ndarray, active: np.ndarray, component: str) -> dict[str, pl.Series]:
    relation = prompts["relation"].to_numpy()
    columns = {f"importance_{r}": pl.Series(lpi[relation == r].mean(axis=0)) for r in sorted(set(relation))}
    columns["importance"] = pl.Series(lpi.mean(axis=0))
    if component == "ffn":
        columns |= {"active": pl.Series(active.sum(axis=0)), "magnitude": pl.Series(np.ones(lpi.shape[1]))}
    return columns


def _sums(prompts: pl.DataFrame, component: str, lpi: np.ndarray, active: np.ndarray) -> pl.DataFrame:
    positive = np.where(lpi > 1e-7, lpi, 0.0)
    logs = np.where(positive > 0, positive * np.log(np.where(positive > 0, positive, 1.0)), 0.0)
    return prompts.select("prompt_id").with_columns(
        component=pl.lit(component),
        active=pl.Series(active.sum(axis=1)),
        sum_positive=pl.Series(positive.sum(axis=1)),
        sum_negative=pl.Series(np.where(lpi < -1e-7, lpi, 0.0).sum(axis=1)),
        sum_positive_log=pl.Series(logs.sum(axis=1)),
    )


def _listed(
    prompts: pl.DataFrame, component: str, lpi: np.ndarray, active: np.ndarray, ids: pl.DataFrame
) -> pl.DataFrame:
    """The ceil(2%) of a prompt's active neurons by |LPI| and the max(ceil(2%), 300) by signed LPI."""
    chosen = []
    for own, at_work in zip(lpi, active, strict=True):
        neurons = np.flatnonzero(at_work)
        share = math.ceil(0.02 * len(neurons))
        by_abs = neurons[np.argsort(-np.abs(own[neurons]), kind="stable")[:share]]
        signed = neurons[np.argsort(-own[neurons], kind="stable")[: max(share, 300)]]
        chosen.append(np.union1d(by_abs, signed))
    prompt, neuron = np.repeat(np.arange(len(lpi)), [len(one) for one in chosen]), np.concatenate(chosen)
    blank = {"kind": tables.TEXT, "expert": tables.ID, "head": tables.ID}
    return ids[neuron].with_columns(
        prompt_id=prompts["prompt_id"].gather(prompt),
        component=pl.lit(component),
        lpi=pl.Series(lpi[prompt, neuron]),
        **{name: pl.lit(None, dtype) for name, dtype in blank.items() if name not in ids},
    )


def _routing(prompts: pl.DataFrame, routed: np.ndarray, experts: int) -> pl.DataFrame:
    slot = np.full((*routed.shape[:2], experts), -1)
    np.put_along_axis(slot, routed, np.broadcast_to(np.arange(routed.shape[2]), routed.shape), axis=2)
    prompt, layer, expert = np.indices(slot.shape).reshape(3, -1)
    columns = {"layer": layer, "expert": expert, "slot": slot.ravel(), "weight": np.ones(slot.size)}
    frame = pl.DataFrame({"prompt_id": prompts["prompt_id"].gather(prompt), **columns})
    return frame.with_columns(pl.col("slot").replace(-1, None), probability=pl.lit(0.5), lpi=pl.lit(0.0))


def random_routing(random: np.random.Generator, prompts: int, model: Model, slots: int) -> np.ndarray:
    """Different experts for every prompt and layer, [prompts, layers, slots]."""
    return np.argsort(random.random((prompts, model.layers, model.experts)))[..., :slots]
