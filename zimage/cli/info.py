"""`info`: what a model folder holds and what it will take to run."""

import json
from collections import Counter
from typing import Any

import click

from zimage.settings import LoadSettings


@click.command()
@click.argument("model", required=False)
@click.option("--device", default="auto", metavar="STR", help="Device the memory is reckoned for.")
@click.option("--dtype", type=click.Choice(("bf16", "fp32")), help="Weights as loaded. Default: as `gen` would choose.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(model: str | None, device: str, dtype: str | None, as_json: bool) -> None:
    """Show the components, sizes, dtypes and memory of MODEL (default: the bundled demo)."""
    LoadSettings(model=model, device=device, dtype=dtype)
    from zimage.pipeline import ZImage

    pipe = ZImage.load(model, device, dtype)
    facts = describe(pipe)
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(f"{facts['name']}  fingerprint {facts['fingerprint']}")
    click.echo(f"{'':14}{'class':26}{'tensors':>8}{'parameters':>16}{'on disk':>10}  {'stored as':18}{'in memory':>10}")
    for c in facts["components"]:
        click.echo(
            f"{c['name']:14}{c['class']:26}{c['tensors']:>8}{c['parameters']:>16,}{_size(c['disk_bytes']):>10}  "
            f"{c['stored']:18}{_size(c['memory_bytes']):>10}"
        )
    click.echo(f"vocabulary    {facts['vocabulary']:,} tokens; captions up to {facts['caption_tokens']:,} tokens")
    d = facts["defaults"]
    click.echo(
        f"defaults      {d['width']}×{d['height']}, {d['steps']} steps, guidance {d['guidance']:g}, shift {d['shift']}"
    )
    click.echo(
        f"memory        {facts['dtype']} on {facts['device']}: "
        + ", ".join(f"{stage} {_size(size)}" for stage, size in facts["stage_bytes"].items())
        + (" (all stages stay loaded)" if facts["keeps_loaded"] else " (one stage at a time)")
    )


def describe(pipe: Any) -> dict[str, Any]:
    """All that `info` prints, as plain values."""
    from zimage.settings import Request

    components = [_describe_component(c, pipe) for c in pipe.model.components.values()]
    known_shift = pipe.model.shift is not None
    request = pipe.resolve(Request(prompt="", shift=None if known_shift else 3.0, seed=0))
    return {
        "name": pipe.model.name,
        "fingerprint": pipe.model.fingerprint,
        "components": components,
        "vocabulary": pipe.model.tokenizer.vocab_size,
        "caption_tokens": pipe.max_caption_tokens,
        "defaults": {
            "width": request.width,
            "height": request.height,
            "steps": request.steps,
            "guidance": request.guidance,
            "shift": f"{request.shift:g}" if known_shift else "none in the folder: give --shift",
        },
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "stage_bytes": pipe.plan.stage_bytes(request),
        "keeps_loaded": pipe.plan.keeps_loaded,
    }


def _describe_component(component: Any, pipe: Any) -> dict[str, Any]:
    checkpoint = component.checkpoint
    stored = Counter(entry.dtype for entry in checkpoint.entries.values())
    return {
        "name": component.name,
        "class": type(component.skeleton).__name__,
        "tensors": len(checkpoint.entries),
        "parameters": sum(weight.numel() for weight in component.skeleton.parameters()),
        "disk_bytes": checkpoint.stored_bytes(),
        "stored": ", ".join(f"{dtype}" for dtype, _ in stored.most_common()),
        "memory_bytes": pipe.plan.weight_bytes(component.name),
    }


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
