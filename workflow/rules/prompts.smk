"""Facts of the relations -> the table of prompts."""


rule prompts:
    input:
        relations=PLAN.facts.inputs,
    output:
        "results/prompts.parquet",
    log:
        "results/logs/prompts/prompts.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("prompts.py"),
        cfg=PLAN.facts.cfg,
    message:
        "Writing the prompts"
    script:
        "../scripts/prompts.py"
