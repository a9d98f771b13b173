"""What the rules of study collaboration are about: names of its tables and figures, what its jobs are told. No rules."""

#: Figures over all series; and of a series with experts, each with the module that draws it and the table it draws.
COLLABORATION_TOGETHER = ["efficiency", "gain_curves", "relation_accuracy"]
COLLABORATION_FIGURES = {
    "budget": ("collaboration_plots", "budgets"),
    "blocking": ("collaboration_plots", "blocking"),
    "expert_overlap": ("leading_plots", "expert_overlap"),
    "association": ("coupling_plots", "associations"),
    "causality": ("coupling_plots", "causality"),
    "neuron_types": ("leading_plots", "neuron_types"),
    "neuron_overlap": ("leading_plots", "neuron_overlap"),
}
#: Tables over all series; of every series; of one with experts, and with shared ones beside them.
TOGETHER = ["efficiency", "relation_accuracy", "beside_published"]
GAINS = ["gains"]
EXPERTS = ["budgets", "blocking", "expert_overlap", "causality"]
SHARED = ["neuron_types", "shared_neurons", "neuron_overlap"]
#: What is found of one checkpoint with experts before it is interfered with, and what comes of that.
FOUND = ["expert_importance", "associations"]
INTERVENED = ["expert_interventions", "gates", "gradients"]
#: Tables of the series that stand beside published numbers; those of checkpoints that the efficiency is made from.
BESIDE_PUBLISHED = ["gains", "budgets", "blocking", "causality", "neuron_types"]
EFFICIENCY_INPUTS = ["manifest.json", "predictions.parquet", "layers.parquet", "active_sums.parquet"]
#: The model that the paper names pairs of heads and experts of.
NAMES_PAIRS = "Qwen/Qwen1.5-MoE-A2.7B"
ASKED = PLAN.config["collaboration"]
#: Series of the study with experts, and those of them with shared ones too.
WITH_EXPERTS = [name for name in PLAN.collaboration if PLAN.series[name].has_experts]
WITH_SHARED = [name for name in PLAN.collaboration if PLAN.series[name].has_shared]


def collaboration_tables(name):
    """The tables of one series in study collaboration."""
    return GAINS + (EXPERTS if name in WITH_EXPERTS else []) + (SHARED if name in WITH_SHARED else [])


def figures_of_tables(tables):
    """The figures that draw these tables."""
    return [figure for figure, (_, table) in COLLABORATION_FIGURES.items() if table in tables]


def collaboration_figures(name):
    """The figures of one series."""
    return figures_of_tables(collaboration_tables(name) + (FOUND if name in WITH_EXPERTS else []))


def drawn_table(figure):
    """The table that a figure draws: of the series, or of its last checkpoint in the study."""
    table = COLLABORATION_FIGURES[figure][1]
    if table in FOUND:
        return lambda wildcards: of_checkpoints(f"{table}.parquet")(wildcards)[-1]
    return f"results/collaboration/{{series}}/{table}.parquet"


def of_checkpoints(name):
    """An input function: a file of every checkpoint of a series in the study."""
    return each_step(name, PLAN.collaboration)


def of_all_checkpoints(name):
    """A file of every checkpoint in the study."""
    return [
        path
        for one, steps in PLAN.collaboration.items()
        for path in expand(f"results/{one}/{{step}}/{name}", step=steps)
    ]


def published_repos():
    """The repository of every series; none where other facts are asked than the published ones."""
    relations, target = PLAN.config["relations"], PLAN.config["attribution"]["target"]
    comparable = (relations["source"], relations["names"], target) == ("lre", "all", "object")
    return {name: PLAN.series[name].entry.get("repo") if comparable else None for name in PLAN.collaboration}


def associate_cfg(wildcards):
    """What the search for pairs of a head and an expert is told."""
    told = {key: ASKED[key] for key in ("association", "importance", "permutations", "strongest")}
    return {**told, "seed": PLAN.facts.seed}


