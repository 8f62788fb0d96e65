"""The command line's contents page: every command, and how errors reach the user."""

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .._version import __version__
from . import (
    answer,
    attention_map,
    bench,
    classify,
    convert,
    data,
    demo,
    embed,
    fill_mask,
    finetune,
    info,
    pretrain,
    train_translation,
    translate,
    tune,
    words,
)
from .console import CommandError, err, one_line

# What a user can put right: one line. Anything else is our bug and shows its traceback.
_USER_ERRORS = (
    CommandError,
    OSError,
    ValueError,
    NotImplementedError,
    FloatingPointError,
    ModuleNotFoundError,
)


class _OneLineErrors(TyperGroup):
    """A user's errors become one line on stderr and exit code 1, and Ctrl-C exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # bertkern embed ... | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(0) from None
        except _USER_ERRORS as error:
            if os.environ.get("BERTKERN_TRACEBACK"):
                raise
            err.print(f"error: {one_line(error)}", style="red", markup=False)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            err.print(one_line(stop) if str(stop) else "interrupted", style="red", markup=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each command explains itself: bertkern embed --help. "
    "BERTKERN_TRACEBACK=1 shows where an error came from.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bertkern {__version__}")
        raise typer.Exit


@app.callback()
def bertkern(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Fused kernels for encoder models, BERT and the Transformer on top."""


app.command("info")(info.info)
app.command("demo")(demo.demo)
app.command("embed")(embed.embed)
app.command("fill-mask")(fill_mask.fill_mask)
app.command("classify")(classify.classify)
app.command("answer")(answer.answer)
app.command("attention-map")(attention_map.attention_map)
app.add_typer(data.app, name="data")
app.command("pretrain")(pretrain.pretrain)
app.add_typer(finetune.app, name="finetune")
app.command("train-translation")(train_translation.train_translation)
app.command("translate")(translate.translate)
app.add_typer(words.app, name="words")
app.command("convert")(convert.convert)
app.command("tune")(tune.tune)
app.command("bench", context_settings=bench.CONTEXT)(bench.bench)


def main() -> None:
    """Entry point of the `bertkern` command."""
    app(prog_name="bertkern")


if __name__ == "__main__":
    main()
