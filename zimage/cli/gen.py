"""`gen`: prompts in, picture files out."""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from zimage.cli.options import GroupedCommand, options_of
from zimage.cli.plan import show_plan
from zimage.cli.progress import Progress
from zimage.cli.settings import configured, resolve_options
from zimage.errors import RequestError
from zimage.settings import LoadSettings, Request

NAME_FIELDS = ("prompt", "seed", "index", "width", "height", "steps")
FIELDS = ", ".join(f"{{{name}}}" for name in NAME_FIELDS)


@click.command(cls=GroupedCommand)
@click.argument("prompt", nargs=-1)
@click.option("--file", "prompt_file", type=click.Path(path_type=Path), help="Read prompts from a file, one per line.")
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="Take all settings from a picture; options override them."
)
@click.option(
    "-o",
    "--output",
    help=f"File to write (.png, .jpg, .webp), a folder, or a pattern with {FIELDS}. "
    "Default: named after prompt and seed, numbered rather than overwritten.",
)
@configured
@options_of(Request, skip=("prompt",))
@options_of(LoadSettings)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print the memory plan first.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the files' names, warnings and errors.")
def gen(
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    source: Path | None,
    output: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Render PROMPT (several, or - to read one from standard input)."""
    started = time.perf_counter()
    origin = _read_origin(source)
    resolved = resolve_options({**options, **_prompts(prompt, prompt_file)}, origin.get("request"))
    wanted, loading = resolved.of(Request), resolved.of(LoadSettings)
    if "prompt" not in wanted:
        raise RequestError("no prompt was given; write it as an argument, as - for standard input, or with --file")
    request = Request.from_mapping(wanted)
    target = Target(output, request.count)

    progress = Progress(quiet or as_json)
    if resolved.note and not progress.quiet:
        progress.note(resolved.note)
    progress.show("starting")
    from zimage.pipeline import ZImage  # torch: only now, so that --help and usage errors are quick

    with resolved.naming_sources():
        pipe = ZImage.load(loading.pop("model", None), **loading)
        request = pipe.resolve(request)
    if not (quiet or as_json):
        _introduce(progress, pipe, request)
    if verbose:
        show_plan(pipe, request)
    _warn_of_differences(origin, pipe.metadata(request, 0))

    saved = []
    for event in pipe.run(request):
        progress.update(event)
        if event.image is not None:
            metadata = pipe.metadata(request, event.index)
            saved.append({"path": str(target.save(event.image, metadata, event.index)), **metadata})
            if not as_json:
                progress.finished(saved[-1])
    progress.close()
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        click.echo(json.dumps({"images": saved, "seconds": seconds}, ensure_ascii=False))
    elif not quiet:
        progress.summary(len(saved), time.perf_counter() - started)


class Target:
    """Where pictures go; checked before anything is rendered."""

    def __init__(self, output: str | None, count: int):
        folder_only = output is not None and Path(output).is_dir()
        self.pattern = "{prompt}-{seed}.png" if output is None or folder_only else Path(output).name
        self.folder = Path(output or ".") if output is None or folder_only else Path(output).parent
        # Only a name that the user wrote out in full, for a single picture, may replace a file.
        self.replaces = count == 1 and output is not None and not folder_only and "{" not in self.pattern
        self._check()

    def save(self, image: Any, metadata: dict[str, Any], index: int) -> Path:
        from zimage.picture_file import save

        path = self.folder / self._name(metadata["request"], index)
        if self.replaces and path.exists():
            click.echo(f"replacing {path}", err=True)
        return save(image, path, metadata, self.replaces)

    def _check(self) -> None:
        from zimage.picture_file import file_format

        path = self.folder / self._name(dict.fromkeys(NAME_FIELDS, 0) | {"prompt": "x"}, 0)
        file_format(path)
        if not self.folder.is_dir():
            raise RequestError(f"output: the folder {str(self.folder)!r} does not exist; make it first")
        if not os.access(self.folder, os.W_OK):
            raise RequestError(f"output: the folder {str(self.folder)!r} cannot be written to")
        if self.replaces and path.is_dir():
            raise RequestError(f"output: {str(path)!r} is a folder")

    def _name(self, request: dict[str, Any], index: int) -> str:
        values = {name: request[name] for name in NAME_FIELDS if name in request}
        values |= {"index": index + 1, "prompt": _slug(request["prompt"])}
        try:
            return self.pattern.format_map(values)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError):
            raise RequestError(f"output pattern {self.pattern!r} cannot be used; its fields may be {FIELDS}") from None


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:60].rstrip("-_") or "image"


def _prompts(arguments: tuple[str, ...], file: Path | None) -> dict[str, Any]:
    if arguments and file:
        raise RequestError("give prompts as arguments or with --file, not both")
    if file:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"prompts cannot be read from {file}: {error}") from error
        return {"prompt": [line.strip() for line in lines if line.strip()]}
    if arguments == ("-",):
        return {"prompt": sys.stdin.read().strip()}
    if not arguments:
        return {}
    return {"prompt": arguments[0] if len(arguments) == 1 else list(arguments)}


def _read_origin(source: Path | None) -> dict[str, Any]:
    if source is None:
        return {}
    from zimage.picture_file import read_metadata

    return read_metadata(source)


def _warn_of_differences(origin: dict[str, Any], now: dict[str, Any]) -> None:
    """The same pixels need the same model, dtype, device and versions."""
    for key in ("model", "dtype", "precision", "lora", "attention", "compile", "device", "version", "torch"):
        before = origin.get(key)
        if before is not None and before != now[key]:
            click.echo(f"warning: {key} was {_plain(before)}, now {_plain(now[key])}: pixels may differ", err=True)

    if origin.get("request", {}).get("batch_size", 1) > 1:
        click.echo(
            "warning: the picture came from a batch, whose bits depend on its members: pixels may differ", err=True
        )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _introduce(progress: Progress, pipe: Any, request: Request) -> None:
    r = dataclasses.asdict(request)
    for line in pipe.model.assumptions:
        progress.note(line)
    if pipe.is_demo:
        progress.note(
            "model: the bundled demo, which draws simple scenes; for the real one: --model PATH/Z-Image-Turbo"
        )
    progress.note(
        f"{r['width']}×{r['height']}, {r['steps']} steps, guidance {r['guidance']:g}, shift {r['shift']:g}, "
        f"{str(pipe.dtype).removeprefix('torch.')} on {pipe.device}"
    )
    from zimage.cli.hints import unknown_words

    hint = unknown_words(pipe.model.origin, request.prompts)
    if hint:
        progress.note(hint)
