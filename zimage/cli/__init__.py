"""The command line; `gen` runs when no command is named. Every failure is one line and an exit status."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import click

from zimage import interrupts
from zimage.cli import faults, ranks, terminal
from zimage.cli.batch import batch
from zimage.cli.compare import compare
from zimage.cli.config import config
from zimage.cli.gen import gen
from zimage.cli.info import info
from zimage.cli.metrics import metrics
from zimage.cli.options import Group
from zimage.cli.rewrite import rewrite
from zimage.cli.serve import serve
from zimage.cli.sweep import sweep
from zimage.cli.templates import templates
from zimage.cli.tokens import encode, see, tokens
from zimage.cli.view import view
from zimage.cli.weights import weights
from zimage.errors import RanksParted, ZImageError, one_line
from zimage.parallel import environment
from zimage.settings.environment import DEBUG
from zimage.version import __version__

INTERRUPTED = 130
COMPLETION = "_ZIMAGE_COMPLETE"  # set by a shell that completes words, see click
MOST_VERBOSE = "-vv"


class DefaultGroup(Group):
    """A group whose first argument may be a prompt instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["gen", *args]
        return super().parse_args(ctx, args)


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        terminal.out(f"zimage, version {__version__}")
        ctx.exit()


@click.group(cls=DefaultGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Z-Image: text to image in plain PyTorch.

    `gen` is the default command: zimage "a cat" means zimage gen "a cat".
    """
    if ctx.invoked_subcommand is None:
        terminal.out(ctx.get_help())


COMMANDS = (
    gen,
    serve,
    batch,
    sweep,
    metrics,
    compare,
    view,
    rewrite,
    encode,
    see,
    tokens,
    templates,
    config,
    info,
    weights,
)
for command in COMMANDS:
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0, 1 (failed), 2 (wrong usage), 130 or 143 (interrupted by Ctrl-C or SIGTERM).
    """
    arguments = list(sys.argv[1:] if args is None else args)
    terminal.open_streams()
    _log_to_terminal()
    with interrupts.handled():
        try:
            with ranks.standing() as rank:
                return _run(arguments) if rank.leads else ranks.follow()
        except KeyboardInterrupt as interrupt:
            told = "; ".join(["interrupted", *map(str, interrupt.args)])
            return _fail(told, getattr(interrupt, "status", INTERRUPTED), environment.INTERRUPTED)
        except RanksParted as error:
            return _fail(str(error), error.exit_status, environment.LOST)
        except click.ClickException as error:
            return _fail(error.format_message(), error.exit_code)
        except ZImageError as error:
            return _fail(str(error), error.exit_status)
        except MemoryError:
            return _fail("out of memory; choose a smaller size", 1)
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                return _fail(f"{error.filename}: {error.strerror}", 1)
            return unexpected(error, MOST_VERBOSE in arguments)


def unexpected(error: Exception, verbose: bool) -> int:
    """The last net: any other exception becomes one line that says how to get the traceback."""
    shown = verbose or os.environ.get(DEBUG)
    if shown:
        terminal.note("".join(traceback.format_exception(error)).rstrip())
    if fault := faults.told(error):
        return _fail(fault, 1)
    if shown:
        return _fail(f"internal fault ({type(error).__name__}); please report it with these lines", 1)
    again = f"run it again with {DEBUG}=1 for the traceback and please report it"
    return _fail(f"internal fault ({type(error).__name__}: {one_line(str(error), 200)}); {again}", 1)


def _run(arguments: list[str]) -> int:
    if COMPLETION in os.environ:
        cli.main(prog_name="zimage")
    try:
        with cli.make_context("zimage", list(arguments), obj=tuple(arguments)) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _fail(message: str, status: int, reason: str = environment.FAILED) -> int:
    if not environment.place().alone:
        ranks.leave(one_line(message), status, reason)
    terminal.note(f"error: {one_line(message)}")
    return status


def _log_to_terminal() -> None:
    logger = logging.getLogger("zimage")
    logger.handlers[:] = [terminal.LogHandler()]
    logger.propagate = False
    logger.setLevel(logging.WARNING)
