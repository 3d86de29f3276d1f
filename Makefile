# `make demo` and `make test` do everything on a fresh machine; both need only Python >= 3.10
# with venv, and a C++ compiler for llama-cpp-python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := .[demo,dev,docs,plugins,train]
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# mypy and import-linter find modules by folder, and the converters lie outside of the package's:
# give them a folder where they are at home.
TYPES = rm -rf build/types && mkdir -p build/types/safegene_edge && \
	ln -s $(CURDIR)/safegene_edge/* build/types/safegene_edge/ && \
	ln -s $(CURDIR)/converters build/types/safegene_edge/converters && \
	cd build/types && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml && \
	$(CURDIR)/$(BIN)/lint-imports --no-logo $(CURDIR)/pyproject.toml

# Keys and tokens by their form; hashes look random, too, so entropy says nothing here.
SECRETS = --disable-plugin HexHighEntropyString --disable-plugin Base64HighEntropyString \
	--exclude-secrets '^(right|secret)$$' \
	--exclude-files '\.(jsonl|gguf|safetensors|gz|svg)$$|^bench/.*\.json$$'

.PHONY: demo test fuzz coverage lint types audit versions docs release bench bench-fast gene clean

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py

# Files of tests side by side, one a processor, four at most: each process holds torch. Threads of
# llama.cpp that wait must not spin, or they would take the processor from the other files' tests.
test: $(VENV)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(TYPES)
	$(BIN)/python tests/prose.py
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# 10,000 mutations of each file, some ten minutes; another seed each time, named where one fails.
fuzz: $(VENV)/dev
	SAFEGENE_FUZZ=10000 SAFEGENE_FUZZ_SEED=$${SEED:-$$(date +%s)} $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_text.py

# Lines and branches that the tests reach, outside of training/: at least nine in ten. Half an hour.
# One test leaves no room for a file, so coverage could not write its own.
coverage: $(VENV)/dev
	$(PIP) coverage
	mkdir -p build/coverage
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest \
		--deselect tests/test_merge.py::test_a_full_disk_gives_one_line_and_no_output
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --fail-under 90

lint: $(VENV)/dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/typos --force-exclude
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook $(SECRETS)
	$(TYPES)
	$(BIN)/python tests/prose.py

# Known weaknesses of what is installed, asked of pypi.org. It fails, too, where a package cannot be
# looked up there, as with a mirror: pip-audit alone calls that "no known vulnerabilities". The
# label of torch's CPU build is taken off, because pypi.org does not know it.
audit: $(VENV)/dev
	$(PIP) pip-audit
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > build/installed.txt
	$(BIN)/python -m pip_audit --strict --disable-pip --no-deps -r build/installed.txt

# The tests with the lowest and with the newest versions that pyproject.toml allows, each in an
# environment of its own; `make versions TESTS=tests/test_gene.py` runs some of them.
versions:
	for which in lowest newest; do \
		$(PYTHON) -m venv build/$$which && \
		{ [ $$which = newest ] || build/$$which/bin/python tests/lowest.py; } > build/$$which.txt && \
		build/$$which/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
			-c constraints.txt -c build/$$which.txt -e '.[demo,test,train]' && \
		build/$$which/bin/python -m pytest $(TESTS) || exit 1; done

types: $(VENV)/dev
	$(TYPES)

# The site, in build/site; `.venv/bin/mkdocs serve` shows it while you write.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The shipped gene anew, resumable; docs/extract.md says how long it takes.
gene: $(VENV)/dev
	$(BIN)/python -m safegene_edge.training.gene --aligned-adapter examples/smollm2-135m-safety

# The README's lines from the built wheel, outside the checkout; then tests of the sdist, of every
# part that reads data files, starts children or is called by name. `make release TESTS=tests` runs all.
RELEASE_TESTS = convert to_peft gene compat gguf_file llama recalibrate merge exports judge suites \
	evaluate html record serve inspect package snapshots
release: $(VENV)/dev
	$(BIN)/python tests/release.py --tests $(or $(TESTS),$(RELEASE_TESTS:%=tests/test_%.py))

# What is about speed alone; LLAMA_SERVER, LLAMA_BENCH and SAFEGENE_QWEN name peers and a model.
FAST = engine sideload limits serve converter merge
bench-fast: $(VENV)/dev
	for name in $(FAST); do $(BIN)/python bench/$$name/run.py || exit 1; done

bench: $(VENV)/dev
	for run in bench/*/run.py; do $(BIN)/python $$run || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '$(EXTRAS)'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
