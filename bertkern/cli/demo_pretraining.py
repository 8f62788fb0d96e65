"""The demo's second half: a small BERT learns from raw text, and fills in words."""

import functools
import time
from pathlib import Path

import torch

from .console import out
from .report import PretrainingSummary

STEPS = 800
TEXTS = (
    "Return [MASK] if the object is a string.",
    "If the file does not [MASK], an error is raised.",
    "This method returns a [MASK] of all the items in the list.",
    "The default value is [MASK].",
)
_TOP = 5
_MAX_LENGTH = 32
_VOCABULARY = 4096
_DROPOUT = 0.0  # a run this short hardly sees a sentence twice


def run(documents: list[list[str]], folder: Path, device: torch.device) -> PretrainingSummary:
    """Pre-train in `folder`, go on if a run was interrupted there, and fill in words."""
    from bertkern.data import MaskingSettings
    from bertkern.models import BertConfig, FillMask
    from bertkern.train import PretrainingSettings, pretrain

    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        hidden_dropout_prob=_DROPOUT,
        attention_probs_dropout_prob=_DROPOUT,
        initializer_range=0.06,  # BERT's 0.02 is for 768 columns; small models start slowly with it
        max_position_embeddings=_MAX_LENGTH,
    )
    settings = PretrainingSettings(
        steps=STEPS,
        tokens_per_batch=512,
        learning_rate=2e-3,
        evaluate_every=max(1, STEPS // 8),
        evaluation_tokens=8192,
        checkpoint_every=max(1, STEPS // 4),
        masking=MaskingSettings(max_length=_MAX_LENGTH),
    )
    resume = _can_resume(folder, settings)
    start = time.perf_counter()
    train = functools.partial(
        pretrain,
        documents,
        folder,
        config=config,
        vocab_size=_VOCABULARY,
        settings=settings,
        device=device,
        console=out,
    )
    try:
        result = train(resume=resume, overwrite=not resume)
    except ValueError as error:  # of another text (another Python), or damaged
        if not resume:
            raise
        out.print(f"the old run cannot go on ({error}); starting anew", markup=False)
        result = train(overwrite=True)
    seconds = time.perf_counter() - start
    history = result.history
    filled = FillMask(result.model, result.tokenizer)(TEXTS, _TOP)
    return PretrainingSummary(
        documents=len(documents),
        parameters=sum(parameter.numel() for parameter in result.model.parameters()),
        steps=STEPS,
        tokens=sum(step.tokens for step in history.steps),
        seconds=seconds,
        resumed=resume,
        unigram_loss=history.baselines["mlm_loss"],
        held_out=list(zip(*history.curve("mlm_loss"), strict=True)),
        training=[(step.step, step.losses["mlm"]) for step in history.steps],
        next_sentence_accuracy=history.evaluations[-1].figures["nsp_accuracy"],
        fills=[
            (text, [(guess.token, guess.probability) for guess in found.masks[0]])
            for text, found in zip(TEXTS, filled, strict=True)
        ],
    )


def _can_resume(folder: Path, settings: object) -> bool:
    """Whether an interrupted run with these settings lies in the folder; tells where it stands."""
    from bertkern.train import PretrainingSettings
    from bertkern.train.checkpoint import read_state
    from bertkern.train.loop import CHECKPOINT

    checkpoint = folder / CHECKPOINT
    if not checkpoint.is_file():
        return False
    try:
        state = read_state(checkpoint)
        same = PretrainingSettings.from_dict(state.run["settings"]) == settings
    except (ValueError, KeyError, TypeError):
        return False
    if not same or state.step >= STEPS:
        return False
    out.print(f"resuming the interrupted run in {folder} at step {state.step}", markup=False)
    return True
