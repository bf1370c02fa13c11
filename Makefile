# make demo, make test: each makes .venv first when it is not there. PYTHON=python3.12 make … chooses another Python.
PYTHON ?= python3
DATA_DIR ?= data
BIN := .venv/bin
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: help install demo readme test test-gateway test-browser lint benchmark scaling study clean

help:  ## list what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

install: .venv/.run  ## make .venv with what the scripts need

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/.run: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.dev: requirements.txt requirements-scale.txt requirements-dev.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/.run

demo: .venv/.run  ## a grid of two runs on the Demo dataset: real model, gold teacher, results in output/
	$(BIN)/python run_experiments.py --datasets Demo --embedding_models sentence-transformers/all-MiniLM-L6-v2 \
		--optimize_with_gold --lr 1e-4 1e-3 --parallel 2 --experiment_prefix demo --save_tensors
	$(BIN)/python report.py output/demo_grid.csv

readme: demo  ## put the demo's table and a plot of its report into the README, as they are now
	$(BIN)/python docs/update_readme.py

test: .venv/.dev  ## the test suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gateway: .venv/.dev .venv-gateway/.done  ## a run through a real LiteLLM proxy on this machine (installs it)
	GATEWAY_BIN=.venv-gateway/bin $(BIN)/python -m pytest -s tests/gateway_check.py

.venv-gateway/.done:
	$(PYTHON) -m venv .venv-gateway
	.venv-gateway/bin/python -m pip install --quiet --disable-pip-version-check 'litellm[proxy]==1.106.2'
	@touch $@

test-browser: .venv/.browser  ## a report in a real browser, with screenshots; CHROMIUM=path where it is not found
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -s tests/browser_check.py

.venv/.browser: .venv/.dev requirements-browser.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt
	@touch $@

lint: .venv/.dev  ## ruff, with the rules of pyproject.toml
	$(BIN)/python -m ruff check .

benchmark: .venv/.dev  ## the numbers of the README; DATA_DIR=folder where the datasets lie (default data)
	$(BIN)/python benchmarks/refinement_speed.py
	$(BIN)/python benchmarks/embedding_speed.py --data_dir $(DATA_DIR)
	for dataset in Clinc150 Banking77 ArgKP21; do \
		$(BIN)/python benchmarks/second_run.py --data_dir $(DATA_DIR) --dataset $$dataset || exit 1; done
	$(BIN)/python benchmarks/large_corpus.py
	$(BIN)/python benchmarks/teacher_calls.py --data_dir $(DATA_DIR)
	$(BIN)/python benchmarks/grid_runs.py
	$(BIN)/python benchmarks/report_speed.py
	$(BIN)/python benchmarks/store_speed.py --data_dir $(DATA_DIR)
	$(BIN)/python benchmarks/store_speed.py --documents 1000000
	$(BIN)/python benchmarks/ray_cluster.py --data_dir $(DATA_DIR)

scaling: .venv/.dev  ## docs/scaling.md, about five minutes
	$(BIN)/python benchmarks/scaling.py

study: .venv/.dev  ## docs/method_study.md and the README's table of methods, about 25 minutes; DATA_DIR as for benchmark
	$(BIN)/python benchmarks/method_study.py --data_dir $(DATA_DIR)

clean:  ## remove the virtual environments; vectors, scores and passages in cache/ and results in output/ stay
	rm -rf .venv .venv-gateway
