"""Sentence vectors by transformers, which `bertkern.models.SentenceEncoder` is compared with.

B sentences, S tokens of the longest of a batch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bertkern.data import load_tokenizer

Encode = Callable[[list[str]], NDArray[np.float32]]


def transformers_encoder(
    folder: Path, device: torch.device, attention: str, max_length: int, batch_size: int
) -> Encode:
    """transformers' BertModel with an attn_implementation, mean pooling and normalisation.

    Args:
        folder: a model folder with a tokenizer.json.
        device: where the model is put, in float32.
        attention: "sdpa", "eager", "bertkern" or another name that transformers knows.
        max_length: tokens after which a text is cut.
        batch_size: texts computed together, padded to the longest of them; longest first.

    Returns:
        Texts -> their vectors, float32 [n, hidden], of length 1.
    """
    import transformers

    if attention == "bertkern":
        import bertkern.integrations.transformers  # noqa: F401  (registers the name)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation=attention)
    model = model.to(device=device, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(max_length)

    def batches(lengths: list[int]) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    @torch.inference_mode()
    def encode(texts: list[str]) -> NDArray[np.float32]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        vectors = torch.empty(len(texts), model.config.hidden_size, device=device)
        for batch in batches([len(i) for i in ids]):
            rows = [torch.tensor(ids[i]) for i in batch]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # [B, S]
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
            hidden = model(tokens, attention_mask=mask.long()).last_hidden_state
            pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
            vectors[torch.tensor(batch, device=device)] = pooled
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()

    return encode
