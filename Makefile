# Everything a person or CI runs. `make help` lists it. Nothing needs to be installed before but Python 3.11 and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
UV := $(VENV)/bootstrap/bin/uv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCKS := requirements/dev.txt requirements/demo.txt
SOURCES := operator trainer_image tests
TESTS := tests --ignore=tests/bench --ignore=tests/e2e

##@ Use

.PHONY: demo
demo: venv ## Fine-tune a real model on real data here, export it and try it: the main job
	$(BIN)/python -m dsft_demo

.PHONY: test
test: venv lint verify ## Check style, types, generated files, and run the tests: all but drills, benches, chaos, and those on a cluster
	@# By file, since files share what takes long to make; two, since a start of ranks leaves one core idle.
	$(BIN)/python -m pytest $(TESTS) --numprocesses 2 --dist loadfile -m "not drill"

.PHONY: test-drills
test-drills: venv ## Run the drills: each crash point of the operator, ten kills in a row, all programs, a real Kueue; an hour
	$(BIN)/python -m pytest $(TESTS) --numprocesses 2 --dist loadfile -m drill

.PHONY: cluster-up
cluster-up: venv ## Start the disposable test cluster, as root; prints its kubeconfig
	@$(BIN)/python -m tests.cluster.up

.PHONY: cluster-down
cluster-down: venv ## End the test cluster, whatever state it is in; caches stay
	@$(BIN)/python -m tests.cluster.up --down

.PHONY: images
images: cluster-up ## Build the operator's and trainer's images, and push them to the test cluster's registry
	@$(BIN)/python -m tests.cluster.images

.PHONY: demo-cluster
demo-cluster: venv ## The quickstart on the test cluster: what kubectl shows until it succeeded, and where the model is
	@$(BIN)/python -m tests.cluster.demo

# On the cluster that KUBECONFIG names, else on the test cluster, which stays up.
.PHONY: e2e-smoke
e2e-smoke: venv ## On a cluster: the quickstart from kubectl apply to the exported model
	$(BIN)/python -m pytest tests/e2e -v -m smoke

.PHONY: e2e
e2e: venv ## On a cluster: also failures, suspend, kills of the operator, the dsft command
	$(BIN)/python -m pytest tests/e2e -v -m "not long and not fault"

.PHONY: e2e-long
e2e-long: venv ## On a cluster, what takes longer: example programs, memory that runs out, tenants, streams, more kills
	$(BIN)/python -m pytest tests/e2e -v -m long

.PHONY: e2e-faults
e2e-faults: venv ## On a cluster: everything that can break under a run, one after the other, and a table of what was seen
	$(BIN)/python -m pytest tests/e2e -v -m fault

