"""The support table of the documentation, from what is measured of the zoo: ``python -m tests.model.support_table``."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from moescope import files
from moescope.errors import MoescopeError
from moescope.interventions import InterventionError
from moescope.models import require_fit
from moescope.replay import ReplayError
from tests.model import families, zoo

#: Columns of errors: heading, and the measures whose largest stands there.
COLUMNS = {
    "identity": ("identity",),
    "LPI": ("LPI", "telescoping"),
    "neurons": ("neurons", "experts"),
    "heads": ("heads",),
    "ablation": ("ablations", "effects"),
    "routers": ("routing", *families.WAYS, "force", "slots"),
    "batches": ("batches",),
    "kernels": ("implementations",),
}
INTRODUCTION = """# Families of models

Written by `make families` with transformers {version}; every number was measured, on models of the real classes, tiny
and with random weights. A checkpoint is held against the identity again whenever it is loaded or scored, so a family
that is not listed is not guessed at either: it is refused unless its residual stream is explained to {tolerance:.0e}.

- **identity**: what a layer adds to the residual stream less the sum of all contributions, of what it adds.
- **LPI**: scores of every neuron and head against the model's own norm and head in float64; sums of sequential layers
  against the model's log-probability (nats).
- **neurons**, **heads**: logits with some of them zeroed, against copies that never compute them, experts that are run
  position by position, attention that gives 0 (where a family does not call it by name, their part of what the output
  matrix reads).
- **ablation**: log-probabilities of the ablation table, which runs no more than it must, and effects of single neurons,
  run again from the last position, against whole passes (nats).
- **routers**: the weights of all experts, clean, blocked in four ways (`reroute`, `reroute_logit`, `min_logit`,
  `zero_weight`), forced, and with some of the slots left, against rules written by hand.
- **batches**: coefficients, residuals and logits with padding on the right and on the left, against prompts alone.
- **kernels**: logits and scores under `eager`, `grouped_mm` and `batched_mm` experts.

Errors are relative to 1 + the size of what is measured, in float32; a dash means that there is nothing to measure.

What asks for care:

- *norm behind*: a contribution is exact as a share of what was written, at the norm's measured scale; without the
  neuron the scale would be another (ablation runs the model again, and knows).
- a norm between the neurons or heads and their output matrix (BitNet; not listed) is taken at its measured scale too.
- *parallel*: both halves of a layer read the same residual, so that the scores of halves do not add up.
- *soft-capped logits*: every score is evaluated directly, which takes longer.
- *no heads*: layers whose mixer is a state space or a convolution; their neurons have no head.
- *router of its own*: its weights are shares of no softmax or sigmoid of its logits; `probability` is null in the
  routing table. What it cannot do is an error.

"""


@dataclass
class Row:
    """What is said of a family: whether it works, remarks, and the errors by column."""

    name: str
    verdict: str
    remarks: list[str]
    errors: dict[str, float]

    def line(self) -> str:
        """The row of the table."""
        errors = [f"{self.errors[name]:.0e}" if name in self.errors else "–" for name in COLUMNS]
        exact = [error.replace("0e+00", "0") for error in errors]
        cells = [f"`{self.name}`", self.verdict, "; ".join(self.remarks) or " ", *exact]
        return f"| {' | '.join(cells)} |"


def measured(name: str) -> Row:
    """Run all measures of a family. Raises AssertionError where an error is larger than it may be."""
    case, found = families.Case.of(name), {}
    remarks = list(case.report["remarks"])
    for measure, (_, tolerance) in families.measures(case).items():
        try:
            found[measure] = families.measured(name, measure)
        except (InterventionError, ReplayError):
            remarks.append(f"no `{measure}`")
            continue
        if not found[measure] <= tolerance:
            raise AssertionError(f"{name}: {measure} is off by {found[measure]:.1e} (allowed: {tolerance:.0e})")
    if not any(site.heads for site in case.sites()):
        del found["heads"]
    columns = {column: [found[m] for m in of if m in found] for column, of in COLUMNS.items()}
    return Row(name, "with care" if remarks else "works", remarks, {c: max(e) for c, e in columns.items() if e})


def refusal(name: str) -> str:
    """What is said of a family that does not fit. Raises AssertionError where it is let in."""
    try:
        require_fit(zoo.build(name))
    except MoescopeError as error:
        return str(error)
    raise AssertionError(f"{name} fits")


def text() -> str:
    """The whole page."""
    names = ["family", "verdict", "care", *COLUMNS]
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    rows = [measured(name).line() for name in zoo.ZOO]
    noes = [f"| `{name}` | {refusal(name)} | {why} |" for name, why in zoo.OTHERWISE.items()]
    return "\n".join(
        [
            INTRODUCTION.format(version=transformers.__version__, tolerance=families.EVERYWHERE["identity"][1]),
            *head,
            *rows,
            "",
            "## Refused",
            "",
            "Also refused, whatever the family: weights that are offloaded to the CPU or a disk, and weights that are",
            "packed by a quantisation (load them dequantised).",
            "",
            "| family | what is said of it | what it does otherwise |",
            "|---|---|---|",
            *noes,
            "",
        ]
    )


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    logging.disable(logging.WARNING)  # of prompts that are the same for all of them
    torch.set_num_threads(1)  # models are so tiny that a second thread only waits
    with files.atomic(path) as temporary:
        temporary.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
