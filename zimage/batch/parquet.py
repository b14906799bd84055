"""Rows and the index as Parquet; the only file that needs pyarrow, which comes with Ray Data."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zimage.errors import RequestError, ZImageError, install_hint
from zimage.formats.atomic import beside
from zimage.settings.fields import Plain


def read_parquet(path: Path) -> Iterator[dict[str, Plain]]:
    """The rows of a file. Raises RequestError, or OSError."""
    arrow = _pyarrow()
    try:
        with path.open("rb") as stream:
            for batch in arrow.parquet.ParquetFile(stream).iter_batches():
                yield from map(_flat, batch.to_pylist())
    except arrow.ArrowException as error:
        raise RequestError(f"{path} is not Parquet that can be read: {error}") from None


def write_parquet(path: Path, rows: Iterable[Mapping[str, Plain]]) -> None:
    """Rows as a file, written whole or not at all; what is a table itself becomes JSON. Raises OSError."""
    arrow = _pyarrow()
    table = arrow.Table.from_pylist([{name: _cell(value) for name, value in row.items()} for row in rows])
    with beside(path) as temporary:
        arrow.parquet.write_table(table, temporary)
        temporary.replace(path)


def _cell(value: Plain) -> Plain:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _flat(row: dict[str, Plain]) -> dict[str, Plain]:
    """A row without the Nones that Parquet fills its tables with."""
    return {name: value for name, value in row.items() if value is not None}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ZImageError(f"Parquet needs pyarrow ({error}); run: {install_hint('ray')}") from None
    return pyarrow
