"""How the training loop runs, whatever it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

Settings = TypeVar("Settings", bound="LoopSettings")

OPTIMIZERS = ("adamw", "lamb")
PRECISIONS = ("fp32", "bf16", "fp16")
SHARDINGS = ("ddp", "fsdp")
SCHEDULES = ("linear", "noam")


def noam_peak(hidden_size: int, warmup_steps: int) -> float:
    """The learning rate of Vaswani et al. (2017) at the end of its warm-up: 1 / √(d · w)."""
    return 1.0 / math.sqrt(hidden_size * warmup_steps)


@dataclass(frozen=True)
class LoopSettings:
    """What every training has in common.

    Attributes:
        steps: updates of the weights.
        learning_rate: its peak.
        schedule: how the rate goes on when it has risen linearly from 0 in the warm-up: "linear",
            down to 0 at the last step; "noam", as 1/√step, which with a peak of `noam_peak` is
            equation 3 of Vaswani et al. (2017).
        warmup_fraction: part of the steps in which the rate rises.
        warmup_steps: those steps themselves, in place of warmup_fraction.
        optimizer: "adamw" or "lamb".
        weight_decay: of matrices; biases and LayerNorms have none.
        max_gradient_norm: gradients are scaled down to it; None: never.
        betas, eps: of the optimizer.
        accumulate: pieces in which each process computes its share of a step, one after the other:
            less memory, the same update.
        precision: "fp32"; "bf16" or "fp16" compute matrix products so (autocast), weights stay
            float32; "fp16" scales the loss.
        sharding: with several processes, "ddp" (each has all weights) or "fsdp" (FSDP2: each has a
            part of weights, gradients and moments).
        gradient_checkpointing: compute activations anew in the backward: less memory.
        evaluate_every: steps between evaluations; there is one after the last step in any case.
        evaluate_first: evaluate before the first step, too.
        checkpoint_every: steps between checkpoints.
        patience: stop after so many evaluations without a better figure; None for never.
        average: the run ends with the mean of the weights at its last so many checkpoints.
        seed: of weights, data and dropout.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup_fraction: float = 0.1
    warmup_steps: int | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_gradient_norm: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    accumulate: int = 1
    precision: str = "fp32"
    sharding: str = "ddp"
    gradient_checkpointing: bool = False
    evaluate_every: int = 100
    evaluate_first: bool = True
    checkpoint_every: int = 200
    patience: int | None = None
    average: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            *("steps", "evaluate_every", "checkpoint_every", "accumulate", "patience"),
            *("average", "warmup_steps"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must be in 0..1, not {self.warmup_fraction}")
        for name, allowed in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("sharding", SHARDINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps >= 0:
            raise ValueError(
                f"betas must be in [0, 1) and eps at least 0, not {self.betas} and {self.eps}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2^63 - 1, not {self.seed}")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive, not {self.max_gradient_norm}")
        if self.average > 1 and self.patience is not None:
            raise ValueError(
                "average and patience exclude one another: the mean is of the last checkpoints, "
                "and patience ends a run some checkpoints after the best"
            )
        if self.optimizer == "lamb" and self.sharding == "fsdp":
            raise ValueError(
                "optimizer = 'lamb' needs sharding = 'ddp', not 'fsdp': with parameters in parts "
                "no process knows their norms"
            )
        if self.precision == "fp16" and self.sharding == "fsdp":
            raise ValueError(
                "precision = 'fp16' needs sharding = 'ddp'; 'fsdp' takes fp32 and bf16"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        warmup = self.warmup
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "noam":
            return self.learning_rate * math.sqrt(max(warmup, 1) / (step + 1))
        return self.learning_rate * (self.steps - step) / max(self.steps - warmup, 1)

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_fraction * self.steps)

    @classmethod
    def from_dict(cls: type[Settings], entries: dict[str, Any]) -> Settings:
        """The inverse of dataclasses.asdict, also after JSON."""
        return cls(**{**entries, "betas": tuple(entries["betas"])})
