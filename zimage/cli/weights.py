"""`weights`: fetch a published model, check one, write it in another layout or dtype."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimage import interrupts
from zimage.cli import terminal
from zimage.cli.options import COMPONENTS, PATH, Group
from zimage.cli.progress import Progress, counted
from zimage.errors import RequestError

if TYPE_CHECKING:
    from zimage.weights.verify import Report

LAYOUTS = ("keep", "diffusers", "native", "ldm", "transformers", "bare", "all-in-one")
DTYPES = ("keep", "bf16", "fp32", "fp16")
COMPONENT = click.Choice((*COMPONENTS, "control"))
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def weights(ctx: click.Context) -> None:
    """Fetch, verify and convert model weights.

    \b
    zimage weights fetch turbo                     download Z-Image-Turbo (about 33 GB)
    zimage weights verify Z-Image-Turbo            check every file
    zimage weights convert Z-Image-Turbo Small --dtype bf16
    """
    if ctx.invoked_subcommand is None:
        terminal.out(ctx.get_help())


@weights.command()
@click.argument("model")
@click.option(
    "--to", "folder", type=PATH, help="Folder to download to. Default: named after the model, ./Z-Image-Turbo."
)
@click.option("--revision", metavar="STR", help="Branch, tag or commit. Default: the main branch.")
@click.option("--endpoint", metavar="URL", help="Another hub, such as a mirror. Default: the library's (HF_ENDPOINT).")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def fetch(model: str, folder: Path | None, revision: str | None, endpoint: str | None, quiet: bool) -> None:
    """Download a published MODEL from the hub (extra `hub`): turbo, base or OWNER/NAME.

    turbo is Z-Image-Turbo (about 33 GB), base is Z-Image (about 21 GB), OWNER/NAME any repository in their layout. Only
    what a render needs is fetched. Every file is checked against the hub's size and hash before it gets its name. Run
    the same command again to continue an interrupted download; on a complete folder it checks every file.

    Your login (HF_TOKEN, `hf auth login`) is sent to huggingface.co and to the hub that HF_ENDPOINT names, and to no
    other --endpoint.
    """
    from zimage.weights.fetch import fetch, repository_of

    repository, watch, transferred, count = repository_of(model), Watch(quiet), 0, 0
    folder = folder or Path(repository.rpartition("/")[2])
    with interrupts.telling("what has arrived is kept: run the same command to continue"):
        for file in fetch(repository, folder, revision, endpoint, watch):
            transferred, count = transferred + file.transferred, count + 1
            watch.note(f"{file.path}  {size_text(file.size)}  {file.state}")
    watch.note(
        f"{folder}: {counted(count, 'file')}, {size_text(transferred)} transferred; zimage gen PROMPT --model {folder}"
    )


@weights.command()
@click.argument("path", type=PATH)
@click.option("--values", is_flag=True, help="Look for NaN and infinity in every tensor; reads everything.")
@click.option("--no-hashes", is_flag=True, help="Skip the hashes; comparing them reads all files that have one.")
@click.option("--configs", type=PATH, help="Model folder whose configs describe a loose file of unusual shapes.")
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
@click.pass_context
def verify(ctx: click.Context, path: Path, values: bool, no_hashes: bool, configs: Path | None, as_json: bool) -> None:
    """Check whether weights are damaged or incomplete.

    PATH is a model folder, a component folder or a weight file. Checks headers and lengths, keys and shapes against the
    config, and hashes where a fetch recorded them. The exit status is 1 if anything is wrong.
    """
    from zimage.weights.verify import verify

    watch, reports = Watch(as_json), []
    with interrupts.telling("not everything was checked"):
        for report in verify(path, values, not no_hashes, configs, watch):
            reports.append(report)
            if not as_json:
                terminal.out("\n".join(_lines(report)))
    wrong = sum(bool(report.problems) for report in reports)
    if as_json:
        terminal.out_json({"path": str(path), "sound": not wrong, "reports": [r.as_dict() for r in reports]})
    else:
        terminal.out(f"{path}: " + (f"{wrong} of {len(reports)} checks found problems" if wrong else "sound"))
    ctx.exit(1 if wrong else 0)


@weights.command()
@click.argument("source", metavar="IN", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="keep",
    help="diffusers: a published folder, or the folder or file of one component. Single files: native (ComfyUI's DiT "
    "or ControlNet), ldm (VAE), transformers and bare (text encoder with and without `model.`), all-in-one. "
    "Default: the layout of IN.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="keep", help="Dtype to write. Default: as stored.")
@click.option("--component", type=COMPONENT, help="Write only this component. Default: all that the layout holds.")
@click.option("--part", "component", type=COMPONENT, hidden=True)  # its former name
@click.option("--configs", type=PATH, help="Model folder with the configs, tokenizer and schedule that IN lacks.")
@click.option("--shard-size", metavar="SIZE", default="10G", help="Maximum size of a file in a folder. Default: 10G.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def convert(
    source: Path,
    target: Path,
    layout: str,
    dtype: str,
    component: str | None,
    configs: Path | None,
    shard_size: str,
    force: bool,
    quiet: bool,
) -> None:
    """Write the weights IN to OUT in another layout or dtype.

    IN is a model folder, a component folder or a weight file; OUT ends in .safetensors or is a folder. Tensors are
    copied one by one, so memory use stays far below the file's size. OUT appears only when it is complete.

    \b
    zimage weights convert Z-Image-Turbo Small --dtype bf16
    zimage weights convert Z-Image-Turbo dit.safetensors --layout native --dtype bf16
    zimage weights convert all.safetensors Folder --layout diffusers --configs Z-Image-Turbo
    """
    limit = _bytes(shard_size)
    from zimage.weights.convert import convert

    watch, started = Watch(quiet), time.perf_counter()
    with interrupts.telling(f"{target} was not changed"):
        done = convert(source, target, layout, dtype, component, configs, limit, force, watch)
    watch.note(
        f"{done.path}: {' and '.join(done.components)} as {done.layout}, {done.tensors} tensors, "
        f"{size_text(done.nbytes)} in {time.perf_counter() - started:.1f} s"
    )


class Watch:
    """Called by the tools as they go on: a line on a terminal, at most ten times a second, nothing in a pipe."""

    def __init__(self, quiet: bool):
        self.progress, self._next = Progress(quiet), 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        interrupts.check()
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.1
            share = f"{done * 100 // total:3} %" if total else ""
            self.progress.show(f"{what} {share} of {size_text(total)}")

    def note(self, text: str) -> None:
        """A line that stays, unless nobody wants to read."""
        self.progress.note(text)


def size_text(size: int) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([KMG]?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise RequestError(f"shard-size {text[:80]!r} is not a size; write 5G or 500M")
    return size


def _lines(report: "Report") -> Iterator[str]:
    """A line for what was looked at, and one for every problem."""
    facts = [] if report.size is None else [size_text(report.size)]
    facts += [] if report.tensors is None else [f"{report.tensors} tensors {' '.join(report.dtypes)}".rstrip()]
    yield f"{'WRONG' if report.problems else 'ok':6}{report.path}  {', '.join(facts + report.notes)}".rstrip()
    for problem in report.problems:
        yield f"      {' '.join(problem.split())}"
