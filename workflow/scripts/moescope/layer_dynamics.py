"""Where in depth attention and FFN do their work, and when that settles over training.

The layer profile x_l(t) of a component is the mean log-probability increase (nats, over prompts) of the whole attention
or FFN output of layer l at checkpoint t. How alike the profiles of a series are is told by Pearson correlations over
layers (the paper's "layer-distribution consistency"), how much each layer moves by the coefficient of variation over
checkpoints ("cross-step CV"). Attention and FFN share the same total by accounting, so their profiles are not two
independent findings. Intervals are percentile bootstraps over subjects, with the same draws at all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import polars as pl
from scipy.stats import rankdata

from moescope import tables
from moescope.errors import MoescopeError
from moescope.sample import Checkpoint, Prompts
from moescope.statistics import percentiles

#: Correlations with the final profile at which it counts as settled.
THRESHOLDS = (0.9, 0.95, 0.99)
#: Scores are Float32: a profile whose layers differ by less than this share of their size is constant.
ROUNDING = 1e-6
#: Numbers that are computed on at a time (of draws x checkpoints x layers): 16 MB in float64.
BLOCK = 2_000_000


class LayerDynamicsError(MoescopeError):
    """Layer tables of a series that do not fit together."""


def layer_dynamics(
    checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame, windows: Iterable[Sequence[int]] = (), seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables ``layer_dynamics`` (by window) and ``profile_similarity`` (by step) of one series.

    ``checkpoints`` carry ``layers`` and are read one at a time; ``windows`` are [from, to] in steps, see ``within``.
    Metrics by window: see ``consistency`` (``consistency``, ``_all_pairs``, ``_spearman``, ``_without_last``),
    ``variation`` (``cv``, ``cv_median``, ``cv_abs``) and ``consolidation`` (``consolidation_0.95`` and others, values
    are steps, the final checkpoint that of the window). By step: ``to_final`` (not for the final one), ``to_previous``
    and ``to_previous_spearman`` (not for the first). What has no value (a profile that is constant over layers has no
    correlation) is null. Both tables are empty where there are fewer than two checkpoints. Holds twice draws x
    checkpoints x layers x 2 float32: 0.6 GB for 558 checkpoints of 32 layers. Raises LayerDynamicsError where the
    number of layers changes, OverviewError where a table does not fit the prompts.
    """
    steps, tokens, sample, draws = _profiles(checkpoints, prompts, seed)
    by_window, by_step = [], []
    for c, component in enumerate(tables.COMPONENTS if len(steps) > 1 else ()):
        profiles = sample[None, :, c], draws[:, :, c]
        for window, chosen in within(steps, windows).items():
            inside = [steps[i] for i in chosen]
            for metric, ends in _summaries(*(x[:, chosen] for x in profiles), inside):
                by_window.append((component, metric, window, *ends, len(chosen)))
        for metric, first, courses in _courses(*profiles):
            for i, ends in enumerate(courses, start=first):
                by_step.append((component, metric, steps[i], tokens[i], *ends))
    return tables.of_rows(by_window, "layer_dynamics"), tables.of_rows(by_step, "profile_similarity")


