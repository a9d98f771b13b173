"""Everything on one page: a self-contained HTML file."""


rule report:
    input:
        figures=figure_files("png"),
        tables=summary_tables(),
        provenance=provenance_files(),
    output:
        "results/report.html",
    log:
        "results/logs/report/report.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code("report.py"),
    message:
        "Writing the report"
    script:
        "../scripts/report.py"
