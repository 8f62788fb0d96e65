"""Which modules of transformers `bertkern.patch` knows, and their attention.

    attention that asks transformers' registry        attn_implementation="bertkern"
    attention of transformers 4                       patched_attention.py
    layers of the BERT family                         patched_bert_layers.py
    masked-LM loss in training                        patched_masked_lm.py

Which classes these are is not a list of names. Most of the family's layers are one text, copied
from model to model; a module is known if the method that is overridden is the same program as that
of BERT, RoBERTa, ELECTRA or DistilBERT, and its children are of the kinds that the program was
written for. What that program is depends on the version of transformers: it must use no argument
and no attribute that the class which overrides it does not know.
"""

import copy
import dis
import importlib
import inspect
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers import __version__ as version

from . import patched_attention as attention
from . import patched_bert_layers as layers
from . import patched_masked_lm as losses
from .patched_bert_layers import Part, cached, patched_class
from .transformers_versions import Config, has_registry, optional, takes_attention

# The name of the attention, as transformers.py registers it.
NAME = "bertkern"
# The key of a model's __dict__ under which the names of its configs' attentions are kept.
_OWN_ATTENTION = "_bertkern_own_attention"

# The method that is overridden, the class whose program it must be, and what overrides it, if it
# knows everything that the program uses in this version.
_KNOWN: tuple[tuple[str, str, type[Part]], ...] = (
    ("forward", "bert.BertSelfAttention", attention.SelfAttention),
    ("forward", "bert.BertSelfOutput", layers.ResidualNorm),
    ("forward", "bert.BertIntermediate", layers.LinearActivation),
    ("feed_forward_chunk", "bert.BertLayer", layers.FeedForwardLayer),
    ("forward", "bert.BertPredictionHeadTransform", layers.HeadTransform),
    ("forward", "roberta.RobertaLMHead", layers.RobertaHead),
    ("ff_chunk", "albert.AlbertLayer", layers.AlbertFeedForward),
    ("ff_chunk", "distilbert.FFN", layers.DistilFeedForward),
    ("forward", "distilbert.TransformerBlock", layers.DistilLayer),
    ("forward", "distilbert.TransformerBlock", layers.DistilTupleLayer),
    ("forward", "bert.BertEmbeddings", layers.BertEmbeddings),
    ("forward", "albert.AlbertEmbeddings", layers.BertEmbeddings),
    ("forward", "bert_generation.BertGenerationEmbeddings", layers.GenerationEmbeddings),
    ("forward", "roberta.RobertaEmbeddings", layers.RobertaEmbeddings),
    ("forward", "distilbert.Embeddings", layers.DistilEmbeddings),
    ("forward", "bert.BertForMaskedLM", losses.BertMaskedLM),
    ("forward", "bert.BertForPreTraining", losses.BertPreTraining),
    ("forward", "roberta.RobertaForMaskedLM", losses.RobertaMaskedLM),
    ("forward", "data2vec_text.Data2VecTextForMaskedLM", losses.RobertaMaskedLM),
    ("forward", "albert.AlbertForMaskedLM", losses.AlbertMaskedLM),
    ("forward", "modernbert.ModernBertForMaskedLM", losses.ModernMaskedLM),
    ("forward", "electra.ElectraForMaskedLM", losses.ElectraMaskedLM),
    ("forward", "distilbert.DistilBertForMaskedLM", losses.DistilMaskedLM),
)
# Names of the projections in modules that compute attention.
_PROJECTIONS = ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("Wqkv",)
_MODELS = "transformers.models."
# Instructions that read an attribute.
_READS = ("LOAD_ATTR", "LOAD_METHOD")
# Names by which a forward calls torch's attention: in layers of transformers 4, in ModernBERT's.
_TORCH_ATTENTION = ("scaled_dot_product_attention", "MODERNBERT_ATTENTION_FUNCTION")


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
    if kind is None or (kind is attention.RoutedAttention and not _projects(module)):
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
        if any(_attention_of(module, root) != NAME for module in (root, *names.values())):
            reason = _attention_obstacle(root)
            if reason is not None:
                left |= dict.fromkeys(names, reason)
                continue
            unpatch_attention(root)
            importlib.import_module(".transformers", __package__)  # registers the name
            configs = _own_configs(root)
            root.__dict__[_OWN_ATTENTION] = [(c, c._attn_implementation) for c in configs]
            root.set_attn_implementation(NAME)
            for config in configs:  # layers may hold another one than their model
                config._attn_implementation = NAME
        swapped += names
    return swapped, left


