# A set of pinned versions: default, newest, classic or living (requirements/stacks).
STACK ?= default
VENV := $(if $(filter default,$(STACK)),.venv,.venv-$(STACK))

.PHONY: help
help: ## Show this list
	@echo 'Usage: make TARGET [STACK=default|newest|classic|living] [ARGS=...]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1	\2/p' $(MAKEFILE_LIST)

.PHONY: demo
demo: venv ## Train, re-parameterize, quantize and compare small networks
	$(VENV)/bin/python tools/demo.py $(ARGS)

.PHONY: test
test: venv ## Run the tests but for the long ones; ARGS='-k name' goes to pytest
	$(VENV)/bin/python -m pytest tests -m 'not long' -n auto --maxprocesses 8 $(ARGS)

.PHONY: check
check: venv ## All tests, their coverage, mutation and fuzz, with figures (an hour)
	$(VENV)/bin/python tests/gates/check.py $(ARGS)

.PHONY: bench
bench: venv ## Measure what mmrep promises of its speed, and every block (10 minutes)
	$(VENV)/bin/python benchmarks/marks.py $(ARGS)
	$(VENV)/bin/python tools/dataset_converters/digits.py data/digits --overwrite
	$(VENV)/bin/python tools/compare_blocks.py configs/repvgg/repvgg-tiny_1xb64_digits.py \
		--seeds 1 --cfg-options train_cfg.max_epochs=2 param_scheduler.T_max=2

.PHONY: docs
docs: venv ## Build the documentation into docs/_build/html
	$(VENV)/bin/python -m sphinx --nitpicky --fail-on-warning --keep-going --quiet \
		-b html docs docs/_build/html
	@echo 'Open docs/_build/html/index.html'

.PHONY: lint
lint: venv ## Check style, formatting, spelling and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy mmrep tests/typed_api.py

.PHONY: venv
venv: ## Set up the environment only; PYTHON=... names the interpreter
	@bash requirements/setup_venv.sh '$(STACK)' '$(VENV)'
