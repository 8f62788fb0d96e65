"""The benchmark suite: `bertkern bench`, `make bench`, `pytest benchmarks/`.

run.py              the command: suites, options, where the rows go
harness.py          checks, times and records a case
row.py              one measurement, and the JSON lines that hold them
machine.py          the machine: name, versions, memory that a call adds
limits.py           what the machine can do: bandwidth and rates, the floor of every row
peers.py            whom we compare with, which of them are here; how they compute attention
op_cases.py         the table of op cases; attention_cases.py: attention's
engines.py          the ways to compute an encoder from a folder of weights
model_cases.py      inference of BERT; sentence_cases.py: sentences a second
training_cases.py   training steps
transformer_cases.py  training steps of the Transformer; decoding_cases.py: its decoding;
                    transformer_peers.py: other packages' Transformers with the weights of ours
report.py           tables and pictures of result files; plots.py draws
compare.py          whether a ratio to a peer fell between two result files
overhead.py         host time that an op adds to its kernel's launch
gpu.py              `make gpu`: build, test and time on the GPU at hand; a script, run before
                    anything is installed
test_ops.py         the op cases under pytest-benchmark
results/            what was measured so far, with its provenance
"""
