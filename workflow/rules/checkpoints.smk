"""Checkpoints: the series that are trained here, the manifest of every checkpoint (listing and hashes, no weights), and
whether those of a series can be trusted."""

for series in PRETRAINED:

    rule:
        name:
            f"pretrain_{series.name}"
        input:
            relations=PLAN.facts.inputs,
        output:
            checkpoints=[path for paths in series.files.values() for path in paths],
            exposure=f"results/{series.name}/exposure.parquet",
            training=f"results/{series.name}/training.parquet",
            provenance=f"results/{series.name}/provenance/pretrain.json",
        log:
            f"results/logs/pretrain/{series.name}.log",
        priority: FIRST
        conda:
            "../../envs/lm.yaml"
        params:
            code=code("pretrain.py"),
            cfg=pretrain_cfg(series),
        message:
            f"Training {series.name}"
        script:
            "../scripts/pretrain.py"


rule manifest:
    input:
        checkpoint=checkpoint_files,
        training=training_table,
    output:
        "results/{series}/{step}/manifest.json",
    log:
        "results/logs/manifest/{series}/{step}.log",
    priority: LISTING
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("manifest.py"),
        cfg=manifest_cfg,
    message:
        "Listing checkpoint {wildcards.step} of {wildcards.series}"
    script:
        "../scripts/manifest.py"


rule audit_series:
    input:
        manifests=each_step("manifest.json"),
    output:
        "results/{series}/audit.json",
    log:
        "results/logs/audit/{series}.log",
    priority: LISTING
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("audit.py"),
        cfg=audit_cfg,
    message:
        "Checking the manifests of {wildcards.series} against one another"
    script:
        "../scripts/audit.py"


rule audit:
    input:
        audit_files(),
