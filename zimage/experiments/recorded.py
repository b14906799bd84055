"""A record as what it was made from: the request and the way of loading, to draw the same picture again."""

from typing import Any

from zimage.experiments.record import Record
from zimage.render import attached
from zimage.settings.declared import Request
from zimage.settings.fields import Plain


def request_of(record: Record) -> Request:
    """The request of a drawn cell; its files are opened from where they lay, if their content is the same.

    A template stands in its parts. Raises RequestError, and CheckpointError for damaged files.
    """
    values: dict[str, Any] = {name: value for name, value in record.request.items() if value is not None}
    opened = attached.reopened(values, {})
    return Request.from_mapping({**values, **opened, "template": None})


def load_of(record: Record) -> dict[str, Plain]:
    """The keywords with which `ZImage.load` opens its model; `model` is the path, None for the bundled one."""
    return {"model": None, **record.load}
