# `make` lists the targets. Each sets up what it needs in .venv, from a fresh clone.

PYTHON ?= python3
PRESET ?= auto
OVERRIDES ?= {}
BIN := .venv/bin

help:
	@echo 'make run    set up and execute the notebook: a trained model, its curve, its text   (PRESET=demo OVERRIDES="{n_layer: 2}")'
	@echo 'make lab    set up and open the notebook in JupyterLab'
	@echo 'make test   set up and run the tests'
	@echo 'make drill  set up and run the fault drills, half an hour: results/reliability.md'
	@echo 'make bench  set up and compare with other libraries, half an hour on an idle machine: results/bench-….md'
	@echo 'make recipe train demo with one change at a time, hours, can be stopped: results/recipe.md'

run: .venv/run
	@mkdir -p runs
	@$(BIN)/papermill LMHarness.ipynb runs/LMHarness.ipynb --kernel python3 --log-level ERROR --no-progress-bar \
	    --stdout-file - --stderr-file - -p preset '$(PRESET)' -y 'overrides: $(OVERRIDES)' 2>runs/stderr.log \
	    || { tail -n 4 runs/stderr.log; exit 1; }
	@$(BIN)/jupyter nbconvert --log-level ERROR --coalesce-streams --to notebook --inplace runs/LMHarness.ipynb
	@$(BIN)/jupyter nbconvert --log-level ERROR --to html runs/LMHarness.ipynb
	@echo 'The executed notebook is runs/LMHarness.ipynb, a page to read or send is runs/LMHarness.html.'

lab: .venv/run
	$(BIN)/jupyter lab LMHarness.ipynb

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2

drill: .venv/dev
	$(BIN)/python -m drills.drill

bench: .venv/bench
	$(BIN)/python -m bench.bench

recipe: .venv/run
	$(BIN)/python -m bench.recipe

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"LMHarness needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/run

.venv/bench: requirements-bench.txt requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@ .venv/dev .venv/run

.PHONY: help run lab test drill bench recipe
