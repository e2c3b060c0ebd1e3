# `make help` lists what there is. Everything runs in .venv, made on first use and made again when its requirements change.

PY ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGE := data_io_nbdev
FRAMEWORKS := .venv-frameworks
FLAGS ?= $(if $(SERVER),mongo)
DOCS_OPTIONS ?=

# The constraints are a freeze made on this Python; others get the newest that settings.ini allows.
PINS = $(shell $(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

# The server that the tests of MongoPool talk to: MONGODB_URI, or what is on the PATH, or FerretDB, which Go builds once.
FERRETDB := .tools/ferretdb
SERVER := $(or $(MONGODB_URI),$(shell command -v mongod || command -v ferretdb || { command -v go >/dev/null && echo $(FERRETDB); }))

.DEFAULT_GOAL := help
.PHONY: help demo test coverage frameworks soak bench bench-peers docs lab readme export outputs clean-notebooks check-export wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/made: settings.ini constraints.txt setup.py
	@echo "Making $(VENV) with $(PY)"
	@rm -rf $(VENV)
	@$(PY) -m venv $(VENV)
	@touch $@

$(VENV)/with-%: $(VENV)/made
	@echo "Installing $(PACKAGE)[$*] into $(VENV); the first time takes a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[$*]'
	@touch $@

demo: $(VENV)/with-demo ## run the demonstration
	@$(BIN)/python -m $(PACKAGE).demo

test: export $(filter $(FERRETDB),$(SERVER)) ## run the tests and every notebook; FLAGS="mongo slow" adds the flagged cells
	@echo "Testing tests/ and every notebook under nbs/$(if $(FLAGS), with $(FLAGS))"
	@$(if $(SERVER),,echo 'NOT TESTED: MongoPool. Set MONGODB_URI, or put mongod on the PATH, or install Go')
	@echo 'NOT TESTED: PyTorch and JAX, which are large; make frameworks installs and tests them'
	@PATH="$(CURDIR)/.tools:$$PATH" $(BIN)/python -m pytest $(COVERAGE) --numprocesses 2 --dist loadscope --flags "$(FLAGS)"

coverage: ## run the tests as above, and list the lines that none of them runs
	@$(MAKE) --no-print-directory test COVERAGE=--cov

# PyTorch and JAX are large: on Linux, PyTorch brings its CUDA libraries, some 5 GB. So they have a venv of their own.
frameworks: export $(FRAMEWORKS)/made ## test what needs PyTorch and JAX: tests/test_frameworks.py, and flagged cells
	@FRAMEWORKS=1 $(FRAMEWORKS)/bin/python -m pytest --flags "torch jax" tests/test_frameworks.py nbs/interop/torch.ipynb nbs/storage/buffer/batches.ipynb nbs/howto/pytorch_dataloader.ipynb

$(FRAMEWORKS)/made: settings.ini constraints.txt setup.py
	@echo "Installing PyTorch and JAX into $(FRAMEWORKS); the first time takes some minutes"
	@rm -rf $(FRAMEWORKS)
	@$(PY) -m venv $(FRAMEWORKS)
	@$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[dev,torch,jax]'
	@touch $@

soak: export $(filter $(FERRETDB),$(SERVER)) ## attack the package ten times as often as the tests do, and print a table; takes an hour or so
	@$(if $(SERVER),,echo 'NOT TESTED: MongoPool. Set MONGODB_URI, or put mongod on the PATH, or install Go')
	@PATH="$(CURDIR)/.tools:$$PATH" SOAK=10 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --timeout 4000 -o faulthandler_timeout=3900 tests/test_attack_*.py

$(FERRETDB): tools/ferretdb/go.mod tools/ferretdb/go.sum
	@echo "Building FerretDB into $@; the first time takes a minute or two"
	@cd tools/ferretdb && go mod vendor && echo v1.24.2 > vendor/github.com/FerretDB/FerretDB/build/version/version.txt && \
		go build -mod=vendor -trimpath -tags ferretdb_no_postgresql -o $(CURDIR)/$@ github.com/FerretDB/FerretDB/cmd/ferretdb
	@rm -rf tools/ferretdb/vendor

bench: $(VENV)/with-dev $(VENV)/with-bench $(filter $(FERRETDB),$(SERVER)) ## run the benchmarks
	@PATH="$(CURDIR)/.tools:$$PATH" $(BIN)/python benchmarks/run.py

# Optional, one by one: what cannot be installed has a line in the table that says why. The newest of everything, so no constraints.
PEERS := cpprb stable-baselines3 torchrl tianshou flashbax
.venv-peers/made: settings.ini
	@echo "Making .venv-peers with $(PY); torch and what it needs take several gigabytes and minutes"
	@rm -rf .venv-peers
	@$(PY) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[fast]'
	@for peer in $(PEERS); do .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $$peer || echo "NOT INSTALLED: $$peer"; done
	@touch $@

bench-peers: .venv-peers/made ## measure beside other replay buffers, and write benchmarks/results.md; REMARK="…" goes into it
	@REMARK="$(REMARK)" .venv-peers/bin/python benchmarks/peers.py

docs: export ## build the site into _docs/; DOCS_OPTIONS=--draft leaves out pages not written yet
	@$(BIN)/python docs/website.py $(DOCS_OPTIONS)

lab: $(VENV)/with-dev ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

readme: $(VENV)/with-dev ## make README.md from nbs/index.ipynb, and its chart from benchmarks/results.md
	@$(BIN)/python docs/readme.py
	@$(BIN)/python docs/pictures.py

# Not nbdev_export alone: it leaves out of the docstrings what the notebooks say in comments.
export: $(VENV)/with-dev ## write the package from the notebooks
	@$(BIN)/python tools/export.py
	@touch $(PACKAGE)/py.typed

outputs: export $(filter $(FERRETDB),$(SERVER)) ## run PAGE=nbs/….ipynb, or every notebook, and keep what its cells show
	@for page in $(or $(PAGE),$$(find nbs -name '*.ipynb' -not -path '*/.*')); do \
		echo "Running $$page"; PATH="$(CURDIR)/.tools:$$PATH" $(BIN)/python conftest.py "$$page" 600 store $(FLAGS) || exit 1; done

clean-notebooks: $(VENV)/with-dev ## strip the notebooks' metadata, keep their outputs
	@$(BIN)/nbdev_clean

# A renamed notebook leaves its old module behind, so the generated modules go first.
check-export: $(VENV)/with-dev ## fail unless the package and README.md are what the notebooks make
	@grep -rliE --include='*.py' '^# autogenerated' $(PACKAGE) | xargs rm -f
	@$(MAKE) --no-print-directory export readme
	@git diff --exit-code -- $(PACKAGE) pyproject.toml README.md || { \
		echo "This is what \`make export readme\` would change. nbdev_export alone leaves the docstrings unfinished."; exit 1; }
	@changed=$$(git status --porcelain -- $(PACKAGE) pyproject.toml README.md); \
		if [ -n "$$changed" ]; then echo "Not committed, or not made by a notebook:"; echo "$$changed"; exit 1; fi
	@echo "The package and README.md are what the notebooks make"

wheel: $(VENV)/with-dev ## build the wheel into dist/
	@$(BIN)/python -m build --wheel

clean: ## remove what the tools made, but not .venv
	@rm -rf _docs _proc build dist htmlcov .coverage .coverage.* .pytest_cache .hypothesis jupyter_execute
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
