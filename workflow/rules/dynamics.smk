"""Study dynamics: where importance lies and how it moves over pre-training; statistics, tables and figures without torch."""


rule dynamics:
    input:
        dynamics_targets(),


rule mask_dense:
    input:
        manifest="results/{series}/{step}/manifest.json",
        prompts="results/prompts.parquet",
        routing=matched_routing,
    output:
        masked_groups="results/{series}/{step}/masked_groups.parquet",
        provenance="results/{series}/{step}/provenance/mask_dense.json",
    log:
        "results/logs/mask_dense/{series}/{step}.log",
    wildcard_constraints:
        series=one_of(PLAN.routed_by),
    priority: masking_priority
    conda:
        "../../envs/lm.yaml"
    threads: scoring_threads
    params:
        code=code("mask_dense.py"),
        cfg=mask_cfg,
    message:
        "Masking checkpoint {wildcards.step} of {wildcards.series} by the routing of its pair"
    script:
        "../scripts/mask_dense.py"


rule dynamics_neurons:
    input:
        manifest=dynamics_files("manifest.json"),
        ffn_neurons=dynamics_files("ffn_neurons.parquet"),
        attn_neurons=dynamics_files("attn_neurons.parquet"),
        active_sums=dynamics_files("active_sums.parquet"),
        ffn_groups=with_groups(dynamics_files("ffn_groups.parquet")),
        attn_groups=with_groups(dynamics_files("attn_groups.parquet")),
        top_active=with_groups(dynamics_files("top_active.parquet")),
        routing=dynamics_routing,
        masked_groups=masked_files,
        prompts="results/prompts.parquet",
    output:
        **({"prompt_dynamics": "results/dynamics/{series}/prompt_dynamics.parquet"} if GROUPS else {}),
        neuron_dynamics="results/dynamics/{series}/neuron_dynamics.parquet",
        overlap="results/dynamics/{series}/overlap.parquet",
    log:
        "results/logs/dynamics_neurons/{series}.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("dynamics_neurons.py"),
        cfg={"seed": PLAN.facts.seed},
    message:
        "Following the neurons of {wildcards.series}"
    script:
        "../scripts/dynamics_neurons.py"


rule dynamics_layers:
    input:
        manifest=dynamics_files("manifest.json"),
        layers=dynamics_files("layers.parquet"),
        prompts="results/prompts.parquet",
    output:
        layer_dynamics="results/dynamics/{series}/layer_dynamics.parquet",
        profile_similarity="results/dynamics/{series}/profile_similarity.parquet",
    log:
        "results/logs/dynamics_layers/{series}.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("dynamics_layers.py"),
        cfg={"seed": PLAN.facts.seed, "windows": PLAN.config["dynamics"]["windows"]},
    message:
        "Following the layers of {wildcards.series}"
    script:
        "../scripts/dynamics_layers.py"


rule dynamics_robustness:
    input:
        manifest=ablated_files("manifest.json"),
        ablations=ablated_files("ablations.parquet"),
        faithfulness_prompts=ablated_files("faithfulness_prompts.parquet") if SAMPLED else [],
        heads=last_ablated("heads.parquet"),
        ffn_neurons=last_ablated("ffn_neurons.parquet"),
        prompts="results/prompts.parquet",
    output:
        **({"score_faithfulness": "results/dynamics/{series}/score_faithfulness.parquet"} if SAMPLED else {}),
        robustness="results/dynamics/{series}/robustness.parquet",
        robustness_summary="results/dynamics/{series}/robustness_summary.parquet",
    log:
        "results/logs/dynamics_robustness/{series}.log",
    wildcard_constraints:
        series=one_of(PLAN.ablation),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("dynamics_robustness.py"),
        cfg={"seed": PLAN.facts.seed},
    message:
        "Summing up the ablations of {wildcards.series}"
    script:
        "../scripts/dynamics_robustness.py"


