"""The files that a request names: opened when it is prepared, plain values in a job, opened again from these.

Attachments are one file each; conditions are lists of files with a number (`settings.conditions`).
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from zimage.errors import CheckpointError, RequestError
from zimage.loading.controls import ControlFile
from zimage.loading.files import ModelFiles
from zimage.loading.registry import DIT
from zimage.pictures.image import InputPicture, content_hash, open_image, open_mask
from zimage.pictures.inpaint import open_alpha
from zimage.settings.conditions import Condition, Control, Reference, names_of
from zimage.settings.declared import MASK_ALPHA, Request
from zimage.settings.fields import Hint, Plain
from zimage.settings.plain import mistake
from zimage.text.embeddings import SAVED, Embeddings

Opener = Callable[[Any], Any]


def open_picture(given: Any) -> InputPicture:
    return InputPicture.of(given, open_image)


def open_reference(given: Any) -> InputPicture | Embeddings:
    """A picture, or in its place the caption of one, which `see` saved in a file of embeddings."""
    is_path = isinstance(given, str | os.PathLike)
    saved = Path(given).suffix == SAVED if is_path else not isinstance(given, Image.Image | InputPicture)
    return Embeddings.of(given) if saved else open_picture(given)


# Each has a name, the hash of its content and, unless it was passed as an object, a path.
ATTACHMENTS: dict[str, Opener] = {
    "image": open_picture,
    "mask": lambda given: InputPicture.of(given, open_mask),
    "embeddings": Embeddings.of,
}
CONDITIONS: dict[str, type[Condition]] = {kind.FIELD: kind for kind in (Reference, Control)}
FILES: dict[tuple[str, str], Opener] = {
    (Reference.FIELD, "picture"): open_reference,
    (Control.FIELD, "picture"): open_picture,
    (Control.FIELD, "model"): ControlFile.of,
}
ATTACHMENT: dict[str, Hint] = {"name": str, "hash": str, "path": str}  # for `mistake`


def opened(request: Request, model: ModelFiles) -> dict[str, Any]:
    """The request's attachments and conditions with their files opened, by field. Raises RequestError."""
    embeddings, width = request.embeddings, model.config(DIT).cap_feat_dim
    with _naming("image"):
        files: dict[str, Any] = {"image": None if request.image is None else open_picture(request.image)}
    with _naming("mask"):
        files["mask"] = _opened_mask(request)
    with _naming("embeddings"):
        files["embeddings"] = None if embeddings is None else Embeddings.of(embeddings, width)
    return files | {name: _opened_all(kind, getattr(request, name)) for name, kind in CONDITIONS.items()}


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors on a file say which field it was passed in, where they do not."""
    try:
        yield
    except (RequestError, CheckpointError) as error:
        if error.fields:
            raise
        raise type(error)(f"{name}: {error}", fields=(name,)) from error


def pointed(request: Request) -> dict[str, Any]:
    """The opened files of a request as plain values, from which `reopened` finds them again."""
    files = {name: value for name in ATTACHMENTS if (value := getattr(request, name)) is not None}
    listed = {name: value for name in CONDITIONS if (value := getattr(request, name)) is not None}
    return {name: {**file.describe(), "path": file.path} for name, file in files.items()} | {
        name: [condition.point() for condition in conditions] for name, conditions in listed.items()
    }


def reopened(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `pointed`: what is `given` by its hash, and all else from its path, if its content is the same.

    Raises RequestError or CheckpointError.
    """
    files = {
        name: _found(name, opener, source, given)
        for name, opener in ATTACHMENTS.items()
        if (source := values.get(name)) and not _is_alpha(source)
    }
    if _is_alpha(values.get("mask")):
        files["mask"] = _alpha_again(values, given)
    listed = {name: kind for name, kind in CONDITIONS.items() if name in values}
    return files | {name: [_again(kind, one, given) for one in values[name]] for name, kind in listed.items()}


def fault(request: Plain) -> str:
    """What of a job's request is not as `pointed` returns it, in words; empty where it is."""
    return next(filter(None, _faults(request)), "")


