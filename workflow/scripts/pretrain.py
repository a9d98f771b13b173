"""Relations -> a model trained on them: its checkpoints, what it was shown, how the training went."""

from pathlib import Path

from moescope import facts, pretraining, provenance, tables
from moescope.job import device, job

with job(snakemake):
    cfg = snakemake.params.cfg
    training, exposure = pretraining.pretrain(
        cfg["architecture"],
        cfg["shape"],
        pretraining.Training.of(cfg["training"]),
        facts.read(cfg["relations"], snakemake.input, Path(__file__).parents[2]),
        Path(snakemake.output.exposure).parent / "checkpoints",
        device(snakemake),
    )
    tables.write(training, snakemake.output.training)
    tables.write(exposure, snakemake.output.exposure)
    provenance.write(snakemake.output.provenance, cfg, dtype="float32", device=device(snakemake))
