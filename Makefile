# Every target does all its own set-up on Debian 12, as root or as a user with sudo; what is there already is reused.

BIN := .venv/bin

.PHONY: help setup demo lint test bench docs fuzz soak clean

help:
	@echo "make demo   set up, then boot a guest, reclaim its memory, check every byte: table, report/, picture"
	@echo "make test   set up, lint, all tests (tests/vm boots guests), JOBS=2 files at a time"
	@echo "make lint   set up, ruff, mypy, import-linter"
	@echo "make bench  set up, measure what the README's figures come from"
	@echo "make docs   set up, write docs/control.md anew from the code"
	@echo "make fuzz   set up, fuzz what reads the other side's bytes (MINUTES=30)"
	@echo "make soak   set up, kill everything at random beside a guest that verifies itself (SECONDS=1200 SEED=)"
	@echo "make clean  delete what was built in this folder; images stay cached (see: hvaqemu image list)"

setup:
	@tools/setup.sh

demo: setup
	@$(BIN)/hvaqemu doctor
	@$(BIN)/hvaqemu run examples/quickstart.yaml --report report

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What needs no guest comes first; files of tests go side by side, the tests of one file one after the other.
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/unit tests/fuzz tests/kernel
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations 20 tests/vm

bench: setup
	$(BIN)/python -m benchmarks

docs: setup
	$(BIN)/python -m tools.control_docs

MINUTES ?= 30
fuzz: setup
	$(BIN)/pip install --quiet --constraint constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

SECONDS ?= 1200
SEED ?=
soak: setup
	$(BIN)/python -m tests.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) --json report/soak.json

clean:
	rm -rf .venv build report .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
