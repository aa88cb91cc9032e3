# Each target does its own set-up: Python 3.11 or newer, pip and make are all it needs.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

# Tests and tools never look for an accelerator; what is compiled for one is compiled here.
export JAX_PLATFORMS := cpu
# As `blm` does: memory in large pages, where programs on CPUs spend a third less on getting it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: install test test-long lint format demo clean

install: $(INSTALLED)

# Two files at a time, in the order of tests/conftest.py: most tests compile, which keeps one core busy.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What takes minutes each: two processes of four devices, more meshes, more kills, the demo in small.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long -o faulthandler_timeout=1800

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(INSTALLED)
	$(BIN)/blm demo

clean:
	rm -rf .venv .cache

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "blm_jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	# compat: with the other kind of editable install, a clone named blm_jax hides the package from its parent folder.
	$(BIN)/pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e '.[test,lint]'
	touch $@