##@ Develop

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n\033[1m%s\033[0m\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  \033[36m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(VENV)/.installed ## Make .venv with the locked requirements, and the demo's texts

$(UV):
	$(PYTHON) -m venv $(VENV)/bootstrap
	$(VENV)/bootstrap/bin/pip install --quiet --require-hashes --no-deps -r requirements/uv.txt

# Bytecode is compiled now: where none is written later, each start of a rank would compile torch and transformers again.
$(VENV)/.installed: $(LOCKS) pyproject.toml $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements/dev.txt
	$(UV) pip install --quiet --compile-bytecode --no-deps --require-hashes --python $(BIN)/python -r requirements/demo.txt
	$(UV) pip install --quiet --compile-bytecode --no-deps --python $(BIN)/python --editable .
	$(BIN)/python -m dsft_demo.render
	touch $@

.PHONY: lock
lock: $(UV) ## Resolve pyproject.toml anew into requirements/
	$(UV) pip compile --quiet --generate-hashes --no-header --no-emit-index-url --python-version 3.11 \
	  --extra operator --extra trainer --extra dev -o requirements/dev.txt pyproject.toml
	$(UV) pip compile --quiet --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --no-deps \
	  -o requirements/demo.txt requirements/demo.in
	$(UV) pip compile --quiet --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --no-deps \
	  -o requirements/bench.txt requirements/bench.in
	for tools in build docs sbom; do \
	  $(UV) pip compile --quiet --generate-hashes --no-header --no-emit-index-url --python-version 3.11 \
	    -o requirements/$$tools.txt requirements/$$tools.in; \
	done
	for image in operator trainer; do \
	  $(UV) pip compile --quiet --generate-hashes --no-header --no-emit-index-url --python-version 3.11 \
	    --extra $$image --constraints requirements/dev.txt -o requirements/$$image.txt pyproject.toml; \
	done

.PHONY: format
format: venv ## Format the code
	$(BIN)/ruff format --quiet $(SOURCES)
	$(BIN)/ruff check --quiet --fix $(SOURCES)

.PHONY: lint
lint: venv ## Style, types and import contracts
	$(BIN)/ruff format --check --quiet $(SOURCES)
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

.PHONY: generate
generate: venv ## Write crds/, docs/reference/, examples/install/ and parts of charts/ from the code
	$(BIN)/python -m dsft_api.generate
	$(BIN)/python -m dsft_operator.install
	$(BIN)/python -m dsft_operator.chart

.PHONY: verify
verify: venv ## Fail if a generated file is not fresh
	$(BIN)/python -m dsft_api.generate --check
	$(BIN)/python -m dsft_operator.install --check
	$(BIN)/python -m dsft_operator.chart --check

# Real runs, killed 100 times: an hour beside other work on two cores; ten of them, 7 minutes on idle ones.
KILLS ?= 100
SEED ?= 1
.PHONY: chaos
chaos: venv ## Kill real runs at random, KILLS times: nothing committed is lost, nothing is trained differently
	$(BIN)/python -m tests.chaos --kills $(KILLS) --seed $(SEED)

.PHONY: bench
bench: venv ## Start-up and steady state against bare torchrun and DeepSpeed; minutes, wants an idle machine
	$(BIN)/python -m tests.bench.launch

.PHONY: bench-checkpoint
bench-checkpoint: venv ## What a checkpoint costs training, against the synchronous way and a plain copy; minutes, wants an idle machine
	$(BIN)/python -m tests.bench.checkpoint

.PHONY: bench-recover
bench-recover: venv ## From a killed rank to the next step; minutes, wants an idle machine
	$(BIN)/python -m tests.bench.recover

.PHONY: bench-upload
bench-upload: venv $(VENV)/bench/.installed ## Upload to S3, against Ray Train's way, obstore and s5cmd; minutes, wants an idle machine
	$(BIN)/python -m tests.bench.upload

.PHONY: bench-reference
bench-reference: venv ## Accuracy and F1 of the BERT/MRPC example, beside the script that it replaces; half an hour, on stand-ins
	$(BIN)/python -m tests.bench.reference

.PHONY: bench-frameworks
bench-frameworks: venv $(VENV)/bench/.installed ## Tokens per CPU second, memory and losses, against HF Trainer and TRL; minutes, wants an idle machine
	$(BIN)/python -m tests.bench.frameworks

$(VENV)/bench/.installed: requirements/bench.txt
	$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python --target $(VENV)/bench -r requirements/bench.txt
	touch $@

.PHONY: bench-operator
bench-operator: venv ## The operator on a real API server: delays, requests, CPU and memory per resource, a restart; wants an idle machine
	$(BIN)/python -m tests.bench.operator_scale

.PHONY: docs
docs: $(VENV)/docs/.installed ## The documents as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet

.PHONY: sbom
sbom: $(VENV)/sbom/.installed ## Bills of materials (CycloneDX) of what is installed in both images, in build/
	mkdir -p build
	for image in operator trainer; do \
	  PYTHONWARNINGS=ignore $(VENV)/sbom/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
	    --output-file build/dsft-$$image.cdx.json requirements/$$image.txt; \
	done

$(VENV)/%/.installed: requirements/%.txt $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)/$*
	$(UV) pip sync --quiet --require-hashes --python $(VENV)/$*/bin/python requirements/$*.txt
	touch $@

.PHONY: clean
clean: ## Remove the environment and what was built; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
