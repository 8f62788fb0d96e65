"""The optimizers of BERT: AdamW (Loshchilov & Hutter 2019) and LAMB (You et al. 2020).

AdamW   p ← p − lr·(m̂ / (√v̂ + eps) + decay·p)
LAMB    p ← p − lr·(‖p‖ / ‖u‖)·u,   u = m̂ / (√v̂ + eps) + decay·p

with m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ), m and v the running means of g and g². Matrices decay;
biases and LayerNorms, vectors, do not, and LAMB gives them no ratio either, as in its authors'
code. LAMB's norms are those of a layer's matrix: a packed projection counts as those it packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .settings import LoopSettings


class Lamb(torch.optim.Optimizer):
    """LAMB, for batches of tens of thousands of sequences.

    Args:
        params: parameters, or groups of them. Besides lr, betas, eps and weight_decay a group may
            say `packed`: how many equal matrices each of its parameters holds one below the other.
        lr, betas, eps, weight_decay: as in the equation above. Where weight_decay is 0 the ratio
            of norms is 1.

    Raises:
        ValueError: a negative lr, eps or weight_decay, or a beta outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), not {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "packed": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1**step)).div_(root)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
            update.mul_(_ratio(parameter, update, group["packed"]))
        parameter.add_(update, alpha=-group["lr"])


def _ratio(parameter: Tensor, update: Tensor, packed: int) -> Tensor:
    """‖p‖ / ‖u‖ of each packed matrix, for each row of the parameter; 1 where a norm is 0."""
    weight, change = (t.reshape(packed, -1).norm(dim=1) for t in (parameter, update))
    ratio = torch.where((weight > 0) & (change > 0), weight / change, 1.0)
    rows = ratio.repeat_interleave(parameter.shape[0] // packed)
    return rows.reshape(-1, *[1] * (parameter.dim() - 1))


def make_optimizer(model: nn.Module, settings: LoopSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over a model's parameters."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vectors = [p for _, p in named if p.dim() <= 1]
    if settings.optimizer == "adamw":
        matrices = [p for _, p in named if p.dim() > 1]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
    groups = [
        {
            "params": [p for n, p in named if p.dim() > 1 and _packed(n) == packed],
            "weight_decay": settings.weight_decay,
            "packed": packed,
        }
        for packed in (1, 2, 3)
    ]
    return Lamb(
        [*(g for g in groups if g["params"]), {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )


def _packed(name: str) -> int:
    """How many matrices a parameter holds, by its name."""
    return 3 if ".qkv." in name else 2 if ".kv." in name else 1