def within(steps: Sequence[int], windows: Iterable[Sequence[int]]) -> dict[str, list[int]]:
    """Positions of the checkpoints of the whole series, ``all``, and of each window ``<from>-<to>`` (steps, ends in).

    A window needs two checkpoints; of windows that hold the same ones the narrowest stands, so that no name promises
    more of training than there is.
    """
    found, seen = {"all": list(range(len(steps)))}, set()
    for first, last in sorted(windows, key=lambda window: (window[1] - window[0], *window)):
        inside = [i for i, step in enumerate(steps) if first <= step <= last]
        if len(inside) > 1 and tuple(inside) not in seen:
            seen.add(tuple(inside))
            found[f"{first}-{last}"] = inside
    return found


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r over the last axis; NaN where one of the two is constant."""
    return np.clip((_standard(x) * _standard(y)).sum(axis=-1), -1, 1)


def consistency(profiles: np.ndarray, pairs: str = "consecutive") -> np.ndarray:
    """Mean correlation of the ``consecutive`` profiles, or of ``all`` pairs, [..., checkpoints, layers] -> [...].

    NaN where a profile is constant: a mean over the other pairs would be one of another series.
    """
    if pairs == "consecutive":
        return correlation(profiles[..., :-1, :], profiles[..., 1:, :]).mean(axis=-1)
    # the squared length of a sum of T unit vectors is T + 2 x the sum of their T(T-1)/2 products
    count = profiles.shape[-2]
    length = (_standard(profiles).sum(axis=-2) ** 2).sum(axis=-1)
    return np.clip((length - count) / (count * (count - 1)), -1, 1)


def variation(profiles: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficient of variation over checkpoints of every layer, [..., checkpoints, layers] -> three times [...].

    ``cv`` is the mean over layers of sd / mean (population sd; the published measure, which explodes, with either sign,
    where a layer's mean is near 0), ``cv_median`` their median, ``cv_abs`` the mean of sd / |mean|.
    """
    mean = profiles.mean(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = profiles.std(axis=-2) / mean
    with np.errstate(invalid="ignore"):
        return {"cv": each.mean(axis=-1), "cv_median": np.median(each, axis=-1), "cv_abs": abs(each).mean(axis=-1)}


def consolidation(similarity: np.ndarray, threshold: float) -> np.ndarray:
    """First position from which the similarity to the final profile stays >= threshold, [..., checkpoints] -> [...].

    The last position where the final checkpoint alone does, the number of checkpoints where it is undefined: both are
    "not before the end".
    """
    stays = np.logical_and.accumulate(similarity[..., ::-1] >= threshold, axis=-1)
    return similarity.shape[-1] - stays.sum(axis=-1)


def _profiles(
    checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame, seed: int
) -> tuple[list[int | None], list[int | None], np.ndarray, np.ndarray]:
    """Steps in order, their tokens, x [checkpoints, components, layers] and the same in every draw [draws, ...].

    The draws are none where the prompts have a single subject: there is no interval then.
    """
    known = Prompts(prompts, seed)
    read, shape = [], None
    for step, tokens, frame in checkpoints:
        placed, layers, increase = known.layers(frame, step)
        increase = increase.transpose(0, 2, 1)  # prompts, components, layers
        shape = shape or increase.shape[1:]
        if increase.shape[1:] != shape:
            found = f"step {step} has {len(layers)} layers, step {read[0][0]} has {shape[1]}"
            raise LayerDynamicsError(
                f"{found}: a series holds checkpoints of one model; give each model its own series"
            )
        sums = known.bootstrap.resample(increase.reshape(len(placed), -1), placed["_subject"].to_numpy())
        means = sums.draws()
        draws = means[1:].astype(np.float32) if sums.subjects() > 1 else np.empty((0, *means.shape[1:]), np.float32)
        read.append((step, tokens, means[0].reshape(shape), draws.reshape(-1, *shape)))
    if len(read) < 2:
        return [], [], np.empty((0, 2, 0)), np.empty((0, 0, 2, 0))
    read.sort(key=lambda one: one[0])
    steps, tokens, sample, draws = zip(*read, strict=True)
    return list(steps), list(tokens), np.stack(sample), np.stack(draws, axis=1)


def _summaries(
    sample: np.ndarray, draws: np.ndarray, steps: list[int]
) -> Iterator[tuple[str, tuple[float | None, float | None, float | None]]]:
    """(metric, value and ends) of profiles [1, checkpoints, layers] and [draws, checkpoints, layers]."""
    value, drawn = _measure(sample, steps), _measure_in_blocks(draws, steps)
    for metric in value:
        if metric.startswith("consolidation"):
            yield metric, _step_interval(value[metric][0], drawn[metric], steps[-1])
        else:
            yield metric, _interval(value[metric][0], drawn[metric])


def _measure(profiles: np.ndarray, steps: list[int]) -> dict[str, np.ndarray]:
    """Every metric by window of profiles [draws, checkpoints, layers], each [draws]."""
    to_final = correlation(profiles, profiles[:, -1:])
    ordered = np.array([*steps, steps[-1]])
    return {
        "consistency": consistency(profiles),
        "consistency_all_pairs": consistency(profiles, "all"),
        "consistency_spearman": consistency(rankdata(profiles, axis=-1)),
        "consistency_without_last": consistency(profiles[..., :-1]),
        **variation(profiles),
        **{f"consolidation_{one}": ordered[consolidation(to_final, one)] for one in THRESHOLDS},
    }


def _measure_in_blocks(draws: np.ndarray, steps: list[int]) -> dict[str, np.ndarray]:
    blocks = [_measure(block, steps) for block in _blocks(draws)]
    return {metric: np.concatenate([block[metric] for block in blocks]) for metric in blocks[0]}


def _blocks(draws: np.ndarray) -> Iterator[np.ndarray]:
    """The draws some at a time, in float64; one empty block where there are none."""
    size = max(1, BLOCK // (draws.shape[1] * draws.shape[2]))
    for start in range(0, max(len(draws), 1), size):
        yield draws[start : start + size].astype(np.float64)


def _courses(sample: np.ndarray, draws: np.ndarray) -> Iterator[tuple[str, int, list]]:
    """(metric, position of the first checkpoint with it, intervals from there on)."""

    def course(of):
        value = of(sample)[0]
        drawn = np.concatenate([of(block) for block in _blocks(draws)])
        return [_interval(value[i], drawn[:, i]) for i in range(len(value))]

    yield "to_final", 0, course(lambda x: correlation(x[:, :-1], x[:, -1:]))
    yield "to_previous", 1, course(lambda x: correlation(x[:, 1:], x[:, :-1]))

    def ranked(x):
        ranks = rankdata(x, axis=-1)
        return correlation(ranks[:, 1:], ranks[:, :-1])

    yield "to_previous_spearman", 1, course(ranked)


def _standard(x: np.ndarray) -> np.ndarray:
    """Centred and of length 1 over the last axis; NaN where it is constant but for rounding, or has one element."""
    if x.shape[-1] < 2:
        return np.full((*x.shape[:-1], 1), np.nan)
    centred = x - x.mean(axis=-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    constant = length <= ROUNDING * np.linalg.norm(x, axis=-1, keepdims=True)
    return centred / np.where(constant, np.nan, length)


def _interval(value: float, draws: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Value and ends of its interval; all null without a value, the ends null where a draw misses the metric."""
    if not np.isfinite(value):
        return None, None, None
    if not len(draws) or not np.isfinite(draws).all():
        return float(value), None, None
    (low,), (high,) = percentiles(draws[:, None])
    return float(value), float(low), float(high)


def _step_interval(value: float, draws: np.ndarray, final: int) -> tuple[float | None, float | None, float | None]:
    """A step and its interval; null, and an open upper end, where it is the final one: not settled before the end.

    The ends are steps of the series (no interpolation between two of them).
    """
    if value == final:
        return None, None, None
    if not len(draws):
        return float(value), None, None
    low, high = np.percentile(draws, [2.5, 97.5], method="inverted_cdf")
    return float(value), *(None if end == final else float(end) for end in (low, high))
