"""What a training run measured, as data that goes through JSON without loss."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass
class StepRecord:
    """One update: its number from 1, tokens, learning rate, and the two losses in training mode."""

    step: int
    tokens: int
    learning_rate: float
    mlm_loss: float = float("nan")
    nsp_loss: float = float("nan")

    @property
    def loss(self) -> float:
        """What was minimised."""
        return self.mlm_loss + self.nsp_loss


@dataclass
class Evaluation:
    """Held-out results after `step` updates, over so many predicted tokens and sentence pairs."""

    mlm_loss: float
    mlm_accuracy: float
    nsp_accuracy: float
    predictions: int
    pairs: int
    step: int = 0


@dataclass
class History:
    """All steps and evaluations, and the held-out loss of one who knows only word frequencies."""

    unigram_loss: float
    steps: list[StepRecord] = field(default_factory=list)
    held_out: list[Evaluation] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain dicts, lists and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """A JSON document."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, entries: dict) -> History:
        """The inverse of to_dict."""
        return cls(
            entries["unigram_loss"],
            [StepRecord(**step) for step in entries["steps"]],
            [Evaluation(**evaluation) for evaluation in entries["held_out"]],
        )
