"""A command on several ranks: started, led by the first of them, followed by the others, and ended in one line.

    zimage gen --gpus 4 …                    this process starts four ranks, which are given the same arguments
    torchrun --nproc-per-node 4 -m zimage …  they are started already

Rank 0 does what the command says. The others wait until it tells them to draw with it.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from zimage import interrupts
from zimage.cli import terminal
from zimage.cli.settings import load_pipeline, resolve_options
from zimage.errors import RequestError
from zimage.parallel.environment import FAILED, Place, is_launched, leave_word, place
from zimage.settings.fields import Plain
from zimage.settings.loading import LoadSettings
from zimage.settings.profiles import Resolved
from zimage.settings.scale import ParallelSettings

if TYPE_CHECKING:
    import torch

    from zimage.parallel.leader import Leader
    from zimage.pipeline import ZImage

DEVICES = ("device", "text_encoder_device", "dit_device", "vae_device")
ANY = ("auto", "cuda", "cpu")  # devices of which each rank has its own


def settings(options: Mapping[str, Plain]) -> Resolved:
    """Those that decide on ranks, from all sources, before anything else is read. Raises RequestError."""
    deciding = ("config", "profile", *ParallelSettings.names(), *LoadSettings.names())
    return resolve_options({name: value for name, value in options.items() if name in deciding})


def launches(resolved: Resolved) -> bool:
    """Whether this process has to start the ranks. Raises RequestError where they could not draw."""
    settings, here = ParallelSettings.from_mapping(resolved.of(ParallelSettings)), place()
    if not here.alone and settings.gpus not in (None, here.size):
        text = f"gpus {settings.gpus}: torchrun has started {here.size} ranks; leave it out, or pass {here.size}"
        raise RequestError(text, fields=("gpus",))
    count = here.size if settings.gpus is None else settings.gpus
    if count > 1:
        _check(resolved)
    elif settings.cfg_parallel:
        text = "cfg_parallel divides the GPUs that draw a picture into two halves; pass gpus, an even number"
        raise RequestError(text, fields=("cfg_parallel", "gpus"))
    return here.alone and count > 1


def _check(resolved: Resolved) -> None:
    """Raise RequestError for settings that do not go together with several ranks."""
    loading = resolved.of(LoadSettings)
    for name in DEVICES:
        if (device := loading.get(name, "auto")) not in ANY:
            text = f"{name} {device}: each rank computes on a GPU of its own; pass cuda or cpu, or leave it out"
            raise RequestError(text, fields=(name, "gpus"))
    if loading.get("compile"):
        text = "compile: compiled blocks cannot wait for other ranks; leave out compile, or gpus"
        raise RequestError(text, fields=("compile", "gpus"))


def launch(resolved: Resolved, arguments: Sequence[str]) -> None:
    """Run the command on as many ranks as the settings say. Raises RequestError where the computer lacks the GPUs."""
    import torch

    from zimage.parallel.launch import launch

    count, here = resolved.of(ParallelSettings)["gpus"], torch.cuda.device_count()
    if resolved.of(LoadSettings).get("device") != "cpu" and here < count:
        text = f"gpus {count}: this computer has {here}; pass at most that many, or device cpu for ranks on the CPU"
        raise RequestError(text, fields=("gpus", "device"))
    launch(count, arguments)


# ------------------------------------------------------------------ the first rank


@contextlib.contextmanager
def drawing(resolved: Resolved) -> Iterator[tuple["ZImage", "ZImage | Leader"]]:
    """The pipeline that the settings ask for, and what runs its jobs: itself, or the leader of several ranks."""
    if place().alone:
        pipe = load_pipeline(resolved)
        yield pipe, pipe
        return
    from zimage.parallel.leader import Leader
    from zimage.parallel.meeting import announce, met

    _check(resolved)  # a state has settings of its own
    pipe = load_pipeline(resolved, own_devices(resolved.of(LoadSettings)))
    parallel = ParallelSettings.from_mapping(resolved.of(ParallelSettings))
    loading = LoadSettings.from_mapping(resolved.of(LoadSettings))
    announce({"load": loading.to_mapping(), "cfg_parallel": parallel.cfg_parallel})
    with met(talking(pipe)) as ranks, Leader(pipe, ranks, parallel.cfg_parallel) as leader:
        yield pipe, leader


def own_devices(loading: Mapping[str, Plain]) -> dict[str, Plain]:
    """Settings of loading, with this rank's own GPU instead of any."""
    import torch

    gpu = f"cuda:{place().local}"
    own = {"cpu": "cpu", "cuda": gpu, "auto": gpu if torch.cuda.is_available() else "cpu"}
    named = {"device": "auto"} | {name: loading[name] for name in DEVICES if loading.get(name)}
    return {**loading, **{name: own[str(device)] for name, device in named.items()}}


def talking(pipe: "ZImage") -> "torch.device":
    """Where the tensors are that ranks exchange: a GPU, if the DiT or the VAE is there, and a CPU's memory."""
    from zimage.loading.registry import DIT, VAE

    devices = [pipe.places[name].device for name in (DIT, VAE)]
    return next((device for device in devices if device.type == "cuda"), devices[0])


# ------------------------------------------------------------------ the others


def follow() -> int:
    """Draw with the first rank until it is done; returns the exit status."""
    from zimage.parallel.meeting import announced, met

    logging.getLogger("zimage").setLevel(logging.ERROR)  # the first one warns
    plan = announced()
    if plan is None:
        return 0
    from zimage.parallel.follower import follow
    from zimage.pipeline import ZImage

    loading = own_devices(plan["load"])
    pipe = ZImage.load(loading.pop("model", None), **loading)
    with met(talking(pipe)) as ranks:
        follow(pipe, ranks, plan["cfg_parallel"])
    return 0


# ------------------------------------------------------------------ the end


@contextlib.contextmanager
def standing() -> Iterator[Place]:
    """Round a whole command: this process's place among ranks, whose end it does not outlive."""
    here = place()
    if here.alone:
        yield here
        return
    from zimage.parallel.guard import guarded

    with guarded():
        yield here
        if here.leads:
            from zimage.parallel.meeting import announce

            announce(None)  # to others that still wait to hear from it


def leave(line: str, status: int, reason: str) -> NoReturn:
    """End a rank that cannot go on, at once: what it shares with others may never be let go."""
    interrupts.ignore()  # also torchrun's, which would take its word from it
    terminal.clear()
    leave_word(line, reason)
    if not is_launched() and (place().leads or reason == FAILED):
        terminal.note(f"error: {line}" if place().leads else f"error: rank {place().rank}: {line}")
    os._exit(status)
