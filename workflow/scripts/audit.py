"""Manifests of a series -> whether its checkpoints can be told apart and belong together."""

import json
from pathlib import Path

from moescope import audit, files
from moescope.job import job

with job(snakemake):
    entries = [json.loads(Path(path).read_text()) for path in snakemake.input.manifests]
    files.write_json(audit.audit(entries, **snakemake.params.cfg), snakemake.output[0])
