"""What the rules share: the checked configuration, names of files, digests of code. No rules, no torch."""

import os
import sys
from pathlib import Path

from snakemake.logging import logger

ROOT = Path(str(workflow.current_basedir)).parents[1]
SCRIPTS = ROOT / "workflow" / "scripts"

# The library beside this file serves the Snakefile and its jobs, whatever other clone is installed.
sys.path.insert(0, str(SCRIPTS))
os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")])))

from moescope import catalog, digest, plan
from moescope.errors import MoescopeError

try:
    PLAN = plan.read(config, ROOT)
except MoescopeError as error:
    sys.exit(f"error: {' '.join(str(error).split())}")

KINDS = {kind: names for kind in ("dense", "moe") if (names := PLAN.of_kind(kind))}
PRETRAINED = [series for series in PLAN.series.values() if series.pretrained]
GROUPS = PLAN.config["attribution"]["uncertainty"] == "groups"
SAMPLED = PLAN.config["ablation"]["neurons"] > 0
#: Attribution: figures of a series, each with the tables it draws.
FIGURES = {
    "accuracy": ["accuracy"],
    "layer_importance": ["layer_importance"],
    "layer_profiles": ["layer_importance"],
    "top_experts": ["top_experts"],
}
#: Study dynamics: figures of a series with two checkpoints or more.
DYNAMICS_FIGURES = {
    "stability": ["neuron_dynamics"],
    "concentration": ["neuron_dynamics"],
    "survival": ["overlap"],
    "consolidation": ["profile_similarity", "layer_dynamics"],
}
#: The same of an ablated series; ``faithfulness`` is also a table of its last ablated checkpoint.
ABLATION_FIGURES = {
    "robustness": ["robustness"],
    "dose_response": ["robustness"],
    **({"faithfulness": ["faithfulness", "score_faithfulness"]} if SAMPLED else {}),
}
#: Figures without a course, which have no axis to choose.
WITHOUT_AXIS = ("survival", "dose_response")


def one_of(names):
    """A wildcard constraint: exactly these names, or nothing at all."""
    return "|".join(name.replace(".", r"\.") for name in names) or "(?!)"


wildcard_constraints:
    series=one_of(PLAN.series),
    step=rf"\d+|{plan.MAIN}",


def code(adapter, *data):
    """Digest of an adapter, of the library modules behind it, and of data files of the workflow that they read."""
    return digest.code(SCRIPTS / adapter, *(ROOT / path for path in data))


def checkpoint_tables(kind):
    """The tables of one checkpoint, by name: what one pass of the model gives."""
    names = ["predictions", "layers", "heads", "ffn_neurons", "attn_neurons", "active_sums"]
    if kind == "moe":
        names.append("routing")
    if GROUPS:
        names += ["ffn_groups", "attn_groups", "top_active"]
    return {name: f"results/{{series}}/{{step}}/{name}.parquet" for name in names}


def series_tables(kind):
    """The summary tables of a series, by name."""
    names = ["accuracy", "layer_importance", *(["top_experts"] if kind == "moe" else [])]
    return {name: f"results/attribution/{{series}}/{name}.parquet" for name in names}


def figures_of(kind):
    """The figures of a series, each with its tables: those whose tables it has."""
    return {figure: tables for figure, tables in FIGURES.items() if tables[0] in series_tables(kind)}


def drawn(study, figures):
    """The files of the figures of a series, by name and format."""
    folder = f"results/figures/{study}/{{series}}"
    return {f"{figure}_{end}": f"{folder}/{figure}.{end}" for figure in figures for end in ("pdf", "png")}


def step_of(wildcards):
    """The step that a job is about, as the plan knows it."""
    return int(wildcards.step) if wildcards.step != plan.MAIN else plan.MAIN


def checkpoint_files(wildcards):
    """The files of a checkpoint on this disk: none where it is on the hub."""
    return PLAN.series[wildcards.series].files[step_of(wildcards)]


def each_step(name, steps=None):
    """An input function: a file of every scored step of a series, or of those that a study uses."""

    def paths(wildcards):
        chosen = PLAN.series[wildcards.series].steps if steps is None else steps[wildcards.series]
        return expand("results/{series}/{step}/{name}", series=wildcards.series, step=chosen, name=name)

    return paths


def last_routing(wildcards):
    """The routing of the last selected step, nothing for a dense series."""
    series = PLAN.series[wildcards.series]
    return f"results/{series.name}/{series.steps[-1]}/routing.parquet" if series.has_experts else []


def exposure(wildcards):
    """How often each fact was met in training, where the training is ours."""
    return f"results/{wildcards.series}/exposure.parquet" if PLAN.series[wildcards.series].pretrained else []


