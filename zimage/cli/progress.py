"""What a person sees while a render runs: a line on a terminal, nothing in a pipe."""

import sys
from typing import TYPE_CHECKING

from zimage import interrupts
from zimage.cli import terminal
from zimage.cli.origin import Record
from zimage.cli.target import PIPED

if TYPE_CHECKING:
    from zimage.events import Event


class Progress:
    """A consumer of pipeline events. Progress and notes go to standard error, names of files to standard output."""

    def __init__(self, quiet: bool, names: bool = True):
        self.quiet, self.names = quiet, names
        self.live = not quiet and terminal.is_terminal(sys.stderr)
        self.head = ""  # of every progress line

    def show(self, text: str) -> None:
        """Replace the progress line."""
        if self.live:
            terminal.show(self.head + text)

    def note(self, text: str) -> None:
        """A line that stays, for people who want more than names."""
        terminal.clear()
        if not self.quiet:
            terminal.note(text)

    def update(self, event: "Event") -> None:
        interrupts.check()
        if event.stage == "load":
            from zimage.loading.registry import ROWS

            self.show(f"loading the {ROWS[event.detail].title}")
            return
        self.at(event.stage, event.step, event.total, event.index, event.count)

    def at(self, stage: str, step: int, total: int, index: int, count: int) -> None:
        """How far a stage is, of one of several images."""
        place = f" ({index + 1} of {count})" if count > 1 else ""
        self.show(f"{stage}{place} {_bar(step, total)} {step}/{total}")

    def finished(self, saved: Record) -> None:
        if not self.names:
            return
        seed = _seed(saved["request"])
        if saved["path"] == PIPED:
            self.note(seed)
            return
        if terminal.is_terminal(sys.stdout):
            terminal.saved(f"{saved['path']}  ({seed})")
            return
        terminal.saved(saved["path"])
        if not self.quiet:
            terminal.note(seed)

    def summary(self, count: int, seconds: float) -> None:
        self.note(f"{counted(count, 'image')} in {seconds:.1f} s")

    def close(self) -> None:
        terminal.clear()


def counted(count: int, what: str) -> str:
    """A number and its noun, in the plural where that is right."""
    plural = what.removesuffix("y") + "ies" if what.endswith("y") else what + "s"
    return f"{count} {what if count == 1 else plural}"


def _seed(request: Record) -> str:
    """What of an image's randomness makes it again."""
    variation = request.get("variation")
    return f"seed {request['seed']}" + (f", variation {variation}" if variation else "")


def _bar(done: int, total: int, width: int = 24) -> str:
    filled = done * width // total
    return "█" * filled + "░" * (width - filled)
