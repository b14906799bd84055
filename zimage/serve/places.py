"""Where a server's workers are: on the devices that its settings name, and on the machines of a Ray cluster."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zimage import cluster
from zimage.settings.fields import Plain
from zimage.settings.loading import absolute_paths
from zimage.settings.scale import BatchSettings
from zimage.settings.serving import ServeSettings

PROCESS = 60 * 10**6  # bytes of one that speaks with a worker on Ray
HERE, ON_RAY = "zimage.serve.worker", "zimage.serve.ray_worker"


class Place(NamedTuple):
    """A worker's name, the module of the process that the server starts for it, and what that is told first."""

    name: str
    module: str
    start: Mapping[str, Any]


def places(loading: Mapping[str, Plain], serving: ServeSettings, machines: BatchSettings, data: Path) -> list[Place]:
    """The places of a server that keeps everything in `data`.

    Raises ZImageError where no cluster answers, or where the processes that speak with it do not fit in memory.
    """
    start = {
        "op": "start",
        "loading": dict(loading),
        "data": str(data),
        "encoder_only": serving.encoder_only,
        "previews": serving.previews,
    }
    devices = serving.worker or ([] if machines.address else [""])
    here = [{**start, "loading": {**loading, **({"device": device} if device else {})}} for device in devices]
    found = [Place(device, HERE, one) for device, one in zip(devices, here, strict=True)]
    if machines.address is None:
        return found
    shelves = [os.path.abspath(folder) for folder in (loading.get("lora_folder"), serving.control_folder) if folder]
    there = {"loading": absolute_paths(loading), "address": machines.address, "shelves": shelves}
    count = machines.workers or cluster.gpus(machines.address)
    if count > (os.cpu_count() or 1):  # the server itself does without torch
        from zimage.loading.memory import check_processes

        check_processes(count, PROCESS, ("workers",))
    return found + [Place("Ray", ON_RAY, {**start, **there})] * count
