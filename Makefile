# `make help` lists the verbs. Everything runs in .venv, made from the pins on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PINS := requirements.txt constraints.txt

.DEFAULT_GOAL := help
.PHONY: help book test check seeds versions notebooks sync lint records gpu bench pins clean

# Tests run side by side, each process with one thread, so that they do not wait for one another.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder

help:  ## list the verbs
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

book: $(READY)  ## build the site and say where it is
	@$(BIN)/python tools/book.py

test: $(READY)  ## run every check: code, notebooks, site, links, browser
	$(PYTEST) --nbval notebooks tests

check: $(READY)  ## the quick part: style, unit tests, pairing; no notebook is run, no site built
	$(PYTEST) -m "not book" tests

seeds: $(READY)  ## run every chapter at other seeds: SEEDS="1 2 3"
	SEEDS="$(or $(SEEDS),1)" $(PYTEST) --dist load -k another_seed tests/test_notebooks.py

versions: $(READY)  ## try other Pythons, with the newest and the oldest dependencies
	@$(BIN)/python tools/versions.py

notebooks: $(READY)  ## execute every chapter: book/NN_*.md -> notebooks/NN_*.ipynb
	@$(BIN)/python tools/notebooks.py run

sync: $(READY)  ## carry edits of the text into the notebooks, executing only where code changed
	@$(BIN)/python tools/notebooks.py sync

lint: $(READY)  ## check the style of the code
	$(BIN)/ruff check .

records: $(READY)  ## list the records to make anew; MINUTES=90 makes those that fit
	@$(BIN)/python experiments/records.py $(if $(MINUTES),--minutes $(MINUTES))

gpu: $(READY)  ## try everything on a GPU, in 8 minutes; DEVICE=pretend tries it without one
	@$(BIN)/python tools/gpu.py --device $(or $(DEVICE),cuda)

bench: $(READY)  ## measure speed, beside peers
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script || exit 1; done

pins: $(READY)  ## resolve constraints.txt anew from requirements.txt
	@sed -n '/^#/p' constraints.txt > .pins
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate \
	  requirements.txt | grep -vE '^(nvidia|cuda|triton)' >> .pins
	@mv .pins constraints.txt

clean:  ## remove what was built (the environment too)
	rm -rf .venv .versions _build dist .pytest_cache .ruff_cache .hypothesis

# uv installs the same wheels several times faster; where it cannot (it does not read pip's
# settings for mirrors and certificates), pip does.
$(READY): $(PINS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install -q --disable-pip-version-check uv -c requirements.txt
	$(BIN)/uv pip install -q --python $(BIN)/python -r requirements.txt -c constraints.txt \
	  || $(BIN)/pip install -q --no-compile -r requirements.txt -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