def training_table(wildcards):
    """What each step of the training has seen, where the training is ours."""
    return f"results/{wildcards.series}/training.parquet" if PLAN.series[wildcards.series].pretrained else []


def pretrain_cfg(series):
    """What a training is told: all that its result depends on besides its code."""
    return {**{key: series.entry[key] for key in ("architecture", "shape", "training")}, "relations": PLAN.facts.cfg}


def manifest_cfg(wildcards):
    """What the listing of a checkpoint is told."""
    series = PLAN.series[wildcards.series]
    told = ("source", "gguf_file", "allow_pickle")
    cfg = {key: series.entry[key] for key in told if series.entry.get(key)}
    if series.on_hub:
        found = series.revisions[step_of(wildcards)]
        cfg |= {"repo": series.entry["repo"], "revision": found.revision, "tokens": found.tokens}
    return cfg


def audit_cfg(wildcards):
    """What the audit of a series is told, beside the manifests: what the catalog says now."""
    series = PLAN.series[wildcards.series]
    return {
        "commits": {found.revision: found.commit for found in series.revisions.values() if found.commit},
        "gaps": [list(pair) for pair in catalog.gaps(sorted(series.files))] if len(series.files) > 1 else [],
        "remarks": catalog.remarks(series.entry.get("repo"), series.steps),
        "allow_duplicates": series.entry["allow_duplicates"],
    }


def attribute_cfg(wildcards):
    """What the scoring of a checkpoint is told."""
    entry = PLAN.series[wildcards.series].entry
    allowed = {"allow_duplicates": True} if entry["allow_duplicates"] else {}
    return {"dtype": entry["dtype"], **PLAN.config["attribution"], **allowed}


def audit_files():
    """Whether the checkpoints of each series can be told apart and belong together."""
    return expand("results/{series}/audit.json", series=list(PLAN.series))


def overview_cfg(wildcards):
    """What the summary of a series is told."""
    return {"seed": PLAN.facts.seed, "allow_duplicates": PLAN.series[wildcards.series].entry["allow_duplicates"]}


def summary_tables():
    """The summary tables of all series."""
    return [
        path
        for series in PLAN.series.values()
        for path in expand(series_tables(series.kind).values(), series=series.name)
    ]


def figure_files(*ends):
    """The figures of all series, in these formats."""
    pattern = "results/figures/attribution/{series}/{figure}.{end}"
    return [
        path
        for series in PLAN.series.values()
        for path in expand(pattern, series=series.name, figure=figures_of(series.kind), end=ends)
    ]


# The order of jobs is one of priorities alone. An order-only input, ancient(...), would be a trap: what hangs on a job
# that runs is not looked at for changes of its own, so that these would be missed.
#: Checkpoints in the order in which they are best scored: by step, because the next one is fetched ahead; mixtures of
#: experts first, because dense ones are seen through their routing.
SCORED = [(name, step) for kind in ("moe", "dense") for name in PLAN.of_kind(kind) for step in PLAN.series[name].steps]
PRIORITIES = {one: 2 * (len(SCORED) - place) for place, one in enumerate(SCORED)}
#: What shows whether a series can be trusted comes before any weights are fetched; what else a checkpoint is needed for,
#: while it is on this disk, before the next one.
LISTING, FIRST = 2 * len(SCORED) + 3, 2 * len(SCORED) + 2


def scoring_priority(wildcards):
    """Earlier places in the order first."""
    return PRIORITIES[wildcards.series, step_of(wildcards)] + 1


def masking_priority(wildcards):
    """Right behind the scoring of the same checkpoint."""
    return PRIORITIES[wildcards.series, step_of(wildcards)]


def scoring_threads(wildcards):
    """One core for a small checkpoint, so that many run side by side; all of them for one above 50 MB, or of a size that
    is not known."""
    size = PLAN.series[wildcards.series].size(step_of(wildcards))
    return workflow.cores if size is None or size > 50e6 else 1


# --- ablation and study dynamics


def ablate_cfg(wildcards):
    """What the ablation of a checkpoint is told."""
    told = {key: PLAN.config["ablation"][key] for key in ("rankings", "seeds", "neurons")}
    entry = PLAN.series[wildcards.series].entry
    read = {key: PLAN.config["attribution"][key] for key in ("target", "norm")}
    return {**told, "dtype": entry["dtype"], **read, "seed": PLAN.facts.seed}


def mask_cfg(wildcards):
    """What the masking of a dense checkpoint is told."""
    cfg = ablate_cfg(wildcards)
    return {key: cfg[key] for key in ("dtype", "target", "norm", "seed")}


