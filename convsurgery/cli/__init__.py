"""The command line. ``main`` turns errors into texts and exit codes; commands are in ``app``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["main"]

#: exit codes: 0 success, 1 a check that failed, 2 bad usage or input
FAILED, USAGE = 1, 2


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit the process."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; ``--debug`` anywhere lets errors through with their traceback."""
    import typer

    from convsurgery.cli.app import build
    from convsurgery.errors import ConvSurgeryError, ParityError, SettingsError, TrainingError

    debug = "--debug" in arguments
    command = typer.main.get_command(build())
    try:
        with _own_warnings():
            code = command.main(
                [a for a in arguments if a != "--debug"], prog_name="convsurgery", standalone_mode=False
            )
        return int(code or 0)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody to tell.
        sys.stderr.close()
        return FAILED
    except Exception as error:
        if debug:
            raise
        show = getattr(error, "show", None)  # a usage error of the command-line library prints itself
        if show is not None:
            show()
            return USAGE
        if isinstance(error, ConvSurgeryError):
            print(f"error: {error}", file=sys.stderr)
            stopped = isinstance(error, ParityError | TrainingError) and not isinstance(error, SettingsError)
            return FAILED if stopped else USAGE
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print("this is a defect of convsurgery; --debug shows where it arose", file=sys.stderr)
        return FAILED


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Our warnings as a line each on standard error; others as Python shows them."""
    from convsurgery.errors import ConvSurgeryWarning

    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, ConvSurgeryWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                others(message, category, *rest, **more)

        warnings.simplefilter("always", ConvSurgeryWarning)
        warnings.showwarning = show
        yield
