# make demo    the whole system on the mini world (SHORT=1: every line runs, nothing is learned)
# make serve   the page and the HTTP API on http://127.0.0.1:8000, of the demo's model or the shipped one
# make test    every test but the long ones;  make quick  those without clusters, servers and whole jobs
# make chaos   the long tests: twenty times kill -9 of a driver, a worker, a node, in curation and in training (SEED=1:
#              other moments), and whole jobs that are killed, retried, stopped
# make docs    the documentation as a site, build/site, warnings as errors
# make lint    ruff, mypy, import-linter;  make format;  make clean
# make infra   renders every overlay of infra/ and checks it: schemas, rules, security (needs kustomize)
# make audit    known vulnerabilities;  make sbom  what is installed, as CycloneDX;  make secrets  keys in tracked files
# make lock     the image's locks, from pyproject (UPGRADE=1: newer versions);  make image TARGET=cpu IMAGE=...
# make lavis-env    the environment of the lavis captioning backend, .venv-lavis (LAVIS_VENV=... elsewhere)
#
# All of them create .venv first, once. PYTHON=python3.12 picks the interpreter, ROOT=s3://... the root.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

LAVIS_VENV ?= .venv-lavis
LAVIS_PINS = pipeline/curation/captioning/lavis-requirements.txt
LAVIS_PIP = $(LAVIS_VENV)/bin/python -m pip --disable-pip-version-check
LAVIS_INSTALLED = $(LAVIS_VENV)/.installed

PRESET = $(if $(SHORT),mini-short,mini)
WHERE = $(or $(ROOT),runs/$(PRESET))
OPTIONS = --preset $(PRESET) --root $(WHERE)

.PHONY: demo serve docs test quick chaos lint infra audit sbom secrets lock image format clean venv lavis-env found

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

# The trained encoder that is shipped, where the demo has left none of its own.
serve: venv
	$(RUN) jobs/serve.py $(OPTIONS) $(if $(ROOT)$(wildcard $(WHERE)/model/config.json),,--model miniworld:ssr)

docs: venv
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

test: venv
	$(RUN) -m pytest -n auto --maxprocesses 3 --dist loadfile --no-loadscope-reorder

quick: venv
	$(RUN) -m pytest --ignore tests/system

chaos: venv
	CHAOS_KILLS=20 CHAOS_SEED=$(or $(SEED),0) $(RUN) -m pytest -m long

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

infra: venv
	$(RUN) -m infra.checks

# exit 75 of the audit: not run, for the advisory service was not there, or knows nothing
LOCKS = infra/docker/locks
audit: venv
	@$(RUN) -m infra.security.audit || [ $$? = 75 ]
	@for lock in $(LOCKS)/*.txt; do echo "audit: $$lock"; \
	  $(RUN) -m infra.security.audit --no-deps --disable-pip -r $$lock || [ $$? = 75 ] || exit 1; done

sbom: venv
	@mkdir -p build
	$(VENV)/bin/cyclonedx-py environment $(RUN) --of JSON -o build/sbom.json
	@echo "wrote build/sbom.json"

secrets: venv
	$(RUN) -m infra.security.secrets

lock: venv
	TORCH="$(TORCH)" UV="$(VENV)/bin/uv" infra/docker/lock.sh $(if $(UPGRADE),--upgrade)

# docker, podman or buildah; the last line of a push tells the digest
BUILDER ?= docker
TARGET ?= cpu
IMAGE ?= ssr-$(TARGET)
image:
	$(BUILDER) build -f infra/docker/Dockerfile --target $(TARGET) -t $(IMAGE) \
	  --build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' pipeline/__init__.py) \
	  --build-arg REVISION=$$(git rev-parse HEAD) .

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

# An interpreter that fits, and an empty environment at $(1) unless one is there.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	  || { echo "error: $(PYTHON) is not Python 3.11 or 3.12; name one with PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "error: $(PYTHON) has no venv module; install it (Debian: apt install python3-venv)" >&2; exit 2; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
	@echo "installing into $(1); this takes some minutes, once"
endef

# torch by the pip $(1): the CUDA build where there is a GPU, else the CPU's if its index answers.
define torch
	@if nvidia-smi >/dev/null 2>&1 || [ "$$(uname)" = Darwin ]; then \
	   $(1) install -qq "$(TORCH)"; \
	 else \
	   $(1) install -qq --retries 1 --timeout 20 "$(TORCH)" \
	     --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	   || $(1) install -qq "$(TORCH)"; \
	 fi
endef

# The stamp is written last: an installation that was broken off is taken up again, not trusted.
# cyclonedx-bom brings rfc3987-syntax; jsonschema imports it where it is, three seconds in each process of Ray.
$(INSTALLED): pyproject.toml
	$(call environment,$(VENV))
	$(call torch,$(PIP))
	@$(PIP) install -qq -e ".[dev]"
	@$(PIP) uninstall -qq -y rfc3987-syntax
	@touch $@

lavis-env: $(LAVIS_INSTALLED)

# --no-deps: the pins are complete, and LAVIS asks for more than captioning needs. fairscale and
# iopath are source archives whose builds need an older setuptools, in the environment itself.
$(LAVIS_INSTALLED): $(LAVIS_PINS)
	$(call environment,$(LAVIS_VENV))
	$(call torch,$(LAVIS_PIP))
	@$(LAVIS_PIP) install -qq "setuptools<81" wheel
	@$(LAVIS_PIP) install -qq --no-deps --no-build-isolation -r $(LAVIS_PINS)
	@$(LAVIS_VENV)/bin/python -m pipeline.curation.captioning.lavis_environment
	@touch $@
