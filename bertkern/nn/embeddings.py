"""BERT's input (Devlin et al. 2018, figure 2).

    y = dropout(LayerNorm(word[id] + position[p] + type[t]))

Legend: T tokens.
"""

from torch import Tensor, nn

from bertkern import ops

from .layer_norm import LayerNorm
from .layout import TokenLayout


class BertEmbeddings(nn.Module):
    """The three embedding tables, their sum normalised: `bertkern.embedding_layer_norm`.

    Args:
        vocab_size, max_positions, num_types: rows of the word, position and type tables.
        hidden_size: their columns.
        eps: of the LayerNorm.
        dropout: probability of dropping a value after the LayerNorm in training.
        pad_token_id: the word row that starts at zero and gets no gradient from here, or None.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        num_types: int,
        hidden_size: int,
        eps: float = 1e-12,
        dropout: float = 0.0,
        pad_token_id: int | None = 0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_token_id)
        self.position = nn.Embedding(max_positions, hidden_size)
        self.token_type = nn.Embedding(num_types, hidden_size)
        self.norm = LayerNorm(hidden_size, eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        layout: TokenLayout,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Three times integer [T] -> [T, hidden]; token_type_ids None means type 0 everywhere."""
        drops = self.training and self.dropout > 0.0
        return ops.embedding_layer_norm(
            input_ids,
            position_ids,
            token_type_ids,
            self.word.weight,
            self.position.weight,
            self.token_type.weight,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            self.dropout if drops else 0.0,
            dropout_seed,
            dropout_rows=layout.dropout_rows,
            padding_idx=self.word.padding_idx,
        )
