# SPDX-License-Identifier: Apache-2.0
# `make demo` builds and runs the main job, `make test` builds and runs the tests; both set up all they need.
# `make quick` runs the tests that are not marked slow, `make check` the linters.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test check quick pytest clean

demo: $(VENV)/.demo
	$(BIN)/medaccel demo

test: $(VENV)/.test check pytest

check: $(VENV)/.test
	$(BIN)/ruff check medaccel tests benchmarks tools/gpu_checks tools/gpu_check tools/build_in_place setup.py
	$(BIN)/ruff format --check medaccel tests benchmarks tools/gpu_checks tools/gpu_check tools/build_in_place setup.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Tests in two processes, one thread each: kernels are tested with other thread counts where they set them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

pytest: $(VENV)/.test
	$(PYTEST)

quick: $(VENV)/.test
	$(PYTEST) -m "not slow"

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; set PYTHON to a Python >= 3.10"; exit 1; }
	@command -v c++ >/dev/null || { echo "make: no C++ compiler was found (Debian/Ubuntu: apt-get install g++)"; exit 1; }
	@echo "== a virtual environment in $(VENV), with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --progress-bar on "$(TORCH)"
	@touch $@

# Editable, so that an edited .py file counts at once; an edited kernel is rebuilt.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "== building and installing medaccel"
	$(PIP) install --progress-bar on -e ".[pipelines]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	@echo "== building and installing medaccel with what its tests need"
	MEDACCEL_WERROR=1 $(PIP) install --progress-bar on -e ".[test]"
	@tools/install_test_tools
	@touch $@

clean:
	rm -rf build dist *.egg-info medaccel/_*.so $(VENV)/.demo $(VENV)/.test