def ablation_tables():
    """The tables that the ablation of a checkpoint gives, by name."""
    names = ["ablations", *(["faithfulness", "faithfulness_prompts"] if SAMPLED else [])]
    return {name: f"results/{{series}}/{{step}}/{name}.parquet" for name in names}


def with_groups(files):
    """Files (or an input function) that are only there where groups of subjects are told apart."""
    return files if GROUPS else []


def matched_routing(wildcards):
    """The routing of the paired mixture of experts at the step nearest to that of a dense checkpoint."""
    step = PLAN.matched_step(wildcards.series, step_of(wildcards))
    return f"results/{PLAN.routed_by[wildcards.series]}/{step}/routing.parquet"


def dynamics_files(name):
    """An input function: a file of every checkpoint of a series in study dynamics."""
    return each_step(name, PLAN.dynamics)


def ablated_files(name):
    """An input function: a file of every ablated checkpoint of a series."""
    return each_step(name, PLAN.ablation)


def last_ablated(name):
    """An input function: a file of the last ablated checkpoint of a series."""
    return lambda wildcards: ablated_files(name)(wildcards)[-1]


def dynamics_routing(wildcards):
    """The routing of every checkpoint of a series in study dynamics, where the series routes."""
    routes = GROUPS and PLAN.series[wildcards.series].has_experts
    return dynamics_files("routing.parquet")(wildcards) if routes else []


def masked_files(wildcards):
    """The masked groups of every checkpoint of a dense series that is held against a mixture of experts."""
    return dynamics_files("masked_groups.parquet")(wildcards) if wildcards.series in PLAN.routed_by else []


def of_series(template, names):
    """A file of the study for each of these series, in their order."""
    return [template.format(series=name) for name in names]


def ablated_tables():
    """The tables of study dynamics of an ablated series."""
    return ["robustness", "robustness_summary", *(["score_faithfulness"] if SAMPLED else [])]


def course_tables():
    """The tables of study dynamics of every series."""
    tables = ["neuron_dynamics", "overlap", "layer_dynamics", "profile_similarity"]
    return [*tables, *(["prompt_dynamics"] if GROUPS else [])]


def dynamics_tables(name):
    """The tables of study dynamics of one series."""
    return [*course_tables(), *(ablated_tables() if name in PLAN.ablation else [])]


def comparison_tables():
    """The tables of study dynamics over all series, by name."""
    names = ["table_2", "table_3", "table_4", *(["sparsity", "verdict"] if PLAN.routed_by else [])]
    return {name: f"results/dynamics/all/{name}.parquet" for name in names}


def courses():
    """The series of the study with two checkpoints or more."""
    return [name for name, steps in PLAN.dynamics.items() if len(steps) > 1]


def dynamics_figures(name):
    """The figures of study dynamics of one series: those that its checkpoints allow."""
    return [*(DYNAMICS_FIGURES if name in courses() else ()), *(ABLATION_FIGURES if name in PLAN.ablation else ())]


def comparison_figures():
    """The figures of study dynamics over all series."""
    paired = any({moe, dense} <= {*courses()} for dense, moe in PLAN.routed_by.items())
    return [*(["comparison"] if len(courses()) > 1 else []), *(["sparsity"] if paired else [])]


def axes_of(figures):
    """What the courses of these figures are drawn over, as the keyword that the figure takes."""
    axis = {"axis": PLAN.config["dynamics"]["axis"]}
    return {figure: axis for figure in figures if figure not in WITHOUT_AXIS}


def pairs():
    """The mixtures of experts and the dense series they are held against, as plain values."""
    return [{"moe": moe, "dense": dense} for dense, moe in PLAN.routed_by.items()]


def comparison_cfg():
    """What the comparison of series is told. Published numbers are those of the published facts and their objects."""
    relations, target = PLAN.config["relations"], PLAN.config["attribution"]["target"]
    comparable = (relations["source"], relations["names"], target) == ("lre", "all", "object")
    repos = {name: PLAN.series[name].entry.get("repo") if comparable else None for name in PLAN.dynamics}
    return {
        "series": list(PLAN.dynamics),
        "ablated": list(PLAN.ablation),
        "repos": repos,
        "pairs": pairs(),
        "windows": PLAN.config["dynamics"]["windows"],
        "seed": PLAN.facts.seed,
    }


def ablation_targets():
    """The ablation of every checkpoint that is to be ablated."""
    paths = [*ablation_tables().values(), "results/{series}/{step}/provenance/ablate.json"]
    ablated = [path for name, steps in PLAN.ablation.items() for path in expand(paths, series=name, step=steps)]
    return audit_files() + ablated


