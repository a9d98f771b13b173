# make run | resume | plan | catalog | first-figure | report | test | test-soak | families | lint | bench | bench-run;
# every target sets up .venv first, once.
PYTHON ?= python3.11
CORES ?= all
# More arguments for Snakemake or pytest: make run ARGS="--configfile configs/bring-your-own.yaml"
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
FIRST := results/figures/attribution/tiny-olmoe/accuracy.png
SNAKEFILES := Snakefile workflow/Snakefile workflow/rules

.PHONY: setup run resume plan catalog test test-soak families lint bench bench-run report first-figure
.DEFAULT_GOAL := run

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; install it or name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: $(READY)
	$(BIN)/snakemake --cores $(CORES) $(ARGS)

# After a kill: refuses while a run still owns the folder, unlocks it, goes on.
resume: $(READY)
	@$(BIN)/python -m moescope.resume
	$(BIN)/snakemake --unlock $(ARGS)
	$(BIN)/snakemake --cores $(CORES) $(ARGS)

first-figure: $(READY)
	$(BIN)/snakemake --cores $(CORES) $(ARGS) $(FIRST)
	@echo $(FIRST)

report: $(READY)
	$(BIN)/snakemake --cores $(CORES) $(ARGS) results/report.html
	@echo results/report.html

# List the branches of the hub repositories that a configuration names: make catalog ARGS="--configfile mine.yaml"
catalog: $(READY)
	$(BIN)/python -m moescope.cataloguing $(ARGS)

# What a configuration takes, before anything is downloaded: make plan ARGS="--configfile mine.yaml --bandwidth 50"
plan: $(READY)
	@$(BIN)/python -m moescope.estimate $(ARGS)

test: $(READY)
	$(BIN)/pytest -m "not soak" $(ARGS)

# Runs that are killed again and again, full disks, runs beside one another.
test-soak: $(READY)
	$(BIN)/pytest -m soak $(ARGS)

# Measure every family of models and write docs/families.md.
families: $(READY)
	$(BIN)/python -m tests.model.support_table docs/families.md

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check $(SNAKEFILES)
	$(BIN)/snakemake --lint

# What scoring costs beside the usual ways; bench-run: what the default run costs.
bench: $(READY)
	$(BIN)/python benchmarks/scoring.py $(ARGS)

bench-run: $(READY)
	$(BIN)/python benchmarks/run.py $(ARGS)
