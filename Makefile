# make demo: two workers and two shards train a small language model here. make test: everything that must pass.
.PHONY: demo test check lint clean
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
# A model that shows falling loss and a readable sample after a minute or two on two cores.
DEMO_ARGS ?= --epochs 6 --samples 4096 --batch-size 16 --layers 2 --width 64 --context 64 --lr 5e-3

demo: .venv/ready
	$(BIN)/zml run -w 2 -p 2 examples/char_lm.py $(DEMO_ARGS)

# First what needs no process of its own, then whole clusters of processes: those mostly wait, so two at once. Last a Slurm.
# Hundreds of processes of zml start here: none of them is to compile it anew, whatever the environment says.
test: export PYTHONDONTWRITEBYTECODE :=
test: lint
	$(BIN)/pytest -q -n 2 -m "not soak and not cluster and not root and not slurm"
	$(BIN)/pytest -q -n 2 --dist loadgroup -m "not soak and (cluster or root)"
	$(BIN)/pytest -q -n 2 -m "not soak and slurm"

# The part that answers while you wait.
check: lint
	$(BIN)/pytest -q -m "not slow and not cluster and not root and not slurm and not soak"

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("zml needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
