# `make help` lists the targets. Needs Python >= 3.11, nothing else: every target makes
# the environment it needs. `make PYTHON=/path/to/python` chooses the interpreter.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL := /bin/bash

# Empty means: the first of the candidates that runs, is recent enough and can make an
# environment. Looked for only when an environment is made.
PYTHON ?=
define NEW_VENV
@for p in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
	if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
		>/dev/null 2>&1; then \
		rm -rf $(1) && exec $$p -m venv $(1); \
	fi; \
done; \
echo "No Python >= 3.11 with the modules venv and ensurepip was found" \
	"$(if $(PYTHON),at PYTHON=$(PYTHON),on the PATH)." \
	"Install one, or name it: make PYTHON=/path/to/python" >&2; exit 2
endef

UV_VERSION := 0.13.8
BIN := .venv/bin
PIP_FLAGS := --quiet --disable-pip-version-check
READY := .venv/.ready
FLOOR_READY := .venv-floor/.ready
COMPILE := .venv-lock/bin/uv --no-config pip compile --quiet --upgrade --universal \
	--generate-hashes --python-version 3.11 --fork-strategy fewest \
	--default-index https://pypi.org/simple --custom-compile-command "make lock"

# More arguments for pytest, for example `make test ARGS="-k split -x"`.
ARGS ?=
# The tests of the library alone: without the command-line program, its datasets and
# the documentation.
LIBRARY_TESTS := tests lwsam_jax --ignore=tests/test_docs.py \
	--ignore=tests/benchmarks

.PHONY: help demo pages test test-slow test-floor test-newest lint format docs flops lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(READY) ## race SGD, the momentum, layer-wise SAM and SAM, each as tuned, on real images
	$(BIN)/lwsam-bench demo

test: $(READY) ## run all tests but those of test-slow
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: $(READY) ## every three parts together, ten times the hostile input, within an hour
	$(BIN)/python -m pytest -n auto --dist worksteal -m thorough tests/test_walk.py $(ARGS)
	$(BIN)/python -m pytest -n auto --dist worksteal --timeout 3600 \
		--hypothesis-profile=thorough \
		tests/test_hostile_*.py tests/test_random_programs.py $(ARGS)

lint: $(READY) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(READY) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(READY) ## bring what README and docs have of committed rows up to date
	$(BIN)/python -m lwsam_bench.front.pages

flops: $(READY) ## FLOPs of the compiled ResNet-20 step over a plain gradient
	$(BIN)/lwsam-bench flops

test-floor: $(FLOOR_READY) ## run the library's tests on the oldest versions it supports
	.venv-floor/bin/python -m pytest -n auto --dist loadfile $(LIBRARY_TESTS) $(ARGS)

test-newest: .venv-newest/.made ## run the library's tests on the newest versions there are
	.venv-newest/bin/python -m pip install $(PIP_FLAGS) --upgrade \
		--upgrade-strategy eager --editable '.[test]'
	.venv-newest/bin/python -m pip list --disable-pip-version-check \
		| grep -E '^(jax|jaxlib|flax|optax) '
	.venv-newest/bin/python -m pytest -n auto --dist loadfile $(LIBRARY_TESTS) $(ARGS)

lock: .venv-lock/.made ## choose the newest versions again and write requirements/*.txt
	.venv-lock/bin/python -m pip install $(PIP_FLAGS) uv==$(UV_VERSION)
	$(COMPILE) --extra dev --output-file requirements/lock.txt pyproject.toml
	$(COMPILE) --output-file requirements/floor.txt requirements/floor.in

clean: ## remove the environments and everything that was built
	rm -rf .venv .venv-floor .venv-newest .venv-lock site dist \
		.pytest_cache .ruff_cache .hypothesis
	find lwsam_jax benchmarks tests -name __pycache__ -type d -prune \
		-exec rm -rf {} +

# An environment is rebuilt from nothing when its lock file changes, and the project is
# installed again, without dependencies, when pyproject.toml does.
.venv/.locked: requirements/lock.txt
	@echo "Installing the pinned dependencies into .venv (once, some minutes) ..."
	$(call NEW_VENV,.venv)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --require-hashes -r $<
	@touch $@

$(READY): .venv/.locked pyproject.toml lwsam_jax/_version.py
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation \
		--editable .
	@touch $@

.venv-floor/.locked: requirements/floor.txt
	@echo "Installing the oldest supported versions into .venv-floor ..."
	$(call NEW_VENV,.venv-floor)
	@.venv-floor/bin/python -m pip install $(PIP_FLAGS) --require-hashes -r $<
	@touch $@

$(FLOOR_READY): .venv-floor/.locked pyproject.toml lwsam_jax/_version.py
	@.venv-floor/bin/python -m pip install $(PIP_FLAGS) --no-deps \
		--no-build-isolation --editable .
	@touch $@

.venv-newest/.made .venv-lock/.made:
	$(call NEW_VENV,$(@D))
	@touch $@
