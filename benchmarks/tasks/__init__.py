"""Real tasks from the text at hand: fine-tuning and pre-training against transformers.

build.py         data sets in the formats of RTE, SQuAD and SWAG, from Python's own documentation
entailment.py    pairs of sentences;  questions.py: spans of passages;  endings.py: one of four
scores.py        scores with their 95 % intervals, over documents
transformers.py  transformers' BERT on the same batches: padding, training loop, predictions
run.py           fine-tunes both from MiniLM's weights and compares curves, scores and times
pretraining.py   pre-trains both from random weights and compares losses and times
curves.py        pictures of the loss curves
"""
