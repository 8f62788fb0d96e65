"""`patch` and `attn_implementation="bertkern"` in other versions of transformers.

    python tests/integrations/transformers_versions.py              every version
    python tests/integrations/transformers_versions.py 4.57.6       those that are named
    python tests/integrations/transformers_versions.py --check      the version on the path, as JSON

Each version stands alone in build/transformers/<version>, before the installed one on the path of a
process of its own; what is not there is installed there by pip. The models are small and their
weights random. A patched model must give what it gave before it was patched, and a model with
attn_implementation="bertkern" what it gives with "eager": logits of tokens that are no padding, and
in training the loss and all gradients. Prints a table, and exits with 1 where something differs.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "transformers"
VERSIONS = {  # and what each needs that the installed one does not bring
    "4.40.2": ("huggingface_hub==0.25.2", "tokenizers==0.19.1", "requests"),
    "4.48.3": ("huggingface_hub==0.36.0", "tokenizers==0.21.4", "requests"),
    "4.57.6": ("huggingface_hub==0.36.0", "tokenizers==0.22.2", "requests"),
    "5.0.0": ("huggingface_hub==1.3.0", "tokenizers==0.22.2", "httpx"),
    "5.10.0": ("huggingface_hub==1.33.0", "tokenizers==0.22.2", "httpx"),
    "5.23.0": ("httpx",),
}
# Families whose attention a version computes in a way that is left as it is.
LEFT = {
    "4.40.2": ("Albert", "DistilBert", "MobileBert"),
    "4.48.3": ("MobileBert",),
    "4.57.6": ("MobileBert",),
}

BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}
DISTIL = {
    "vocab_size": 99,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "pad_token_id": 1,
}
MOBILE = BERT | {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 1}
MODERN = BERT | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
FAMILIES = {
    "Bert": BERT,
    "Roberta": BERT,
    "XLMRoberta": BERT,
    "Camembert": BERT,
    "Electra": BERT | {"embedding_size": 16},
    "DistilBert": DISTIL,
    "Albert": BERT | {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    "MobileBert": MOBILE,
    "Data2VecText": BERT,
    "ModernBert": MODERN | {"local_attention": 6, "reference_compile": False},
    "MPNet": BERT,
}
MASKS = {
    "none": None,
    "right padded": [[1] * 12, [1] * 5 + [0] * 7, [1] + [0] * 11],
    "left padded": [[1] * 12, [0] * 7 + [1] * 5, [0] * 3 + [1] * 9],
}
HEADS = ("ForMaskedLM", "ForSequenceClassification")
TOLERANCES = {"atol": 1e-5, "rtol": 1e-4}


def model(name, family, **options):
    """A model in evaluation, or None where this version has none; the weights depend on nothing."""
    import transformers

    implementation = options.pop("attn_implementation", None)
    if not hasattr(transformers, name):
        return None
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | options)
    if implementation is not None:
        config._attn_implementation = implementation
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def inputs(mask):
    """Ids [3, 12] and a mask of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (3, 12), generator=generator)
    if MASKS[mask] is None:
        return {"input_ids": ids}
    padding = torch.tensor(MASKS[mask])
    return {"input_ids": ids.masked_fill(padding == 0, 1), "attention_mask": padding}


def outputs(model, name, given):
    """What is compared: logits of real tokens, in training the loss, and every gradient."""
    real = given.get("attention_mask", torch.ones(3, 12)).bool()
    labels = given["input_ids"].masked_fill(~real | (given["input_ids"] % 3 > 0), -100)
    if name.endswith("Classification"):
        real, labels = slice(None), torch.tensor([0, 1, 1])
    with torch.no_grad():
        results = {"logits": model.eval()(**given).logits[real]}
    model.train().zero_grad()
    results["loss"] = model(**given, labels=labels).loss
    results["loss"].backward()
    model.eval()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**{n: t.detach().clone() for n, t in results.items()}, **grads}


def differences(found, wanted):
    """Names of tensors that differ, with by how much."""
    faults = [f"{name}: on one side only" for name in found.keys() ^ wanted.keys()]
    for name in found.keys() & wanted.keys():
        if not torch.allclose(found[name], wanted[name], **TOLERANCES):
            error = (found[name] - wanted[name]).abs().max()
            faults.append(f"{name} differs by {float(error):.1e}")
    return sorted(faults)


def check_patch(name, family, **options):
    """A model patched, against itself; and unpatched again."""
    import transformers

    import bertkern

    plain = model(name, family, **options)
    if plain is None:
        return None
    patched = copy.deepcopy(plain)
    report = bertkern.patch(patched)
    faults = []
    for mask in MASKS:
        given = inputs(mask)
        found = outputs(patched, name, given)
        # The gradients of torch's fused attention are wrong where an added mask of the least
        # float hides every key of a query.
        with sdpa_kernel(SDPBackend.MATH):
            wanted = outputs(plain, name, given)
        faults += [f"{mask}: {f}" for f in differences(found, wanted)]
    bertkern.unpatch(patched)
    same = torch.equal(patched(**given).logits, plain(**given).logits)
    faults += [] if same else ["unpatch does not restore"]
    left_alone = ("MPNet", *LEFT.get(transformers.__version__, ()))
    if (family not in left_alone) != ("attention" in report.swapped) and not options:
        faults.append(f"attention: {report}")
    return {"parts": sorted(report.swapped), "left": report.left, "faults": faults}


