# A fresh machine needs python3 (3.10 or later, with venv), a C++17 compiler and make. Everything else comes from pip.
# nvcc is used if it is there: PERSONVIT_CUDA=OFF make demo builds without it.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt

NATIVE := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu')
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt constraints.txt csrc/torch_paths.py $(filter csrc/%,$(NATIVE))
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))

.DEFAULT_GOAL := help
.PHONY: help venv install native demo learn test test-gpu bench bench-gpu lint format types clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -nE 's/^([a-z-]+):.*## (.*)$$/  make \1: \2/p' $(MAKEFILE_LIST)

# Stamps: what a folder holds is installed again only when the files that decide it have changed.
$(VENV)/stamp-torch: constraints.txt
	@echo "creating $(VENV) and installing torch and the build tools (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile setuptools wheel cmake ninja torch
	@touch $@

$(VENV)/stamp-install: $(VENV)/stamp-torch $(BUILD_FILES)
	@echo "building the extension and installing personvit into $(VENV)"
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp-install
	@echo "installing the tools for tests"
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

venv: $(VENV)/stamp-dev  ## .venv with everything that development needs
install: $(VENV)/stamp-install  ## .venv with what running needs

native: $(VENV)/stamp-torch  ## build the C++/CUDA extension again
	$(PIP) --no-build-isolation --no-deps -e .

demo: install  ## pre-train and fine-tune on generated persons, evaluate, draw the result
	$(PY) -m personvit.demo

learn: venv  ## the slow proof that pre-training and fine-tuning learn
	$(PY) -m pytest -s --run-slow tests/e2e/test_learning.py

test: venv lint types  ## the whole CPU suite
	$(PY) -m pytest

test-gpu: venv  ## what needs a CUDA device; a skip is a failure
	$(PY) -m pytest --require-gpu tests/gpu

bench: venv  ## every benchmark on what this machine has; tables in docs/benchmarks.md
	@for script in $(BENCHMARKS); do echo "== $$script"; $(PY) $$script || exit 1; done
	@$(PY) benchmarks/tables.py

bench-gpu: venv  ## every benchmark, refused without a CUDA device
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make bench-gpu: no CUDA device; see $(PY) -m personvit.env')"
	@for script in $(BENCHMARKS); do echo "== $$script"; $(PY) $$script || exit 1; done
	@$(PY) benchmarks/tables.py

lint: venv  ## ruff and clang-format, without changing a file
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

format: venv  ## rewrite sources in the project's format
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

types: venv  ## mypy --strict on the package
	$(VENV)/bin/mypy

clean:  ## remove builds and caches; the environment and runs stay
	rm -rf build dist *.egg-info personvit/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/stamp-install $(VENV)/stamp-dev
