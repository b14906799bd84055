"""The first rank of several: it does what one rank alone would do, and the others draw with it.

    with joined(pipe.device) as ranks:
        if ranks.rank:
            follow(pipe, ranks)
        else:
            with Leader(pipe, ranks) as leader:
                for event in leader.run(job): ...

It prepares requests, sees and encodes; the captions go to the others with the job, and from there all do the same work
on their parts of it. Its events are those of `ZImage.run`: progress, previews, cancelling and keeping the state are
things that its consumer does, as with one rank.
"""

from collections.abc import Generator
from types import TracebackType
from typing import Self

from zimage.errors import ZImageError
from zimage.events import Event
from zimage.parallel import orders
from zimage.parallel.orders import Word
from zimage.parallel.ranks import Ranks
from zimage.parallel.together import Divided, division
from zimage.pipeline import ZImage
from zimage.render import stages
from zimage.render.captioning import Conditions
from zimage.render.job import Job
from zimage.render.state import RenderState
from zimage.settings.declared import Request


class Leader:
    """A pipeline whose pictures all ranks draw together, one job at a time; the ranks are let go at its end."""

    def __init__(self, pipe: ZImage, ranks: Ranks, cfg_parallel: bool = False):
        """The other ranks call `follow` with a pipeline of the same model, and the same `cfg_parallel`.

        Raises RequestError for a number of ranks that the model cannot be divided over.
        """
        self.pipe, self._ranks, self._halves = pipe, ranks, division(pipe, ranks, cfg_parallel)
        self._at: Divided | None = None  # the job that all ranks are at
        self._has_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the other ranks go. Where an error has parted them from this one, only the end of this process does."""
        if not self._has_ended and not self._is_parted:
            orders.say(self._ranks, Word.END)
        self._has_ended = True
        self.pipe.planner.divide(1)  # it draws alone again

    @property
    def _is_parted(self) -> bool:
        """Whether others wait for this rank in the middle of their work."""
        return self._at is not None and self._at.in_use

    def run(self, job: Job | Request, state: RenderState | None = None) -> Generator[Event, None, None]:
        """Render as `ZImage.run` does. Closing the generator cancels, and the other ranks wait for the next job.

        Raises RequestError and CheckpointError as that does, and ZImageError while the ranks cannot begin a job.
        """
        return self._run(*self.pipe.begun(job, state))

    def _run(self, job: Job, state: RenderState) -> Generator[Event, None, None]:
        conditions = Conditions([], None)
        if len(stages.finished(job, state)) < job.count:
            conditions = yield from self.pipe.conditions(job)
        components = self._begin(job, conditions, state)
        try:
            yield from stages.draw(components, job, conditions, state, components.hooks)
        finally:
            self._leave()

    def _begin(self, job: Job, conditions: Conditions, state: RenderState) -> Divided:
        if self._has_ended or self._at is not None:
            why = "are gone" if self._has_ended else "were parted by an error" if self._is_parted else "are at a job"
            raise ZImageError(f"the ranks {why}; run one job after the other, before the leader is closed")
        at = Divided(self.pipe, job, self._ranks, self._halves, lambda: orders.say(self._ranks, Word.GO))
        self._at = at
        at.in_use = True
        orders.say(self._ranks, Word.JOB)
        orders.give(self._ranks, job, conditions, state)
        at.in_use = False
        return at

    def _leave(self) -> None:
        if self._has_ended or self._is_parted:
            return
        self._at = None
        orders.say(self._ranks, Word.STOP)  # those that are at its end already take no notice
