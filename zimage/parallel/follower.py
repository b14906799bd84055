"""A rank that follows the first one: it draws the jobs that it is given, and what comes out is the first rank's."""

from zimage.parallel import orders
from zimage.parallel.guidance import Halves
from zimage.parallel.orders import Word
from zimage.parallel.ranks import Ranks
from zimage.parallel.together import Divided, division
from zimage.pipeline import ZImage
from zimage.render import stages
from zimage.render.captioning import Conditions
from zimage.render.job import Job
from zimage.render.state import RenderState


class _Told(Exception):
    """The first rank's word to leave the job."""

    def __init__(self, word: Word):
        super().__init__(word.name)
        self.word = word


def follow(pipe: ZImage, ranks: Ranks, cfg_parallel: bool = False) -> None:
    """Draw with the first rank, which has a `Leader`, until that is closed.

    Raises what a render raises, and RanksParted where another rank has gone: then all ranks have to end.
    """
    halves = division(pipe, ranks, cfg_parallel)
    word = Word.STOP
    while word is not Word.END:
        word = orders.hear(ranks)
        if word is Word.JOB:
            word = _draw(pipe, ranks, halves, *orders.take(ranks))
    pipe.planner.divide(1)  # it draws alone again


def _draw(
    pipe: ZImage, ranks: Ranks, halves: Halves | None, job: Job, conditions: Conditions, state: RenderState
) -> Word:
    """One job; returns the last word that was heard of it."""

    def turn() -> None:
        if (word := orders.hear(ranks)) is not Word.GO:
            raise _Told(word)

    job = pipe.checked(job)
    components = Divided(pipe, job, ranks, halves, turn)
    try:
        for _ in stages.draw(components, job, conditions, state, components.hooks):
            pass
    except _Told as told:
        return told.word
    return Word.STOP
