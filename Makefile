# dist_train: `make` lists the targets. Requires Python >= 3.11, make and git.
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
ARGS   ?=
TESTERS ?= 4

VENV := .venv
BIN  := $(VENV)/bin

# One process per GPU visible to this shell; without GPUs, two processes. Evaluated only when a recipe needs it.
GPUS = $(shell if [ -n "$${CUDA_VISIBLE_DEVICES+set}" ]; \
	then printf '%s' "$$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '^[^-]'; \
	else nvidia-smi -L 2>/dev/null | grep -c '^GPU '; fi)
NPROC ?= $(or $(filter-out 0,$(GPUS)),2)

# An equal share of the CPUs for each process, unless the shell has set it: torchrun would set 1, and warn.
CPUS    = $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
THREADS = $(shell n=$$(($(CPUS) / $(NPROC))); echo $$((n > 0 ? n : 1)))

.PHONY: help train test-cpu lint format bench bench-quick bench-all chaos docs site clean distclean install
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# PET_LOCAL_ADDR is torchrun's --local-addr: it waits five minutes if the machine's own hostname can't be resolved.
train: install  ## train CONFIG (configs/digits.yaml) on NPROC processes (one per GPU, else 2); ARGS='optimizer.lr=0.05'
	PET_LOCAL_ADDR=127.0.0.1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} $(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) -m dist_train.main --config $(CONFIG) $(ARGS)

# Several test files in parallel, on any number of CPUs: many tests wait for processes to start or exit. TESTERS=0 runs them one by one.
# Hundreds of processes import the package: write bytecode, whatever the shell has set.
test-cpu: install  ## run all tests that need neither a GPU nor a network; ARGS='tests/config -k duration' TESTERS=0
	CUDA_VISIBLE_DEVICES= PYTHONHASHSEED=0 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder -m "not chaos" $(or $(ARGS),tests)

lint: install  ## run ruff (style and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## reformat the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## compare steps per second and startup time with a raw loop, Fabric, Lightning, accelerate, Ignite
	bench/run overhead.py $(ARGS)

bench-quick: install  ## what matters of speed, in about a minute: the input, the step and its fixed cost, a whole job
	bench/run input.py --quick
	bench/run overhead.py --rounds 1 --steps 500 --world 1 --only raw dist_train
	bench/run step_cost.py
	bench/run job.py --rounds 1 --epochs 5 --world 1 --only plain dist_train

# On a quiet machine: half an hour. The tables of bench/RESULTS.md, in one file.
bench-all: install  ## all benchmarks of the CPU, with their tables in bench-results.md
	for command in "step_cost.py" "step_cost.py --lean" "input.py" "overhead.py --steps 3000 --rounds 3" "job.py" "resume.py --trials 3"; do \
	  bench/run $$command || exit 1; echo; done | tee bench-results.md

chaos: install  ## run the long kill tests: real processes, real signals
	CUDA_VISIBLE_DEVICES= PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m chaos -o faulthandler_timeout=7200 $(or $(ARGS),tests)

docs: install  ## regenerate docs/config.md and the JSON Schema from the schema
	$(BIN)/python docs/make_config.py

site: install  ## build the documentation as a site with search: site/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove tool caches and build outputs (keeps runs/ and .venv)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environments
	rm -rf $(VENV) .venv-bench

# Installs if pyproject.toml or constraints.txt has changed since the last installation. The stamp is written last, so an
# interrupted installation is repeated; an environment that was moved, or whose Python is gone, is recreated.
install:
	@want=$$(cat pyproject.toml constraints.txt | cksum); \
	if [ "$$(cat $(VENV)/.installed 2>/dev/null)" = "$$want" ] && $(BIN)/python -c '' 2>/dev/null; then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: dist_train needs Python >= 3.11; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1)." \
	       "Choose another one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	if ! head -n 2 $(BIN)/pip 2>/dev/null | grep -qF "$(CURDIR)/$(BIN)/" || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "make: creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make: the virtual environment could not be created; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	echo "make: installing (the first time downloads about 3 GB; 6 GB on disk)"; \
	rm -f $(VENV)/.installed; \
	$(BIN)/python -m pip install $$([ -t 1 ] || echo --quiet) --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	printf '%s\n' "$$want" >$(VENV)/.installed
