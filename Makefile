# Each target sets up what it needs: `make bench` and `make test` run on a machine with Python and g++.
PYTHON ?= python3
TORCH ?= torch==2.12.0
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
SOURCES := pyproject.toml setup.py $(shell find csrc -name "*.h" -o -name "*.cpp")
PYTEST_ARGS ?= -n auto --dist worksteal
ASAN := build/asan

.PHONY: $(VENV) bench bench-norms bench-stack bench-step bench-memory report train detect test test-all test-asan lint wheel kernels clean

$(VENV): $(INSTALLED)

$(INSTALLED): $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[test,bench]" "$(TORCH)"
	touch $@

bench: $(INSTALLED)
	$(RUN) -m benchmarks.bench_ops
	$(RUN) -m benchmarks.plot
	$(RUN) -m benchmarks.round_trip

# What follows a convolution in MBConv, and depthwise convolutions, beside PyTorch's.
bench-norms: $(INSTALLED)
	$(RUN) -m benchmarks.bench_norms
	$(RUN) -m benchmarks.bench_depthwise

bench-stack: $(INSTALLED)
	$(RUN) -m benchmarks.bench_stack
	$(RUN) -m benchmarks.lattice
	$(RUN) -m benchmarks.plot

# OFFICIAL=DIR, a checkout of the authors' repository, times their network too.
bench-step: $(INSTALLED)
	$(RUN) -m benchmarks.bench_step $(if $(OFFICIAL),--official $(OFFICIAL))
	$(RUN) -m benchmarks.profile_step $(if $(OFFICIAL),--official $(OFFICIAL))
	$(RUN) -m benchmarks.step_report

bench-memory: $(INSTALLED)
	$(RUN) -m benchmarks.bench_memory
	$(RUN) -m benchmarks.step_report

report: $(INSTALLED)
	$(RUN) -m benchmarks.step_report

# Handwritten digits, in two or three minutes; TRAIN_ARGS="--data DIR --out DIR …" trains on your pictures.
train: $(INSTALLED)
	$(RUN) -m revbifpn_kernels.train $(TRAIN_ARGS)

# The digits; DETECT_ARGS="--masks", "--data DIR --out runs/mine", …
detect: $(INSTALLED)
	$(RUN) -m revbifpn_kernels.detect $(DETECT_ARGS)

# The fast tests; `make test-all` runs the slow ones after them.
test: $(INSTALLED)
	$(RUN) -m pytest $(PYTEST_ARGS)

test-all: test
	$(RUN) -m pytest -m slow $(PYTEST_ARGS)

# Every CPU op under the address and undefined-behaviour sanitizers. A copy, so that the instrumented
# extension never lies beside the sources.
test-asan: $(INSTALLED)
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -r setup.py pyproject.toml LICENSE csrc revbifpn_kernels tests/cpu_sweep.py $(ASAN)
	rm -f $(ASAN)/revbifpn_kernels/*.so
	cd $(ASAN) && SANITIZE=address,undefined $(abspath $(RUN)) setup.py --quiet build_ext --inplace
	cd $(ASAN) && env ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(abspath $(RUN)) cpu_sweep.py

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

wheel: $(INSTALLED)
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

kernels: $(INSTALLED)
	$(RUN) -m benchmarks.kernels

clean:
	rm -rf $(VENV) build dist *.egg-info revbifpn_kernels/*.so
