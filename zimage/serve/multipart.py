"""Bodies of several parts (multipart/form-data, RFC 7578), as browsers send files.

A body is in memory as a whole, within the limit of uploads, so its parts are found by searching for the boundary. Text
is UTF-8 whatever a client says: some of Python's encodings take hours for a megabyte.
"""

from typing import NamedTuple

from python_multipart.multipart import parse_options_header

from zimage.serve.refusals import Malformed

MOST_PARTS, LONGEST_HEAD, LONGEST_BOUNDARY = 64, 4096, 70  # parts, bytes of a part's header, characters (RFC 2046)


class Part(NamedTuple):
    """A field of a form, or a file where `filename` is not None: its name where it came from, which may be anything."""

    name: str
    content: bytes
    filename: str | None = None

    @property
    def text(self) -> str:
        """The content as text. Raises Malformed."""
        try:
            return self.content.decode()
        except UnicodeDecodeError:
            raise Malformed(f"the part {self.name[:80]!r} should be text in UTF-8") from None


def parts_of(content_type: str, body: bytes) -> list[Part]:
    """The parts of a body. Raises Malformed."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= LONGEST_BOUNDARY:
        raise Malformed("the Content-Type should be multipart/form-data with a boundary")
    line = b"\r\n--" + boundary
    whole = b"\r\n" + body  # the first boundary may stand at the very beginning
    if whole.count(line) > MOST_PARTS + 1:
        raise Malformed(f"the body has too many parts; at most {MOST_PARTS} are read")
    _, *pieces = whole.split(line)
    if not pieces or not pieces[-1].startswith(b"--"):
        raise Malformed("the body ends before its last boundary")
    return [_part(piece) for piece in pieces[:-1]]


def _part(piece: bytes) -> Part:
    """`piece`: blanks, a line break, header lines, an empty line, the content."""
    head_end = piece.find(b"\r\n\r\n", 0, LONGEST_HEAD)
    blanks, _, head = piece[: max(head_end, 0)].partition(b"\r\n")
    if head_end < 0 or blanks.strip():
        raise Malformed(f"a part of the body should begin with a header of at most {LONGEST_HEAD} bytes")
    lines = (line.partition(b":") for line in head.split(b"\r\n"))
    headers = {name.strip().lower(): value.strip() for name, _, value in lines}
    kind, options = parse_options_header(headers.get(b"content-disposition"))
    if kind != b"form-data" or b"name" not in options:
        raise Malformed("a part of the body should have a Content-Disposition: form-data with a name")
    filename = options.get(b"filename")
    return Part(_decoded(options[b"name"]), piece[head_end + 4 :], None if filename is None else _decoded(filename))


def _decoded(name: bytes) -> str:
    return name.decode(errors="replace")
