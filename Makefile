# One virtual environment, made on first use; every target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Empty for the newest versions the package allows.
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find cpp -type f)
CXX_SOURCES = $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
# Each worker begins with a half of the tests, so that what belongs together meets the same caches; who is done steals.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
SANITIZED := build/sanitized
CUDA_BUILD := build/cuda
INSTALLS := build/install
# What every Python and every torch must pass: operators, modules and their compilation.
SMOKE := tests/ops/test_opcheck.py tests/skipping/test_modules.py tests/skipping/test_compile.py \
  tests/skipping/test_backward.py
PYTHONS ?= 3.10 3.13
TORCHES ?= torch==2.10.0 torch==2.11.0 torch

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 30

.PHONY: demo
demo: $(VENV)/demo.done ## Denoise a video with and without skipping, compare three families; writes report/index.html
	$(BIN)/python examples/video_dit/demo.py

.PHONY: test
test: $(VENV)/test.done ## Run the test suite
	$(PYTEST)

.PHONY: test-fast
test-fast: $(VENV)/test.done ## Run the tests but those marked slow
	$(PYTEST) -m "not slow"

.PHONY: test-sanitized
test-sanitized: $(SANITIZED)/done ## Run the operator tests on an ASan + UBSan build of the CPU kernels
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(SANITIZED)/bin/python -m pytest tests/ops/test_operators.py tests/ops/test_errors.py tests/ops/test_properties.py

.PHONY: build-cuda
build-cuda: $(CUDA_BUILD)/done ## Compile the Hopper kernels, without a GPU, into a wheel; prints what each takes
	$(BIN)/python cmake/check_ptxas.py table $(CUDA_BUILD)

.PHONY: test-install
test-install: $(INSTALLS)/nvcc.done ## Install as the README says, with CUDA torch and with CPU torch, with nvcc and without

.PHONY: test-torch-versions
test-torch-versions: $(INSTALLS)/nvcc.done ## Run one built library under several versions of torch (TORCHES)
	for torch in $(TORCHES); do \
	  $(BIN)/uv pip install --quiet --upgrade-package torch --python $(INSTALLS)/nvcc/bin/python $$torch && \
	  $(INSTALLS)/nvcc/bin/python -c "import torch; print('torch', torch.__version__)" && \
	  $(INSTALLS)/nvcc/bin/python -m pytest $(SMOKE) || exit 1; \
	done

.PHONY: test-pythons
test-pythons: $(VENV)/test.done ## Build and test with other Pythons (PYTHONS), which uv finds or downloads
	$(PIP_INSTALL) uv
	for python in $(PYTHONS); do \
	  $(BIN)/python .ci/installs.py $$python && $(INSTALLS)/$$python/bin/python -m pytest $(SMOKE) || exit 1; \
	done

.PHONY: lint
lint: $(VENV)/test.done $(VENV)/lint.done ## Check format, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

.PHONY: format
format: $(VENV)/lint.done ## Rewrite sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

.PHONY: bench
bench: $(VENV)/demo.done ## Measure the CPU kernels; writes benchmarks/results/
	$(BIN)/python benchmarks/cpu_attention.py

.PHONY: clean
clean: ## Remove the environment and everything built
	rm -rf $(VENV) build report

$(VENV)/base.done: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch numpy scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/package.done: $(VENV)/base.done $(BUILD_INPUTS)
	$(PIP_INSTALL) --no-build-isolation --no-deps -C cmake.define.LITE_ATTENTION_WERROR=ON -e .
	touch $@

$(VENV)/demo.done $(VENV)/test.done $(VENV)/lint.done: $(VENV)/%.done: $(VENV)/package.done
	$(PIP_INSTALL) --no-build-isolation -C cmake.define.LITE_ATTENTION_WERROR=ON -e '.[$*]'
	touch $@

# Its own environment, which sees the packages of the first but not its editable install.
$(SANITIZED)/done: $(VENV)/test.done
	$(PYTHON) -m venv $(SANITIZED)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(SANITIZED)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth
	$(SANITIZED)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --force-reinstall -C build-dir=build/sanitized-cmake -C cmake.define.LITE_ATTENTION_WERROR=ON \
	  -C cmake.define.LITE_ATTENTION_SANITIZE=address,undefined .
	touch $@

# nvcc comes as wheels, of one version everywhere: another may allocate registers in another way.
$(CUDA_BUILD)/done: $(VENV)/base.done $(BUILD_INPUTS)
	$(PIP_INSTALL) --no-deps nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  -C build-dir=$(CUDA_BUILD) -C cmake.define.LITE_ATTENTION_WERROR=ON -C cmake.define.LITE_ATTENTION_CUDA=ON \
	  --wheel-dir $(CUDA_BUILD) .
	touch $@

$(INSTALLS)/nvcc.done: $(VENV)/test.done $(BUILD_INPUTS)
	$(PIP_INSTALL) uv
	$(BIN)/python .ci/installs.py nvcc
	touch $@
