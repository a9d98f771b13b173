"""Attribution: one job a checkpoint gives all its tables; summaries of a series, their CSV and figures, without torch."""


rule attribution:
    input:
        attribution_targets(),


for kind, names in KINDS.items():

    rule:
        name:
            f"attribute_{kind}"
        input:
            manifest="results/{series}/{step}/manifest.json",
            prompts="results/prompts.parquet",
        output:
            **checkpoint_tables(kind),
            provenance="results/{series}/{step}/provenance/attribute.json",
        log:
            "results/logs/attribute/{series}/{step}.log",
        wildcard_constraints:
            series=one_of(names),
        priority: scoring_priority
        conda:
            "../../envs/lm.yaml"
        threads: scoring_threads
        params:
            code=code("attribute.py"),
            cfg=attribute_cfg,
        message:
            "Scoring checkpoint {wildcards.step} of {wildcards.series}"
        script:
            "../scripts/attribute.py"

    rule:
        name:
            f"overview_{kind}"
        input:
            manifest=each_step("manifest.json"),
            predictions=each_step("predictions.parquet"),
            layers=each_step("layers.parquet"),
            provenance=each_step("provenance/attribute.json"),
            routing=last_routing,
            exposure=exposure,
            prompts="results/prompts.parquet",
        output:
            **series_tables(kind),
        log:
            "results/logs/overview/{series}.log",
        wildcard_constraints:
            series=one_of(names),
        conda:
            "../../envs/analysis.yaml"
        params:
            code=code("overview.py"),
            cfg=overview_cfg,
        message:
            "Summarising {wildcards.series}"
        script:
            "../scripts/overview.py"

    rule:
        name:
            f"attribution_figures_{kind}"
        input:
            **series_tables(kind),
        output:
            **drawn("attribution", figures_of(kind)),
        log:
            "results/logs/attribution_figures/{series}.log",
        wildcard_constraints:
            series=one_of(names),
        conda:
            "../../envs/analysis.yaml"
        params:
            code=code("attribution_figures.py"),
            cfg={"figures": figures_of(kind)},
        message:
            "Drawing attribution of {wildcards.series}"
        script:
            "../scripts/attribution_figures.py"
