"""A checkpoint, its leading experts and pairs, and the prompts -> what breaks without them, and what drives them."""

import json
from pathlib import Path

from moescope import checkpoints, clean, experiments, precision, provenance, tables
from moescope.job import device, job

with job(snakemake):
    cfg = snakemake.params.cfg
    entry = json.loads(Path(snakemake.input.manifest).read_text())
    prompts, importance, associations = (
        tables.read(snakemake.input[name]) for name in ("prompts", "expert_importance", "associations")
    )
    asked = experiments.Asked.of(cfg)
    opened = checkpoints.opened(entry, cfg["dtype"], device(snakemake))
    with opened as (model, tokenizer), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, tokenizer, prompts, cfg["target"], cfg["norm"])
        results, found = experiments.intervene_run(run, importance, associations, asked, progress=True)
    for name, frame in results.items():
        tables.write(frame, snakemake.output[name])
    provenance.write(snakemake.output.provenance, cfg, device=device(snakemake), decomposition_error=run.error, **found)
