# The interpreter that .venv is made with: 3.11 or later.
PYTHON ?= python3
# What runs engines: `docker`, or `process`, which `september up` takes if nothing is said.
BACKEND ?=
# Where Admission runs: `fast`, inside of the gateway, or `grpc`, a server behind it.
LANE ?=
# What `make fuzz` draws its inputs from; one that is new if nothing is said.
SEED ?=
# `make bench QUICK=1` takes a minute and a half and leaves docs/benchmarks alone; PEERS=jupyterhub adds JupyterHub.
QUICK ?=
PEERS ?=

VENV := .venv
BIN := $(VENV)/bin
ENGINE_IMAGE := september-engine:dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-long fuzz chaos bench lint types breaking gen engine-image clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.runtime ## Run the platform on this machine until Ctrl-C; BACKEND=docker for engines in containers, LANE=grpc for Admission as a process of its own.
	@test "$(BACKEND)" != docker || docker image inspect $(ENGINE_IMAGE) >/dev/null 2>&1 || deploy/docker/make-engine-image $(ENGINE_IMAGE)
	@test "$(BACKEND)" != docker || deploy/docker/isolate-engines "$${ORCH_ENGINE_NETWORK:-engine_net}" || \
		echo "engines can reach this host's ports until root has run deploy/docker/isolate-engines" >&2
	@exec $(BIN)/september up $(if $(BACKEND),--backend $(BACKEND)) $(if $(LANE),--lane $(LANE))

test: $(VENV)/.dev ## Run all tests that this machine can; REQUIRE_DOCKER=1 allows none to be skipped for want of Docker.
	@if docker info >/dev/null 2>&1; then deploy/docker/make-engine-image $(ENGINE_IMAGE); \
	elif [ "$$REQUIRE_DOCKER" = 1 ]; then echo "no Docker daemon answers" >&2; exit 1; \
	else echo "no Docker daemon answers: the tests that need one are skipped"; fi
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.dev ## Run the tests that take minutes.
	$(BIN)/pytest -m long

fuzz: $(VENV)/.dev ## Make 100,000 malformed calls, 2 minutes on two cores; SEED=n replays those of a run.
	$(BIN)/pytest tests/chaos/test_malformed.py --full -s --seed $(or $(SEED),$(shell date +%s))

chaos: $(VENV)/.dev ## Break things, under 20 minutes on two cores, and write the score card into docs/reliability.md.
	@docker info >/dev/null 2>&1 || { echo "no Docker daemon answers" >&2; exit 1; }
	deploy/docker/make-engine-image $(ENGINE_IMAGE)
	REQUIRE_DOCKER=1 $(BIN)/pytest tests/chaos --full -m "" -n 4 --dist load --maxschedchunk 1

bench: $(VENV)/.bench ## Measure what docs/performance.md promises, under 10 minutes; QUICK=1 for 90 s, PEERS=jupyterhub for more.
	@command -v h2load >/dev/null || { echo "h2load is missing: apt-get install nghttp2-client" >&2; exit 1; }
	@command -v wrk >/dev/null || { echo "wrk is missing: apt-get install wrk" >&2; exit 1; }
	@if docker info >/dev/null 2>&1; then deploy/docker/make-engine-image $(ENGINE_IMAGE); \
	else echo "no Docker daemon answers: cold provision and wake are not measured"; fi
	@exec $(BIN)/python -m bench $(if $(QUICK),--quick) $(PEERS:%=--peer %)

lint: build/googleapis ## Check style and format, of the protos too.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/buf lint

types: $(VENV)/.dev ## Check types.
	$(BIN)/mypy

breaking: build/googleapis ## Check that the protos break no caller.
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/buf-breaking

gen: $(VENV)/.dev ## Make again all that is generated from the protos and the code.
	$(BIN)/python -m tools.generate

engine-image: ## Build the image of the reference engine.
	deploy/docker/make-engine-image $(ENGINE_IMAGE)

clean: ## Remove all that was installed or made, except the data in var.
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find services tests tools gen -name __pycache__ -prune -exec rm -rf {} +

build/googleapis: $(VENV)/.dev
	$(BIN)/python -c 'from tools.generate import copy_googleapis; copy_googleapis()'

# $(call install,what): into .venv, with the versions that were tested.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing into $(VENV), about half a minute"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable $(1)
endef

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(call install,.)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,'.[dev]')
	@touch $@ $(VENV)/.runtime

$(VENV)/.bench: $(VENV)/.dev
	$(call install,'.[bench]')
	@touch $@
