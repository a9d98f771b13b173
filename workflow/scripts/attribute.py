"""One checkpoint and the prompts -> every table that one pass of the model gives."""

import json
from pathlib import Path

from moescope import attribution, audit, checkpoints, provenance, tables
from moescope.job import device, job, memory

with job(snakemake):
    cfg, prompts = snakemake.params.cfg, tables.read(snakemake.input.prompts)
    manifest = Path(snakemake.input.manifest)
    entry, others = json.loads(manifest.read_text()), checkpoints.selected(manifest.parents[1])
    opened = checkpoints.opened(entry, cfg["dtype"], device(snakemake))
    ahead = checkpoints.ahead(checkpoints.following(entry, others, "predictions.parquet"))
    with opened as (model, tokenizer), ahead:
        own = checkpoints.finding(entry, model, tokenizer, prompts["text"].to_list())
        same = audit.require_apart(entry, own, checkpoints.findings(others), cfg.get("allow_duplicates", False))
        frames, found = attribution.attribute_with_report(
            model,
            tokenizer,
            prompts,
            cfg["target"],
            cfg["uncertainty"],
            cfg["norm"],
            progress=True,
            mem_mb=memory(snakemake),
        )
    for name, frame in frames.items():
        tables.write(frame, snakemake.output[name])
    found |= {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "device": device(snakemake)}
    provenance.write(snakemake.output.provenance, cfg, checkpoint=own, same_weights=same, **found)
