"""TransformerConfig: the sizes and rates of an encoder-decoder Transformer, as `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .config import ACTIVATIONS, read_entries

MODEL_TYPE = "bertkern-transformer"
_WRITTEN_BESIDES = ("architectures", "dtype")  # by save_pretrained


@dataclass
class TransformerConfig:
    """Sizes, rates and token ids of a Transformer (Vaswani et al. 2017, table 3).

    Encoder and decoder have the same sizes. `dropout` is of the sublayers' outputs and of the sum
    of embedding and position; the paper drops no attention weights. `label_smoothing` is of the
    loss in training; the held-out loss is the plain cross-entropy. `extra` holds what a config.json
    said besides (versions, ...); it is written back unchanged.

    Raises:
        ValueError: a size that is not a positive integer, heads that do not divide hidden_size, a
            rate outside 0..1, an unknown hidden_act, or a token id outside the vocabulary.
    """

    vocab_size: int = 37000
    hidden_size: int = 512
    num_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    prenorm: bool = False
    layer_norm_eps: float = 1e-6
    label_smoothing: float = 0.1
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 3
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            value, least = getattr(self, name), 0 if name == "num_layers" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must divide "
                f"hidden_size = {self.hidden_size}"
            )
        if self.hidden_size // self.num_attention_heads > 256:
            raise ValueError(
                f"head dimension hidden_size / num_attention_heads = "
                f"{self.hidden_size // self.num_attention_heads}; 1..256 are supported"
            )
        if not isinstance(self.prenorm, bool):
            raise ValueError(f"prenorm must be true or false, not {self.prenorm!r}")
        for name in ("dropout", "attention_dropout", "label_smoothing", "layer_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a number >= 0, not {value!r}")
            if name != "layer_norm_eps" and value > 1:
                raise ValueError(f"{name} must be in 0..1, not {value!r}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {list(ACTIVATIONS)}, not {self.hidden_act!r}"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} must be an integer below vocab_size = {self.vocab_size}, not {value!r}"
                )

        ids = (self.pad_token_id, self.bos_token_id, self.eos_token_id)
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"pad_token_id, bos_token_id and eos_token_id must be different, not {ids}"
            )

    @property
    def activation(self) -> str:
        """The name of hidden_act in the ops."""
        return ACTIVATIONS[self.hidden_act]

    @classmethod
    def base(cls, **changes: Any) -> TransformerConfig:
        """The paper's base model: 6 layers, hidden 512, 8 heads; `changes` replace fields."""
        return cls(**changes)

    @classmethod
    def big(cls, **changes: Any) -> TransformerConfig:
        """The paper's big model: hidden 1024, 16 heads, dropout 0.3 (0.1 for English-French)."""
        sizes = {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "dropout": 0.3,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> TransformerConfig:
        """The configuration that a config.json's entries describe.

        Raises:
            ValueError: an unknown key, or another model_type.
        """
        own = {f.name for f in fields(cls)} - {"extra"}
        kind = entries.get("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise ValueError(f"config key 'model_type' is {kind!r}; supported: {MODEL_TYPE!r}")
        unknown = set(entries) - own - {"model_type", *_WRITTEN_BESIDES}
        if unknown:
            raise ValueError(
                f"unknown config keys {', '.join(sorted(unknown))}; allowed: "
                + ", ".join(sorted(own | {"model_type", *_WRITTEN_BESIDES}))
            )
        extra = {key: entries[key] for key in _WRITTEN_BESIDES if key in entries}
        return cls(**{key: entries[key] for key in own if key in entries}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The entries of config.json."""
        entries = asdict(self)
        return {"model_type": MODEL_TYPE, **entries.pop("extra"), **entries}

    def with_changes(self, **changes: Any) -> TransformerConfig:
        """A copy with other entries.

        Raises:
            ValueError: as `from_dict`.
        """
        return self.from_dict({**self.to_dict(), **changes})

    @classmethod
    def from_json_file(cls, path: str | Path) -> TransformerConfig:
        """Read a config.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not JSON, not an object, or as `from_dict`; the message starts with the
                path.
        """
        entries = read_entries(path)
        try:
            return cls.from_dict(entries)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
