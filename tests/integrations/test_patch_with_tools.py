"""Patched models of transformers in the hands of other tools: tracers, savers, quantizers, hooks of
the whole process, wrappers, and models that change after they were patched."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from bertkern.integrations.patching import patch, unpatch  # noqa: E402

OPTIONS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
# As many rows as tokens, so that a mask of tokens can be taken for one of scores.
IDS = torch.randint(3, 99, (12, 12), generator=torch.Generator().manual_seed(1))
FULL = torch.ones_like(IDS)
RIGHT, LEFT = FULL.clone(), FULL.clone()
RIGHT[1, 7:] = 0
LEFT[3, :4] = 0
MASKS = {"full": FULL, "right padded": RIGHT, "left padded": LEFT}


def make(name="BertModel", **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**OPTIONS | options)
    return getattr(transformers, name)(config).eval()


def pair(**options):
    plain, patched = make(**options), make(**options)
    patch(patched)
    return plain, patched


def agree(ours, theirs, mask):
    """The last hidden states of tokens that count."""
    with torch.no_grad():
        ours, theirs = (model(IDS, attention_mask=mask)[0] for model in (ours, theirs))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("example", MASKS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_traced_model_takes_every_mask(example, grad):
    """The form in which padding is passed is chosen by looking at it: not while jit traces."""
    plain, patched = pair(return_dict=False)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(patched, (IDS, MASKS[example]), strict=False)
    for mask in MASKS.values():
        with torch.no_grad():
            out = traced(IDS, mask)[0]
            expected = plain(IDS, mask)[0]
        torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_a_graph_of_make_fx_takes_every_mask():
    plain, patched = pair()
    with torch.no_grad():
        graph = make_fx(lambda mask: patched(IDS, attention_mask=mask)[0])(FULL)
        for mask in MASKS.values():
            expected = plain(IDS, attention_mask=mask)[0]
            torch.testing.assert_close(
                graph(mask)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_tensors_without_values_pass(mode):
    _, patched = pair()
    with torch.no_grad():
        graph = make_fx(
            lambda mask: patched(IDS, attention_mask=mask)[0],
            tracing_mode=mode,
            _allow_non_fake_inputs=True,  # the weights
        )(RIGHT)
    assert any("attention_fwd" in str(node.target) for node in graph.graph.nodes)


def test_a_traced_linear_is_the_same_with_and_without_gradients():
    layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    patch(layer)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected, atol=1e-5, rtol=1e-5)


def _outputs_of_a_saved_model(path, queue):
    model = torch.load(path, weights_only=False)
    with torch.no_grad():
        queue.put(model(IDS, attention_mask=RIGHT)[0].numpy())


def test_a_whole_saved_model_runs_in_another_process(tmp_path):
    _, patched = pair()
    torch.save(patched, tmp_path / "model.pt")
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_outputs_of_a_saved_model, args=(tmp_path / "model.pt", queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    with torch.no_grad():
        expected = patched(IDS, attention_mask=RIGHT)[0]
    torch.testing.assert_close(torch.from_numpy(queue.get()), expected)


def test_a_forward_that_a_wrapper_keeps_survives_unpatch():
    """As Accelerate's mixed precision does: it holds the bound method of the patched class."""
    plain, patched = make("BertForMaskedLM"), make("BertForMaskedLM")
    patch(patched)
    patched.forward = patched.forward
    unpatch(patched)
    with torch.no_grad():
        ours, theirs = (m(IDS, attention_mask=RIGHT).logits for m in (patched, plain))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def names_of_attention(model):
    return {
        model.config._attn_implementation,
        *(layer.attention.self.config._attn_implementation for layer in model.encoder.layer),
    }


@pytest.mark.parametrize("mask", MASKS)
def test_layers_with_another_config_than_their_model(mask):
    plain, patched = make(), make()
    own = names_of_attention(patched)
    patched.config = copy.deepcopy(patched.config)
    patch(patched)
    assert names_of_attention(patched) == {"bertkern"}
    agree(patched, plain, MASKS[mask])
    unpatch(patched)
    assert names_of_attention(patched) == own
    agree(patched, plain, MASKS[mask])


