# Each command sets up what it needs. `make run PYTHON=python3.12` chooses the interpreter of a new .venv.
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.13 python3.12 python3.11 python3.10 python3)

.DEFAULT_GOAL := help
.PHONY: help run test lab docs bench prepare env constraints clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

run: env ## train on handwritten digits and on spirals, write an HTML report and say where it is
	@$(BIN)/neuralode demo

test: env ## everything that CI checks, in the order of how soon it can fail
	$(call step,the library is what the notebooks say,$(PY) tests/gates.py sync)
	$(call step,the notebooks are clean,$(PY) tests/gates.py clean)
	$(call step,lint,$(BIN)/ruff check -q --output-format concise nbs tests benchmarks neuralode_nb/__init__.py)
	$(call step,the notebooks run,OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing)
	$(call step,pytest,OMP_NUM_THREADS=1 $(PY) -m pytest -n 2,quiet)

lab: env ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

docs: env ## build the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { \
	  echo "make docs needs Quarto: see quarto.org/docs/get-started (macOS: brew install --cask quarto)"; exit 1; }
	@$(BIN)/nbdev_docs && $(PY) tests/readme.py && echo "The site is in _docs/index.html"

bench: env ## compare speed and work with the other libraries; OPTIONS=--smoke takes a minute
	@for f in benchmarks/[a-z]*.py; do echo "── $$f"; OMP_NUM_THREADS=1 $(PY) "$$f" $(OPTIONS) || exit 1; done

prepare: env ## after editing notebooks: write the modules, strip metadata, write README.md
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(PY) tests/readme.py

# The environment is complete when .venv/.complete names this folder and these two files as they are now.
env: ## make .venv and install everything into it (the commands above do it by themselves)
	@set -e; here="$(CURDIR)"; key="$$here $$(cat pyproject.toml constraints.txt | cksum)"; \
	had=$$(cat $(VENV)/.complete 2>/dev/null || true); \
	works() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }; \
	if works $(PY); then \
	  if [ "$$had" = "$$key" ]; then exit 0; fi; \
	  case "$$had" in ""|"$$here "*) make_venv= ;; *) make_venv=yes ;; esac; \
	else make_venv=yes; fi; \
	if [ -n "$$make_venv" ]; then \
	  python=; bare=; \
	  for p in $(CANDIDATES); do \
	    if ! works "$$p"; then continue; fi; \
	    if "$$p" -c 'import ensurepip, venv' 2>/dev/null; then python=$$p; break; else bare=$${bare:-$$p}; fi; \
	  done; \
	  if [ -z "$$python" ] && [ -n "$$bare" ]; then \
	    echo "$$bare cannot make a virtual environment. On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; \
	  elif [ -z "$$python" ]; then \
	    echo "No Python 3.10 or newer among: $(CANDIDATES)."; \
	    echo "Debian, Ubuntu: sudo apt install python3 python3-venv; macOS: brew install python; or give PYTHON=/path/to/python3"; \
	    exit 1; \
	  fi; \
	  "$$python" -m venv --clear $(VENV); \
	fi; \
	echo "Installing into $(VENV). The first time takes a few minutes and about 6 GB, most of it PyTorch."; \
	start=$$(date +%s); rm -f $(VENV)/.complete; \
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt uv || true; \
	UV_HTTP_TIMEOUT=300 $(PY) -m uv pip install --python $(PY) -c constraints.txt -e ".[vision,dev]" \
	  || $(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[vision,dev]"; \
	echo "$$key" > $(VENV)/.complete; echo "Installed in $$(($$(date +%s) - start)) s."

constraints: env ## resolve constraints.txt again after a change of dependencies; pinned versions stay where they can
	@cp constraints.txt $(VENV)/constraints.txt
	@$(PY) -m uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.10 \
	  --no-header --no-annotate -o $(VENV)/constraints.txt >/dev/null
	@{ head -2 constraints.txt; cat $(VENV)/constraints.txt; } > $(VENV)/new.txt && mv $(VENV)/new.txt constraints.txt

clean: ## remove .venv, the built site and all caches; results stay
	@rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# $(call step,name,command[,quiet]): run the command, say how long it took; if it fails, name it and stop.
define step
@start=$$(date +%s); echo "── $(1)"; \
if $(2); then $(if $(3),:,echo "   $$(($$(date +%s) - start)) s"); \
else echo "make test stopped at: $(1) ($$(($$(date +%s) - start)) s)"; exit 1; fi
endef
