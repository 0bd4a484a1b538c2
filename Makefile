# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv on their first call.
PYTHON ?= python3
# On a machine without a GPU, PyTorch's CPU build is a fraction of the size: see "Installation" in the README.
TORCH ?= torch==2.13.0
BIN := .venv/bin
DEMO := quickstart

.PHONY: demo test lint format docs clients faults faults-serve rounds bench bench-quick clean

demo: .venv/installed
	$(BIN)/alignkit init quickstart --dir $(DEMO)
	cd $(DEMO) && ../$(BIN)/alignkit run quickstart.yaml

test: .venv/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy alignkit plugins serve

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/installed
	$(BIN)/python -c 'from alignkit.config import configuration_markdown; from alignkit.registry import find_plugins; \
		print(configuration_markdown(find_plugins()), end="")' > docs/configuration.md

# What the server is tested with beside the official client for Python, each in an environment of its own: clients of OpenAI's API, and
# TRL, which trains on what the server exports.
clients: .clients/installed

.clients/installed: tests/serve/clients/requirements.txt tests/serve/clients/trl.txt tests/serve/clients/node/package.json
	$(PYTHON) -m venv .clients/python
	.clients/python/bin/pip install --quiet --disable-pip-version-check --requirement tests/serve/clients/requirements.txt
	mkdir -p .clients/node && cp tests/serve/clients/node/package.json .clients/node
	npm install --silent --no-audit --no-fund --prefix .clients/node
	$(PYTHON) -m venv .clients/trl
	.clients/trl/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.clients/trl/bin/pip install --quiet --disable-pip-version-check --requirement tests/serve/clients/trl.txt
	touch $@

# Everything that a disk, a signal or a kill can do to a run, with thirty kills; `make test` does six.
faults: .venv/installed
	OMP_WAIT_POLICY=PASSIVE ALIGNKIT_FAULTS=30 $(BIN)/pytest tests/faults

# The server killed fifty times on SQLite and twenty times on PostgreSQL, under clients that note what it acknowledged; CI does a few.
faults-serve: .venv/installed
	ALIGNKIT_KILLS=50,20 $(BIN)/pytest tests/serve/test_kill.py -s

# Two rounds of serving, feedback from simulated people, and training, with the small real model: about half an hour on two cores.
rounds: .venv/installed
	$(BIN)/python examples/rounds/run.py runs/rounds --results examples/rounds/results.json

# About 35 minutes on two cores, without the peers' environments, which the first call makes.
bench: .venv/installed
	TORCH='$(TORCH)' $(BIN)/python -m benchmarks.bench

bench-quick: .venv/installed
	TORCH='$(TORCH)' $(BIN)/python -m benchmarks.bench --quick

# torch goes first and alone: resolved together with the rest, pip may take another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .clients $(DEMO) runs benchmarks/.peers
