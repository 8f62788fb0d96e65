"""Which modules of transformers `bertkern.patch` knows, and their attention.

    attention that asks transformers' registry        attn_implementation="bertkern"
    layers of the BERT family                         patched_bert_layers.py
    masked-LM loss in training                        patched_masked_lm.py

Which classes these are is not a list of names. Most of the family's layers are one text, copied
from model to model; a module is known if the method that is overridden is the same program as that
of BERT, RoBERTa, ELECTRA or DistilBERT, and its children are of the kinds that the program was
written for.
"""

import copy
import dis
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.albert import modeling_albert as albert
from transformers.models.bert import modeling_bert as bert
from transformers.models.bert_generation import modeling_bert_generation as bert_generation
from transformers.models.data2vec import modeling_data2vec_text as data2vec_text
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.electra import modeling_electra as electra
from transformers.models.modernbert import modeling_modernbert as modernbert
from transformers.models.roberta import modeling_roberta as roberta

from . import patched_bert_layers as layers
from . import patched_masked_lm as losses
from .patched_bert_layers import Part, cached, patched_class
from .transformers import NAME

# The key of a model's __dict__ under which the names of its configs' attentions are kept.
_OWN_ATTENTION = "_bertkern_own_attention"

# The method that is overridden, the class whose program it must be, and what overrides it.
_KNOWN: tuple[tuple[str, type[nn.Module], type[Part]], ...] = (
    ("forward", bert.BertSelfOutput, layers.ResidualNorm),
    ("forward", bert.BertIntermediate, layers.LinearActivation),
    ("feed_forward_chunk", bert.BertLayer, layers.FeedForwardLayer),
    ("forward", bert.BertPredictionHeadTransform, layers.HeadTransform),
    ("forward", roberta.RobertaLMHead, layers.RobertaHead),
    ("ff_chunk", albert.AlbertLayer, layers.AlbertFeedForward),
    ("ff_chunk", distilbert.FFN, layers.DistilFeedForward),
    ("forward", distilbert.TransformerBlock, layers.DistilLayer),
    ("forward", bert.BertEmbeddings, layers.BertEmbeddings),
    ("forward", albert.AlbertEmbeddings, layers.BertEmbeddings),
    ("forward", bert_generation.BertGenerationEmbeddings, layers.GenerationEmbeddings),
    ("forward", roberta.RobertaEmbeddings, layers.RobertaEmbeddings),
    ("forward", distilbert.Embeddings, layers.DistilEmbeddings),
    ("forward", bert.BertForMaskedLM, losses.BertMaskedLM),
    ("forward", bert.BertForPreTraining, losses.BertPreTraining),
    ("forward", roberta.RobertaForMaskedLM, losses.RobertaMaskedLM),
    ("forward", data2vec_text.Data2VecTextForMaskedLM, losses.RobertaMaskedLM),
    ("forward", albert.AlbertForMaskedLM, losses.AlbertMaskedLM),
    ("forward", modernbert.ModernBertForMaskedLM, losses.ModernMaskedLM),
    ("forward", electra.ElectraForMaskedLM, losses.ElectraMaskedLM),
    ("forward", distilbert.DistilBertForMaskedLM, losses.DistilMaskedLM),
)


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """What `bertkern.patch` does with a module of transformers.

    Args:
        module: a module of the model, not patched itself.
        model: the model that is patched.

    Returns:
        The class that takes the module's place; or why the module stays as it is; or None, where
        it is none of the kinds above.
    """
    kind = _kind(type(module))
    if kind is None:
        return _unknown(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"

    def class_of(child: Any) -> type:
        if isinstance(child, nn.Module) and not isinstance(child, Part):
            answer = replacement(child, model) if _kind(type(child)) else None
            return answer if isinstance(answer, type) else type(child)
        return type(child)

    return kind.obstacle_in(module, class_of) or patched_class(type(module), kind)


def patch_attention(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Let every model of transformers inside, or the model itself, use attention "bertkern".

    Returns:
        The names of the attention modules that do now, and of those that do not -> why.
    """
    swapped: list[str] = []
    left: dict[str, str] = {}
    for prefix, root in _outermost_models(model):
        names = {
            f"{prefix}.{name}" if prefix else name: module
            for name, module in root.named_modules()
            if _asks_registry(type(module))
        }
        if not names:
            continue
        if root.config._attn_implementation != NAME:
            reason = _attention_obstacle(root)
            if reason is not None:
                left |= dict.fromkeys(names, reason)
                continue
            unpatch_attention(root)
            configs = _own_configs(root)
            root.__dict__[_OWN_ATTENTION] = [(c, c._attn_implementation) for c in configs]
            root.set_attn_implementation(NAME)
        swapped += names
    return swapped, left


def unpatch_attention(model: nn.Module) -> None:
    """Give every config the name of the attention that it had."""
    for module in model.modules():
        for config, name in module.__dict__.pop(_OWN_ATTENTION, ()):
            config._attn_implementation = name


def _outermost_models(model: nn.Module) -> Iterable[tuple[str, PreTrainedModel]]:
    """The models of transformers that are not part of another one, with their names."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            yield name, module


def _asks_registry(kind: type) -> bool:
    """Whether a class computes attention by the function that its config names."""
    return "ALL_ATTENTION_FUNCTIONS" in (name for _, name in _program(kind, "forward") or ())


def _attention_obstacle(root: PreTrainedModel) -> str | None:
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            if not (module._supports_attention_backend and module._can_set_attn_implementation()):
                return f"{type(module).__name__} does not take other attention functions"
            if module.config.output_attentions:
                return "its config asks for attention weights (output_attentions)"
    return None


def _own_configs(root: PreTrainedModel) -> list[PreTrainedConfig]:
    """Give a model configs of its own, which no other model shares; the outer ones come first."""
    copies: dict[int, Any] = {}
    configs: list[PreTrainedConfig] = []
    for module in root.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, PreTrainedConfig):
                module.__dict__[name] = own = copy.deepcopy(value, copies)
                if all(own is not config for config in configs):
                    configs.append(own)
    return configs


def _kind(own: type) -> type[Part] | None:
    """Which of the classes above a class of transformers is the program of."""
    if issubclass(own, Part):
        return None
    for method, known, part in _KNOWN:
        program = _program(own, method)
        if program is not None and program == _program(known, method):
            return part
    return None


def _program(own: type, method: str) -> tuple[tuple[str, Any], ...] | None:
    """What a method of a class does, without the names of the module that it is written in; None
    where it is not a method written in Python."""
    function: Any = getattr(own, method, None)
    while hasattr(function, "__wrapped__") and _is_of_transformers(function):
        function = function.__wrapped__
    if not inspect.isfunction(function):
        return None
    return _instructions(function, getattr(own, "base_model_prefix", None))


@cached
def _instructions(function: Callable[..., Any], encoder: str | None) -> tuple[tuple[str, Any], ...]:
    """A function's instructions. Globals are what they refer to, and the attribute that holds a
    model's encoder counts as one name."""
    program = []
    for instruction in dis.get_instructions(function):
        value = instruction.argval
        if instruction.opname == "LOAD_GLOBAL":
            program.append((instruction.opname, value))
            value = function.__globals__.get(value)
        elif encoder and value == encoder:
            value = "base_model"
        program.append((instruction.opname, value))
    return tuple(program)


def _is_of_transformers(wrapper: Any) -> bool:
    """Whether a wrapper around a method is one of transformers' own decorators."""
    name: str = getattr(wrapper, "__globals__", {}).get("__name__", "")
    return name.partition(".")[0] == "transformers"


def _unknown(module: nn.Module) -> str | None:
    """Why a module that looks like one of the family is left, or None where it does not."""
    children = dict(module.named_children()).keys()
    name = type(module).__name__
    if children >= {"query", "key", "value"}:
        asks = _asks_registry(type(module))
        return None if asks else f"{name} computes its attention without transformers' registry"
    looks = (
        children >= {"dense", "dropout", "LayerNorm"}
        or children >= {"intermediate", "output"}
        or name.endswith(("Embeddings", "FFN", "ForMaskedLM", "MLP"))
    )
    if not looks:
        return None
    return f"the forward of {name} is not that of BERT, RoBERTa or another that is known"