rule dynamics_comparison:
    input:
        neuron_dynamics=of_series("results/dynamics/{series}/neuron_dynamics.parquet", PLAN.dynamics),
        layer_dynamics=of_series("results/dynamics/{series}/layer_dynamics.parquet", PLAN.dynamics),
        prompt_dynamics=with_groups(of_series("results/dynamics/{series}/prompt_dynamics.parquet", PLAN.dynamics)),
        robustness_summary=of_series("results/dynamics/{series}/robustness_summary.parquet", PLAN.ablation),
        prompts="results/prompts.parquet",
    output:
        **comparison_tables(),
    log:
        "results/logs/dynamics_comparison/all.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("dynamics_comparison.py", "resources/published/figures.csv"),
        cfg=comparison_cfg(),
    message:
        "Holding the series against each other"
    script:
        "../scripts/dynamics_comparison.py"


rule dynamics_figures:
    input:
        neuron_dynamics="results/dynamics/{series}/neuron_dynamics.parquet",
        overlap="results/dynamics/{series}/overlap.parquet",
        layer_dynamics="results/dynamics/{series}/layer_dynamics.parquet",
        profile_similarity="results/dynamics/{series}/profile_similarity.parquet",
    output:
        **drawn("dynamics", DYNAMICS_FIGURES),
    log:
        "results/logs/dynamics_figures/{series}.log",
    wildcard_constraints:
        series=one_of(courses()),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("dynamics_figures.py"),
        cfg={"figures": DYNAMICS_FIGURES, "axis": axes_of(DYNAMICS_FIGURES)},
    message:
        "Drawing the courses of {wildcards.series}"
    script:
        "../scripts/dynamics_figures.py"


rule ablation_figures:
    input:
        **({"score_faithfulness": "results/dynamics/{series}/score_faithfulness.parquet"} if SAMPLED else {}),
        robustness="results/dynamics/{series}/robustness.parquet",
        faithfulness=last_ablated("faithfulness.parquet") if SAMPLED else [],
    output:
        **drawn("dynamics", ABLATION_FIGURES),
    log:
        "results/logs/ablation_figures/{series}.log",
    wildcard_constraints:
        series=one_of(PLAN.ablation),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("ablation_figures.py"),
        cfg={"figures": ABLATION_FIGURES, "axis": axes_of(ABLATION_FIGURES)},
    message:
        "Drawing the ablations of {wildcards.series}"
    script:
        "../scripts/ablation_figures.py"


rule comparison_figure:
    input:
        neuron_dynamics=of_series("results/dynamics/{series}/neuron_dynamics.parquet", PLAN.dynamics),
        layer_importance=of_series("results/attribution/{series}/layer_importance.parquet", PLAN.dynamics),
        profile_similarity=of_series("results/dynamics/{series}/profile_similarity.parquet", PLAN.dynamics),
    output:
        pdf="results/figures/dynamics/all/comparison.pdf",
        png="results/figures/dynamics/all/comparison.png",
    log:
        "results/logs/dynamics_figure/all/comparison.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("comparison_figure.py"),
        cfg={"axis": PLAN.config["dynamics"]["axis"], "series": list(PLAN.dynamics)},
    message:
        "Drawing the series beside each other"
    script:
        "../scripts/comparison_figure.py"


rule sparsity_figure:
    input:
        neuron_dynamics=of_series("results/dynamics/{series}/neuron_dynamics.parquet", PLAN.dynamics),
        sparsity="results/dynamics/all/sparsity.parquet",
        verdict="results/dynamics/all/verdict.parquet",
    output:
        pdf="results/figures/dynamics/all/sparsity.pdf",
        png="results/figures/dynamics/all/sparsity.png",
    log:
        "results/logs/dynamics_figure/all/sparsity.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("sparsity_figure.py"),
        cfg={"axis": PLAN.config["dynamics"]["axis"], "series": list(PLAN.dynamics)},
    message:
        "Drawing the sparsity question"
    script:
        "../scripts/sparsity_figure.py"