def test_an_encoder_of_an_encoder_decoder():
    """transformers gives such an encoder another config after its layers have theirs."""
    decoder = make("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    plain = transformers.EncoderDecoderModel(encoder=make(), decoder=decoder).eval()
    both = copy.deepcopy(plain)
    patch(both.encoder)
    agree(both.encoder, plain.encoder, LEFT)
    given = {"attention_mask": RIGHT, "decoder_input_ids": IDS}
    with torch.no_grad():
        torch.testing.assert_close(
            both(IDS, **given).logits, plain(IDS, **given).logits, atol=1e-5, rtol=1e-5
        )


def test_a_config_that_came_after_the_patch_is_unpatched():
    plain, patched = pair()
    own = names_of_attention(plain)
    patched.config = copy.deepcopy(patched.config)
    agree(patched, plain, RIGHT)
    unpatch(patched)
    assert names_of_attention(patched) == own
    agree(patched, plain, RIGHT)


def test_a_layer_that_came_after_the_patch_is_patched_by_another():
    plain, patched = make(), make()
    config = patched.config
    patch(patched)
    torch.manual_seed(2)
    layer = type(plain.encoder.layer[0])(config).eval()
    plain.encoder.layer.append(copy.deepcopy(layer))
    patched.encoder.layer.append(layer)
    assert "encoder.layer.2.attention.self" in patch(patched).swapped["attention"]
    agree(patched, plain, LEFT)
    unpatch(patched)
    agree(patched, plain, LEFT)


class Halved(torch.Tensor):
    """A weight that computes in its own way, as torchao's quantized ones do: here, with half of
    what it holds."""

    def __tensor_flatten__(self):
        return [], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.as_subclass(torch.Tensor) * 0.5, bias)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("first", ["patched", "quantized"])
@pytest.mark.parametrize("kind", ["transformers", "torch"])
def test_weights_that_compute_in_their_own_way(first, kind):
    def model():
        if kind == "transformers":
            return make()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    def quantize(model):
        for module in model.modules():
            if type(module) is nn.Linear:
                weight = module.weight.detach().as_subclass(Halved)
                module.weight = nn.Parameter(weight, requires_grad=False)

    plain, ours = model(), model()
    quantize(plain)
    for step in (patch, quantize) if first == "patched" else (quantize, patch):
        step(ours)
    with torch.no_grad():
        x = torch.randn(2, 5, 32)
        given = {"inputs_embeds": x} if kind == "transformers" else {"src": x}
        results = [m(**given) for m in (ours, plain)]
    results = [r[0] if kind == "transformers" else r for r in results]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_hooks_of_the_whole_process_see_every_module():
    plain, patched = pair()
    calls = []
    for model in (plain, patched):
        names = {module: name for name, module in model.named_modules()}
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, names=names, seen=seen: seen.append(names[module])
        )
        with torch.no_grad():
            model(IDS, attention_mask=RIGHT)
        handle.remove()
        calls.append(sorted(seen))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("first", ["patched", "scripted"])
def test_an_activation_that_is_a_script(first):
    """A ScriptModule keeps its parameters in a dictionary of its own kind."""
    plain, ours = make(), make()
    steps = [patch, lambda model: script(model)]

    def script(model):
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn = torch.jit.script(nn.GELU())

    script(plain)
    for step in steps if first == "patched" else reversed(steps):
        step(ours)
    agree(ours, plain, RIGHT)


def test_weights_that_fsdp_shards_are_plain_in_the_forward(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        plain, ours = make(), make()
        mesh = init_device_mesh("cpu", (1,))
        for layer in ours.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        assert "encoder.layer.0.output" in patch(ours).swapped["dropout + residual + LayerNorm"]
        agree(ours, plain, RIGHT)
    finally:
        torch.distributed.destroy_process_group()