def masked_targets():
    """The dense checkpoints seen through the routing of a mixture of experts."""
    paths = ["results/{series}/{step}/masked_groups.parquet", "results/{series}/{step}/provenance/mask_dense.json"]
    return [path for name in PLAN.routed_by for path in expand(paths, series=name, step=PLAN.dynamics[name])]


def dynamics_table_files(template):
    """A file for every table of study dynamics, of each series and of all."""
    paths = [template.format(series=name, table=table) for name in PLAN.dynamics for table in dynamics_tables(name)]
    return paths + [template.format(series="all", table=table) for table in comparison_tables()]


def dynamics_figure_files(*ends):
    """The figures of study dynamics, in these formats."""
    pattern = "results/figures/dynamics/{series}/{figure}.{end}"
    drawn = {**{name: dynamics_figures(name) for name in PLAN.dynamics}, "all": comparison_figures()}
    return [path for name, figs in drawn.items() for path in expand(pattern, series=name, figure=figs, end=ends)]


def dynamics_targets():
    """Everything of study dynamics but the report."""
    tables = dynamics_table_files("results/dynamics/{series}/{table}.parquet")
    csv = dynamics_table_files("results/tables/dynamics/{series}/{table}.csv")
    figures = dynamics_figure_files("pdf", "png")
    return ablation_targets() + masked_targets() + tables + csv + figures


#: What is written as CSV: study, series, tables.
CSV = {
    **{f"attribution_{kind}": ("attribution", names, list(series_tables(kind))) for kind, names in KINDS.items()},
    "dynamics": ("dynamics", PLAN.dynamics, course_tables()),
    "ablation": ("dynamics", PLAN.ablation, ablated_tables()),
    "comparison": ("dynamics", ["all"], list(comparison_tables())),
}


# --- the report and what is asked for


def report_cfg():
    """What the report says of each series, and of the studies, beside their tables."""
    series = [
        {
            "name": series.name,
            "source": series.entry["source"],
            "architecture": series.architecture,
            "steps": list(series.steps),
            "figures": list(figures_of(series.kind)),
        }
        for series in PLAN.series.values()
    ]
    studies = {"dynamics": dynamics_report_cfg, "collaboration": collaboration_report_cfg}
    return {"series": series, **{study: told() if PLAN.asks(study) else None for study, told in studies.items()}}


def dynamics_report_cfg():
    """What the report says of study dynamics beside its tables."""
    series = [
        {
            "name": name,
            "steps": list(steps),
            "ablated": list(PLAN.ablation.get(name, [])),
            "tables": dynamics_tables(name),
            "figures": dynamics_figures(name),
        }
        for name, steps in PLAN.dynamics.items()
    ]
    return {"series": series, "tables": list(comparison_tables()), "figures": comparison_figures(), "options": {}}


def dynamics_report_files():
    """What the report shows of study dynamics."""
    tables = dynamics_table_files("results/dynamics/{series}/{table}.parquet")
    return tables + dynamics_figure_files("png") if PLAN.asks("dynamics") else []


def report_sources():
    """The files that the page is made from: its template and captions."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "workflow" / "report").iterdir())


def last_files(name):
    """A file of the last selected checkpoint of every series."""
    return [f"results/{series.name}/{series.steps[-1]}/{name}" for series in PLAN.series.values()]


def provenance_files():
    """How every checkpoint was scored, and how the series that are trained here were."""
    scored = "results/{series}/{step}/provenance/attribute.json"
    return [
        *(path for s in PLAN.series.values() for path in expand(scored, series=s.name, step=s.steps)),
        *(f"results/{series.name}/provenance/pretrain.json" for series in PRETRAINED),
    ]


def series_targets(series):
    """The tables of one series and of its checkpoints."""
    kind = series.kind
    each = [*checkpoint_tables(kind).values(), "results/{series}/{step}/manifest.json"]
    once = ["results/{series}/audit.json"]
    once += [f"results/tables/attribution/{{series}}/{table}.csv" for table in series_tables(kind)]
    if series.pretrained:
        once += ["results/{series}/training.parquet", "results/{series}/exposure.parquet"]
    return expand(each, series=series.name, step=series.steps) + expand(once, series=series.name)


def attribution_targets():
    """All that is there without any study."""
    each = [path for series in PLAN.series.values() for path in series_targets(series)]
    return each + summary_tables() + figure_files("pdf", "png") + provenance_files()


def warn_of_code_trigger():
    """Snakemake's own code trigger goes by the time of the script file: a touched or cloned file would rerun all."""
    if "code" in {trigger.name.lower() for trigger in workflow.rerun_triggers}:
        logger.warning(
            "Rerun trigger 'code' is on, so files newer than the results rerun them: "
            "run with the profile in profiles/default (--workflow-profile) to rerun only what changed."
        )
