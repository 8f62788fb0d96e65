"""Position-wise feed-forward network (Vaswani et al. 2017, section 3.3).

y = act(x W_upᵀ + b_up) W_downᵀ + b_down
"""

from torch import Tensor, nn

from bertkern import ops


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, computed by `bertkern.ffn`.

    Args:
        hidden_size: size of x and y.
        intermediate_size: size between the layers.
        activation: "gelu" (erf), "gelu_tanh" or "relu".
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]; y is dropped in the residual addition that follows."""
        return ops.ffn(
            x,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            activation=self.activation,
        )
