"""bertkern data: a vocabulary from text, a corpus larger than memory, and a look at examples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .console import err, need, out, writable_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from bertkern.data import Corpus

app = typer.Typer(no_args_is_help=True, help="Vocabularies, corpora, and a look at examples.")

_TOKENS_PER_BATCH = 16384

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Text files (empty lines separate documents), .jsonl or .parquet files, folders, "
        "patterns, or hub:NAME\\[:CONFIG]\\[:SPLIT]."
    ),
]
TextColumnOption = Annotated[
    str, typer.Option(help="Column of the text in JSON lines, tables and hub datasets.")
]
LinesOption = Annotated[
    bool,
    typer.Option(
        "--one-sentence-per-line",
        help="Lines of the text are its sentences; else full stops end them.",
    ),
]


@app.command("tokenizer")
def tokenizer(
    sources: Sources,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tokenizer's files.")],
    kind: Annotated[str, typer.Option(help="wordpiece, or bpe (byte-level).")] = "wordpiece",
    vocab_size: Annotated[int, typer.Option(min=6, help="At most so many tokens.")] = 30522,
    cased: Annotated[bool, typer.Option("--cased", help="Keep capitals and accents.")] = False,
    min_frequency: Annotated[
        int, typer.Option(min=1, help="How often a pair of pieces must occur to be merged.")
    ] = 2,
    text_column: TextColumnOption = "text",
    one_sentence_per_line: LinesOption = False,
) -> None:
    """Learn a vocabulary from texts, which are streamed; the same texts give the same vocabulary.

    Example: bertkern data tokenizer books/*.txt --out my-tokenizer --vocab-size 16000
    """
    from bertkern.data import save_tokenizer, train_tokenizer

    _need_readers(sources)
    writable_folder(folder)
    with _counting("reading texts") as step:

        def sentences() -> Iterator[str]:
            for document in _documents(sources, text_column, one_sentence_per_line):
                step()
                yield from document

        made = train_tokenizer(
            sentences, vocab_size, lowercase=not cased, min_frequency=min_frequency, kind=kind
        )
    save_tokenizer(made, folder)
    out.print(
        f"{kind} vocabulary of {made.get_vocab_size():,} tokens in {folder}",
        markup=False,
        soft_wrap=True,
    )


@app.command("prepare")
def prepare(
    sources: Sources,
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", "-t", help="Its folder, tokenizer.json or vocab.txt.")
    ],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the corpus, a new one.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a corpus that is there.")
    ] = False,
    text_column: TextColumnOption = "text",
    one_sentence_per_line: LinesOption = False,
) -> None:
    """Tokenise texts once, into files that are mapped: they may be larger than memory.

    Example: bertkern data prepare books/*.txt --tokenizer my-tokenizer --out my-corpus
    """
    from bertkern.data import Corpus, load_tokenizer

    _need_readers(sources)
    words = load_tokenizer(tokenizer)
    with _counting("tokenising") as step:
        corpus = Corpus.build(
            _documents(sources, text_column, one_sentence_per_line),
            words,
            folder,
            overwrite=overwrite,
            on_document=step,
        )
    size = sum(path.stat().st_size for path in folder.iterdir())
    out.print(
        f"{corpus.documents:,} documents, {corpus.sentences:,} sentences, {corpus.tokens:,} "
        f"tokens of a vocabulary of {corpus.vocab_size:,}: {size / 1e6:,.1f} MB in {folder}",
        markup=False,
        soft_wrap=True,
    )
    if corpus.left_out:
        out.print(f"{corpus.left_out:,} documents with fewer than two sentences were left out")


@app.command("inspect")
def inspect(
    sources: Annotated[
        list[str], typer.Argument(help="One folder of `data prepare`, or texts as it takes them.")
    ],
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", "-t", help="Its folder, tokenizer.json or vocab.txt.")
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Examples to show.")] = 5,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    whole_word: Annotated[
        bool, typer.Option("--whole-word", help="Mask all pieces of a word together.")
    ] = False,
    measure: Annotated[
        int, typer.Option(min=1, help="Examples of which the statistics are taken.")
    ] = 2000,
    documents: Annotated[
        int, typer.Option(min=4, help="Of texts (not of a corpus), look at the first so many.")
    ] = 2000,
    epoch: Annotated[int, typer.Option(min=0, help="Show examples of this epoch.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of pairs and masks.")] = 0,
    text_column: TextColumnOption = "text",
    one_sentence_per_line: LinesOption = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a whole corpus; fail if it is damaged.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write what is shown to this page, too.")
    ] = None,
) -> None:
    """Show pre-training examples coloured by what was masked, and measure their statistics.

    Example: bertkern data inspect my-corpus --tokenizer my-tokenizer --count 3
    """
    from bertkern.data import MaskingSettings, PretrainingData, load_tokenizer
    from bertkern.data.files import write_text

    from .examples_view import ExamplesView

    settings = MaskingSettings(max_length, whole_word=whole_word)
    words = load_tokenizer(tokenizer)
    corpus = _open_or_read(
        sources,
        words,
        lambda: islice(_documents(sources, text_column, one_sentence_per_line), documents),
    )
    if verify:
        corpus.verify()
    data = PretrainingData(corpus, words, settings, seed)
    view = ExamplesView(data, words, max(_TOKENS_PER_BATCH, max_length))
    view.read(epoch, max(count, measure))
    view.print_examples(out, count)
    view.print_statistics(out)
    if html is not None:
        write_text(html, view.page(count))
        err.print(f"written to {html}", markup=False)


def _open_or_read(
    sources: list[str], words: "Tokenizer", read: Callable[[], Iterator[list[str]]]
) -> "Corpus":
    from bertkern.data import Corpus
    from bertkern.data.corpus import META

    if len(sources) == 1 and (Path(sources[0]) / META).is_file():
        return Corpus.open(sources[0])
    _need_readers(sources)
    return Corpus.from_documents(read(), words)


def _documents(sources: list[str], text_column: str, lines: bool) -> Iterator[list[str]]:
    from bertkern.data import stream_documents

    return stream_documents(sources, text_column, one_sentence_per_line=lines)


def _need_readers(sources: list[str]) -> None:
    """Fail before the work if a package is missing, or a file."""
    from bertkern.data.hub import HUB
    from bertkern.data.parquet import PARQUET
    from bertkern.data.sources import expand

    for place in (place for source in sources for place in expand(source)):
        if place.startswith(HUB):
            need("datasets", "data", place)
        elif Path(place).suffix in PARQUET:
            need("pyarrow", "data", place)


@contextmanager
def _counting(what: str) -> Iterator[Callable[[], None]]:
    """A line that says how many documents have passed; calling what it gives counts one."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f} documents"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    task = progress.add_task(what, total=None)
    with progress:
        yield lambda: progress.advance(task)
