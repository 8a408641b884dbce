# The two commands of README.md, and what CI calls. Each makes the environment that it needs, once.
PYTHON ?= python3

# Variables, because a comma would end an argument of $(call).
RUN_EXTRAS := [train,eval]
TEST_EXTRAS := [test]
FLOOR_EXTRAS := [test-floor]
VLLM_EXTRAS := [test-vllm]

.PHONY: run test test-floor test-vllm clean

run: .venv/ready
	.venv/bin/python -m deltanet.train.shipped

test: .venv-test/ready
	.venv-test/bin/python -m pytest tests

FLOOR_TESTS := bad_input cache configuration context_parallel decoding generation interoperability layout mixer_step \
    modeling_features modeling_options parallel publish publish_contents publish_convert publish_flatten serving

test-floor: .venv-floor/ready
	.venv-floor/bin/python -m pytest $(FLOOR_TESTS:%=tests/test_%.py)

test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/test_serving.py tests/test_vllm_*.py

.venv/ready: setup.py constraints.txt
	$(call environment,.venv,$(RUN_EXTRAS),constraints.txt)

.venv-test/ready: setup.py constraints.txt
	$(call environment,.venv-test,$(TEST_EXTRAS),constraints.txt)

.venv-floor/ready: setup.py constraints-floor.txt
	$(call environment,.venv-floor,$(FLOOR_EXTRAS),constraints-floor.txt)

# vLLM asks for torchvision, torchaudio and torchcodec, of which the registry has builds for CUDA only. Beside a torch for
# the CPU they cannot be imported, and Transformers imports what is installed.
.venv-vllm/ready: setup.py constraints-vllm.txt
	$(call environment,.venv-vllm,$(VLLM_EXTRAS),constraints-vllm.txt)
	@.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec

# Folder, extras, constraints. torch comes first and alone, so that nothing else chooses its version.
define environment
	@echo "Making the environment $(1), once; pip fetches PyTorch and Transformers, which takes minutes."
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -q --upgrade pip
	@$(1)/bin/python -m pip install -q -c $(3) torch numpy
	@PYTHONWARNINGS=ignore $(1)/bin/python -m pip install -q -c $(3) -e '.$(2)'
	@touch $@
endef

clean:
	rm -rf .venv .venv-test .venv-floor .venv-vllm build dist *.egg-info
