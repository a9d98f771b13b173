"""A checkpoint, its scores and the prompts -> what breaks without heads and neurons, and how true the scores are."""

import json
from pathlib import Path

from moescope import ablation, checkpoints, clean, faithfulness, precision, provenance, tables
from moescope.job import device, job

with job(snakemake):
    cfg = snakemake.params.cfg
    entry = json.loads(Path(snakemake.input.manifest).read_text())
    prompts, scored = tables.read(snakemake.input.prompts), ("heads", "ffn_neurons", "ffn_groups")
    frames = {name: tables.read(snakemake.input[name]) for name in scored if snakemake.input.get(name)}
    opened = checkpoints.opened(entry, cfg["dtype"], device(snakemake))
    with opened as (model, tokenizer), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, tokenizer, prompts, cfg["target"], cfg["norm"])
        ablated, found = ablation.ablate_run(run, frames, cfg["rankings"], cfg["seeds"], cfg["seed"], progress=True)
        results = {"ablations": ablated}
        if cfg["neurons"]:
            results |= faithfulness.faithfulness(run, frames, cfg["neurons"], cfg["seed"], progress=True)
    for name, frame in results.items():
        tables.write(frame, snakemake.output[name])
    provenance.write(snakemake.output.provenance, cfg, device=device(snakemake), decomposition_error=run.error, **found)
