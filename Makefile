# Two commands on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: install demo demo-text test check docs
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "atm-fl needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# The main job: PA-ATM with eight parties in Ray simulation, about three minutes on two cores.
demo: install
	rm -rf $(RUN)
	$(BIN)/atm-fl run configs/demo.toml -c run-dir=$(RUN)

# The same with four parties of texts and MiniLM, about six minutes on two cores.
demo-text: install
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[text]'
	rm -rf runs/demo_text
	$(BIN)/atm-fl run configs/demo_text.toml

# Lint, types, who may import whom, and the fast tests; `make test PYTEST="-m slow -n 0"` for the slow ones.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile $(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site in site/, strictly; needs no network once installed.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet --strict

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@