def unpatch_attention(model: nn.Module) -> None:
    """Give every config the name of the attention that it had, and a config that came later that of
    the first."""
    for root in model.modules():
        own = root.__dict__.pop(_OWN_ATTENTION, ())
        for config, name in own:
            config._attn_implementation = name
        for module in root.modules() if own else ():
            for config in module.__dict__.values():
                if isinstance(config, Config) and config._attn_implementation == NAME:
                    config._attn_implementation = own[0][1]


def _attention_of(module: nn.Module, root: PreTrainedModel) -> str | None:
    """The name of the attention in a module's config, or in its model's."""
    name: str | None = getattr(module, "config", root.config)._attn_implementation
    return name


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
    if not has_registry():
        return f"transformers {version} takes no other attention functions"
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            if not (module._supports_attention_backend and takes_attention(type(module))):
                return f"{type(module).__name__} does not take other attention functions"
            if module.config.output_attentions:
                return "its config asks for attention weights (output_attentions)"
    return None


def _own_configs(root: PreTrainedModel) -> list[Any]:
    """Give a model configs of its own, which no other model shares; the outer ones come first."""
    copies: dict[int, Any] = {}
    configs: list[Any] = []
    for module in root.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, Config):
                module.__dict__[name] = own = copy.deepcopy(value, copies)
                if all(own is not config for config in configs):
                    configs.append(own)
    return configs


def _kind(own: type) -> type[Part] | None:
    """Which of the classes above a class of transformers is the program of."""
    if issubclass(own, Part):
        return None
    for method, known, part in _known():
        program = _program(own, method)
        if program is not None and program == _program(known, method):
            return part
    return attention.RoutedAttention if _calls_torch(own) else None


@cached
def _known() -> list[tuple[str, type, type[Part]]]:
    """_KNOWN, as far as this version has the classes and its programs are the known ones."""
    rows = []
    for method, name, part in _KNOWN:
        file, _, name = name.rpartition(".")
        folder = file.removesuffix("_text")
        known = optional(f"models.{folder}.modeling_{file}", name)
        if known is not None and _names(known, method) <= part.knows(method):
            rows.append((method, known, part))
    return rows


def _names(own: type, method: str) -> set[str]:
    """The arguments of a method, and the attributes that it reads of its module."""
    function: Any = inspect.unwrap(getattr(own, method))
    names = {*list(inspect.signature(function).parameters)[1:]}
    program = _program(own, method) or ()
    for (load, given), (read, name) in pairwise(program):
        if load.startswith("LOAD_FAST") and read in _READS:
            last = given if isinstance(given, str) else given[-1]  # of two at once
            names |= {name} if last == "self" else set()
    return names


def _calls_torch(own: type) -> bool:
    """Whether a class computes attention by torch's scaled_dot_product_attention."""
    names = {name for _, name in _program(own, "forward") or () if isinstance(name, str)}
    return issubclass(own, nn.Module) and not names.isdisjoint(_TORCH_ATTENTION)


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
def _instructions(
    function: Callable[..., Any], encoder: str | None, deep: bool = True
) -> tuple[tuple[str, Any], ...]:
    """A function's instructions. Globals are what they refer to, a model's own functions are their
    instructions, and the attribute that holds a model's encoder counts as one name."""
    program = []
    for instruction in dis.get_instructions(function):
        value = instruction.argval
        if instruction.opname == "LOAD_GLOBAL":
            program.append((instruction.opname, value))
            value = function.__globals__.get(value)
            if deep and inspect.isfunction(value) and value.__module__.startswith(_MODELS):
                value = _instructions(value, None, deep=False)
        elif encoder and value == encoder:
            value = "base_model"
        program.append((instruction.opname, value))
    return tuple(program)


def _is_of_transformers(wrapper: Any) -> bool:
    """Whether a wrapper around a method is one of transformers' own decorators."""
    name: str = getattr(wrapper, "__globals__", {}).get("__name__", "")
    return name.partition(".")[0] == "transformers"


def _projects(module: nn.Module) -> bool:
    """Whether a module's children are those of an attention of the family."""
    children = dict(module.named_children()).keys()
    return any(children >= set(names) for names in _PROJECTIONS)


def _unknown(module: nn.Module) -> str | None:
    """Why a module that looks like one of the family is left, or None where it does not."""
    children = dict(module.named_children()).keys()
    name = type(module).__name__
    if _projects(module):
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
