# Two commands: `make pretrain` shows what the package does, `make test` proves it.
# How many processes share the work: WORKERS=4 make test.
# A Python to start from: PYTHON=python3.12 make test.  Extra words for pip: PIP_ARGS="...".
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
WORKERS ?= 2
# A test that waits for ever shows where it stands, and ends them all.
LIMIT := -o faulthandler_timeout=500 --timeout 600 --timeout-method thread --max-worker-restart 0
RECIPE ?= object-transformer-mini
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
.DEFAULT_GOAL := help
.PHONY: help pretrain test notebooks site docs bench wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

.venv/made:
	@$(PYTHON) tools/check_python.py
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@touch $@

.venv/runtime: .venv/made settings.ini setup.py constraints.txt
	@echo "installing the runtime set (a few minutes the first time)"
	@$(INSTALL) -e '.[worlds]'
	@touch $@

.venv/dev: .venv/runtime settings.ini setup.py constraints.txt
	@echo "installing the test set"
	@$(INSTALL) -e '.[dev]'
	@touch $@

pretrain: .venv/runtime  ## install, then pre-train the embedded default on the CPU
	$(BIN)/unipre3d pretrain $(RECIPE) $(ARGS)

notebooks: .venv/dev  ## run every notebook
	$(BIN)/python tools/run_notebooks.py --workers $(WORKERS)

test: .venv/dev notebooks  ## install, run every notebook, then pytest
	$(BIN)/python -m pytest -q tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(LIMIT) $(ARGS)

site: .venv/dev
	$(BIN)/python tools/build_site.py

docs: site  ## build the documentation site into _docs/ and walk its pages in a browser
	$(BIN)/python tools/check_site.py

bench: .venv/dev  ## time training steps; ARGS="--against REV" runs an older commit alternately
	$(BIN)/python benchmarks/steps.py $(ARGS)

wheel: .venv/dev  ## build a wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

clean:  ## remove everything that the targets above made
	rm -rf .venv _docs _proc _executed build dist unipre3d.egg-info .pytest_cache
