# `make help` lists the targets. Each builds .venv first when it must. One recipe line is one command: its failure
# fails the target.

PYTHON ?= python3
PROFILE ?= quick
JOBS ?= 2
REUSE ?=
CLUSTER ?=
FACTOR ?= 1

# Asked for by a range, pip would take the newest build with gigabytes of CUDA packages. The exact version takes a CPU
# build where one is at hand, so its hash differs by machine and it stays out of requirements.lock.
TORCH := torch==2.13.0
# A C extension without wheels, for reasoning-gym's zebra puzzles only: a fresh machine needs no compiler.
UNLOCKED := torch pycosat
UV := uv==0.13.9

PY := .venv/bin/python
NSLORA := $(PY) -m nslora.cli

FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
HAS_TORCH := import importlib.metadata as m; v = m.version('torch').split('.'); \
  raise SystemExit((int(v[0]), int(v[1])) < (2, 6))

export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help reproduce plan schedules figures verify freeze table bench check pure test torture lint lab paper lock clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  settings: PROFILE=quick|tuning|full|smoke  JOBS=2  REUSE=1  CLUSTER=tcp://host:8786  PYTHON=python3"

reproduce: .venv/ready ## run every notebook over backbones and seeds; makes all records, tables and figures
	$(NSLORA) reproduce --profile $(PROFILE) --jobs $(JOBS) $(if $(filter 1,$(REUSE)),--reuse) \
	  $(if $(CLUSTER),--cluster $(CLUSTER))

plan: .venv/ready ## print the jobs of PROFILE, which are done, and what the rest will cost
	$(NSLORA) plan --profile $(PROFILE)

schedules: .venv/ready ## try every schedule of PROFILE's instances, each move once, JOBS trees at a time; goes on where it was
	$(NSLORA) schedules --profile $(PROFILE) --jobs $(JOBS)

figures: .venv/ready ## rebuild tables and figures from the records in seconds
	$(NSLORA) figures --profile $(PROFILE)

verify: .venv/ready ## recompute claims and tables from the records and compare
	$(NSLORA) verify --profile $(PROFILE)

freeze: .venv/ready ## register the study of PROFILE before anything of it is run: its code, runs and claims
	$(NSLORA) freeze --profile $(PROFILE)

table: .venv/ready ## print the main table
	$(NSLORA) table --profile $(PROFILE)

bench: .venv/ready ## measure speed and memory beside the tools that our parts replace; wants a quiet machine
	$(NSLORA) bench

check: .venv/ready ## lint and the tests that need no model and no other process, side by side: a minute
	$(MAKE) --no-print-directory --jobs 2 lint pure

pure: .venv/ready ## the tests that need no model and no other process
	$(PY) -m pytest -q -m pure -n $(JOBS) --dist loadfile

test: lint ## lint, then all tests, JOBS files at a time
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

torture: .venv/ready ## kill, damage, confuse and starve everything, FACTOR times half an hour; writes results/reliability.json
	NSLORA_TORTURE=$(FACTOR) NSLORA_RELIABILITY=results/reliability.json $(PY) -m pytest -q -p no:xdist tests/torture

lint: .venv/ready ## ruff, pyright, and notebooks without outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(PY) -m nbstripout --verify notebooks/*.ipynb

lab: .venv/ready ## open JupyterLab in notebooks/
	$(PY) -m jupyterlab notebooks

paper: ## compile paper/main.tex with latexmk or tectonic
	@if command -v latexmk >/dev/null; then cd paper && latexmk -pdf -interaction=nonstopmode -halt-on-error main.tex; \
	elif command -v tectonic >/dev/null; then cd paper && tectonic main.tex; \
	else echo "make paper needs latexmk or tectonic: on Debian, apt install latexmk texlive-latex-recommended" \
	  "texlive-fonts-recommended." >&2; exit 2; fi

lock: ## write requirements.lock anew from pyproject.toml; keeps its pins where they still fit
	"$(PYTHON)" -m venv runs/uv
	runs/uv/bin/python -m pip install --quiet $(UV)
	printf '%s\n' $(UNLOCKED) > runs/uv/excludes.txt
	runs/uv/bin/uv pip compile pyproject.toml --extra dev --extra bench --extra peers --extra cluster --excludes runs/uv/excludes.txt --universal \
	  --python-version 3.11 --fork-strategy fewest --generate-hashes --custom-compile-command "make lock" --quiet \
	  --output-file requirements.lock

clean: ## remove caches; keeps .venv, runs/ and results/
	rm -rf .pytest_cache .ruff_cache .hypothesis runs/uv src/*.egg-info
	find src tests notebooks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up is taken up again.
.venv/ready: requirements.lock pyproject.toml
	@"$(PYTHON)" -c "$(FITS)" 2>/dev/null || { echo "nslora needs Python 3.11 to 3.14, and '$(PYTHON)' is not;" \
	  "name one with make PYTHON=/path/to/python3.11." >&2; exit 2; }
	@"$(PYTHON)" -c "import venv, ensurepip" 2>/dev/null || { echo "'$(PYTHON)' lacks the venv module;" \
	  "on Debian, apt install python3-venv." >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || \
	  if "$(PYTHON)" -c "$(HAS_TORCH)" 2>/dev/null; then "$(PYTHON)" -m venv --clear --system-site-packages .venv; \
	  else "$(PYTHON)" -m venv --clear .venv; fi
	$(PY) -c "$(HAS_TORCH)" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install --no-deps --require-hashes -r requirements.lock
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	touch $@
