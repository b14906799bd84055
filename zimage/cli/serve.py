"""`serve`: the server and its page; what it loads and draws is set by the options of `gen`."""

import importlib.util
import logging
from typing import TYPE_CHECKING

import click

from zimage.cli import terminal
from zimage.cli.options import GroupedCommand, options_of
from zimage.cli.progress import counted
from zimage.cli.settings import configured, resolve_options
from zimage.cli.trust import check_folder, check_server, check_serving
from zimage.errors import RequestError, ZImageError, install_hint
from zimage.settings.declared import Request
from zimage.settings.fields import fields
from zimage.settings.loading import LoadSettings
from zimage.settings.profiles import Resolved
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.scale import BatchSettings
from zimage.settings.serving import ServeSettings

if TYPE_CHECKING:
    from zimage.serve.app import Ready

PACKAGES = ("fastapi", "uvicorn", "python_multipart")
MACHINES = ("address", "workers")  # a cluster with further workers
PER_CALL = tuple(field.name for field, _ in fields(Request) if field.metadata["per_call"])


@click.command(cls=GroupedCommand)
@configured
@click.option("--reindex", is_flag=True, help="Make the index of the history anew from the pictures, and exit.")
@options_of(ServeSettings)
@options_of(BatchSettings, only=MACHINES)
@options_of(Request, skip=PER_CALL)
@options_of(RewriteSettings)
@options_of(LoadSettings)
@click.option("-v", "--verbose", is_flag=True, help="Print more of what the server does.")
@click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
def serve(reindex: bool, verbose: bool, quiet: bool, **options: object) -> None:
    """Start a server with a page, an API and a queue of jobs.

    It also speaks OpenAI's images API and the form of AUTOMATIC1111's web UI. Settings of pictures are the defaults of
    requests. Ctrl-C and SIGTERM stop the server once its running job has ended or its state is saved.
    """
    logging.getLogger("zimage").setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    resolved = resolve_options(options)
    serving, machines = _checked(resolved), _machines(resolved)
    if resolved.note and not quiet:
        terminal.note(resolved.note)
    need_packages("a server")
    from zimage.serve import app

    with resolved.naming_sources():
        if reindex:
            terminal.out(f"{counted(app.reindex(serving), 'picture')} in the index")
        else:
            defaults = {**resolved.of(Request), **resolved.of(RewriteSettings)}
            loading, presets = resolved.of(LoadSettings), resolved.presets
            app.run(loading, defaults, serving, machines, presets, lambda ready: _introduce(ready, quiet))


def _introduce(ready: "Ready", quiet: bool) -> None:
    """The address on standard output, where a script can take it from; what people want to know besides."""
    about = ready.about
    if not quiet:
        terminal.note(f"{about.model['name']} on {about.device} ({about.dtype}); everything is kept in {ready.folder}")
        for line in about.notes:
            terminal.note(line)
        terminal.note("Ctrl-C stops the server")
    terminal.out(ready.url)


def _checked(resolved: Resolved) -> ServeSettings:
    """The server's own settings. Raises RequestError for what a file may not decide that merely lies in the folder."""
    for name in ("rewriter_url", "encoder_url"):
        check_server(resolved, name)
    with resolved.naming_sources():
        check_serving(resolved)
        check_folder(resolved, "cache_folder")
        return ServeSettings.from_mapping(resolved.of(ServeSettings))


def _machines(resolved: Resolved) -> BatchSettings:
    """The cluster and its workers. Raises RequestError where an option asks for workers of none."""
    values = {name: value for name, value in resolved.of(BatchSettings).items() if name in MACHINES}
    if "address" not in values and resolved.source("workers").startswith("--"):
        text = "workers are those of a cluster; name it with --address, or a device of this computer with --worker"
        raise RequestError(text, fields=("workers", "address"))
    return BatchSettings.from_mapping(values)


def need_packages(what: str) -> None:
    """Raise ZImageError where the packages of the extra `serve` are missing, which `what` needs."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        told = f"{what} needs {' and '.join(missing)}, of the extra `serve`"
        raise ZImageError(f"{told}; run: {install_hint('serve')}")