def check_attention(name, family):
    """attn_implementation="bertkern" against "eager". A model whose attention is its own may refuse
    the name instead."""
    from bertkern.integrations.transformers_versions import takes_attention

    eager = model(name, family, attn_implementation="eager")
    if eager is None:
        return None
    ours = model(name, family, attn_implementation="bertkern")
    faults = []
    for mask in MASKS:
        given = inputs(mask)
        wanted = outputs(eager, name, given)
        try:
            faults += [f"{mask}: {f}" for f in differences(outputs(ours, name, given), wanted)]
        except (NotImplementedError, KeyError) as error:  # KeyError 'bertkern': ModernBERT's of 5.0
            if takes_attention(type(ours)) or "bertkern" not in str(error):
                raise
            return {"parts": [f"refused: {error}"], "faults": []}
    own = " of its own" if not takes_attention(type(ours)) else ""
    return {"parts": [f"attention{own}"], "faults": faults}


def check_weights_asked_for():
    """output_attentions=True where the class's own forward can still be called: before 5."""
    import bertkern

    plain = model("BertModel", "Bert")
    patched = copy.deepcopy(plain)
    bertkern.patch(patched)
    given = inputs("right padded") | {"output_attentions": True}
    found, wanted = (
        {str(i): a for i, a in enumerate(m(**given).attentions)} for m in (patched, plain)
    )
    return {"parts": ["weights"], "faults": differences(found, wanted)}


def check_decoder():
    """Causal attention with a cache, and attention to another model's output."""
    import bertkern

    decoder = {"is_decoder": True, "add_cross_attention": True}
    plain = model("BertLMHeadModel", "Bert", **decoder)
    patched = copy.deepcopy(plain)
    bertkern.patch(patched)
    ids = inputs("none")["input_ids"]
    memory = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    found, wanted = {}, {}
    for results, m in ((found, patched), (wanted, plain)):
        start = m(ids[:, :7], encoder_hidden_states=memory, use_cache=True)
        more = {"past_key_values": start.past_key_values, "encoder_hidden_states": memory}
        results.update(start=start.logits, end=m(ids[:, 7:], **more).logits)
        results["whole"] = m(ids, encoder_hidden_states=memory).logits
    return {"parts": ["decoder"], "faults": differences(found, wanted)}


def check():
    """All cases with the version on the path, one JSON object a line; whether all is well."""
    import transformers

    transformers.logging.set_verbosity_error()
    newer = int(transformers.__version__.partition(".")[0]) >= 5
    cases = {}
    for family in FAMILIES:
        for head in HEADS:
            name = family + head
            cases[f"patch {name}"] = lambda n=name, f=family: check_patch(n, f)
        if newer:
            name = f"{family}ForMaskedLM"
            cases[f"attention {name}"] = lambda n=name, f=family: check_attention(n, f)
    for kind in () if newer else ("relative_key", "relative_key_query"):
        for family in ("Bert", "Electra", "Albert"):
            cases[f"patch {family}, {kind}"] = lambda f=family, k=kind: check_patch(
                f"{f}ForMaskedLM", f, position_embedding_type=k
            )
    cases["patch Bert, eager"] = lambda: check_patch(
        "BertForMaskedLM", "Bert", attn_implementation="eager"
    )
    cases["patch a decoder"] = check_decoder
    if not newer:
        cases["patch Bert, weights asked for"] = check_weights_asked_for
    results = [(name, case()) for name, case in cases.items()]
    for name, result in results:
        print(json.dumps({"case": name, **(result or {"parts": ["none here"], "faults": []})}))
    return not any(result and result["faults"] for _, result in results)


def folder(version):
    """Where a version is, or would be."""
    return BUILD / version


def install(version):
    """A folder with this version and what it needs, to stand before the installed one."""
    if (folder(version) / "transformers").is_dir():
        return
    print(f"installing transformers {version} in {folder(version).relative_to(ROOT)}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    *alone, client = VERSIONS[version]
    # transformers comes last: a folder that has it has all.
    for packages in ([client], ["--no-deps", f"transformers=={version}", *alone]):
        subprocess.run([*pip, "--target", folder(version), *packages], check=True)


def run(version=None):
    """The results of `check` in a process of its own; of the installed version if none is named."""
    paths = [*([str(folder(version))] if version else []), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "ignore", __file__, "--check"]
    process = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"transformers {version}: {process.stderr[-2000:]}")
    return lines


def main():
    """Checks what is asked for; exit code 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", choices=[*VERSIONS, []])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        sys.exit(not check())
    failed = False
    for version in given.versions or VERSIONS:
        install(version)
        print(f"== transformers {version}")
        for result in run(version):
            failed |= bool(result["faults"])
            print(f"{result['case']:42} {'; '.join(result['faults'] or result['parts'])}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
