# `make` lists the targets. Each sets up what it needs in .venv, from a fresh clone.

PYTHON ?= python3
PRESET ?= auto
OVERRIDES ?=
SCALE ?= cpu
BIN := .venv/bin
override PRESET := $(value PRESET)
override OVERRIDES := $(value OVERRIDES)
override RUN := $(value RUN)
export PRESET OVERRIDES RUN  # read from the environment: quotes and dollars in a value stay as they are

help:
	@echo 'make run    set up and execute the notebook: a trained model, its curve, its text   (PRESET=demo OVERRIDES="{n_layer: 2}")'
	@echo 'make lab    set up and open the notebook in JupyterLab'
	@echo 'make notebook  set up and execute the notebook in place, as it is committed'
	@echo 'make test   set up and run the tests'
	@echo 'make test-long  set up and run the tests that take minutes'
	@echo 'make browser  set up and use the notebook in Chromium, minutes; screenshots in runs/browser/'
	@echo 'make script set up and write the notebook as a program, LMHarness.py, for torchrun   (PRESET=day OVERRIDES="{…}")'
	@echo 'make scores  set up and score a run with lm_eval, beside the notebook: RUN=runs/demo-44feb9'
	@echo 'make experiments  set up and answer the five questions, within an hour on two cores: results/experiments.md'
	@echo 'make drill  set up and run the fault drills, a quarter to three quarters of an hour: results/reliability.md'
	@echo 'make rehearsal  set up and take day through two steps on GPUs that are not there, a quarter of an hour, on Linux with gcc: results/rehearsal.md'
	@echo 'make bench  set up and compare with other libraries, a quarter of an hour on an idle machine: results/bench-….md'
	@echo 'make traffic  set up and count what a block of day reads and writes on a GPU, without one, minutes: results/traffic.md'
	@echo 'make card   print the row of your card for results/cards.md, from a run that has ended: RUN=runs/day-1a2b3c'
	@echo 'make recipe train demo beside other recipes and with single changes, hours, can be stopped: results/recipe.md'
	@echo 'make dial   hold what is said of the best size and batch against a sweep by hand, hours, can be stopped: results/dial.md'
	@echo 'make forecast  train the short runs behind the forecast, and longer ones to test it, hours, can be stopped: results/forecast.md'

run: .venv/run
	@$(BIN)/python -m tools.execute --preset "$$PRESET" --overrides "$$OVERRIDES"

script: .venv/run
	@$(BIN)/python -m tools.execute --preset "$$PRESET" --overrides "$$OVERRIDES" --script

notebook: .venv/run
	@$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace --ExecutePreprocessor.timeout=-1 \
	    --ExecutePreprocessor.record_timing=False LMHarness.ipynb
	@$(BIN)/jupyter nbconvert --log-level ERROR --coalesce-streams --to notebook --inplace LMHarness.ipynb
	@$(BIN)/python -c 'from machinery.notebook import mark_executed; mark_executed()'

lab: .venv/run
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) LMHarness.ipynb

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-long: .venv/dev
	$(BIN)/python -m pytest -q -m long

browser: .venv/dev
	SCREENSHOTS=runs/browser $(BIN)/python -m pytest -q -rs -m 'long or not long' tests/test_browser.py

scores: .venv/dev
	@test -n "$$RUN" || { echo 'make scores RUN=runs/... : which run?'; exit 1; }
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tools.scores "$$RUN" $${SOURCE:+"$$SOURCE"}

drill: .venv/dev
	$(BIN)/python -m tools.drills.drill

rehearsal: .venv/run
	$(BIN)/python -m tools.rehearsal

bench: .venv/dev
	$(BIN)/python -m tools.bench.bench

traffic: .venv/run
	$(BIN)/python -m tools.bench.traffic

card: .venv/run
	@test -n "$$RUN" || { echo 'make card RUN=runs/... : which run?'; exit 1; }
	@$(BIN)/python -m tools.card "$$RUN"

recipe: .venv/run
	$(BIN)/python -m tools.bench.recipe

forecast: .venv/run
	$(BIN)/python -m tools.forecast

dial: .venv/run
	$(BIN)/python -m tools.dial

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"LMHarness needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: tools/requirements.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tools/requirements.txt
	@touch $@ .venv/run

experiments: .venv/run
	$(BIN)/python -m tools.experiments --scale $(SCALE)

.PHONY: help run script notebook lab test test-long browser scores drill rehearsal bench traffic card recipe forecast dial experiments
