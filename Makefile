# `make demo` and `make test` do all the set-up, in .venv, on a machine with python3, gcc and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)

.PHONY: demo test check lint types contracts unit headers peer vmms vmms-all bench guests clean

# Debian ships venv without ensurepip; the package that has it is installed where that is possible.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard src/guestmem/native/*.[ch] src/guestmem/cpu/native/*.[ch])
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { apt-get update -qq && apt-get install -y -qq python3-venv; } \
	    || { echo "python3-venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/guestmem demo

test: lint types contracts unit

# Every scenario to its end, then every mutant: about two minutes and a half on two cores.
check: $(VENV)/.installed
	$(BIN)/guestmem check --jobs $(JOBS)
	$(BIN)/guestmem check --mutants --jobs $(JOBS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

contracts: $(VENV)/.installed
	$(BIN)/lint-imports

# The hunts for mutants are left to `make check`, which makes them all; pytest alone makes them too.
unit: $(VENV)/.installed
	$(BIN)/pytest -n $(JOBS) --dist worksteal \
	    --deselect tests/known_bugs/test_known_bugs.py::test_found_by_a_property_that_it_breaks

# The kernel's own KVM tests under `guestmem run`. Exit code 4 of the build: they cannot be had here, and are skipped.
peer: $(VENV)/.installed
	$(BIN)/python -m tests.peer.build || test $$? -eq 4
	$(BIN)/python -m tests.peer.run

# The headers of kernels that tests/uapi compares the levels with. Those that cannot be had make tests skip.
headers: $(VENV)/.installed
	-$(BIN)/python -m tests.uapi.kvm_headers

# Real VMMs boot Debian's kernel under `guestmem run`: a few rows of the table, or all of it, which takes an hour or two.
vmms: $(VENV)/.installed
	$(BIN)/python -m tests.vmms

vmms-all: $(VENV)/.installed
	$(BIN)/python -m tests.vmms --all

bench: $(VENV)/.installed
	$(BIN)/python -m bench

# Rebuilds the guest program that the package ships, with the machine's gcc.
guests: examples/guests/demo.c examples/guests/guest.ld
	examples/guests/build.sh src/guestmem/cli/demo.elf

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
