# make run        the main job: one evaluation on a small real model, logged to the local MLflow store
# make test-fast  unit tests alone, under a minute: after each edit
# make test       all tests but the long variants, those on real weights, real MLflow servers and a card (where there is one)
# make test-all   every test: all model families, all kill points, generated hostile inputs, PostgreSQL where it is there, a soak; prints coverage
# make check      what CI checks besides: lint, format, types, which package imports which, the pages and their links
# make docs       the documentation as a site in site/, after the pages that are made from the code
# make bench      how fast it is: figures with their targets, one table, outputs/bench.json
# make audit      known vulnerabilities of everything installed (asks PyPI's vulnerability service, over the network)
# make soak       700 short runs in one process each, on sqlite and against a server: does anything grow (an hour)?
# make ui         the MLflow UI, on this machine only
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Tests run side by side, each worker with one thread: tiny models gain nothing from more.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) --dist worksteal
# Strict: a link to nothing, or a page that is not in the menu, is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
# In the long run alone: with every call traced, tests take half as long again.
COVERAGE := --cov --cov-report=term

.PHONY: run test-fast test test-all check docs bench audit soak ui clean

run: $(READY)
	mlflow run . -e phase2_eval --env-manager local --experiment-name cedkv -P config=configs/quickstart.yaml

test-fast: $(READY)
	$(PYTEST) -m "not weights and not server and not browser and not slow" tests/unit

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST) -m "slow or not slow" $(COVERAGE)
	python -m benchmarks.soak 20 10

check: $(READY)
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache --no-logo
	python docs/reference.py --check
	$(MKDOCS) --quiet --site-dir $(VENV)/site

docs: $(READY)
	python docs/reference.py
	$(MKDOCS)

bench: $(READY)
	python -m benchmarks

# The auditor has an environment of its own: its packages are none of the project's. Strict: a package that the service does not
# know is no clean one. A build's own mark (+cpu) is no part of the version that advisories name.
audit: $(READY)
	test -x $(VENV)/audit/bin/pip-audit || $(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/bin/python -m pip freeze --exclude cedkv | sed 's/+[a-z0-9.]*$$//' > $(VENV)/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(VENV)/installed.txt

soak: $(READY)
	python -m benchmarks.soak

ui: $(READY)
	mlflow ui --host 127.0.0.1

# The pins are those of conda.yaml, its pip part, line by line.
$(READY): conda.yaml pyproject.toml
	$(PYTHON) -m venv $(VENV)
	sed -n 's/^ *- \([A-Za-z].*==.*\)$$/\1/p' conda.yaml > $(VENV)/pins.txt
	python -m pip install --quiet --disable-pip-version-check -r $(VENV)/pins.txt
	python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(READY)

clean:
	rm -rf $(VENV) build site *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
