# make demo    the whole system on the mini world (SHORT=1: every line runs, nothing is learned)
# make test    every test;  make quick  those without clusters, servers and whole jobs
# make chaos   twenty times kill -9 of a driver, a worker, a node: the same result (SEED=1: other moments)
# make lint    ruff, mypy, import-linter;  make format;  make clean
#
# All of them create .venv first, once. PYTHON=python3.12 picks the interpreter, ROOT=s3://... the root.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

PRESET = $(if $(SHORT),mini-short,mini)
WHERE = $(or $(ROOT),runs/$(PRESET))
OPTIONS = --preset $(PRESET) --root $(WHERE)

.PHONY: demo test quick chaos lint format clean venv found

demo: venv found
	$(RUN) jobs/curate.py $(OPTIONS)
	$(RUN) jobs/train.py $(OPTIONS)
	$(RUN) jobs/generate.py $(OPTIONS)
	@echo
	@echo "The demo wrote, under $(WHERE):"
	@echo "  grid.png       references, where the aligner looked, and what it drew"
	@echo "  report.html    the funnel, captions, loss curves and the grid"
	@echo "  model/         the trained encoder; SSREncoder.from_pretrained loads it"
	@echo "Next, how well it selects, in numbers:"
	@echo "  $(RUN) jobs/evaluate.py $(OPTIONS)"

test: venv
	$(RUN) -m pytest

quick: venv
	$(RUN) -m pytest --ignore tests/system

chaos: venv
	CHAOS_KILLS=20 CHAOS_SEED=$(or $(SEED),0) $(RUN) -m pytest tests/system/test_chaos.py

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: venv
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	find runs -mindepth 1 -maxdepth 1 ! -name foundation -exec rm -rf {} + 2>/dev/null || true
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@echo "kept: $(VENV) and runs/foundation (hours of training); remove them by hand to begin afresh"

found:
	@$(RUN) -m pipeline.cluster

venv: $(INSTALLED)

# The stamp is written last: an installation that was broken off is taken up again, not trusted.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	  || { echo "error: $(PYTHON) is not Python 3.11 or 3.12; name one with PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "error: $(PYTHON) has no venv module; install it (Debian: apt install python3-venv)" >&2; exit 2; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV); this takes some minutes, once"
	@if nvidia-smi >/dev/null 2>&1 || [ "$$(uname)" = Darwin ]; then \
	   $(PIP) install -qq "$(TORCH)"; \
	 else \
	   $(PIP) install -qq --retries 1 --timeout 20 "$(TORCH)" \
	     --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	   || $(PIP) install -qq "$(TORCH)"; \
	 fi
	@$(PIP) install -qq -e ".[dev]"
	@touch $@
