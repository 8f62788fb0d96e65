"""Trains a small Transformer on the German messages of this system's programs and scores it.

    python -m bertkern.benchmarks.tasks.translation [--steps N] [--folder FOLDER]
        [--results FOLDER] [--picture FILE] [--document FILE] [--seed N]

The data are `messages`: a test message, and any nearly like it, is in training neither in English
nor in German. The model begins with random weights and is trained by `train_translation` as in the
paper; nothing is chosen by the test messages. Scored are its translations (beam search, 4
hypotheses, length penalty 0.6; and greedy) against copying the source, which reaches something
where messages hold format codes, options and names. Beside them stands a translation memory: the
German of the training message whose English is most like the source, much of what there is to
know where programs say the same in few words. Written are results, learning curves and a page with
examples. Exit code 1 where the BLEU interval of the beam search does not lie above that of copying.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bertkern.data.files import write_text
from bertkern.data.parallel_text import Pair
from bertkern.data.translation import TranslationData
from bertkern.models.transformer_config import TransformerConfig
from bertkern.models.translate import Translate
from bertkern.train.curves import draw_curves
from bertkern.train.history import History, StepRecord
from bertkern.train.translation import TranslationSettings, train_translation
from bertkern.train.translation_scores import bleu_interval, translation_scores

from ..machine import ROOT, file_name, progress, provenance
from ..row import RESULTS
from .messages import FOLDER, MOST_CHARACTERS, Messages, build, read

PICTURE = ROOT / "docs" / "translation.png"
DOCUMENT = ROOT / "docs" / "translation.md"
STEPS = 5500
VOCABULARY = 4000
CONFIG = TransformerConfig(
    hidden_size=128, num_layers=2, num_attention_heads=4, intermediate_size=512
)
BEAM, GREEDY, COPY, MEMORY = "beam search", "greedy", "copy", "translation memory"
_EXAMPLES = 12
_TOKENS_PER_BATCH = 1024
_PEAK, _WARMUP = 2e-3, 0.1  # of the learning rate; part of the steps in which it rises
_REPORT = 100  # steps between lines on stderr


@dataclass
class Scores:
    """BLEU, its 95 % interval by resampling the messages (Koehn 2004), and chrF."""

    bleu: float
    low: float
    high: float
    chrf: float

    @classmethod
    def of(cls, translations: Sequence[str], pairs: Sequence[Pair]) -> Scores:
        """Of translations of these pairs' sources."""
        references = [pair.target for pair in pairs]
        figures = translation_scores(translations, references)
        return cls(figures["bleu"], *bleu_interval(translations, references), figures["chrf"])

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.1f} ({self.low:.1f} to {self.high:.1f}), chrF {self.chrf:.1f}"


