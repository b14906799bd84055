"""What `--vary NAME=VALUE,…` says: a setting, and the texts of the values that it takes."""

import csv

from zimage.errors import RequestError, quoted


def varied(text: str) -> tuple[str, list[str]]:
    """NAME=VALUE,… → the name and the texts, of which an empty one leaves the setting as it is. Raises RequestError."""
    name, equals, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise RequestError(f"vary {quoted(text)} should be NAME=VALUE,VALUE,…, such as steps=4,8,16")
    try:
        (values,) = csv.reader([listed], strict=True)
    except (csv.Error, ValueError):
        told = f"{name}: {quoted(listed)} cannot be read; a value with a comma stands in double quotes, as in CSV"
        raise RequestError(told, fields=(name,)) from None
    return name, values or [""]
