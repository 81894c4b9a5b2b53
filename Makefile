# make demo: two workers and two shards train a small language model here. make test: everything that must pass.
.PHONY: demo test check lint kernels clean
.DELETE_ON_ERROR:

# What is imported is compiled the first time, and not each time, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
BIN := .venv/bin
# A model that shows falling loss and a readable sample after a minute or two on two cores.
DEMO_ARGS ?= --epochs 6 --samples 4096 --batch-size 16 --layers 2 --width 64 --context 64 --lr 5e-3
# Tests side by side, on two cores or two threads of one.
AT_ONCE ?= 2

demo: .venv/ready
	$(BIN)/zml run -w 2 -p 2 examples/char_lm.py $(DEMO_ARGS)

# First what needs no cluster, then a Slurm, which mostly waits, and whole clusters of processes.
test: .venv/ready
	$(MAKE) --no-print-directory --jobs 2 --output-sync lint kernels
	$(BIN)/pytest -q -n $(AT_ONCE) -m "not soak and not cluster and not root and not slurm"
	$(BIN)/pytest -q -n $(AT_ONCE) --dist loadgroup -m "not soak and (cluster or root or slurm)" tests/slurm tests/e2e tests/obs

# The part that answers while you wait.
check: lint
	$(BIN)/pytest -q -m "not slow and not cluster and not root and not slurm and not soak"

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

kernels: .venv/ready
	$(BIN)/python -m tests.kernels

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("zml needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -c 'import torch'  # pip would have compiled everything; this is what takes long to compile
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
