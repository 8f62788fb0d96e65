"""The benchmark suite; `make bench` runs it.

run.py            the command: which cases, and where the rows go
op_cases.py       the table of op cases
harness.py        checks, times and records a case
overhead.py       host time that an op adds to its kernel's launch
gpu.py            `make gpu`: build, test and time on the GPU at hand; a script, run before
                  anything is installed
test_ops.py       the op cases under pytest-benchmark
results/          what was measured so far, with its provenance
"""
