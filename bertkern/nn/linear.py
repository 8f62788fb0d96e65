"""Linear layer: y = act(x wᵀ + b)."""

from torch import Tensor, nn

from bertkern import ops


class Linear(nn.Linear):
    """torch's Linear (weight [out, in], bias [out]) computed by `bertkern.linear`.

    Args:
        in_features, out_features: sizes of the last dimension of x and of y.
        activation: None, "gelu", "gelu_tanh" or "relu", applied in the product's epilogue.
    """

    def __init__(self, in_features: int, out_features: int, activation: str | None = None) -> None:
        super().__init__(in_features, out_features)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return ops.linear(input, self.weight, self.bias, activation=self.activation)
