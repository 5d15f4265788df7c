## make setup         make the environment in VENV, or bring it up to date; says what it downloads first
## make compare       train MODELS, one after another or JOBS at once, and compare them
## make test          each promise proven once, with real ranks
## make test-quick    the tests of a minute
## make test-all      all: every launcher, fault, installation and page too, and a real SLURM brought up here (Debian, root)
## make test-slurm    of these, the tests on SLURM
## make soak          N=100 faults drawn by SEED=1 strike real runs, which must end as if nothing had happened
## make soak-slurm    the same on a real SLURM brought up here (root): N=100 faults, preemption and lost nodes among them
## make bench         how much faster than the tutorials' loop, and where a step's time goes (hours; ARGS=, PARTS= shorten)
## make bench-scaling what 2 and 4 ranks bring on this machine
## make lint          ruff check, ruff format --check, mypy
## make lock          resolve the locks anew (docs/design.md says when)
## make clean         remove caches; never runs, data or the environment
##
## Variables, as in `make compare MODELS=cnn SEEDS="1 2 3"`:
##   VENV=.venv       folder of the environment
##   PYTHON=python3   makes it, 3.11 or newer
##   LOCK=            newest or cuda12; by itself it is chosen by the NVIDIA driver
##   DEV=             1: with the development tools, which tests, soak and lint add by themselves
##   MODELS="linear relu mlp cnn"  RECIPE=blog  SEEDS=42      what compare trains
##   GPUS=            which cards, as 1,2 (all)               RANKS=  processes of each run (one per card, or one)
##   JOBS=1           how many runs at once, which share the cards or the cores, and whose times are marked so
##   FRESH=           1: train anew, keep old runs as .1      ARGS=   any other flag, as ARGS="--epochs 10"
##   FORCE=           1: train on a login node of a SLURM cluster all the same
##   TESTS=           which tests, as TESTS=tests/training (all)
## Targets that need the environment make it first.

VENV ?= .venv
# An existing environment answers for its own Python, whatever python3 is today.
PYTHON ?= $(or $(realpath $(VENV)/bin/python),python3)
LOCK ?=
DEV ?= $(filter test% soak% lint,$(MAKECMDGOALS))
MODELS ?= linear relu mlp cnn
RECIPE ?= blog
SEEDS ?= 42
GPUS ?=
RANKS ?=
JOBS ?=
FRESH ?=
FORCE ?=
ARGS ?=
PARTS ?=
TESTS ?=
N ?= 100
SEED ?= 1

RUN := $(VENV)/bin/python -m
DATA := $(wildcard ../shared/data)
ifneq ($(DATA),)
FASHION_DDP_DATA_DIR ?= $(abspath $(DATA))
export FASHION_DDP_DATA_DIR
endif

.PHONY: help setup compare test test-quick test-all test-slurm soak soak-slurm bench bench-scaling lint lock clean

.DEFAULT:
	@echo "error: there is no target '$@': make alone lists them" >&2; exit 2

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

# The other targets need setup, and silence from it when there is nothing to do.
compare test test-quick test-all test-slurm soak soak-slurm bench bench-scaling lint lock: quiet = --quiet
setup:
	@$(PYTHON) requirements/install.py --venv "$(VENV)" --lock "$(LOCK)" $(if $(DEV),--dev) $(quiet)

# Cards that are named are meant: without one a run would quietly take the CPU.
FLAGS = $(if $(GPUS),--device cuda) $(if $(JOBS),--jobs $(JOBS)) $(if $(RANKS),--ranks $(RANKS)) $(if $(FRESH),--fresh) \
	$(if $(FORCE),--force) $(ARGS)
compare: setup
	$(if $(GPUS),CUDA_VISIBLE_DEVICES=$(GPUS) )$(RUN) launch.local --models $(MODELS) --recipe $(RECIPE) --seeds $(SEEDS) $(FLAGS)

# Tests wait for processes more than they compute, so two run at once. No more: they start up to four ranks, of a
# gigabyte each. A process that is done takes over tests of the other.
AT_ONCE := -n 2 --dist worksteal
# SLURM's tests have one cluster, and wait for it: a third process begins with them, and they stay together.
BESIDE_SLURM := -n 3 --dist loadgroup
test: setup
	$(RUN) pytest $(AT_ONCE) -m "not slow and not slurm" $(TESTS)

test-quick: setup
	$(RUN) pytest $(AT_ONCE) -m quick $(TESTS)

test-all: setup
	$(RUN) pytest $(BESIDE_SLURM) $(TESTS)

test-slurm: setup
	$(RUN) pytest -m slurm $(TESTS)

soak: setup
	$(VENV)/bin/python tests/soak.py --faults $(N) --seed $(SEED)

soak-slurm: setup
	$(VENV)/bin/python tests/soak_slurm.py --faults $(N) --seed $(SEED)

bench: setup
	$(VENV)/bin/python benchmarks/bench.py $(ARGS)
	$(VENV)/bin/python benchmarks/step_parts.py $(PARTS)

bench-scaling: setup
	$(VENV)/bin/python benchmarks/scaling.py $(ARGS)

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --upgrade
lock: setup
	$(COMPILE) pyproject.toml requirements/newest.in --extra timm --output-file requirements/newest.txt
	$(COMPILE) pyproject.toml requirements/cuda12.in --extra timm --output-file requirements/cuda12.txt
	$(COMPILE) --group dev --constraint requirements/newest.txt --output-file requirements/dev.txt
	echo uv | $(COMPILE) - --output-file requirements/uv.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -r {} +
