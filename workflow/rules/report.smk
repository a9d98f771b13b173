"""Everything on one page: a self-contained HTML file."""


rule report:
    input:
        figures=figure_files("png"),
        tables=summary_tables(),
        provenance=provenance_files(),
        manifests=last_files("manifest.json"),
        predictions=last_files("predictions.parquet"),
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
