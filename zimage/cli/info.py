"""`info`: what a model holds and what it will take to run, or what a loose file's header says."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from zimage.cli import terminal
from zimage.cli.options import COMPONENTS, GroupedCommand, options_of
from zimage.cli.plan import plan_facts, plan_lines
from zimage.cli.settings import configured, load_pipeline, resolve_options
from zimage.errors import RequestError, printable
from zimage.settings.declared import Request
from zimage.settings.fields import Plain
from zimage.settings.loading import LoadSettings
from zimage.settings.paths import user_path

if TYPE_CHECKING:
    from zimage.loading.files import Component
    from zimage.pipeline import ZImage
    from zimage.render.job import Job

LISTED = 5  # tensors of a loose file
REFERENCE = (1024, 1024)  # of a picture in the plan; larger ones are seen at about this size
ASKED = ("width", "height", "aspect", "steps", "preset", "sampler", "guidance", "batch_size")  # by options
PLANNED = (*ASKED, "tile_mode", "tile_size", "tile_overlap")


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@click.option("--plan", "with_plan", is_flag=True, help="Show what will be in memory in each stage of a render.")
@configured
@options_of(Request, only=ASKED)
@options_of(LoadSettings, skip=("model",))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(model: str | None, with_plan: bool, as_json: bool, **options: object) -> None:
    """Show the components, sizes and memory of MODEL. Default: the settings' model, else the bundled demo.

    Of a loose file (weights of one component, a LoRA) it shows what the header says.
    """
    resolved = resolve_options({**options, "model": model})
    loose = _loose_file(resolved.of(LoadSettings))
    if loose is not None and not (with_plan and _is_whole(loose)):
        if with_plan:
            raise RequestError("--plan needs a whole model; pass its folder, or --model with the other components")
        terminal.out_json(loose) if as_json else terminal.out("\n".join(_file_lines(loose)))
        return
    pipe, size = load_pipeline(resolved), _planned(resolved.of(Request))
    facts = describe(pipe, size)
    if as_json:
        terminal.out_json(facts)
        return
    _print(facts)
    if with_plan:
        job = _job(pipe, size)
        terminal.out("\n".join(plan_lines(job, pipe.refusal(job))))


def _loose_file(load: dict[str, Plain]) -> dict[str, Any] | None:
    """What the header of a file says that cannot be loaded alone; None for whole models."""
    model = user_path(load.get("model") or "", "model")
    if not os.path.isfile(model) or any(load.get(name) for name in COMPONENTS):
        return None
    from zimage.loading.describe import describe_file

    facts = describe_file(model)
    return None if _is_whole(facts) and (load.get("tokenizer") or facts["has_tokenizer"]) else facts


def _is_whole(facts: dict[str, Any]) -> bool:
    return set(COMPONENTS) <= set(facts["components"])


def _file_lines(facts: dict[str, Any]) -> Iterator[str]:
    yield f"{printable(facts['file'])}  {facts['format']}, {_size(facts['bytes'])}"
    yield f"holds         {'; '.join(facts['holds']) or 'nothing that is known here'}"
    if _is_whole(facts):
        yield "tokenizer     none was found; a render needs --tokenizer"
    yield f"tensors       {len(facts['tensors']):,}"
    for dtype, count in facts["dtypes"].items():
        yield f"  {dtype:12}{count['tensors']:>8,}{_size(count['bytes']):>12}"
    for tensor in facts["tensors"][:LISTED]:
        yield f"  {printable(tensor['name'])[:80]}  {tensor['dtype']} {tensor['shape']}"
    if len(facts["tensors"]) > LISTED:
        yield f"  and {len(facts['tensors']) - LISTED:,} more"
    for key, value in facts["metadata"].items():
        yield f"metadata      {key}: {value}"


def _planned(request: dict[str, Plain]) -> dict[str, Plain]:
    """What of a request's settings decides on memory and time."""
    return {name: value for name, value in request.items() if name in PLANNED}


