"""`bertkern bench`: hands its arguments to the benchmark suite, `bertkern.benchmarks.run`."""

import typer

CONTEXT = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # --help is the suite's own
}


def bench(ctx: typer.Context) -> None:
    """Time bertkern and what one would otherwise use; report and compare results.

    bertkern bench [ops|models|training] [--quick] [--peers LIST], bertkern bench report,
    bertkern bench compare OLD NEW; --help says everything.
    """
    from bertkern.benchmarks import run

    raise typer.Exit(run.main(ctx.args))
