# Everything a stranger needs: `make demo` and `make test` do all the set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo cluster test test-fast soak lint types proto generate breaking docs coverage bench gates policy ci clean

help: ## Show what there is.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Esper needs Python 3.11 or later; `make PYTHON=python3.12 …` names another") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## Make .venv and install everything into it.

demo: setup ## Grow two real networks under Tamiyo; ends with a table and runs/demo/report.html.
	$(BIN)/esper demo

cluster: setup ## Run three NATS servers and two of Oona's gateways on loopback, until Ctrl-C.
	$(BIN)/esper cluster

test: setup ## Run all tests.
	$(BIN)/python -m pytest

test-fast: setup ## Run the tests that take no more than a few seconds each.
	$(BIN)/python -m pytest -m 'not slow'

soak: setup ## Run the long forms of the bus's tests: crashes, power cuts, fuzz, many streams, large logs, a cluster. Hours.
	CRASH_ROUNDS=200 POWER_CUTS=100 FUZZ_FRAMES=1000000 SOAK_STREAMS=1000 LOG_EVENTS=10000000 \
	CLUSTER_ROUNDS=5 CLUSTER_CUT_S=10 \
	$(BIN)/python -m pytest --timeout=14400 tests/oona/test_crash.py tests/oona/test_power_loss.py tests/oona/test_frame_fuzz.py \
	tests/oona/test_many_streams.py tests/oona/test_large_log.py tests/oona/test_jetstream_failures.py \
	tests/server/test_cluster.py

lint: setup ## Check style and formatting.
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## Check types, strictly.
	$(BIN)/mypy

proto: setup ## Lint the protos, check that generated code is what they make.
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python tools/generate.py --check

generate: setup ## Make generated/ from proto/.
	$(BIN)/buf format --write
	$(BIN)/python tools/generate.py

breaking: setup ## Check that the protos break nobody who uses the last release.
	$(BIN)/buf breaking --against proto/released.binpb

docs: setup ## Build the API and contract references; fails on what is undocumented.
	$(BIN)/python tools/docs.py

coverage: setup ## Run all tests and fail under 85 % of lines and branches.
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html:build/coverage

gates: setup ## Check the latency of decisions: under 10 ms at 10, 64 and 256 nodes.
	$(BIN)/python -m pytest tests/bench --benchmark-enable --benchmark-only

bench: setup ## Measure Decide beside a call that does nothing, and the bus beside brokers and a relay.
	$(BIN)/esper bench decide --json
	$(BIN)/esper bench oona --json

EXPERIENCE := runs/experience
SHIPPED := server/esperml/tamiyo/checkpoints/shipped

policy: setup ## Make the shipped policy anew: collect experience, train, evaluate. About an hour; resumes.
	$(BIN)/esper trainer collect --out $(EXPERIENCE)/all --hosts 150 --branches 8 --seed 0 --jobs 2 --resume
	$(BIN)/esper trainer collect --out $(EXPERIENCE)/long --hosts 38 --branches 8 --seed 1 --task mnist1d --pace 2 --jobs 2 --resume
	$(BIN)/esper trainer train $(EXPERIENCE)/all $(EXPERIENCE)/long --out policies/shipped --steps 600 --evaluate-every 30
	mkdir -p $(SHIPPED) && cp policies/shipped/policy.json policies/shipped/policy.safetensors $(SHIPPED)

ci: ## What a change must pass.
	.ci/run

clean: ## Remove everything that was made here.
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
