"""The components of a job as all ranks use them: the same ones in the same order, divided while they are used.

Ranks talk only while they use a component. So each use begins with the first rank's word to go on, and between two uses
it may let the others stop. An error within a use leaves the others in the middle of theirs: then all ranks have to end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zimage.loading.registry import DIT
from zimage.parallel.divided import divided
from zimage.parallel.guidance import Halves
from zimage.parallel.layout import check_ranks
from zimage.parallel.ranks import Ranks
from zimage.pipeline import ZImage
from zimage.render.components import Components
from zimage.render.denoising import Hook
from zimage.render.job import Job


class Divided(Components):
    """The components of a job, divided over the ranks; `in_use` tells whether this rank is at work on one."""

    def __init__(self, pipe: ZImage, job: Job, ranks: Ranks, halves: Halves | None, turn: Callable[[], None]):
        """With `halves`, each of these evaluates the DiT by itself where the job is guided. `turn` is called before
        each use: it tells the other ranks to go on, or waits until it is told to.
        """
        whole = pipe.components(job)
        super().__init__(whole.residency, whole.plan, whole.adapters, whole.controls)
        self._ranks, self._halves, self._turn = ranks, halves if job.request.guidance else None, turn
        self.in_use = False

    @property
    def hooks(self) -> list[Hook]:
        """Those of its evaluations."""
        return [self._halves.hook] if self._halves else []

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """A component for one piece of work, which all ranks do; after an error in it, it counts as in use."""
        self.in_use = True
        self._turn()
        ranks = self._halves.own if self._halves and name == DIT else self._ranks
        with super().use(name) as module, divided(ranks, name, module):
            yield module
        self.in_use = False


def division(pipe: ZImage, ranks: Ranks, cfg_parallel: bool) -> Halves | None:
    """Let a pipeline plan as one of these ranks; the halves that evaluate the branches of guidance, if they should.

    All ranks call it at once. Raises RequestError where the model cannot be divided so.
    """
    halves = Halves.of(ranks) if cfg_parallel else None
    check_ranks((halves.own if halves else ranks).size, pipe.model.config(DIT).n_heads)
    pipe.planner.divide(ranks.size, cfg_parallel)
    return halves
