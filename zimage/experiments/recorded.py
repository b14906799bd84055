"""A record as the request that it was made from, to draw the same picture again."""

from typing import Any

from zimage.errors import RequestError
from zimage.experiments.record import Record
from zimage.render import attached
from zimage.settings.declared import Request


def request_of(record: Record) -> Request:
    """The request of a drawn cell; its files are opened from where they lay, if their content is the same.

    A template stands in its parts. Raises RequestError, and CheckpointError for damaged files.
    """
    values: dict[str, Any] = {name: value for name, value in record.request.items() if value is not None}
    if fault := attached.fault(values):
        raise RequestError(f"the record's request cannot be drawn again ({fault.replace('job.', '')})")
    opened = attached.reopened(values, {})
    return Request.from_mapping({**values, **opened, "template": None})
