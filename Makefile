# A fresh machine needs python3 (3.10 or later, with venv), a C++17 compiler and make. Everything else comes from pip.
# nvcc is used if it is there: PERSONVIT_CUDA=OFF make demo builds without it.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# make test-gpu PY=python3: an environment of your own, where the extension has been built. Nothing is installed then.
ifeq ($(origin PY),command line)
  RUN_ENV :=
  DEV_ENV :=
else
  RUN_ENV := install
  DEV_ENV := venv
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

NATIVE := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu')
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt constraints.txt csrc/torch_paths.py $(filter csrc/%,$(NATIVE))
SANITIZED := tests/gpu/test_native_cuda.py tests/gpu/test_retrieval_cuda.py
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))
# One that fails keeps no other from running.
RUN_BENCHMARKS = @failed=; for script in $(BENCHMARKS); do echo "== $$script"; $(PY) $$script || failed="$$failed $$script"; done; \
	  $(PY) benchmarks/tables.py; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help venv install native demo learn test test-gpu sanitize-gpu bench bench-gpu tune-gpu evidence lint format types clean

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

demo: $(RUN_ENV)  ## pre-train and fine-tune on generated persons, evaluate, draw the result
	$(PY) -m personvit.demo

learn: $(DEV_ENV)  ## the slow proof that pre-training and fine-tuning learn
	$(PY) -m pytest -s --run-slow tests/e2e/test_learning.py

test: venv lint types  ## the whole CPU suite
	$(PY) -m pytest

test-gpu: $(DEV_ENV)  ## what needs a CUDA device; a skip is a failure
	$(PY) -m pytest --require-gpu tests/gpu

sanitize-gpu: $(DEV_ENV)  ## the extension's CUDA operators under compute-sanitizer
	@command -v compute-sanitizer >/dev/null || { echo "make sanitize-gpu: no compute-sanitizer on PATH; it comes with the CUDA toolkit, in its bin/"; exit 1; }
	@for tool in memcheck racecheck initcheck synccheck; do echo "== $$tool"; PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $$tool --error-exitcode 86 --kernel-name kns=personvit \
	  $(PY) -m pytest -q --require-gpu --timeout 1800 $(SANITIZED) || exit 1; done

bench: $(DEV_ENV)  ## every benchmark on what this machine has; tables in docs/benchmarks.md
	$(RUN_BENCHMARKS)

bench-gpu: $(DEV_ENV)  ## every benchmark, refused without a CUDA device
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make bench-gpu: no CUDA device; see $(PY) -m personvit.env')"
	$(RUN_BENCHMARKS)

tune-gpu: $(DEV_ENV)  ## measure other launch parameters of the Triton kernels, and say what to freeze
	@$(PY) benchmarks/tune.py

evidence: $(DEV_ENV)  ## what pre-training is worth as a start: four arms, three seeds, on a GPU; docs/evidence.md
	@$(PY) benchmarks/evidence.py
	@$(PY) benchmarks/evidence.py --page

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
