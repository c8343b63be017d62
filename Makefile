# Winnow. `make help` lists what there is. Every target sets up what it needs.

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS ?=
# http://HEAD:8265 of a Ray cluster: harvest and train become jobs there. JOB: options of `winnow submit`.
RAY_ADDRESS ?=
JOB ?=
# The published SAE that `make explore` shows.
SAE ?= runs/quickstart
OUT ?= benchmarks/results
# Outside the clone, so that a fresh one finds them again.
WINNOW_TOOLS ?= $(HOME)/.cache/winnow/tools
# The release RELEASE.2025-09-07T16-13-09Z under the name that Go's module proxy knows it by.
MINIO_VERSION ?= v0.0.0-20250907161309-07c3a429bfed

BIN := .venv/bin
export WINNOW_TOOLS
# The GPU build of some libraries and Ray both print notices that are of no use here.
export RAY_DEDUP_LOGS ?= 1
export TOKENIZERS_PARALLELISM ?= true

# `winnow`, or `winnow submit ... --` where a cluster is named.
RUN = $(BIN)/winnow $(if $(RAY_ADDRESS),submit --address $(RAY_ADDRESS) $(JOB) --)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev plan harvest train test test-gpu explore test-browser test-faults test-formats test-subjects peers notebooks docs docs-serve lint format bench servers readers minio clean

help:  ## Show this list
	@echo "make TARGET [CONFIG=configs/quickstart.yaml] [ARGS='--set key=value'] [RAY_ADDRESS=http://HEAD:8265]"; echo
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

# The clone is installed as it lies, on purpose: no page of advice about that.
.venv/ready .venv/ready-dev: export PYTHONWARNINGS = ignore:Editable installation
.venv/ready: pyproject.toml constraints.txt configs/embedded.txt
	@echo "Setting up .venv: Winnow's libraries are some gigabytes, and pip is silent for minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --no-deps -r configs/embedded.txt
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/ready-docs: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

setup: .venv/ready  ## Make .venv with everything that harvest and train need
setup-dev: .venv/ready-dev  ## Add what test and lint need

plan: setup  ## Tokenise and shuffle the corpus into CONFIG's root
	$(RUN) plan $(CONFIG) $(ARGS)

harvest: setup  ## Run the subject model and store its activations; resumes
	$(RUN) harvest $(CONFIG) $(ARGS)

train: setup  ## Train the sparse autoencoder on the stored activations; resumes
	$(RUN) train $(CONFIG) $(ARGS)

explore: setup  ## Index SAE's latents where that is not done, then show them in the browser
	$(BIN)/winnow index $(SAE) --config $(CONFIG)
	$(BIN)/winnow explore $(SAE) --config $(CONFIG) $(ARGS)

test: setup-dev  ## Run the tests (uses MinIO where `make minio` has built it, else moto)
	$(BIN)/python -m pytest $(ARGS)

test-gpu: setup-dev  ## Run the GPU tests; fails if any is skipped
	$(BIN)/python -m pytest tests/gpu --no-skips $(ARGS)

test-browser: setup-dev  ## Click through the explorer in Chromium (Debian: apt-get install chromium); part of `make test`
	$(BIN)/python -m pytest tests/browser $(ARGS)

test-faults: setup-dev  ## Run the tests that kill, cut and corrupt; part of `make test`
	$(BIN)/python -m pytest tests/faults tests/contract $(ARGS)

test-formats: setup-dev  ## Test import and export against the other libraries' own code (see `make peers`)
	$(BIN)/python -m benchmarks.peers -- $(BIN)/python -m pytest tests/formats $(ARGS)

test-subjects: setup-dev  ## Try every causal language model of transformers (docs/subjects.md); `make test` tries a dozen
	$(BIN)/python -m pytest tests/subjects/every_subject.py $(ARGS)

peers: setup-dev  ## Install other libraries for SAEs and circuits, to be compared with, in two folders (550 MB)
	$(BIN)/python -m benchmarks.peers

notebooks: setup-dev  ## Execute the notebooks of examples/ as they are and keep their outputs; ARGS: their names
	$(BIN)/winnow quickstart --install
	$(BIN)/python -m tests.support.notebooks $(ARGS)

docs: .venv/ready-docs  ## Build the documentation site into site/; a warning is an error
	$(BIN)/python -m docs.generate
	$(BIN)/zensical build --clean --strict

# It watches build/docs: `python -m docs.generate` in another terminal shows what has changed since.
docs-serve: .venv/ready-docs  ## Show the documentation site at http://localhost:8000
	$(BIN)/python -m docs.generate
	$(BIN)/zensical serve

lint: setup-dev  ## ruff, pyright, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: setup-dev  ## Let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-dev  ## Run the benchmarks into OUT, one JSON each
	mkdir -p $(OUT)
	for name in harvest store mixing; do $(BIN)/python -m benchmarks.$$name --json $(OUT)/$$name.json || exit 1; done

servers: setup-dev  ## Try the store on every S3 server that is installed here; prints the table of docs/data.md
	$(BIN)/python -m benchmarks.servers_tried $(ARGS)

readers: setup-dev  ## Try other zarr readers on sound and damaged datasets; prints the tables of docs/data.md
	$(BIN)/python -m benchmarks.readers_tried

minio: $(WINNOW_TOOLS)/bin/minio  ## Build MinIO for the S3 tests (needs Go; a few minutes, once)

$(WINNOW_TOOLS)/bin/minio:
	@command -v go >/dev/null || { echo "make minio needs Go on the PATH (https://go.dev); without it the tests use moto" >&2; exit 2; }
	mkdir -p $(@D)
	GOBIN=$(abspath $(@D)) go install github.com/minio/minio@$(MINIO_VERSION)

clean:  ## Remove .venv, caches and the quickstart's data and runs
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache .cache *.egg-info build dist site
	rm -rf data/quickstart runs/quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
