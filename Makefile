# Everything runs in .venv; PIP_FIND_LINKS, where set, names a folder of wheels that uv looks into first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export TOKENIZERS_PARALLELISM := false

# The images. WHEELS_IMAGE names an image that holds wheels, where an index cannot be reached.
DOCKER ?= docker
BASE_IMAGE ?= python:3.11-slim
WHEELS_IMAGE ?= scratch
TORCH ?= cpu
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION ?= $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)
SOURCE ?=
LOCK = UV_FIND_LINKS= $(BIN)/uv pip compile --quiet --no-config --python-version 3.11 --no-annotate --generate-hashes \
  --custom-compile-command 'make lock' --constraint constraints.txt

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 18

setup: $(VENV)/ready  ## make .venv with the silotune command in it

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "silotune needs Python 3.11 or newer; run make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'uv>=0.5'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

run: setup  ## three synthetic hospitals, offline: base model, federation, comparison
	$(BIN)/python examples/hospitals/run.py

test: setup  ## the fast test tier
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup  ## crash tests on every box, whole runs on real text
	$(BIN)/python -m pytest -m slow

chaos: setup  ## 200 seeded scenarios of kills, lost answers, damaged bytes and races (twenty minutes)
	$(BIN)/python tests/chaos/run.py

images: image-silo image-coordinator  ## build both container images (BASE_IMAGE, TORCH=cpu|cuda, REGISTRY=…/ and PUSH=1)

image-silo image-coordinator: image-%:
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --target $* --tag $(REGISTRY)silotune-$*:$(VERSION) \
	  --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg WHEELS_IMAGE=$(WHEELS_IMAGE) --build-arg TORCH=$(TORCH) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --build-arg SOURCE=$(SOURCE) .
	$(if $(PUSH),$(DOCKER) push $(REGISTRY)silotune-$*:$(VERSION))

test-images: setup  ## build both images for real and run a federation in them (needs a Docker engine)
	$(BIN)/python -m pytest -m images tests/docker

test-cluster: setup  ## a federation on the cluster that KUBECONFIG and KFP_ENDPOINT name (an hour or two; docs/kubernetes.md)
	$(BIN)/python -m pytest -m cluster tests/cluster -v

test-cluster-clean: setup  ## take away what a trial that was killed has left there (TRIAL=…)
	cd tests/cluster && ../../$(BIN)/python -m trial.kube $(TRIAL)

lock: setup  ## choose the images' packages anew, from docker/*.in and constraints.txt
	$(LOCK) docker/build.in -o docker/build.lock
	$(LOCK) --excludes docker/without.txt docker/coordinator.in -o docker/coordinator.lock
	$(LOCK) --excludes docker/without.txt --excludes docker/silo-without.txt docker/silo.in -o docker/silo.lock
	echo torch | $(LOCK) --excludes docker/without.txt -c docker/silo.lock - -o docker/torch-cuda.lock

lint: setup .types/silotune/components  ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.types $(BIN)/mypy
	$(BIN)/lint-imports

.types/silotune/components:
	mkdir -p .types/silotune
	ln -sfn ../../components .types/silotune/components
	ln -sfn ../../pipelines .types/silotune/pipelines

bench: setup  ## overhead, recovery and quality benchmarks (an hour; see docs/benchmarks.md)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/quality.py

docs: setup  ## regenerate docs/federation.md and docs/policy.md from the models
	$(BIN)/python docs/reference.py

golden: setup  ## rewrite the compiled pipelines that tests compare with
	$(BIN)/python -m pytest tests/pipelines/test_federated_finetuning.py --rewrite-golden

clean:  ## remove what the targets made, but no results
	rm -rf $(VENV) .types .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.PHONY: help setup run test test-slow chaos images image-silo image-coordinator test-images test-cluster test-cluster-clean lock lint bench docs golden clean
.DEFAULT_GOAL := help
