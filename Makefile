# `make demo` and `make test` do everything on a fresh machine; both need only Python >= 3.10
# with venv, and a C++ compiler for llama-cpp-python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# mypy and import-linter find modules by folder, and the converters lie outside of the package's:
# give them a folder where they are at home.
TYPES = rm -rf build/types && mkdir -p build/types/safegene_edge && \
	ln -s $(CURDIR)/safegene_edge/* build/types/safegene_edge/ && \
	ln -s $(CURDIR)/converters build/types/safegene_edge/converters && \
	cd build/types && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml && \
	$(CURDIR)/$(BIN)/lint-imports --no-logo $(CURDIR)/pyproject.toml

.PHONY: demo test fuzz lint types docs bench gene clean

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py

test: $(VENV)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(TYPES)
	$(BIN)/python -m pytest

# 20,000 mutations of each file, about ten minutes; another seed each time, named where one fails.
fuzz: $(VENV)/dev
	SAFEGENE_FUZZ=20000 SAFEGENE_FUZZ_SEED=$${SEED:-$$(date +%s)} $(BIN)/python -m pytest tests/test_fuzz.py

lint: $(VENV)/dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(TYPES)

types: $(VENV)/dev
	$(TYPES)

# The site, in build/site; `.venv/bin/mkdocs serve` shows it while you write.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The shipped gene anew, resumable; docs/extract.md says how long it takes.
gene: $(VENV)/dev
	$(BIN)/python -m safegene_edge.training.gene --aligned-adapter examples/smollm2-135m-safety

bench: $(VENV)/dev
	for run in bench/*/run.py; do $(BIN)/python $$run || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo,dev,docs,plugins,train]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
