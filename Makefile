# The two commands of README.md, and what CI calls. Each makes the environment that it needs.
PYTHON ?= python3

.PHONY: run test test-floor lint clean

run: .venv/ready
	.venv/bin/python -m deltanet.train.first_run

test: .venv-test/ready
	.venv-test/bin/python -m pytest tests

test-floor: .venv-floor/ready
	.venv-floor/bin/python -m pytest tests/test_configuration.py tests/test_cache.py tests/test_generation.py \
	    tests/test_interoperability.py tests/test_modeling_features.py tests/test_modeling_options.py

lint: .venv-test/ready
	.venv-test/bin/python -m pip install -q ruff
	.venv-test/bin/ruff check .

.venv/ready: setup.py constraints.txt
	$(call environment,.venv,[train,eval],constraints.txt)

.venv-test/ready: setup.py constraints.txt
	$(call environment,.venv-test,[test],constraints.txt)

.venv-floor/ready: setup.py constraints-floor.txt
	$(call environment,.venv-floor,[test-floor],constraints-floor.txt)

# name, extras, constraints: torch alone first, so that nothing else chooses its version.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q --upgrade pip
	$(1)/bin/python -m pip install -q -c $(firstword $(3)) torch numpy
	$(1)/bin/python -m pip install -q -c $(3) -e '.$(2)'
	touch $@
endef

clean:
	rm -rf .venv .venv-test .venv-floor build dist *.egg-info
