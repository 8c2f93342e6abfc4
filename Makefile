# make demo         asks the embedded model about the bundled pictures
# make test         lints, checks types, runs the C and the Python tests
# make test-quick   the Python tests that are not marked slow

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := pyproject.toml setup.py __init__.py runtime/build_migi.py $(shell find runtime/csrc -type f)
SOURCES := $(BUILD) $(shell find runtime -name "*.py") $(wildcard runtime/*.mig runtime/*.md runtime/examples/*)
FOLDERS := $(patsubst %/__init__.py,%,$(wildcard runtime/__init__.py calib/__init__.py export/__init__.py \
	bench/__init__.py train/__init__.py))

.PHONY: demo test test-quick lint c-build c-test py-test clean

demo: $(VENV)/.runtime
	@$(BIN)/python -m migician.runtime.demo --draw demo.png

# What is built is built first; then everything at once, the C tests' words kept until they end.
test: c-build
	@$(MAKE) --no-print-directory -j 3 lint c-test py-test

test-quick: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup -m "not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	@# the root is the package: mypy finds it under its own name through a link
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/migician
	$(BIN)/mypy -m migician $(foreach folder,$(FOLDERS),-p migician.$(folder))

c-build: $(VENV)/.test
	$(MAKE) -j 2 -C tests/c build

c-test: c-build
	@$(MAKE) --no-print-directory -C tests/c test > $(VENV)/c-test.log 2>&1 || { cat $(VENV)/c-test.log; exit 1; }
	@cat $(VENV)/c-test.log

py-test: $(VENV)/.test
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup

# A plain install; an editable one that `make test` made serves as well while it is newer than the sources.
$(VENV)/.runtime: $(SOURCES) | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check .
	@rm -f $(VENV)/.test
	@touch $@

# Editable, so that `import migician` is this checkout; only a new C core or new metadata needs another install.
$(VENV)/.test: $(BUILD) | $(VENV)/.created
	MIGI_WERROR=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is missing or older than 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CC:-gcc} >/dev/null || \
		{ echo "make: no C compiler; install gcc (Debian, Ubuntu: apt install gcc libc6-dev)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "make: $(PYTHON) cannot make a venv; install it (Debian: apt install python3-venv)" >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist ./*.egg-info runtime/_migi*.so demo*.png
