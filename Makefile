# make demo   sets everything up and does the main job, end to end, on an embedded default
# make test   sets everything up and passes the tests
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
SEED ?= 0
BIN := $(VENV)/bin
APPROACHES := none concat contrastive distance
RUNS := $(APPROACHES:%=$(DEMO)/runs/%)

.PHONY: help setup test test-heavy lint typecheck bench docs demo clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "flsep is tested with Python 3.11 and 3.12; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[pipeline,cluster,trainer,evaluate,demo,dev]'
	@touch $@

# make lint typecheck   what a change must pass beside the tests
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow package_dir: give it the packages under their full names.
typecheck: setup
	@mkdir -p build/typing/flsep
	@for name in cache pipeline trainer; do ln -sfn ../../../$$name build/typing/flsep/$$name; done
	$(BIN)/mypy -p flsep.cache -p flsep.pipeline -p flsep.trainer

# Two processes with a thread each: oversubscribed cores cost more than they give.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# make test-heavy   passes the tests that take long, and those on a real SLURM where it is installed
test-heavy: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m heavy || { \
	  echo "what a busy machine has kept waiting gets a second chance"; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m heavy --last-failed --last-failed-no-failures none; }

# make bench   prints the tables of docs/benchmarks.md, measured on this machine
bench: setup
	FLSEP_BENCH=1 $(BIN)/python -m pytest -q tests/benchmarks

# make docs   renews docs/reference/cli.md and config.md from the code
docs: setup
	$(BIN)/python docs/generate.py

$(DEMO)/teacher/saved_model.pb: | setup
	$(BIN)/flsep-precompute teacher export musicnn $(DEMO)/teacher

demo: setup $(DEMO)/teacher/saved_model.pb
	$(BIN)/flsep-precompute demo-corpus $(DEMO)/corpus --tracks 10 --seconds 16 --seed $(SEED)
	$(BIN)/flsep-precompute run $(DEMO)/corpus $(DEMO)/shards --teacher $(DEMO)/teacher \
	  --shard-size 128M
	$(BIN)/flsep-precompute mixes $(DEMO)/shards $(DEMO)/mixes --seed $(SEED) --epochs 7 \
	  --seconds 6.1 --excerpts-per-track 2
	@set -ex; for approach in $(APPROACHES); do \
	  $(BIN)/flsep-train fit $(DEMO)/shards --run $(DEMO)/runs/$$approach --recipe demo \
	    --mixing rendered --mixes $(DEMO)/mixes --approach $$approach --seed $(SEED) --resume; \
	done
	$(BIN)/flsep-train evaluate $(RUNS) $(DEMO)/shards --floor $(DEMO)/floor
	$(BIN)/flsep-train compare $(RUNS) --floor $(DEMO)/floor --out $(DEMO)/comparison

# make clean   removes what the demo and the tests wrote, not the environment
clean:
	rm -rf $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
