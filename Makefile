# Each target sets up what it needs: `make bench` and `make test` run on a machine with Python and g++.
PYTHON ?= python3
TORCH ?= torch==2.12.0
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
SOURCES := pyproject.toml setup.py $(shell find csrc -name "*.h" -o -name "*.cpp")
PYTEST_ARGS ?= -n auto --dist worksteal
ASAN := build/asan
QUICK := build/bench

.PHONY: $(VENV) bench bench-all report train detect test test-all test-asan test-arm lint wheel kernels clean

$(VENV): $(INSTALLED)

$(INSTALLED): $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[test,bench]" "$(TORCH)"
	touch $@

# A first answer in under three minutes: the operators beside copy and eager, a training step of S0, memory
# against depth. Prints tables; rows, page and figures go to build/bench.
bench: $(INSTALLED)
	rm -rf $(QUICK)
	$(RUN) -m benchmarks.bench_ops --quick --output $(QUICK)/benchmarks/results
	$(RUN) -m benchmarks.bench_step --quick --output $(QUICK)/benchmarks/results
	$(RUN) -m benchmarks.bench_memory --quick --parts depth --output $(QUICK)/benchmarks/results
	$(RUN) -m benchmarks.results --root $(QUICK) --allow-dirty

# All that docs/results.md shows, on one quiet machine, from a clean commit; then the pages and figures.
# OFFICIAL=DIR, a checkout of the authors' repository, times their network too.
bench-all: $(INSTALLED)
	$(MAKE) --jobs=1 bench-ops bench-mbconv bench-step bench-profile bench-host bench-precision bench-memory kernels report

# One of them: make bench-step, bench-memory, bench-ops, …
bench-step bench-profile: $(INSTALLED)
	$(RUN) -m benchmarks.$(subst -,_,$@) $(if $(OFFICIAL),--official $(OFFICIAL))

bench-%: $(INSTALLED)
	$(RUN) -m benchmarks.bench_$*

# docs/results.md, the marked parts of README.md and docs/*.md, and the figures, from the rows alone.
report: $(INSTALLED)
	$(RUN) -m benchmarks.results

# Handwritten digits, in two or three minutes; TRAIN_ARGS="--data DIR --out DIR …" trains on your images.
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

# The C++ operators on Arm64, compiled and emulated on x86-64.
test-arm: $(INSTALLED)
	tests/arm.sh $(abspath $(RUN)) "$(TORCH)" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

wheel: $(INSTALLED)
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# What the compiler makes of the Triton kernels, no GPU needed.
kernels: $(INSTALLED)
	$(RUN) -m benchmarks.kernels

clean:
	rm -rf $(VENV) build dist *.egg-info revbifpn_kernels/*.so