def _faults(request: Plain) -> Iterator[str]:
    for name in (*ATTACHMENTS, *CONDITIONS):
        value, place = request.get(name), f"job.request.{name}"
        if value is None:
            continue
        if name in ATTACHMENTS:
            yield mistake(value, ATTACHMENT, place)
        elif not isinstance(value, list):
            yield f"{place} should be a list"
        else:
            yield from (mistake(one, _hints(CONDITIONS[name]), f"{place}[{i}]") for i, one in enumerate(value))


def _hints(kind: type[Condition]) -> dict[str, Hint]:
    numbers = [name for name in names_of(kind) if name not in kind.FILES]
    texts = [f"{role}{part}" for role in kind.FILES for part in ("", "_name", "_hash")]
    return dict.fromkeys(texts, str) | dict.fromkeys(numbers, float)


def opened_references(given: list[Any] | None) -> list[Reference]:
    """References with their pictures opened. Raises RequestError, and CheckpointError for damaged embeddings."""
    with _naming(Reference.FIELD):
        return [Reference(open_reference(one.picture), one.alpha) for one in map(Reference.parse, given or [])]


def _opened_mask(request: Request) -> InputPicture | None:
    """The mask that is named; an image that is extended brings its transparent pixels along, where it has any."""
    if request.mask is not None and request.mask != MASK_ALPHA:
        return InputPicture.of(request.mask, open_mask)
    if request.mask is None and (request.extend is None or isinstance(request.image, InputPicture)):
        return None
    mask = open_alpha(request.image)
    if mask.getbbox() is not None:
        return _alpha_mask(mask)
    if request.mask is None:
        return None
    text = "mask: no pixel of the image is transparent; pass the file of a mask, or an image with transparent areas"
    raise RequestError(text, fields=("mask", "image"))


def _alpha_mask(mask: Image.Image) -> InputPicture:
    return InputPicture(mask, MASK_ALPHA, content_hash(mask), MASK_ALPHA)


def _is_alpha(described: Mapping[str, str] | None) -> bool:
    """Whether a mask lies in its image: no file that is pointed to has a relative path."""
    return described is not None and described["path"] == MASK_ALPHA


def _alpha_again(values: Mapping[str, Any], given: Mapping[str, Any]) -> InputPicture:
    """The mask that lies in the image, from the image's own file, or what is given in its place."""
    if "image" not in values:
        raise RequestError("mask: the job has no image in which it lies", fields=("mask", "image"))
    image, hash = values["image"], values["mask"]["hash"]
    source = {hash: given[image["hash"]]} if image["hash"] in given else {}
    mask: InputPicture = _found("image", lambda given: _alpha_mask(open_alpha(given)), {**image, "hash": hash}, source)
    return mask


def _opened_all(kind: type[Condition], given: list[Any] | None) -> list[Condition] | None:
    return None if given is None else [_with_files(kind.parse(one), {}) for one in given]


def _with_files(condition: Condition, files: Mapping[str, Any]) -> Condition:
    """A condition whose files are these, or its own opened."""
    values = {name: getattr(condition, name) for name in names_of(type(condition))}
    with _naming(condition.FIELD):
        own = {role: FILES[condition.FIELD, role](values[role]) for role in condition.FILES if role not in files}
    return type(condition)(**{**values, **own, **files})


def _again(kind: type[Condition], plain: Mapping[str, Any], given: Mapping[str, Any]) -> Condition:
    files = {
        role: _found(
            kind.FIELD,
            FILES[kind.FIELD, role],
            {"path": plain[role], "name": plain[f"{role}_name"], "hash": plain[f"{role}_hash"]},
            given,
        )
        for role in kind.FILES
    }
    return _with_files(kind.parse({**plain, **files}), files)


def _found(name: str, opener: Opener, described: Mapping[str, str], given: Mapping[str, Any]) -> Any:
    source = given.get(described["hash"], described["path"])
    if isinstance(source, str) and not source:
        raise RequestError(
            f"{name} {described['name']!r} was given as an object; pass it as attachments={{{described['hash']!r}: …}}",
            fields=(name,),
        )
    found = opener(source)
    if found.hash != described["hash"]:
        raise RequestError(f"{name} {source} is not the file that the job was prepared with", fields=(name,))
    return found
