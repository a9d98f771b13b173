"""MoEscope: series of checkpoints and facts in, tables, figures and a report out."""

from snakemake.utils import min_version

min_version("9.27")


configfile: workflow.current_basedir.join("config.yaml").get_path_or_uri(secret_free=True)


include: "workflow/rules/common.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/checkpoints.smk"
include: "workflow/rules/attribution.smk"
include: "workflow/rules/ablation.smk"
include: "workflow/rules/dynamics.smk"
include: "workflow/rules/collaboration_common.smk"
include: "workflow/rules/collaboration.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        rules.attribution.input,
        rules.dynamics.input if PLAN.asks("dynamics") else [],
        rules.collaboration.input if PLAN.asks("collaboration") else [],
        "results/report.html",


onstart:
    warn_of_code_trigger()
