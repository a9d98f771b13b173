"""Ablation: one job a checkpoint takes heads and neurons away and sees what breaks."""


rule ablation:
    input:
        ablation_targets(),


rule ablate:
    input:
        manifest="results/{series}/{step}/manifest.json",
        prompts="results/prompts.parquet",
        heads="results/{series}/{step}/heads.parquet",
        ffn_neurons="results/{series}/{step}/ffn_neurons.parquet",
        ffn_groups=with_groups("results/{series}/{step}/ffn_groups.parquet"),
    output:
        **ablation_tables(),
        provenance="results/{series}/{step}/provenance/ablate.json",
    log:
        "results/logs/ablate/{series}/{step}.log",
    priority: FIRST
    conda:
        "../../envs/lm.yaml"
    threads: scoring_threads
    params:
        code=code("ablate.py"),
        cfg=ablate_cfg,
    message:
        "Ablating checkpoint {wildcards.step} of {wildcards.series}"
    script:
        "../scripts/ablate.py"
