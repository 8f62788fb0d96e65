"""Documents whose words tell where they come from."""

import numpy as np


def numbered_documents(documents=60, sentences=60):
    """Sentence s of document d is "d<d> s<s>", some times over."""
    rng = np.random.default_rng(0)
    return [
        [" ".join([f"d{d}", f"s{s}"] * int(rng.integers(1, 12))) for s in range(sentences)]
        for d in range(documents)
    ]
