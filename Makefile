# Everything runs in .venv, which `make setup` makes. Variables: PYTHON, VENV, MODEL (for demo), VLLM (for test-vllm), TEST_WORKERS.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
export VENV PYTHON

.PHONY: help setup demo test test-vllm quality lint format deploy-tools dist soak fuzz sbom clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */\1|/p' $(MAKEFILE_LIST) | column -t -s'|'

setup:  ## .venv with vllm-sparse and a working vLLM
	@bash deploy/environment/setup.sh

demo: setup  ## train, compress, convert, serve, compare; MODEL=<dir or hub id> uses that model instead
	@$(BIN)/python -m bench.demo --out out/demo $(if $(MODEL),--model "$(MODEL)") $(DEMO_ARGS)

test: setup  ## the tests (all but those marked slow or gpu); those that measure time run last and alone
	@$(BIN)/python -m pytest -m "not slow and not gpu and not serial" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)
	@$(BIN)/python -m pytest -m "serial and not slow and not gpu" $(TEST_ARGS)

test-vllm: setup  ## what runs in vLLM, with another release of it: VLLM=0.31.0
	@VLLM="$(VLLM)" bash deploy/environment/other_vllm.sh tests/serving tests/models -m "not slow and not gpu" -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

quality: setup  ## what docs/quality.md lacks: base model, missing rows, table; an interrupted run continues
	@$(BIN)/python -m converters.train.quality docs/quality/suite.yaml $(QUALITY_ARGS)

lint: setup  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup  ## ruff's formatter
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

deploy-tools: setup  ## what checks deploy/: helm, hadolint, prometheus, caddy and more, in .venv/deploy-tools
	@bash deploy/environment/tools.sh

dist: deploy-tools  ## wheel and sdist in dist/, with the CPU kernels, checked; VLLM_SPARSE_BUILD_CUDA=1: CUDA's too
	@rm -rf dist
	@VLLM_SPARSE_REQUIRE_EXTENSION=1 $(BIN)/python -m build --no-isolation
	@$(VENV)/deploy-tools/bin/twine check --strict dist/*

soak: setup  ## a 2:4 model under mixed load for SOAK_MINUTES=60: failures, leaks, draining
	@$(BIN)/python -m bench.soak --minutes $(or $(SOAK_MINUTES),60) $(SOAK_ARGS)

fuzz: setup  ## FUZZ_CASES=10000 broken checkpoints: crashes, hangs, wrong loads
	@$(BIN)/python -m tests.fuzz --cases $(or $(FUZZ_CASES),10000)

sbom: deploy-tools  ## software bill of materials of .venv (CycloneDX), in out/sbom.json
	@mkdir -p out && $(VENV)/deploy-tools/bin/cyclonedx-py environment $(VENV) --output-file out/sbom.json
	@echo "written: out/sbom.json"

clean:  ## results and build products, not .venv
	rm -rf out build dist ./*.egg-info
