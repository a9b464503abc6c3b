# make demo | test | check: each sets up what it needs in .venv and runs. Nothing is installed outside it.
PYTHON ?= python3
STUDY ?= $(firstword $(wildcard ../shared/data/chest_ct_lung_dx_a0001/series))
# one more than there are processors: many tests wait for other processes
WORKERS ?= $(shell expr $$(nproc) + 1)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo viewer test lint check bench bench-gate fast format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo [STUDY=/folder]  push a study, see the SEG and SR that come back"
	@echo "make viewer                PACS, node and the OHIF viewer on this machine; VIEWER_ARGS=--help says more"
	@echo "make test                  run every test; those of real peers skip where the peer is missing"
	@echo "make bench                 measure beside DCMTK, Orthanc and others into bench/RESULTS.md; BENCH_ARGS=\"receive --rounds 3\""
	@echo "make bench-gate            fail where something costs more than bench/bounds.toml allows"
	@echo "make check                 format, lint, types, import contracts (make lint), and the fast tests"

demo: $(VENV)/.demo
	$(BIN)/dicom-node demo $(STUDY)

viewer: $(VENV)/.demo
	@$(BIN)/python deploy/viewer/run.py $(VIEWER_ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/viewer/compose.yaml

check: lint
	$(BIN)/python -m pytest -q -n auto --dist loadfile tests/unit tests/property

bench: $(VENV)/.test
	$(BIN)/python -m bench $(or $(BENCH_ARGS),all)

bench-gate: $(VENV)/.test
	$(BIN)/python -m bench gate

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  test "$$(id -u)" = 0 && apt-get install --yes --quiet python3-venv && $(PYTHON) -m venv $(VENV); } || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	touch $@

NATIVE := $(wildcard dicom_node/native/*.[ch]) dicom_node/native/build.py

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt $(NATIVE)
	@echo "installing into $(VENV) (torch is the large part)"
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[test,onnx,monai,nnunet]'
	$(PIP) --no-deps deepbet
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(PIP) --editable '.[test,check,onnx,monai,nnunet]'
	touch $@

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache
