# likelihood-lab. `make` lists the targets; every variable below can be given on the command line.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH  ?=
PY     := .venv/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
ARGS   ?=
DIR    ?=
PORT   ?= 5000

export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: help install equivalence train sweep audit report sync server ui experiments experiments-check readme simulate data bench bench-check test faults lint types wheel check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- installation: .venv, with the versions of constraints.txt

.venv/.lab: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	@case "$(TORCH)" in \
	  "") ;; \
	  cpu) $(PIP) -qq --retries 1 --index-url $(CPU_INDEX) torch torchvision || { \
	    echo "error: torch's index of CPU builds, $(CPU_INDEX), cannot be used here; leave TORCH=cpu out" >&2; exit 1; };; \
	  *) echo "error: TORCH=$(TORCH); give TORCH=cpu, or leave it out" >&2; exit 1;; \
	esac
	$(PIP) -e '.[lab,launchers]'
	@touch $@

.venv/.dev: .venv/.lab
	$(PIP) -e '.[lab,launchers,server,dev]'
	@touch $@

.venv/.server: .venv/.lab
	$(PIP) -e '.[lab,server]'
	@touch $@

install: .venv/.lab ## make ./.venv with all that the pipeline needs; TORCH=cpu: torch without CUDA, 5 GB less
ifeq ($(TORCH),cpu)
	@$(PY) -c 'import sys, torch; sys.exit(torch.version.cuda and "error: ./.venv holds a torch with CUDA; remove ./.venv first")'
endif

# --- the work

equivalence: .venv/.lab ## the main job: NLL, CE and KL x 10 seeds on digits, verdict and report
	$(PY) -m pipeline.train experiment=equivalence $(ARGS)

train: .venv/.lab ## one trial: make train ARGS="'loss=[ce,kl_mean]' 'seed=[0,1,2]'"
	$(PY) -m pipeline.train $(ARGS)

sweep: .venv/.lab ## several trials: make sweep ARGS="model=mlp,cnn loss=nll,ce 'seed=range(3)'"
	$(PY) -m pipeline.train -m $(ARGS)

audit: .venv/.lab ## the losses alone, in seconds: make audit ARGS="'loss=[ce,nll,kl_mean]'"
	$(PY) -m pipeline.audit $(ARGS)

report: .venv/.lab ## the verdict again from what was recorded: make report DIR=outputs/...
	$(PY) -m pipeline.report $(DIR) $(ARGS)

sync: .venv/.lab ## send MLflow what it lacks of a trial: make sync DIR=outputs/...
	$(PY) -m pipeline.sync $(DIR)

server: .venv/.server ## a server that asks for a password, on loopback: MLFLOW_AUTH_ADMIN_PASSWORD=... make server
	$(PY) -m pipeline.server --port $(PORT) $(ARGS)

ui: .venv/.lab ## the MLflow page of the recorded runs, on http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false .venv/bin/mlflow server --workers 1 --host 127.0.0.1 --port $(PORT) \
	  --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}"

experiments: .venv/.lab ## run and record every experiment again: make experiments ARGS=textbook_spellings
	$(PY) -m experiments.record $(ARGS)

experiments-check: .venv/.lab ## run them again and say whether the recorded numbers still hold
	$(PY) -m experiments.record --check $(ARGS)

readme: .venv/.lab ## make the README's tables and figure again, from the record and from its own commands
	$(PY) -m experiments.readme $(ARGS)

simulate: .venv/.lab ## how often the verdict is wrong: the full simulation, a quarter of an hour of CPU
	$(PY) -m experiments.error_rates.simulate $(ARGS)

data: ## real Fashion-MNIST from Debian's package; digits come with scikit-learn
	apt-get install -y dataset-fashion-mnist

bench: .venv/.dev ## cost of the step and of a trial beside conventional loops, in CPU time
	$(PY) -m benchmarks.run $(ARGS)

bench-check: .venv/.dev ## the steps again, beside the last record of this device; names what has regressed
	$(PY) -m benchmarks.run --check $(ARGS)

# --- quality

# One worker a core, each with one thread; a file stays with one worker, so that its fixtures are made once.
PARALLEL := -n logical --dist loadfile
test test-all: export OMP_NUM_THREADS := 1

test: .venv/.dev ## the tests on all cores, without the slow ones and the drills
	$(PY) -m pytest -m "not slow and not faults" $(PARALLEL) --durations=15 $(ARGS)

faults: .venv/.dev ## the drills: what is killed, full, slow or wrong, many minutes
	$(PY) -m pytest -m faults tests/faults $(ARGS)

lint: .venv/.dev ## ruff: style, imports, security rules, formatting; import-linter: who may import whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-logo --no-cache

types: .venv/.dev ## mypy in strict mode
	$(PY) -m mypy

check: .venv/.dev ## what CI runs: lint, types, all tests, the main job; prints the time of each part
	@for part in lint types equivalence "test-all"; do \
	  start=$$SECONDS; $(MAKE) --no-print-directory $$part; echo "== $$part took $$((SECONDS - start)) s"; done; \
	  echo "== all parts took $$SECONDS s"

test-all: .venv/.dev
	$(PY) -m pytest -m "not faults" $(PARALLEL) --durations=15 $(ARGS)

clean: ## remove caches; never results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