def settings_of(steps: int, seed: int) -> TranslationSettings:
    """How it is trained: with the paper's optimizer and schedule, in fewer and smaller steps."""
    return TranslationSettings(
        steps=steps,
        learning_rate=_PEAK,
        warmup_steps=max(1, round(_WARMUP * steps)),
        tokens_per_batch=_TOKENS_PER_BATCH,
        evaluate_every=max(1, steps // 8),
        checkpoint_every=max(1, steps // 40),
        average=5,
        max_length=MOST_CHARACTERS,
        seed=seed,
    )


def nearest(train: Sequence[Pair], sources: Sequence[str]) -> list[str]:
    """For each source the target of the training pair whose source is most like it.

    Likeness is the cosine of counts of 2 to 4 characters, weighted by their rarity (tf-idf).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    known = vectorizer.fit_transform([pair.source for pair in train])
    likeness = vectorizer.transform(sources) @ known.T
    return [train[int(row.toarray().argmax())].target for row in likeness]


def run(messages: Messages, config: TransformerConfig, steps: int, seed: int) -> dict[str, Any]:
    """Train, translate the test messages, and score.

    Returns:
        What the result file holds, without provenance; `history` as History.to_dict.
    """
    settings = settings_of(steps, seed)
    losses: list[float] = []

    def report(record: StepRecord) -> None:
        losses.append(record.loss)
        if record.step % _REPORT == 0:
            recent = losses[-_REPORT:]
            progress(f"step {record.step:,}: loss {sum(recent) / len(recent):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = train_translation(
            messages.train,
            messages.dev,
            folder,
            config=config,
            vocab_size=VOCABULARY,
            settings=settings,
            progress=False,
            on_step=report,
        )
        seconds = time.perf_counter() - started
        sources = [pair.source for pair in messages.test]
        translate = Translate.from_pretrained(folder)  # what a user would read
        progress("translating the test messages")
        started = time.perf_counter()
        translations = {BEAM: [t.text for t in translate(sources)]}
        beam_seconds = time.perf_counter() - started
        translations[GREEDY] = [t.text for t in translate(sources, beam_size=1)]
    translations[COPY] = sources
    translations[MEMORY] = nearest(messages.train, sources)
    progress("scoring")
    history = result.history
    data = TranslationData(messages.train, result.tokenizer, settings.max_length)
    return {
        "data": {
            "train": len(messages.train),
            "dev": len(messages.dev),
            "test": len(messages.test),
            "digest": messages.digest,
            "taken": messages.taken,
            "left_out": result.left_out,
        },
        "config": result.model.config.to_dict(),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "settings": asdict(settings),
        "training_seconds": seconds,
        "beam_search_seconds": beam_seconds,
        "tokens_per_epoch": int(data.lengths.sum()),
        "tokens": sum(step.tokens for step in history.steps),
        "scores": {
            who: asdict(Scores.of(found, messages.test)) for who, found in translations.items()
        },
        "examples": [
            {
                "source": messages.test[i].source,
                "reference": messages.test[i].target,
                **{who: translations[who][i] for who in (BEAM, MEMORY)},
            }
            for i in range(min(_EXAMPLES, len(messages.test)))  # they are in random order
        ],
        "history": history.to_dict(),
    }


def verdict(found: dict[str, Any]) -> list[str]:
    """What is wrong with the result; empty where all is well."""
    low, high = found["scores"][BEAM]["low"], found["scores"][COPY]["high"]
    if low > high:
        return []
    return [f"the interval of {BEAM} begins at {low:.1f}, that of {COPY} ends at {high:.1f}"]


def page(found: dict[str, Any], picture: str) -> str:
    """The result for people, as Markdown."""
    data, facts, config = found["data"], found["provenance"], found["config"]
    history = found["history"]
    last = history["evaluations"][-1]["figures"]
    epochs = found["tokens"] / max(1, found["tokens_per_epoch"])
    lines = [
        "# Translation: the messages of programs, from English to German",
        "`python -m bertkern.benchmarks.tasks.translation` wrote this page, the picture and the "
        "file of results. The data are the gettext",
        f"catalogues of one Linux system, {len(data['taken'])} of them: {data['train']:,} messages "
        f"to train on, {data['dev']:,} for the curves, {data['test']:,} for the table. Of messages",
        "that differ in case, digits, punctuation or format codes only, in English or in German, "
        "one is kept, and singular and plural",
        "of a message stay together: no test message is trained on in any of these forms.",
        "",
        f"The model: {config['num_layers']} + {config['num_layers']} layers of "
        f"{config['hidden_size']} columns, {config['num_attention_heads']} heads, a BPE of "
        f"{config['vocab_size']:,} tokens that both languages share,",
        f"{found['parameters'] / 1e6:.1f} million weights that begin at random. Trained for "
        f"{found['settings']['steps']:,} steps of at most "
        f"{found['settings']['tokens_per_batch']:,} tokens ({epochs:.0f} times through the data)",
        f"in {found['training_seconds'] / 60:.0f} minutes on {facts['threads']} core(s) "
        f"({facts['device']}); the weights are the mean of the last "
        f"{found['settings']['average']} checkpoints.",
        "",
        "| test messages | BLEU | 95 % interval | chrF |",
        "|---|---|---|---|",
        *(
            f"| {who} | {s['bleu']:.1f} | {s['low']:.1f} to {s['high']:.1f} | {s['chrf']:.1f} |"
            for who, s in found["scores"].items()
        ),
        "",
        f"Beam search: 4 hypotheses, length penalty 0.6, {found['beam_search_seconds']:.0f} s for "
        "all. The translation memory gives the German of the training message",
        "whose English is most like the source. BLEU and chrF by sacreBLEU, the interval by "
        "resampling the messages (Koehn 2004).",
        "On the messages of the curves the cross-entropy is "
        f"{last['loss']:.2f} nats a token (perplexity {math.exp(last['loss']):.1f}; by "
        f"frequency alone {history['baselines']['loss']:.2f} nats).",
        "",
        f"![learning curves]({picture})",
        "",
        f"## The first {len(found['examples'])} test messages",
        "| English | the model | a person | the translation memory |",
        "|---|---|---|---|",
        *(
            "| " + " | ".join(_cell(e[c]) for c in ("source", BEAM, "reference", MEMORY)) + " |"
            for e in found["examples"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text in a table of Markdown, as it is."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data, train, score, write and judge."""
    parser = argparse.ArgumentParser(
        prog="python -m bertkern.benchmarks.tasks.translation",
        description="Train a small Transformer on the German messages of this system's programs.",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where catalogues are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG of the curves")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="page with examples")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches")
    options = parser.parse_args(arguments)
    facts = provenance(torch.device("cpu"))
    progress("reading the catalogues")
    messages = build(read(options.folder), options.seed)
    progress(f"{len(messages.train):,} training messages")
    found = {"provenance": facts, **run(messages, CONFIG, options.steps, options.seed)}
    path = (options.results / file_name("translation", facts)).with_suffix(".json")
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    draw_curves(History.from_dict(found["history"]), "bleu", True, options.picture)
    write_text(options.document, page(found, options.picture.name))
    for who, scores in found["scores"].items():
        print(f"{who:20} {Scores(**scores)}")
    print(f"-> {path}, {options.picture}, {options.document}")
    problems = verdict(found)
    print("\n".join(problems) or "its BLEU exceeds that of copying by more than the intervals")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