def _print(facts: dict[str, Plain]) -> None:
    terminal.out(f"{facts['name']}  fingerprint {facts['fingerprint']}")
    terminal.out(
        f"{'':14}{'class':26}{'tensors':>8}{'parameters':>16}{'on disk':>10}  {'stored as':18}{'in memory':>10}"
    )
    for c in facts["components"]:
        terminal.out(
            f"{c['name']:14}{c['class']:26}{c['tensors']:>8}{c['parameters']:>16,}{_size(c['disk_bytes']):>10}  "
            f"{c['stored']:18}{_size(c['memory_bytes']):>10}"
        )
    if facts["encoder_url"]:
        terminal.out(f"text_encoder  on another machine: {facts['encoder_url']}")
    terminal.out(f"vocabulary    {facts['vocabulary']:,} tokens; captions up to {facts['caption_tokens']:,} tokens")
    for line in facts["assumptions"]:
        terminal.out(f"assumed       {line}")
    for line in facts["adapters"]:
        terminal.out(f"recognised    {line}")
    d = facts["defaults"]
    terminal.out(
        f"defaults      {d['width']}×{d['height']}, {d['steps']} steps, guidance {d['guidance']:g}, shift {d['shift']}"
    )
    terminal.out(
        f"memory        {facts['dtype']} on {facts['device']}: "
        + ", ".join(f"{name} {_size(stage['peak'])}" for name, stage in facts["plan"]["stages"].items())
        + (" (all components stay loaded)" if facts["plan"]["keeps_all"] else "")
    )


def describe(pipe: "ZImage", size: dict[str, Plain]) -> dict[str, Plain]:
    """All that `info` prints, as plain values; the plan for a picture of `size`, where one is given."""
    from zimage.render.defaults import adapters_told

    here = [component for name, component in pipe.model.components.items() if name in pipe.places]
    components = [_describe_component(component, pipe) for component in here]
    known_shift = pipe.model.shift is not None
    request = _job(pipe, {}).request
    return {
        "name": pipe.model.name,
        "fingerprint": pipe.model.fingerprint,
        "components": components,
        "encoder_url": pipe.settings.encoder_url,
        "assumptions": pipe.model.assumptions,
        "adapters": adapters_told(pipe.lora.list(), pipe.model),
        "vocabulary": pipe.model.tokenizer.vocab_size,
        "caption_tokens": pipe.texts.limit,
        "defaults": {
            "width": request.width,
            "height": request.height,
            "steps": request.steps,
            "guidance": request.guidance,
            "shift": f"{request.shift:g}" if known_shift else "none in the folder: pass --shift",
        },
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "plan": plan_facts(_job(pipe, size)),
    }


def _job(pipe: "ZImage", size: dict[str, Plain]) -> "Job":
    """A job for nothing but its plan: as many images as are denoised together, a reference if they can be seen."""
    from PIL import Image

    shift, images = 3.0 if pipe.model.shift is None else None, size.get("batch_size", 1)
    seen = [Image.new("RGB", REFERENCE)] if pipe.vision else None
    request = Request(prompt="", images=images, shift=shift, seed=0, reference=seen, **size)
    return pipe.prepare(request, must_fit=False)


def _describe_component(component: "Component", pipe: "ZImage") -> dict[str, Plain]:
    checkpoint = component.checkpoint
    stored = Counter(entry.dtype for entry in checkpoint.entries.values())
    return {
        "name": component.name,
        "class": type(component.skeleton).__name__,
        "tensors": len(checkpoint.entries),
        "parameters": sum(weight.numel() for weight in component.skeleton.parameters()),
        "disk_bytes": checkpoint.stored_bytes(),
        "stored": ", ".join(f"{dtype}" for dtype, _ in stored.most_common()),
        "memory_bytes": pipe.planner.sizes[component.name].weights,
    }


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
