# All that one does with this tree. `make help` lists it.
#
# A fresh machine needs Python >= 3.11 with venv, a C compiler and make; everything else goes into virtual environments
# inside the tree (.venv, .work/), which `make clean-all` removes.
#
#   PYTHON=...      the interpreter; each has an environment of its own
#   ARGS=...        more arguments for pytest: make test ARGS="-k timeout -x"
#   CC, CFLAGS, AIOTOOLS_DEBUG, ... (setup.py)  for the build

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python on PATH that is new enough.
FIND_PYTHON = for p in python3 python3.15 python3.14 python3.13 python3.12 python3.11 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; exit; }; done; echo python3
ifndef PYTHON
# An environment that is there already goes on being used.
PYTHON := $(shell for p in .venv/bin/python .venv/Scripts/python.exe; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; exit; }; done; $(FIND_PYTHON))
VENV := .venv
endif
# An interpreter that was asked for has an environment named after it: 3.14.0, 3.14.0t, 3.14.0d, 3.14.0t-tsan.
ifndef VENV
NAME := $(shell $(PYTHON) -c 'import sys, sysconfig; \
    tsan = "thread-sanitizer" in (sysconfig.get_config_var("CONFIG_ARGS") or ""); \
    print(sys.version.split()[0] + getattr(sys, "abiflags", "") + "-tsan" * tsan)')
ifeq ($(NAME),)
$(error PYTHON=$(PYTHON) does not run)
endif
VENV := .work/venvs/$(NAME)
endif
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY := $(VENV)/$(BIN)/python
# ruff, mypy and towncrier do not belong to what the suite runs with.
TOOLS := .work/venvs/tools
TOOLS_PY := $(TOOLS)/$(BIN)/python
ARGS ?=
PYTEST := $(PY) -m pytest

.PHONY: help
help: ## this list
	@echo "make TARGET [PYTHON=...] [ARGS='arguments for pytest']"
	@echo
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	    while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

.PHONY: venv
venv: ## the virtual environment for building and testing (.venv, or one per PYTHON=...)
	@tools/venv $(PYTHON) $(VENV) build-system test uvloop

.PHONY: build
build: venv ## compile the core where it is imported from; only what changed
	@if [ ! -e $(VENV)/editable ] || [ aiotools/_version.py -nt $(VENV)/editable ] || [ pyproject.toml -nt $(VENV)/editable ]; then \
	    echo "--- installing the tree into $(VENV), editable" && \
	    PYTHONWARNINGS=ignore $(PY) -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --editable . && \
	    touch $(VENV)/editable; fi
	@$(PY) setup.py --quiet build_ext --inplace

.PHONY: test
test: build ## the suite on all loop kinds
	$(PYTEST) $(ARGS)

.PHONY: demo
demo: build ## a service with 1,000 clients on both loops, a crawler with a limit, a service with workers, reloaded and shot at
	$(PY) examples/line_service.py
	$(PY) examples/crawl.py
	$(PY) examples/workers_demo.py

.PHONY: test-c
test-c: ## the C unit tests of the pure structures, under ASan and UBSan where the compiler has them
	@tools/test-c

.PHONY: test-asan
test-asan: venv ## the suite with the core under ASan and UBSan, invariants checked
	tools/test-sanitized asan $(PY) $(ARGS)

.PHONY: test-tsan
# What making the environment shows is not ours.
test-tsan: export TSAN_OPTIONS := report_bugs=0
test-tsan: venv ## the thread tests under TSan (PYTHON= a free-threaded build that is itself under TSan)
	tools/test-sanitized tsan $(PY) $(ARGS)

.PHONY: stress
# 8 threads and 4 loops per queue, a million items; as many as AIOTOOLS_STRESS_ITEMS says.
stress: export AIOTOOLS_STRESS_ITEMS ?= 1000000
stress: build ## queues between 8 threads and 4 loops with random cancellations, AIOTOOLS_STRESS_ITEMS=1000000 items each
	$(PYTEST) tests/test_queue_stress.py $(ARGS)

.PHONY: test-refleaks
test-refleaks: build ## leak hunting: references (PYTHON= a debug build), allocated blocks, type references
	$(PYTEST) tests/test_refleaks.py $(ARGS)

.PHONY: test-nomemory
test-nomemory: build ## each operation with each allocation failing once
	$(PYTEST) tests/test_nomemory.py $(ARGS)

.PHONY: test-all
test-all: ## the suite on all interpreters that can be had (INTERPRETERS="3.11 3.14t ...")
	tools/test-all $(ARGS)

.PHONY: bench
bench: build ## the benchmarks, side by side with asyncio and its rivals
	@tools/venv $(PYTHON) $(VENV) bench
	$(PY) -m benchmarks $(ARGS)

.PHONY: load
load: build ## servers restarted, killed, hung and stopped under load, side by side with the peers
	@tools/venv $(PYTHON) $(VENV) load
	@[ -e .work/rivals/aiotools ] || { echo "--- installing aiotools 2.2 into .work/rivals" && \
	    $(PY) -m pip --disable-pip-version-check install --quiet --target .work/rivals aiotools==2.2.4 typing_extensions; }
	$(PY) -m benchmarks.server $(ARGS)

.PHONY: docs
docs: ## the documentation, in docs/_build/html; warnings are errors
	@tools/venv $(PYTHON) .work/venvs/docs build-system docs
	@$(MAKE) --no-print-directory build VENV=.work/venvs/docs
	.work/venvs/docs/$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html
	@echo "docs/_build/html/index.html"

.PHONY: dist
dist: ## sdist and wheel in dist/, checked; the wheel passes the sdist's suite in a clean environment
	tools/dist $(PYTHON)

.PHONY: wheels
wheels: ## wheels for all Pythons on this platform, in wheelhouse/ (cibuildwheel: Docker on Linux)
	@tools/venv $(PYTHON) .work/venvs/wheels wheels
	.work/venvs/wheels/$(BIN)/python -m cibuildwheel --output-dir wheelhouse

.PHONY: changes
changes: ## what CHANGES.rst will say about the fragments in changes/
	@tools/venv $(PYTHON) $(TOOLS) build-system dev
	@$(TOOLS_PY) -m towncrier build --draft --version "$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' aiotools/_version.py)"

.PHONY: lint
lint: ## ruff; warnings of gcc and clang as errors; cppcheck where there is one
	@tools/venv $(PYTHON) $(TOOLS) build-system dev
	tools/lint $(TOOLS_PY)

.PHONY: typecheck
typecheck: ## mypy --strict, and the stubs against the module
	@tools/venv $(PYTHON) $(TOOLS) build-system dev
	@$(MAKE) --no-print-directory build VENV=$(TOOLS)
	tools/typecheck $(TOOLS_PY)

.PHONY: clean
clean: ## remove what was built; the virtual environments stay
	rm -rf build dist docs/_build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .work/asan .work/tsan
	rm -f aiotools/_aiotools*.so aiotools/_aiotools*.pyd
	find aiotools tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: clean-all
clean-all: clean ## and the virtual environments
	rm -rf .venv .work
