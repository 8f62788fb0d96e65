"""BLEU (Papineni et al. 2002) and chrF (Popović 2015) of translations, as sacreBLEU counts them.

sacreBLEU (Post 2018) cuts words and counts by one standard, so that figures can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 1000


def check_sacrebleu() -> None:
    """Be sure before a long run that its translations can be scored.

    Raises:
        ModuleNotFoundError: sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"BLEU and chrF need the package sacrebleu ({error}): pip install 'bertkern[train]'"
        ) from error


def translation_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{"bleu": 0..100, "chrf": 0..100} of a corpus of translations with one reference each."""
    import sacrebleu

    return {
        "bleu": sacrebleu.corpus_bleu(list(translations), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(translations), [list(references)]).score,
    }


def bleu_interval(
    translations: Sequence[str], references: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of BLEU by resampling the corpus (Koehn 2004).

    The counts of a corpus are sums over its sentences: those of each are counted once.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    sentences = [
        bleu.sentence_score(translation, [reference])
        for translation, reference in zip(translations, references, strict=True)
    ]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in sentences])
    generator = np.random.default_rng(seed)
    scores = []
    for _ in range(_RESAMPLES):
        total = counts[generator.integers(len(counts), size=len(counts))].sum(0).tolist()
        order = (len(total) - 2) // 2
        score = BLEU.compute_bleu(
            total[:order], total[order:-2], total[-2], total[-1], smooth_method="exp"
        )
        scores.append(score.score)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)
