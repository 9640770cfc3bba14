# Every target sets up what it needs; run `make help` for the list.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export ITPN_HOME ?= $(HOME)/itpn
SAMPLE := $(ITPN_HOME)/data/fashion-mnist
PORT ?= 5000

.PHONY: help setup data pretrain finetune sweep ui test test-long test-cluster lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; several minutes, most of it downloading PyTorch)"
	@start=$$SECONDS; \
	$(PYTHON) -m venv $(VENV) && \
	{ $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[dev,dense]' >$(VENV)/setup.log 2>&1 || { tail -n 30 $(VENV)/setup.log; exit 1; }; } && \
	touch $(STAMP) && echo "set-up took $$((SECONDS - start)) s (its output: $(VENV)/setup.log)"

setup: $(STAMP)  ## make the virtual environment with the tested packages

data: $(STAMP)  ## make the sample shards (70,000 real product photographs)
	@$(BIN)/python jobs/make_shards.py fashion-mnist $(SAMPLE)

pretrain: data  ## pretrain a small Fast-iTPN on two CPU workers and evaluate it
	@$(BIN)/python jobs/pretrain.py --recipe jobs/recipes/first_run.yaml

finetune: pretrain  ## make a classifier of the backbone that `make pretrain` left
	@made=$$(ls -t $(ITPN_HOME)/runs/first_run-*/final/backbone.safetensors | head -1) && \
	$(BIN)/python jobs/finetune.py --init "$${made%/final/*}"

sweep: data  ## search token-reduction settings for the first run's checkpoint (after make pretrain)
	@$(BIN)/python jobs/sweep.py --recipe jobs/recipes/sweep_token_reduction.yaml

ui: $(STAMP)  ## serve the results at http://127.0.0.1:5000 (PORT=... for another port)
	@case "$$MLFLOW_TRACKING_URI" in http*) echo "your MLflow server is at $$MLFLOW_TRACKING_URI"; exit 0;; esac; \
	echo "MLflow at http://127.0.0.1:$(PORT) (Ctrl-C ends it)"; \
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false exec $(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) \
	  --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(ITPN_HOME)/runs/mlflow.db}"

lint: $(STAMP)  ## format check, lint and strict types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

test: lint  ## everything that CI runs first: lint, unit, contract, golden, one end-to-end run
	@$(BIN)/pytest -m "not long and not cluster"

test-long: $(STAMP)  ## kills, world sizes, real S3, PostgreSQL and MLflow servers
	@$(BIN)/pytest -m long --timeout 900

test-cluster: $(STAMP)  ## several hosts as network namespaces (root), and the longest runs
	@$(BIN)/pytest -m cluster --timeout 1800

clean:  ## remove the environment and caches of this clone (never ITPN_HOME)
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
