"""Tables as CSV, and everything on one page: a self-contained HTML file."""


rule table:
    input:
        "results/{study}/{series}/{table}.parquet",
    output:
        "results/tables/{study}/{series}/{table}.csv",
    log:
        "results/logs/table/{study}/{series}/{table}.log",
    wildcard_constraints:
        study="attribution|dynamics",
        series=one_of([*PLAN.series, "all"]),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("table.py"),
    message:
        "Writing table {wildcards.table} of {wildcards.series} ({wildcards.study})"
    script:
        "../scripts/table.py"


rule report:
    input:
        figures=figure_files("png"),
        tables=summary_tables(),
        provenance=provenance_files(),
        manifests=last_files("manifest.json"),
        predictions=last_files("predictions.parquet"),
        dynamics=dynamics_report_files(),
    output:
        "results/report.html",
    log:
        "results/logs/report/report.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("report.py", *report_sources()),
        cfg=report_cfg(),
    message:
        "Writing the report"
    script:
        "../scripts/report.py"
