# make demo · test · test-all · mutants · gate · sass · bench · gpu · gpu-tests · gpu-ops · gpu-models · lint · clean
#
# Every target but `gpu` and its parts makes .venv when it is missing: a virtual environment with the versions of constraints.txt and
# bertkern installed in place, its extension compiled. Two stamps inside say that this is done, so it is not redone:
# .venv/installed follows constraints.txt, .venv/built follows what is compiled. No sudo, and nothing outside this folder.
# PYTHON chooses the interpreter that the environment is made from (and, for `gpu`, the one that runs).

PYTHON  ?= python3
RESULTS ?= benchmarks/results
ARGS    ?=

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
# WORKERS processes share the test files, one thread each: two OpenMP teams on two cores would wait for each other.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
NATIVE  := $(shell find csrc tests -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: help demo test test-all mutants gate sass bench gpu gpu-tests gpu-ops gpu-models lint clean

help:
	@echo "make demo      embed, search and pre-train on this machine; writes ./demo-output (<= 3 minutes once installed)"
	@echo "make test      the tests (about a quarter of an hour on two cores once installed)"
	@echo "make test-all  the tests with every dtype, 500 random cases of each op and all mutants, and every case of the benchmarks checked"
	@echo "make mutants   run the tests on each deliberately wrong kernel; writes docs/mutants.md and docs/cuda-mutants.md"
	@echo "make gate      compile every Triton kernel at every tuning row with the oldest and the newest Triton; writes docs/machine-code.md"
	@echo "make sass      read the compiled CUDA kernels: registers, occupancy, the loops' issue slots; writes docs/machine-code-cuda.md (<= 1 minute)"
	@echo "make bench     time ops, models and training against their peers (about a quarter of an hour; ARGS=--quick: three minutes); draws benchmarks/report"
	@echo "make gpu       with PYTHON as it stands: build, test and time on the GPU at hand (<= 9 minutes); writes RESULTS"
	@echo "               in parts: make gpu-tests, gpu-ops, gpu-models; ARGS=--full times every case"
	@echo "make lint      ruff, mypy, clang-format, and asm only in csrc/ptx"
	@echo "ARGS='...' goes to the command that a target runs, e.g.  make test ARGS='tests/ops -k varlen'"

demo: $(VENV)/built
	$(BIN)/bertkern demo $(ARGS)

test: $(VENV)/built
	$(PYTEST) $(ARGS)

test-all: $(VENV)/built
	BERTKERN_DTYPES=all BERTKERN_FUZZ_CASES=500 BERTKERN_MUTANTS=all $(PYTEST) tests benchmarks $(ARGS)

mutants: $(VENV)/built
	cd tests && PYTHONPATH=. ../$(BIN)/python -m mutants.run --write ../docs/mutants.md $(ARGS)
	cd tests && PYTHONPATH=. ../$(BIN)/python -m emulator.mutants.run --write ../docs/cuda-mutants.md $(ARGS)

# The two Tritons go to build/gate, each alone in a folder; what was compiled is kept there, too.
gate: $(VENV)/built
	$(BIN)/python tests/kernels/gate.py --every-triton $(ARGS)

sass: $(VENV)/built
	cd tests && PYTHONPATH=. ../$(BIN)/python -m csrc.cuda_gate $(ARGS)

bench: $(VENV)/built
	$(BIN)/python -m bertkern.benchmarks.run --results $(RESULTS) $(ARGS)

# Needs only what the checkout and a stock torch + nvcc installation hold: no .venv, no network, and nothing is
# installed into PYTHON's own environment (the build goes to build/gpu-site). Exit code 3 where there is no GPU, since a
# gate that ran nothing must not look like one that passed.
gpu:
	$(PYTHON) benchmarks/gpu.py --results $(RESULTS) $(ARGS)

gpu-tests gpu-ops gpu-models:
	$(PYTHON) benchmarks/gpu.py $(@:gpu-%=%) --results $(RESULTS) $(ARGS)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run -Werror $(NATIVE))
	@if grep -rnE '\basm[[:space:]]*(volatile|goto|\()|__asm' csrc --include='*.cpp' --include='*.h' --include='*.hpp' \
	    --include='*.cu' --include='*.cuh' | grep -v '^csrc/ptx/'; then echo "asm outside csrc/ptx (above)"; exit 1; fi
	@echo "lint: clean"

clean:
	rm -rf build dist demo-output *.egg-info

$(VENV)/installed: constraints.txt
	@echo "== making $(VENV) from $(PYTHON) (once: some minutes, and some GB where torch comes with CUDA)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r constraints.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "== compiling bertkern._C and installing bertkern in place"
	$(PIP) install --no-deps --no-build-isolation --no-index -e .
	@touch $@
