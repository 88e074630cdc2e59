# Set-up, serving and checks. `make help` lists what there is. Works with GNU make 3.81 (macOS) and newer.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
ARGS ?=
# Set-up leaves compiling to the first import of a module: a Python that keeps nothing would compile at every start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install vllm-cpu-backend install-dev serve test test-full test-fast test-mac-network lint lint-style lint-types lint-layers format proto engine-options bench bench-batch bench-autoscale soak chaos rack-simulation mutants check-macos-wheels clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=/path/to/python3 chooses the interpreter; ARGS=... is passed on by serve, test, test-fast, bench and mutants"

install: ## set up .venv, so that .venv/bin/pomarium works
	@deploy/setup.sh

vllm-cpu-backend: ## vLLM with its own CPU kernels, which VLLM_METAL_USE_MLX=0 takes; a Mac builds them, for many minutes
	@POMARIUM_VLLM=cpu deploy/setup.sh

install-dev: ## the same, and the linters, type checker and test tools
	@deploy/setup.sh --dev

serve: install ## set up if needed, then serve the embedded model at http://127.0.0.1:8000/v1
	@exec $(BIN)/pomarium serve $(ARGS)

test: install-dev lint ## set up if needed, then lint, types, layers and the tests: half an hour on two cores
	@echo "[test] all tests but the long forms"
	@deploy/test.sh "not full" $(ARGS)

test-full: install-dev lint ## the same with the long forms: more families, cuts and replicas
	@echo "[test] all tests"
	@deploy/test.sh "" $(ARGS)

test-fast: install-dev ## the tests that start no server: about five minutes on two cores
	@$(BIN)/python -m pytest -m "not e2e" $(ARGS)

test-mac-network: install-dev ## the same in a network as a Mac's, with 127.0.0.1 alone (Linux, root)
	@tests/mac_network.sh $(BIN)/python -m pytest -m "not e2e" $(ARGS)

lint: lint-style lint-types lint-layers ## style, types and the layer rule

lint-style: install-dev
	@echo "[lint] style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lint-types: install-dev
	@echo "[lint] types"
	@$(BIN)/mypy

lint-layers: install-dev
	@echo "[lint] layers"
	@$(BIN)/lint-imports --no-cache --no-logo

format: install-dev ## rewrite our Python files in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: install-dev ## generate the gRPC stubs from proto/*.proto
	@$(BIN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src --grpc_python_out=src src/pomarium/proto/*.proto

engine-options: install-dev ## list the installed vLLM's options in cluster/replica/engine_options.json
	@$(BIN)/python -m pomarium.cluster.replica.engine_args

bench: install-dev ## measure our engine, mlx-lm and vLLM's CPU backend (docs/benchmarks.md)
	@$(BIN)/python benchmarks/engine.py $(ARGS)

mutants: install-dev ## plant faults in every kernel, and count those that its cases see (docs/kernels.md)
	@PYTHONPATH=tests $(BIN)/python -m emulator.mutants $(ARGS)

bench-batch: install-dev ## a million lines against an engine that answers at once (docs/benchmarks.md)
	@$(BIN)/python benchmarks/batch_rows.py $(ARGS)

bench-autoscale: install-dev ## from a request to a rack asleep to its first token, on a simulated rack (docs/benchmarks.md)
	@$(BIN)/python benchmarks/autoscale.py $(ARGS)

soak: install-dev ## ten minutes of clients that are slow, leave or send too much, and the memory then (docs/benchmarks.md)
	@$(BIN)/python benchmarks/endpoint_soak.py $(ARGS)

chaos: install-dev ## kill, freeze and drain at random what a simulated rack consists of, while it answers (docs/reliability.md)
	@PYTHONPATH=tests $(BIN)/python benchmarks/chaos.py $(ARGS)

rack-simulation: install-dev ## a day of 8, 64 and 512 Macs that sleep, by policy (docs/benchmarks.md)
	@$(BIN)/python benchmarks/rack_simulation.py $(ARGS)

check-macos-wheels: install-dev ## ask the index whether each pin has a macOS wheel, for Python 3.11 to 3.14 (PYTHONS="3.13")
	@deploy/check_macos_wheels.sh $(PYTHONS)

clean: ## remove .venv, caches and build output
	rm -rf .venv tests/clients/.venv tests/clients/node_modules build dist src/pomarium.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find cluster worker kernels proto tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
