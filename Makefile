# `make demo` runs the main job on an embedded example, `make test` all tests; each target sets up what it needs first.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
GPU_BENCHMARKS := classifier decode decode_attention decode_linears flashsvdattn_ranks flashsvdffn long_context_attn long_context_decoder_attn long_context_decoder_ffn long_context_ffn launch
# A process of pytest for each core. One that has nothing left to do takes tests over from another.
PARALLEL ?= -n logical --maxprocesses=8 --dist=worksteal
export HF_HUB_OFFLINE ?= 1

.PHONY: demo notebook quick test coverage oldest style lint types layers bench bench-gpu clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

quick: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not interpreted" $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# Apart, since interpreted kernels take twice as long while lines are counted.
coverage: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL) --cov=flashsvd --cov-report=term --cov-fail-under=97 $(ARGS)

style: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

layers: $(VENV)/.ready
	$(BIN)/lint-imports

# The oldest torch has CUDA's libraries in its wheel's dependencies: some gigabytes.
oldest: $(VENV)-oldest/.ready
	$(VENV)-oldest/bin/python -m pytest $(PARALLEL) -m "not slow and not interpreted" $(ARGS)

notebook: $(VENV)/.ready
	$(BIN)/python examples/run_notebook.py

bench: $(VENV)/.ready
	$(BIN)/python benchmark/benchmark_main_job.py

bench-gpu: $(VENV)/.ready
	failed=; \
	for script in $(GPU_BENCHMARKS); do \
		$(BIN)/python benchmark/benchmark_$$script.py || failed="$$failed $$script"; \
	done; \
	$(BIN)/python benchmark/table.py || failed="$$failed table"; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-oldest/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	grep -Ev '^(torch|triton|transformers)=' constraints.txt | cat - constraints-oldest.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-oldest/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
