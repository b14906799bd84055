"""What the first rank tells the others: a word before each piece of work, and a job with all that it needs.

A word is one byte. A job travels as plain values with tensors beside them, its pictures and embeddings by their
content, so that the other ranks read nothing of the user's but the files of the model, of LoRAs and of ControlNets.
"""

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zimage.parallel.ranks import Ranks
from zimage.pictures.image import InputPicture
from zimage.render.attached import ATTACHMENTS, CONDITIONS
from zimage.render.captioning import Conditions
from zimage.render.job import Job
from zimage.render.state import CARRIED, RenderState, carried_of
from zimage.text.embeddings import Embeddings

ORDERS = "orders"  # this kind of traffic


class Word(IntEnum):
    """What the first rank does next, and the others with it."""

    GO = 0  # the next piece of the job's work
    STOP = 1  # leave the job
    JOB = 2  # begin one
    END = 3  # there are no more


def say(ranks: Ranks, word: Word) -> None:
    ranks.broadcast(ORDERS, torch.tensor([word], dtype=torch.uint8))


def hear(ranks: Ranks) -> Word:
    """The first rank's next word; waits for it."""
    return Word(int(ranks.broadcast(ORDERS, torch.empty(1, dtype=torch.uint8))))


# ------------------------------------------------------------------ jobs


def give(ranks: Ranks, job: Job, conditions: Conditions, state: RenderState) -> None:
    """Give a job to the other ranks, with its captions and what is done of it already."""
    plain, tensors = job.to_dict(), dict[str, Tensor]()
    files = {}
    for file in _files(job):
        files[file.hash], tensors[f"file.{file.hash}"] = _content(file)
    if mask := plain["request"].get("mask"):
        mask["path"] = ""  # one that lies in the image's alpha, too, travels as a picture of its own
    tensors |= _numbered("caption", conditions.prompts) | _numbered("small", state.small)
    tensors |= _numbered("finished", state.finished)
    tensors |= {} if conditions.negative is None else {"negative": conditions.negative}
    tensors |= {} if state.latents is None else {"latents": state.latents}
    tensors |= {CARRIED + name: x for name, x in state.carried.items()}
    ranks.share(ORDERS, {"job": plain, "files": files, "step": state.step, "decoded": state.decoded}, tensors)


def take(ranks: Ranks) -> tuple[Job, Conditions, RenderState]:
    """What the first rank gives. Raises RequestError or CheckpointError for files that are not the same here."""
    values, tensors = ranks.share(ORDERS)
    files = {hash: _opened(hash, about, tensors[f"file.{hash}"]) for hash, about in values["files"].items()}
    conditions = Conditions(_listed("caption", tensors), tensors.get("negative"))
    small, finished = _listed("small", tensors), _listed("finished", tensors)
    latents, carried = tensors.get("latents"), carried_of(tensors)
    state = RenderState(small, finished, latents, values["step"], values["decoded"], carried)
    return Job.from_dict(values["job"], files), conditions, state


def _files(job: Job) -> Iterator[InputPicture | Embeddings]:
    """The pictures and embeddings of a job."""
    request = job.request
    found = [getattr(request, name) for name in ATTACHMENTS]
    found += [one.picture for name in CONDITIONS for one in getattr(request, name) or ()]
    yield from (file for file in found if file is not None)


def _content(file: InputPicture | Embeddings) -> tuple[dict[str, Any], Tensor]:
    about: dict[str, Any] = {"name": file.name, "path": file.path}
    if isinstance(file, Embeddings):
        return {**about, "request": file.request, "encoder": file.encoder}, file.caption
    picture = file.picture
    pixels = torch.from_numpy(np.frombuffer(picture.tobytes(), dtype=np.uint8).copy())
    return {**about, "mode": picture.mode, "size": list(picture.size)}, pixels


def _opened(hash: str, about: Mapping[str, Any], content: Tensor) -> InputPicture | Embeddings:
    name, path = about["name"], about["path"]
    if "mode" not in about:
        return Embeddings(content, about["request"], about["encoder"], hash, name, path)
    return InputPicture(
        Image.frombytes(about["mode"], tuple(about["size"]), content.numpy().tobytes()), name, hash, path
    )


def _numbered(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}


def _listed(name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return [tensors[f"{name}.{i}"] for i in range(count)]