def intervene_cfg(wildcards):
    """What the experiments on a checkpoint are told."""
    told = {key: ASKED[key] for key in ("importance", "semantics", "budgets", "weights", "seeds", "gradient_steps")}
    pairs = [[*pair["head"], *pair["expert"]] for pair in ASKED["pairs"] if pair["series"] == wildcards.series]
    entry = PLAN.series[wildcards.series].entry
    read = {key: PLAN.config["attribution"][key] for key in ("target", "norm")}
    return {**told, "pairs": pairs, "dtype": entry["dtype"], **read, "seed": PLAN.facts.seed}


def gains_cfg(wildcards):
    """Where the stages of a series begin."""
    return {"stages": ASKED["stages"].get(wildcards.series), "seed": PLAN.facts.seed}


def experts_cfg(wildcards):
    """Which published numbers stand beside those of a series."""
    return {"repo": published_repos()[wildcards.series], "seed": PLAN.facts.seed}


def together_cfg():
    """What the comparison of series is told: their checkpoints in the order of the files, and their repositories."""
    checkpoints = [name for name, steps in PLAN.collaboration.items() for _ in steps]
    told = {key: ASKED[key] for key in ("association", "importance", "permutations")}
    return {"checkpoints": checkpoints, "repos": published_repos(), **told, "seed": PLAN.facts.seed}


def paper_of_pairs(name):
    """A file of the model that the paper names pairs of, whose correlations stand beside the paper's."""
    found = [
        one
        for one, repo in published_repos().items()
        if repo == NAMES_PAIRS and PLAN.collaboration[one] == (plan.MAIN,)
    ]
    return [f"results/{one}/{plan.MAIN}/{name}" for one in found]


def collaboration_table_files(template):
    """A file for every table of the study, of each series and of all."""
    paths = [
        template.format(series=name, table=table) for name in PLAN.collaboration for table in collaboration_tables(name)
    ]
    return paths + [template.format(series="all", table=table) for table in TOGETHER]


def collaboration_figure_files(*ends):
    """The figures of the study, in these formats."""
    pattern = "results/figures/collaboration/{series}/{figure}.{end}"
    drawn = {**{name: collaboration_figures(name) for name in PLAN.collaboration}, "all": list(COLLABORATION_TOGETHER)}
    return [path for name, figs in drawn.items() for path in expand(pattern, series=name, figure=figs, end=ends)]


def intervened_files():
    """What the experiments on every checkpoint with experts give."""
    names = [*(f"{table}.parquet" for table in FOUND + INTERVENED), "provenance/intervene.json"]
    pattern = "results/{series}/{step}/{file}"
    return [
        path
        for name in WITH_EXPERTS
        for path in expand(pattern, series=name, step=PLAN.collaboration[name], file=names)
    ]


def collaboration_targets():
    """Everything of study collaboration but the report."""
    tables = collaboration_table_files("results/collaboration/{series}/{table}.parquet")
    csv = collaboration_table_files("results/tables/collaboration/{series}/{table}.csv")
    return audit_files() + intervened_files() + tables + csv + collaboration_figure_files("pdf", "png")


def collaboration_report_files():
    """What the report shows of the study."""
    if not PLAN.asks("collaboration"):
        return []
    tables = collaboration_table_files("results/collaboration/{series}/{table}.parquet")
    return tables + collaboration_figure_files("png") + intervened_files()


def collaboration_report_cfg():
    """What the report says of the study beside its tables."""
    series = []
    for name, steps in PLAN.collaboration.items():
        experts, last = name in WITH_EXPERTS, steps[-1]
        series.append(
            {
                "name": name,
                "dense": not experts,
                "shared": name in WITH_SHARED,
                "step": last if last != plan.MAIN else None,
                "checkpoint": {"step": f"{last}", "tables": FOUND} if experts else None,
                "tables": collaboration_tables(name),
                "figures": collaboration_figures(name),
            }
        )
    options = {"method": ASKED["importance"]}
    return {"series": series, "tables": TOGETHER, "figures": list(COLLABORATION_TOGETHER), "options": options}


CSV |= {
    "gains": ("collaboration", PLAN.collaboration, GAINS),
    "experts": ("collaboration", WITH_EXPERTS, EXPERTS),
    "shared_experts": ("collaboration", WITH_SHARED, SHARED),
    "together": ("collaboration", ["all"], TOGETHER),
}
