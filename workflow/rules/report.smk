"""Tables as CSV, and everything on one page: a self-contained HTML file."""

for part, (study, names, shown) in CSV.items():

    rule:
        name:
            f"csv_{part}"
        input:
            [f"results/{study}/{{series}}/{table}.parquet" for table in shown],
        output:
            [f"results/tables/{study}/{{series}}/{table}.csv" for table in shown],
        log:
            f"results/logs/csv_{part}/{{series}}.log",
        wildcard_constraints:
            series=one_of(names),
        conda:
            "../../envs/analysis.yaml"
        params:
            code=code("tables_as_csv.py"),
        message:
            "Writing tables of {wildcards.series} as CSV"
        script:
            "../scripts/tables_as_csv.py"


rule report:
    input:
        figures=figure_files("png"),
        tables=summary_tables(),
        provenance=provenance_files(),
        manifests=last_files("manifest.json"),
        audits=audit_files(),
        predictions=last_files("predictions.parquet"),
        dynamics=dynamics_report_files(),
        collaboration=collaboration_report_files(),
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
