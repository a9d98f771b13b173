"""One checkpoint and the prompts -> every table that one pass of the model gives."""

import json
from pathlib import Path

from moescope import attribution, audit, checkpoints, loading, provenance, tables
from moescope.job import device, job, memory

with job(snakemake):
    cfg = snakemake.params.cfg
    manifest = Path(snakemake.input.manifest)
    entry, others = json.loads(manifest.read_text()), checkpoints.listed(manifest.parents[1])
    opened = checkpoints.opened(entry, cfg["dtype"], device(snakemake))
    ahead = checkpoints.ahead(checkpoints.following(entry, others, "predictions.parquet"))
    with opened as (model, tokenizer), ahead:
        frames, found = attribution.attribute_with_report(
            model,
            tokenizer,
            tables.read(snakemake.input.prompts),
            cfg["target"],
            cfg["uncertainty"],
            cfg["norm"],
            progress=True,
            mem_mb=memory(snakemake),
        )
        fingerprint = loading.fingerprint(model)
    for name, frame in frames.items():
        tables.write(frame, snakemake.output[name])
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    found |= {"fingerprint": fingerprint, "same_weights": audit.same_weights(entry, others.values())}
    provenance.write(snakemake.output.provenance, cfg, dtype=dtype, device=device(snakemake), **found)
