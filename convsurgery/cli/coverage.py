"""``convsurgery coverage``: sweep architectures and keep what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["coverage"]


def coverage(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATTERN", help="Shell patterns: 'resnet*', 'torchvision/*'; all without one."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of JSON lines, one each; resumed.")] = Path(
        "coverage.jsonl"
    ),
    checks: Annotated[str, typer.Option(help="What to check, with commas: plan, null, poly.")] = "plan,null,poly",
    processes: Annotated[int, typer.Option(min=1, help="Workers, on one thread each.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for one architecture.")] = 900,
    max_params: Annotated[float, typer.Option(help="Larger models are planned but not run.")] = 3e9,
    sample: Annotated[bool, typer.Option("--sample", help="Some 70 hard architectures, as in the tests.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Page whose marked part becomes the table, e.g. docs/coverage.md.")
    ] = None,
) -> None:
    """Sweep architectures: what is planned, converted, bit-equal. Exit code 1 when a row needs an explanation."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from convsurgery.coverage import HARD, Row, choose, summary_text, sweep, write_table

    names = list(HARD) if sample and not patterns else choose(patterns or [])
    if sample and patterns:
        names = [name for name in names if name in HARD]
    console = Console(stderr=True)
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("coverage", total=len(names))

        def report(row: Row, done: int, total: int) -> None:
            progress.update(task, completed=done, description=row.name[:32])
            troubles = "; ".join(row.exceptions)
            if troubles or not console.is_terminal:
                line = f"{done}/{total} {row.name} {row.seconds:.1f} s {troubles}"
                console.print(line.rstrip(), markup=False, highlight=False)

        rows = sweep(
            names,
            output,
            checks=[check.strip() for check in checks.split(",") if check.strip()],
            processes=processes,
            timeout=timeout,
            max_params=max_params,
            restart=restart,
            report=report,
        )
    typer.echo(summary_text(rows))
    if markdown is not None:
        write_table(rows, markdown)
        typer.echo(f"wrote the table into {markdown}")
    typer.echo(f"rows are in {output}")
    if any(row.exceptions for row in rows):
        raise typer.Exit(1)
