"""The command line; `gen` runs when no command is named. Every failure is one line and an exit status."""

import logging
import sys
from collections.abc import Sequence

import click

from zimage.cli.config import config
from zimage.cli.gen import gen
from zimage.cli.info import info
from zimage.cli.rewrite import rewrite
from zimage.cli.templates import templates
from zimage.cli.tokens import encode, tokens
from zimage.cli.weights import weights
from zimage.errors import ZImageError
from zimage.version import __version__

INTERRUPTED = 130


class DefaultGroup(click.Group):
    """A group whose first argument may be a prompt instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["gen", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zimage")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Z-Image: text to image in plain PyTorch.

    `gen` is the default command: zimage "a cat" means zimage gen "a cat".
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (gen, rewrite, encode, tokens, templates, config, info, weights):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    _log_to_stderr()
    try:
        result = cli.main(args=None if args is None else list(args), prog_name="zimage", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail("interrupted; the unfinished picture was not saved", INTERRUPTED)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except ZImageError as error:
        return _fail(str(error), error.exit_status)
    except BrokenPipeError:
        return 1
    except (OSError, MemoryError) as error:
        return _fail(str(error) or "out of memory; choose a smaller size", 1)


def _fail(message: str, status: int) -> int:
    print(f"{_fresh_line()}error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _fresh_line() -> str:
    """What wipes a progress line that may stand there."""
    return "\r\033[K" if sys.stderr.isatty() else ""


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LevelFormatter())
    logger = logging.getLogger("zimage")
    logger.handlers[:] = [handler]
    logger.propagate = False


class _LevelFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{_fresh_line()}{record.levelname.lower()}: {record.getMessage()}"
