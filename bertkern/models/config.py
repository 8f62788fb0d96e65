"""BertConfig: the sizes and rates of a BERT, in the form of Hugging Face's `config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""`hidden_act` of config.json -> the activation of the ops."""

# Keys of config.json on the file, labels, generation or training, and not on this computation.
# fmt: off
_BYSTANDERS = frozenset((
    "_attn_implementation", "_commit_hash", "_name_or_path", "_num_labels", "architectures",
    "auto_map", "bos_token_id", "chunk_size_feed_forward", "cls_token_id", "directionality",
    "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing", "language",
    "mask_token_id", "max_length", "model_name", "name", "output_past", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache", "xla_device",
))
# fmt: on

PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")

# Keys that do concern the computation, with the only values that this model computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "pruned_heads": ({}, None),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
}


@dataclass
class BertConfig:
    """Sizes, dropout rates and initialisation of a BERT, by Hugging Face's names and defaults.

    The labels are given by `num_labels`, by `id2label` {number: name} or by `label2id` {name:
    number}, and the others follow: names LABEL_0, LABEL_1, ... where there are none, and two labels
    where nothing is said. `extra` holds what a config.json said besides (versions, ...); it is
    written back unchanged.

    Raises:
        ValueError: a size that is not a positive integer, heads that do not divide hidden_size, a
            probability outside 0..1, an unknown hidden_act or problem_type, or labels that
            contradict one another.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None  # of the task heads; None: hidden_dropout_prob
    problem_type: str | None = None
    num_labels: int = None  # type: ignore[assignment]  # None only on the way in, as the next two
    id2label: dict[int, str] = None  # type: ignore[assignment]
    label2id: dict[str, int] = None  # type: ignore[assignment]
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            value, least = getattr(self, name), 0 if name == "num_hidden_layers" else 1
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
        rates = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
        if self.classifier_dropout is not None:
            rates.append("classifier_dropout")
        for name in rates:
            if not self._is_number(name) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not self._is_number(name) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a number >= 0, not {getattr(self, name)!r}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {list(ACTIVATIONS)}, not {self.hidden_act!r}"
            )
        pad = self.pad_token_id
        if pad is not None and not (isinstance(pad, int) and 0 <= pad < self.vocab_size):
            raise ValueError(
                f"pad_token_id must be None or below vocab_size = {self.vocab_size}, not {pad!r}"
            )
        self._complete_labels()
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type must be one of {PROBLEM_TYPES}, not {self.problem_type!r}"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type 'single_label_classification' needs num_labels of 2 or more, not 1"
            )

    def _complete_labels(self) -> None:
        count, names, numbers = self.num_labels, self.id2label, self.label2id
        if count is not None and (
            not isinstance(count, int) or isinstance(count, bool) or count < 1
        ):
            raise ValueError(f"num_labels must be an integer >= 1, not {count!r}")
        for key, value in (("id2label", names), ("label2id", numbers)):
            if value is not None and (not isinstance(value, dict) or not value):
                raise ValueError(f"{key} must be None or a table of labels, not {value!r}")
        if names is None:
            if numbers is not None:
                names = {number: name for name, number in numbers.items()}
            else:
                names = {i: f"LABEL_{i}" for i in range(2 if count is None else count)}
        try:
            names = {int(number): name for number, name in names.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"the numbers of id2label must be integers ({error})") from error
        if sorted(names) != list(range(len(names))):
            raise ValueError(
                f"the numbers of id2label must be 0..{len(names) - 1}, not {sorted(names)}"
            )
        if count is not None and count != len(names):
            raise ValueError(f"num_labels = {count}, but id2label has {len(names)} labels")
        if numbers is None:
            numbers = {names[i]: i for i in range(len(names))}
        wrong = {name: i for name, i in numbers.items() if names.get(i) != name}
        if wrong or set(numbers) != set(names.values()):
            raise ValueError(f"label2id = {numbers} is not the inverse of id2label = {names}")
        self.num_labels, self.id2label, self.label2id = len(names), names, numbers

    def _is_number(self, name: str) -> bool:
        return isinstance(getattr(self, name), (int, float)) and not isinstance(
            getattr(self, name), bool
        )

    @property
    def activation(self) -> str:
        """The name of hidden_act in the ops."""
        return ACTIVATIONS[self.hidden_act]

    @classmethod
    def base(cls, **changes: Any) -> BertConfig:
        """BERT-base (Devlin et al. 2018): 12 layers, hidden 768; `changes` replace fields."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes: Any) -> BertConfig:
        """BERT-large: 24 layers, hidden 1024, 16 heads."""
        sizes = {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> BertConfig:
        """The configuration that a config.json's entries describe.

        Raises:
            ValueError: an unknown key, or a known one with a value that this model does not
                compute.
        """
        own = {f.name for f in fields(cls)} - {"extra"}
        extra = {}
        kind = entries.get("model_type", "bert")
        if kind not in _FIXED["model_type"]:  # first: another model has other keys, too
            raise ValueError(f"config key 'model_type' is {kind!r}; supported: 'bert'")
        for key, value in entries.items():
            if key in own:
                continue
            if key in _FIXED:
                if not any(value == allowed for allowed in _FIXED[key]):
                    allowed = " or ".join(map(repr, _FIXED[key]))
                    raise ValueError(f"config key {key!r} is {value!r}; supported: {allowed}")
            elif key not in _BYSTANDERS:
                raise ValueError(
                    f"unknown config key {key!r} (value {value!r}); allowed: "
                    + ", ".join(sorted(own | set(_FIXED) | _BYSTANDERS))
                )
            if key != "model_type":  # which to_dict always says
                extra[key] = value
        return cls(**{key: entries[key] for key in own if key in entries}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The entries of config.json; as transformers does, without labels that are the default."""
        entries = asdict(self)
        del entries["num_labels"]  # id2label says it
        if entries["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}:
            del entries["id2label"], entries["label2id"]
        return {"model_type": "bert", **entries.pop("extra"), **entries}

    def with_changes(self, **changes: Any) -> BertConfig:
        """A copy with other entries; labels that are given replace all that there are.

        Raises:
            ValueError: as `from_dict`.
        """
        entries = self.to_dict()
        if any(self._differs(key, changes) for key in ("num_labels", "id2label", "label2id")):
            entries.pop("id2label", None)
            entries.pop("label2id", None)
        return self.from_dict({**entries, **changes})

    def _differs(self, key: str, changes: dict[str, Any]) -> bool:
        return key in changes and changes[key] != getattr(self, key)

    @classmethod
    def from_json_file(cls, path: str | Path) -> BertConfig:
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


def read_entries(path: str | Path) -> dict[str, Any]:
    """The entries of a config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, or not an object; the message starts with the path.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 and not JSON alike
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(entries).__name__}")
    return entries
