"""One checkpoint and the prompts -> every table that one pass of the model gives."""

import json
from pathlib import Path

from moescope import attribution, checkpoints, provenance, tables
from moescope.job import device, job, memory

with job(snakemake):
    cfg = snakemake.params.cfg
    entry = json.loads(Path(snakemake.input.manifest).read_text())
    with checkpoints.acquire(entry) as directory:
        model, tokenizer = checkpoints.load(directory, cfg["dtype"], device(snakemake), entry["gguf_file"])
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
    for name, frame in frames.items():
        tables.write(frame, snakemake.output[name])
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    provenance.write(snakemake.output.provenance, cfg, dtype=dtype, device=device(snakemake), **found)
