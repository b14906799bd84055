"""What a run of `gen` has settled before anything is drawn, here or on a server."""

from dataclasses import dataclass

from zimage.cli.origin import Record
from zimage.cli.progress import Progress, counted
from zimage.cli.target import Target
from zimage.settings.declared import Request
from zimage.settings.profiles import Resolved
from zimage.settings.rewriting import RewriteSettings


@dataclass(frozen=True)
class Drawing:
    """A request and where its pictures go. `origin` is the record of the picture of --from, or empty."""

    resolved: Resolved
    request: Request
    rewriting: RewriteSettings | None
    origin: Record
    target: Target
    progress: Progress


def introduced(request: Record, place: str, evaluations: int | None = None) -> str:
    """The line on what is drawn: a request with nothing left open, what draws it, and how often the DiT is evaluated.

    A step that takes one evaluation says nothing of it.
    """
    r = request
    told = "" if evaluations in (None, r["steps"]) else f" ({counted(evaluations, 'evaluation')})"
    away = f", nag {r['nag']:g}" if r.get("nag", 1.0) > 1 else ""  # servers of earlier versions have none
    sampler = "" if r.get("sampler", "euler") == "euler" else f"{r['sampler']}, "
    return (
        f"{r['width']}×{r['height']}, {counted(r['steps'], 'step')}{told}, guidance {r['guidance']:g}{away}, "
        f"{sampler}{scheduled(r)}, {place}"
    )


def scheduled(request: Record) -> str:
    """Where its noise levels come from."""
    if request["shift"] is None:
        return "sigmas as given"
    named = request.get("schedule", "simple")
    return f"{'' if named == 'simple' else f'{named}, '}shift {request['shift']:g}"


def rewriting_told(rewrite: Record, prompt: str) -> str:
    """The line on a prompt that was rewritten."""
    return f"rewritten ({rewrite['rewriter']}, seed {rewrite['seed']}): {prompt}"
