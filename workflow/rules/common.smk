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

from moescope import digest, plan
from moescope.errors import MoescopeError

try:
    PLAN = plan.read(config, ROOT)
except MoescopeError as error:
    sys.exit(f"error: {' '.join(str(error).split())}")

KINDS = {kind: names for kind in ("dense", "moe") if (names := PLAN.of_kind(kind))}
PRETRAINED = [series for series in PLAN.series.values() if series.pretrained]
FIGURES = {
    "accuracy": "accuracy",
    "layer_importance": "layer_importance",
    "layer_profiles": "layer_importance",
    "top_experts": "top_experts",
}


def one_of(names):
    """A wildcard constraint: exactly these names."""
    return "|".join(name.replace(".", r"\.") for name in names)


wildcard_constraints:
    series=one_of(PLAN.series),
    step=r"\d+",
    table=r"\w+",
    figure=one_of(FIGURES),


def code(adapter, *data):
    """Digest of an adapter, of the library modules behind it, and of data files of the workflow that they read."""
    return digest.code(SCRIPTS / adapter, *(ROOT / path for path in data))


def checkpoint_tables(kind):
    """The tables of one checkpoint, by name: what one pass of the model gives."""
    names = ["predictions", "layers", "heads", "ffn_neurons", "attn_neurons", "active_sums"]
    if kind == "moe":
        names.append("routing")
    if PLAN.config["attribution"]["uncertainty"] == "groups":
        names += ["ffn_groups", "attn_groups", "top_active"]
    return {name: f"results/{{series}}/{{step}}/{name}.parquet" for name in names}


def series_tables(kind):
    """The summary tables of a series, by name."""
    names = ["accuracy", "layer_importance", *(["top_experts"] if kind == "moe" else [])]
    return {name: f"results/attribution/{{series}}/{name}.parquet" for name in names}


def figures_of(kind):
    """The figures of a series: those whose table it has."""
    return [figure for figure, table in FIGURES.items() if table in series_tables(kind)]


def figure_table(wildcards):
    """The table that a figure draws."""
    return f"results/attribution/{wildcards.series}/{FIGURES[wildcards.figure]}.parquet"


def checkpoint_files(wildcards):
    """The files of a checkpoint."""
    return PLAN.series[wildcards.series].files[int(wildcards.step)]


def each_step(pattern):
    """An input function: the file of every selected step of a series."""

    def paths(wildcards):
        return expand(pattern, series=wildcards.series, step=PLAN.series[wildcards.series].steps)

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
    entry = PLAN.series[wildcards.series].entry
    return {"source": entry["source"], "gguf_file": entry.get("gguf_file")}


def attribute_cfg(wildcards):
    """What the scoring of a checkpoint is told."""
    return {"dtype": PLAN.series[wildcards.series].entry["dtype"], **PLAN.config["attribution"]}


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


def scoring_threads(wildcards):
    """One core for a small checkpoint, so that many run side by side; all of them for one above 50 MB."""
    size = PLAN.series[wildcards.series].size(int(wildcards.step))
    return workflow.cores if size > 50e6 else 1


def report_cfg():
    """What the report says of each series beside its tables."""
    return [
        {
            "name": series.name,
            "source": series.entry["source"],
            "architecture": series.architecture,
            "steps": list(series.steps),
            "figures": figures_of(series.kind),
        }
        for series in PLAN.series.values()
    ]


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
    once = [f"results/tables/attribution/{{series}}/{table}.csv" for table in series_tables(kind)]
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
