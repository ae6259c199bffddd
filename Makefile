# `make train` and `make test` need python3 (3.10 or newer) and nothing else installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test
train: .venv/.run
	$(BIN)/python train_custom.py $(ARGS)

test: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.venv/.run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.test: .venv/.run Makefile
	$(BIN)/python -m pip install --disable-pip-version-check "pytest>=8" "pytest-xdist>=3.7" "ruff>=0.9" \
		onnx onnxscript onnxruntime
	touch $@
