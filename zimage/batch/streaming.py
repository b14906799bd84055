"""Rows through Ray Data: each a block of its own, to encoders and on to workers, out as soon as it has ended."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from zimage import cluster
from zimage.batch.actors import Actor, Encoder, Packed, Tools, Worker
from zimage.batch.places import Share, Shares

CLIENT = "ray://"


def results(ray: Any, address: str | None, pending: Sequence[Packed], places: Shares, tools: Tools) -> Iterator[Packed]:
    """What becomes of each row, as soon as it is known."""
    if not pending:
        return
    if address is None or not address.startswith(CLIENT):
        yield from _streamed(ray, pending, places, tools)
        return
    afar = ray.remote(num_cpus=0)(Afar).remote(list(pending), places, tools)
    while (packed := cluster.get(afar.next.remote())) is not None:
        yield packed


class Afar:
    """The same in a process of the cluster: Ray Data does not run in one that is connected by Ray's client."""

    def __init__(self, pending: Sequence[Packed], places: Shares, tools: Tools):
        self._results = _streamed(cluster.ray_module(), pending, places, tools)

    def next(self) -> Packed | None:
        """What became of one more row; None after the last."""
        return next(self._results, None)


def _streamed(ray: Any, pending: Sequence[Packed], places: Shares, tools: Tools) -> Iterator[Packed]:
    _quieten(ray)
    rows = ray.data.from_items(list(pending), override_num_blocks=len(pending))
    stages: list[tuple[type[Actor], Share]] = [(Encoder, places.encoders), (Worker, places.workers)]
    for actor, share in stages:
        if share.count:
            pool = ray.data.ActorPoolStrategy(size=min(share.count, len(pending)))  # more would have nothing to do
            rows = rows.map(actor, fn_constructor_args=(tools,), compute=pool, **share.options)
    for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from block.to_pylist()


def _quieten(ray: Any) -> None:
    """Progress is our own, and what Ray Data logs lies in a file of its session."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
