"""The components of a job as all ranks use them: the same ones in the same order, divided while they are used.

Ranks talk only while they use a component. So each use begins with the first rank's word to go on, and between two uses
it may let the others stop. An error within a use leaves the others in the middle of theirs: then all ranks have to end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zimage.parallel.divided import divided
from zimage.parallel.ranks import Ranks
from zimage.render.stages import Components


class Divided(Components):
    """The components of a job, divided over the ranks; `in_use` tells whether this rank is at work on one."""

    def __init__(self, whole: Components, ranks: Ranks, turn: Callable[[], None]):
        """`turn` is called before each use: it tells the other ranks to go on, or waits until it is told to."""
        super().__init__(whole.residency, whole.plan, whole.adapters, whole.controls)
        self._ranks, self._turn = ranks, turn
        self.in_use = False

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """A component for one piece of work, which all ranks do; after an error in it, it counts as in use."""
        self.in_use = True
        self._turn()
        with super().use(name) as module, divided(self._ranks, name, module):
            yield module
        self.in_use = False
