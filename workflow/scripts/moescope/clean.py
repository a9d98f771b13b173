"""The clean run: one loaded model, a table of prompts, and the forward pass that nothing interferes with.

Scoring, masking and ablation all start from it: the prompts as tokens, their targets, what every layer did at the last
position (``decomposition``) and how a residual is read (``readout``). A model that cannot be taken apart is refused
here, before anything is computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from moescope import tables, targets
from moescope.decomposition import Decomposition, Trace
from moescope.readout import Readout

#: Tokens of one forward batch, padding included: a gigabyte of activations in a model like OLMoE-1B-7B.
BATCH_TOKENS = 4_096

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CleanRun:
    """P prompts (a ``prompts`` table) and what the model does with them.

    ``targets``: the token that is scored after each prompt; ``others``: the targets of the other right objects of its
    relation and subject; ``batches``: (prompt rows [B], ids [B, T], mask [B, T]); ``error``: of the decomposition.
    """

    prompts: pl.DataFrame
    targets: list[targets.Target]
    others: list[frozenset[int]]
    batches: list[Batch]
    trace: Trace
    readout: Readout
    error: float

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: nn.Module, tokenizer: object, prompts: pl.DataFrame, target: str = "object", norm: str = "final"
    ) -> CleanRun:
        """Run the model on the prompts, within ``precision.computing_in_float32``.

        ``target``: ``object`` (the first token of the object) or ``argmax`` (the model's own top token). ``norm``:
        residuals are read with the norm statistic of the ``final`` one, or each with its own (``local``). Raises
        DecompositionError where the model does not decompose, TargetError where the tokenizer cannot make a target,
        ReadoutError where the model's logits are not those of its residual.
        """
        prompts = tables.check(prompts, "prompts")
        rows = prompts.to_dicts()
        objects = targets.find(tokenizer, rows)
        decomposition = Decomposition(model)
        _require_known(model, objects)
        batches = batched([t.tokens for t in objects], decomposition.device)
        trace = decomposition.trace(batches)
        error = trace.verified()
        chosen = objects
        if target == "argmax":
            said = trace.logits.argmax(1).tolist()
            chosen = [targets.retarget(t, token) for t, token in zip(objects, said, strict=True)]
        ids = torch.tensor([t.target_id for t in chosen], device=decomposition.device)
        others = targets.other_targets(rows, objects)
        readout = Readout.of(decomposition, trace, ids, local=norm == "local")
        return cls(prompts, chosen, others, batches, trace, readout, error)

    @property
    def remarks(self) -> list[str]:
        """What asks for care when the scores of this model are read (``docs/families.md``)."""
        capped = ["soft-capped logits"] if self.readout.unembedding.cap is not None else []
        return self.trace.remarks() + capped

    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """log p(target) (nats, float64) and its rank among all tokens, from 1, in the model's own logits: [P] each."""
        logits, target = self.trace.logits, self.target[:, None]
        rank = 1 + (logits > logits.gather(1, target)).sum(1)
        return logits.double().log_softmax(-1).gather(1, target)[:, 0].cpu().numpy(), rank.cpu().numpy()

    @property
    def decomposition(self) -> Decomposition:
        return self.trace.decomposition

    @property
    def model(self) -> nn.Module:
        return self.decomposition.model

    @property
    def target(self) -> Tensor:
        """The token that is scored after each prompt: [P]."""
        return self.readout.target


def _require_known(model: nn.Module, objects: list[targets.Target]) -> None:
    """Raises TargetError where the tokenizer makes a token that the model has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((max(*target.tokens, target.target_id) for target in objects), default=0)
    if largest >= rows:
        raise targets.TargetError(
            f"the tokenizer makes token {largest}, the model knows {rows}; load the tokenizer that belongs to it"
        )


def batched(input_ids: list[tuple[int, ...]], device: torch.device) -> list[Batch]:
    """Length-sorted, right-padded batches: (prompt rows, ids, mask). Causal models never see the padding."""
    order = sorted(range(len(input_ids)), key=lambda i: (len(input_ids[i]), i))
    batches, batch = [], []
    for i in order:
        if batch and (len(batch) + 1) * len(input_ids[i]) > BATCH_TOKENS:
            batches.append(batch)
            batch = []
        batch.append(i)
    batches.append(batch)
    return [_padded(rows, input_ids, device) for rows in batches]


def _padded(rows: list[int], input_ids: list[tuple[int, ...]], device: torch.device) -> Batch:
    length = max(len(input_ids[i]) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, i in enumerate(rows):
        ids[k, : len(input_ids[i])] = torch.tensor(input_ids[i])
        mask[k, : len(input_ids[i])] = 1
    return torch.tensor(rows, device=device), ids.to(device), mask.to(device)
