"""What a training run measured, as data that goes through JSON without loss."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class StepRecord:
    """One update, or the mean of those since the last record of a long run.

    Attributes:
        step: the number of the (last) update, from 1.
        tokens: that were computed.
        learning_rate: of the (last) update.
        losses: each loss by its name, in training mode.
    """

    step: int
    tokens: int
    learning_rate: float
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """What was minimised."""
        return sum(self.losses.values())


@dataclass
class Evaluation:
    """Held-out figures by name, after `step` updates."""

    step: int
    figures: dict[str, float]


@dataclass
class History:
    """All records and evaluations, and what the run is to be compared with.

    Attributes:
        baselines: figures of one who has not learnt, by the names of the evaluations' figures.
        steps, evaluations: in order.
    """

    baselines: dict[str, float] = field(default_factory=dict)
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def curve(self, figure: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a figure of the evaluations."""
        return [e.step for e in self.evaluations], [e.figures[figure] for e in self.evaluations]

    def best(self, figure: str, higher_is_better: bool) -> Evaluation | None:
        """The first evaluation with the best figure, None where there is no evaluation."""
        sign = -1 if higher_is_better else 1
        return min(self.evaluations, key=lambda e: sign * e.figures[figure], default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """A JSON document."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> History:
        """The inverse of to_dict."""
        return cls(
            entries["baselines"],
            [StepRecord(**step) for step in entries["steps"]],
            [Evaluation(**evaluation) for evaluation in entries["evaluations"]],
        )
