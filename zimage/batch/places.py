"""What each process of a batch gets of the cluster: CPU threads, and a GPU where its components run on one.

Ray gives an actor its GPU by hiding all others, and as many threads as it reserves CPUs. What does not fit would wait
for ever, so it is refused here, with the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from zimage.errors import RequestError
from zimage.settings.fields import Plain
from zimage.settings.scale import BatchSettings

ON_CPU = ("cpu", "mps")
PROCESS = 250 * 10**6  # bytes of a process of the demo model, without what it shares with others


class Node(NamedTuple):
    """A machine of the cluster: what it can give away."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Share:
    """The processes of one kind, and what each reserves."""

    count: int
    cpus: int
    gpus: int

    @property
    def options(self) -> dict[str, int]:
        """As Ray takes it."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


class Shares(NamedTuple):
    """Those that draw, and those that encode for them."""

    workers: Share
    encoders: Share


def shares(settings: BatchSettings, loading: Mapping[str, Plain], nodes: Sequence[Node]) -> Shares:
    """How the processes of a batch divide the nodes. Raises RequestError where they do not fit."""
    gpus = sum(node.gpus for node in nodes)
    draws = _on_gpu(loading, ("dit_device", "vae_device"), gpus)
    encodes = settings.encoders and _on_gpu(loading, ("text_encoder_device",), gpus)
    taken = settings.encoders * encodes
    workers = settings.workers or max(1, (gpus - taken) * draws)
    needed, count = workers * draws + taken, workers + settings.encoders
    if needed > gpus:
        text = f"{workers} workers and {settings.encoders} encoders need {needed} GPUs, and the cluster has {gpus}"
        raise RequestError(f"{text}; pass fewer", fields=("workers", "encoders"))
    cpus = _threads(nodes, count, needed)
    return Shares(Share(workers, cpus, draws), Share(settings.encoders, cpus, encodes))


def needed_for(rows: int, settings: BatchSettings) -> BatchSettings:
    """The same with no more processes of a kind than there are rows: the others would have nothing to do."""
    workers = settings.workers and min(settings.workers, rows)
    return replace(settings, workers=workers, encoders=min(settings.encoders, rows))


def least_cpus(settings: BatchSettings, here: int) -> int:
    """The CPUs that a cluster of our own on a machine with so many has to have: one for each process.

    Raises RequestError where so many processes would not fit into the machine's memory, whatever their model is.
    """
    count = (settings.workers or 1) + settings.encoders
    if count > here:
        _check_memory(count)
    return max(here, count)


def _check_memory(count: int) -> None:
    import torch

    from zimage.loading.memory import available_memory

    needed, free = count * PROCESS / 1e9, available_memory(torch.device("cpu")) / 1e9
    if needed > free:
        text = f"{count:,} processes need more than {needed:.1f} GB without their models, and {free:.1f} GB are free"
        raise RequestError(f"{text}; pass fewer workers or encoders", fields=("workers", "encoders"))


def _threads(nodes: Sequence[Node], count: int, on_gpus: int) -> int:
    """The most threads that each of `count` processes can have. Raises RequestError where one each is too many."""
    for cpus in range(max((node.cpus for node in nodes), default=0), 0, -1):
        places = [node.cpus // cpus for node in nodes]
        beside_gpus = [min(free, node.gpus) for free, node in zip(places, nodes, strict=True)]
        if sum(places) >= count and sum(beside_gpus) >= on_gpus:
            return cpus
    free = sum(node.cpus for node in nodes)
    text = f"{count} processes need a CPU each, and the cluster has {free}; pass fewer workers or encoders"
    raise RequestError(text, fields=("workers", "encoders"))


def _on_gpu(loading: Mapping[str, Plain], names: tuple[str, ...], gpus: int) -> int:
    """1 where one of these components runs on a GPU, else 0. Raises RequestError for a device by its number."""
    usual = str(loading.get("device", "auto"))
    devices = {name: str(loading.get(name) or usual) for name in names}
    for name, device in devices.items():
        if device.startswith("cuda:") and device != "cuda:0":
            field = name if loading.get(name) else "device"
            text = f"{field} {device}: each worker gets a GPU of its own; pass cuda, or leave it out"
            raise RequestError(text, fields=(field,))
    return int(any(device not in (*ON_CPU, "auto") or (device == "auto" and gpus > 0) for device in devices.values()))
