"""The most probable words at the [MASK]s of a text: softmax of the masked-LM logits there."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from bertkern.data.tokenizer import SpecialIds

from .bert import BertForPreTraining


@torch.inference_mode()
def fill_mask(
    model: BertForPreTraining, tokenizer: Tokenizer, text: str, top_k: int = 5
) -> list[list[tuple[str, float]]]:
    """For each [MASK] of the text, the top_k tokens with their probabilities, best first.

    Raises:
        ValueError: the text has no [MASK], or more tokens than the model has positions.
    """
    was_training = model.training
    model.eval()
    device = model.bert.embeddings.word.weight.device
    ids = torch.tensor(tokenizer.encode(text).ids, device=device)
    masks = (ids == SpecialIds.of(tokenizer).mask).nonzero()[:, 0]
    if not len(masks):
        raise ValueError(f"no [MASK] in {text!r}")
    encoded = model.bert(ids[None]).last_hidden_state[0]
    best = model.predict(encoded[masks]).float().softmax(1).topk(top_k, dim=1)
    model.train(was_training)
    return [
        [(tokenizer.id_to_token(i) or "", p) for i, p in zip(row_ids, row_p, strict=True)]
        for row_ids, row_p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
