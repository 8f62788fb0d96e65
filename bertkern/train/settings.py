"""How the training loop runs, whatever it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

Settings = TypeVar("Settings", bound="LoopSettings")

OPTIMIZERS = ("adamw", "lamb")
PRECISIONS = ("fp32", "bf16", "fp16")
SHARDINGS = ("ddp", "fsdp")


@dataclass(frozen=True)
class LoopSettings:
    """What every training has in common.

    Attributes:
        steps: updates of the weights.
        learning_rate: its peak.
        warmup_fraction: part of the steps in which the rate rises from 0; then it falls to 0, both
            linearly.
        optimizer: "adamw" or "lamb".
        weight_decay: of matrices; biases and LayerNorms have none.
        max_gradient_norm: gradients are scaled down to it.
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
        seed: of weights, data and dropout.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
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
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "checkpoint_every", "accumulate", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must be in 0..1, not {self.warmup_fraction}")
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("sharding", SHARDINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
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
        warmup = round(self.warmup_fraction * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (self.steps - step) / max(self.steps - warmup, 1)

    @classmethod
    def from_dict(cls: type[Settings], entries: dict[str, Any]) -> Settings:
        """The inverse of dataclasses.asdict, also after JSON."""
        return cls(**{**entries, "betas": tuple(entries["betas"])})
