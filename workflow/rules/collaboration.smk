"""Study collaboration: what layers gain, how experts and heads work together, what breaks without some of them; one job
a checkpoint interferes with the model, the rest runs without torch."""


rule collaboration:
    input:
        collaboration_targets(),


rule associate:
    input:
        heads="results/{series}/{step}/heads.parquet",
        routing="results/{series}/{step}/routing.parquet",
        top_active="results/{series}/{step}/top_active.parquet",
        prompts="results/prompts.parquet",
    output:
        **{table: f"results/{{series}}/{{step}}/{table}.parquet" for table in FOUND},
    log:
        "results/logs/associate/{series}/{step}.log",
    wildcard_constraints:
        series=one_of(WITH_EXPERTS),
    priority: FIRST
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("associate.py"),
        cfg=associate_cfg,
    message:
        "Looking for leading experts, and for heads that go with them, in {wildcards.series}, {wildcards.step}"
    script:
        "../scripts/associate.py"


rule intervene:
    input:
        **{table: f"results/{{series}}/{{step}}/{table}.parquet" for table in FOUND},
        manifest="results/{series}/{step}/manifest.json",
        prompts="results/prompts.parquet",
    output:
        **{table: f"results/{{series}}/{{step}}/{table}.parquet" for table in INTERVENED},
        provenance="results/{series}/{step}/provenance/intervene.json",
    log:
        "results/logs/intervene/{series}/{step}.log",
    wildcard_constraints:
        series=one_of(WITH_EXPERTS),
    priority: FIRST
    conda:
        "../../envs/lm.yaml"
    threads: scoring_threads
    params:
        code=code("intervene.py"),
        cfg=intervene_cfg,
    message:
        "Interfering with experts and heads of {wildcards.series}, {wildcards.step}"
    script:
        "../scripts/intervene.py"


rule collaboration_gains:
    input:
        manifest=of_checkpoints("manifest.json"),
        layers=of_checkpoints("layers.parquet"),
        prompts="results/prompts.parquet",
    output:
        gains="results/collaboration/{series}/gains.parquet",
    log:
        "results/logs/collaboration_gains/{series}.log",
    wildcard_constraints:
        series=one_of(PLAN.collaboration),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("collaboration_gains.py"),
        cfg=gains_cfg,
    message:
        "Following the gain along the layers of {wildcards.series}"
    script:
        "../scripts/collaboration_gains.py"


rule collaboration_experts:
    input:
        **{table: of_checkpoints(f"{table}.parquet") for table in FOUND + INTERVENED},
        manifest=of_checkpoints("manifest.json"),
        routing=of_checkpoints("routing.parquet"),
        prompts="results/prompts.parquet",
    output:
        **{table: f"results/collaboration/{{series}}/{table}.parquet" for table in EXPERTS},
    log:
        "results/logs/collaboration_experts/{series}.log",
    wildcard_constraints:
        series=one_of(WITH_EXPERTS),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("collaboration_experts.py", "resources/published/top_experts.csv"),
        cfg=experts_cfg,
    message:
        "Summing up the experiments on {wildcards.series}"
    script:
        "../scripts/collaboration_experts.py"


rule collaboration_neurons:
    input:
        manifest=of_checkpoints("manifest.json"),
        top_active=of_checkpoints("top_active.parquet"),
        ffn_neurons=of_checkpoints("ffn_neurons.parquet"),
        active_sums=of_checkpoints("active_sums.parquet"),
        routing=of_checkpoints("routing.parquet"),
        prompts="results/prompts.parquet",
    output:
        **{table: f"results/collaboration/{{series}}/{table}.parquet" for table in SHARED},
    log:
        "results/logs/collaboration_neurons/{series}.log",
    wildcard_constraints:
        series=one_of(WITH_SHARED),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("collaboration_neurons.py"),
        cfg={"seed": PLAN.facts.seed},
    message:
        "Telling shared and routed neurons of {wildcards.series} apart"
    script:
        "../scripts/collaboration_neurons.py"


rule collaboration_together:
    input:
        **{file.partition(".")[0]: of_all_checkpoints(file) for file in EFFICIENCY_INPUTS},
        **{
            table: of_series(
                f"results/collaboration/{{series}}/{table}.parquet",
                [name for name in PLAN.collaboration if table in collaboration_tables(name)],
            )
            for table in BESIDE_PUBLISHED
        },
        heads=paper_of_pairs("heads.parquet"),
        routing=paper_of_pairs("routing.parquet"),
        prompts="results/prompts.parquet",
    output:
        **{table: f"results/collaboration/all/{table}.parquet" for table in TOGETHER},
    log:
        "results/logs/collaboration/all.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("collaboration_together.py", "resources/published/figures.csv"),
        cfg=together_cfg(),
    message:
        "Holding the series against each other and against the paper"
    script:
        "../scripts/collaboration_together.py"


for part, names, tables in (("experts", WITH_EXPERTS, EXPERTS + FOUND), ("shared", WITH_SHARED, SHARED)):
    figures = figures_of_tables(tables)

    rule:
        name:
            f"collaboration_figures_{part}"
        input:
            **{figure: drawn_table(figure) for figure in figures},
        output:
            **drawn("collaboration", figures),
        log:
            f"results/logs/collaboration_figures/{part}/{{series}}.log",
        wildcard_constraints:
            series=one_of(names),
        conda:
            "../../envs/analysis.yaml"
        params:
            code=code("collaboration_figures.py"),
            cfg={"figures": {figure: COLLABORATION_FIGURES[figure][0] for figure in figures}},
        message:
            "Drawing study collaboration of {wildcards.series}"
        script:
            "../scripts/collaboration_figures.py"


rule collaboration_figures_together:
    input:
        efficiency="results/collaboration/all/efficiency.parquet",
        relation_accuracy="results/collaboration/all/relation_accuracy.parquet",
        gain_curves=of_series("results/collaboration/{series}/gains.parquet", PLAN.collaboration),
    output:
        **{
            f"{figure}_{end}": f"results/figures/collaboration/all/{figure}.{end}"
            for figure in COLLABORATION_TOGETHER
            for end in ("pdf", "png")
        },
    log:
        "results/logs/collaboration_figures/all.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("collaboration_figures_together.py"),
        cfg={"series": list(PLAN.collaboration)},
    message:
        "Drawing the series of study collaboration beside each other"
    script:
        "../scripts/collaboration_figures_together.py"
