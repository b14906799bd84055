"""`gen --server`: the same options and output, drawn by a `zimage serve` elsewhere. Imports no torch.

request, files ─ POST /api/jobs ─→ job ─ its events ─→ progress; each picture is fetched and saved as it is finished
"""

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage import interrupts
from zimage.cli.drawing import Drawing, introduced, rewriting_told
from zimage.cli.following import ANSWERS, END, Refused
from zimage.cli.options import given
from zimage.cli.origin import CONDITIONS, FILES, Record, check_values, warn_of_differences
from zimage.cli.progress import counted
from zimage.errors import CheckpointError, RemoteError, RequestError, ZImageError, quoted
from zimage.formats.files import read_file
from zimage.formats.json_text import json_object
from zimage.serve.asking import OPERATORS
from zimage.serve.conditions import PICTURE
from zimage.settings.conditions import Condition
from zimage.settings.declared import MASK_ALPHA, MAX_SIDE, Request
from zimage.settings.fields import Hint, Plain, as_plain, fields
from zimage.settings.loading import LoadSettings
from zimage.settings.paths import user_path
from zimage.settings.plain import mistake
from zimage.settings.rewriting import RewriteSettings
from zimage.settings.scale import ParallelSettings

if TYPE_CHECKING:
    from zimage.cli.client import Client

JOBS = "/api/jobs"
LARGEST_UPLOAD = 1 << 30  # bytes: as much as any server can be told to take
SPARE = 1 << 24  # bytes of a picture beside its pixels
GOODBYE = 10.0  # seconds for cancelling a job on the way out; another Ctrl-C ends that
ID = re.compile(r"[\w-]{1,100}", re.ASCII)
# What a server tells, as far as it is used here, for `mistake`.
SIZE: dict[str, Hint] = {"width": int, "height": int}
JOB: dict[str, Hint] = {
    "id": str,
    "state": str,
    "position": int | None,
    "request": {
        **SIZE,
        "steps": int,
        "guidance": float,
        "shift": float | None,
        "images": int,
        "prompt": str | list[str],
    },
    "seeds": list[int],
    "images": list[dict[str, Any]],
    "notes": list[str],
    "rewritten": list[dict[str, Any]],
}
# Of its request, where the server is not of an earlier version.
SAMPLING: dict[str, Hint] = {"nag": float, "sampler": str, "schedule": str | None}
RECORD: dict[str, Hint] = {
    "request": {**SIZE, "prompt": str, "seed": int, "steps": int, "guidance": float, "shift": float | None},
    "model": {"name": str, "fingerprint": str},
    "lora": list[dict[str, Any]],
    "version": str,
}
REWRITTEN: dict[str, Hint] = {"rewriter": str, "seed": int}
LORA: dict[str, Hint] = {"name": str, "scale": float, "hash": str}
IMAGE: dict[str, Hint] = {"id": str, **SIZE, "settings": RECORD}
PROGRESS: dict[str, Hint] = dict.fromkeys(("step", "total", "index", "count"), int) | {"stage": str}


def check_options(options: Mapping[str, Plain], save_state: Path | None, resume: Path | None) -> None:
    """Raise RequestError for options that a server decides by itself."""
    loading = [name for name in given(options, LoadSettings) if name != "lora"]
    rewriting = [name for name in given(options, RewriteSettings) if name in OPERATORS]
    kept = [name for name, path in (("save_state", save_state), ("resume", resume)) if path is not None]
    for name in (*loading, *given(options, ParallelSettings), *rewriting, *kept):
        flag = "--" + name.replace("_", "-")
        raise RequestError(f"{flag} belongs to the server; leave it out with --server", fields=(name,))


def draw(drawing: Drawing, url: str) -> list[Record]:
    """Have all pictures drawn; returns what was saved where."""
    from zimage.cli.client import Client

    return _Run(drawing, Client(url)).run()


class _Run:
    """One job on its way: what is known of it, and what was saved of it."""

    def __init__(self, drawing: Drawing, client: "Client"):
        self.drawing, self.client, self.progress = drawing, client, drawing.progress
        self.saved: list[Record] = []
        self._content, self._type = _packed(body_of(drawing), _files(drawing))
        self._key, self._id, self._ended = uuid.uuid4().hex, "", False
        self._pictures: set[str] = set()  # ids of those that are saved
        self._told: set[str] = set()  # what was said of the job

    def run(self) -> list[Record]:
        try:
            with self.drawing.resolved.naming_sources():
                self._id = self._submit(ANSWERS)
                for kind, data in self.client.events(f"{JOBS}/{self._id}/events"):
                    self._take(kind, data)
        except KeyboardInterrupt as interrupt:
            interrupt.args = (self._cancel(),)
            raise
        except RemoteError as error:
            goes_on = f"; the job may go on at {self.client.url}{JOBS}/{self._id}" if self._runs else ""
            raise error.with_text(f"{error}{goes_on}") from None
        except BaseException:  # a disk that is full, a name that is taken: nobody waits for the rest
            if self._runs:
                self._cancel()
            raise
        finally:
            self.progress.close()
        return self.saved

    @property
    def _runs(self) -> bool:
        return bool(self._id) and not self._ended

    def _submit(self, seconds: float) -> str:
        """The id of the job: by the key that goes with it, the same one however often this is asked."""
        headers = {"Content-Type": self._type, "Idempotency-Key": self._key}
        answer = self.client.ask("POST", JOBS, self._content, headers, seconds)
        return _id(_checked({"id": str}, "the answer", _object(answer)))

    def _cancel(self) -> str:
        """Cancel the job on the way out, and say what became of it."""
        told = f"{counted(len(self.saved), 'picture')} saved"
        if self._ended:
            return told
        try:
            self._id = self._id or self._submit(GOODBYE)  # it may have been accepted while we were interrupted
            self.client.ask("DELETE", f"{JOBS}/{self._id}", seconds=GOODBYE)
        except ZImageError as error:
            return f"the job could not be cancelled ({error}); {told}"
        return f"the job was cancelled on the server; {told}"

    # ------------------------------------------------------------------ its events

    def _take(self, kind: str, data: dict[str, Plain]) -> None:
        interrupts.check()
        if kind in ("job", END):
            self._take_job(_checked_job(data))
        elif kind == "position":
            self._wait(_checked({"position": int | None}, "the event", data)["position"])
        elif kind == "progress":
            p = _checked(PROGRESS, "the event", data)
            total = max(1, p["total"])
            self.progress.at(p["stage"], min(max(0, p["step"]), total), total, p["index"], p["count"])
        elif kind == "image":
            self._save(data.get("image"))
        if kind == END:
            self._ended = True
            self._check_outcome(data)

    def _take_job(self, job: Record) -> None:
        if not self._told:
            self.drawing.target.check(_records(job))
        for line in _introduction(job, self.client.url):
            if line not in self._told:
                self.progress.note(line)
            self._told.add(line)
        self._wait(job["position"])
        for image in job["images"]:
            self._save(image)

    def _wait(self, position: int | None) -> None:
        if position is not None:
            self.progress.show(f"waiting: {counted(position, 'job')} before it" if position else "waiting")

    def _save(self, image: Plain) -> None:
        """Fetch and save a picture that is not saved yet."""
        id = _id(_checked_image(image))
        if id in self._pictures:
            return
        content = self.client.fetch(f"/api/images/{id}", image["width"] * image["height"] * 4 + SPARE)
        _check_png(content, image)
        record = image["settings"]
        if not self.saved:
            warn_of_differences(self.drawing.origin, record)
        path = self.drawing.target.save(content, record, len(self.saved))
        self._pictures.add(id)
        self.saved.append({"path": str(path), **record})
        self.progress.finished(self.saved[-1])

    def _check_outcome(self, job: Record) -> None:
        """Raise what ended the job, where not all of it is done and saved."""
        count, error = len(job["seeds"]), job.get("error")
        if job["state"] == "done" and len(self.saved) == count:
            return
        if job["state"] == "done":
            raise Refused(f"{self.client.url}: {len(self.saved)} of {count} pictures came; others were deleted there")
        message, fields = (error.get("message"), error.get("fields")) if isinstance(error, dict) else (None, None)
        if fields and isinstance(fields, list):
            raise RequestError(str(message), fields=map(str, fields))
        raise Refused(f"{self.client.url}: the job {f'failed: {message}' if message else 'was ' + job['state']}")


# ---------------------------------------------------------------------- what is sent


def body_of(drawing: Drawing) -> Record:
    """A request as the server reads it. What is open here is left to the server's own defaults."""
    resolved = drawing.resolved
    body: Record = {}
    if drawing.origin:  # a picture leaves nothing to others: what it had not, it should not get now
        body = {field.name: None for field, _ in fields(Request) if field.default is None} | {"rewriter": None}
    body |= {name: as_plain(value) for name, value in resolved.of(Request).items() if value is not None}
    body["images"] = drawing.request.images
    if drawing.rewriting is not None:
        body |= {name: value for name, value in resolved.of(RewriteSettings).items() if name not in OPERATORS}
    if lora := resolved.of(LoadSettings).get("lora"):
        body["lora"] = lora
    for name, conditions in _conditions(drawing).items():  # their pictures come as files, in this order
        body[name] = [{key: value for key, value in vars(one).items() if key != PICTURE} for one in conditions]
    return {name: value for name, value in body.items() if name not in FILES or value == MASK_ALPHA}


def _conditions(drawing: Drawing) -> dict[str, list[Condition]]:
    """References and controls; the model of a control goes by its name on the server."""
    asked = drawing.resolved.of(Request)
    return {name: [kind.parse(one) for one in asked[name]] for name, kind in CONDITIONS.items() if asked.get(name)}


def _files(drawing: Drawing) -> list[tuple[str, tuple[str, bytes]]]:
    """The attachments by their fields, and the pictures of conditions, each with its name and content."""
    asked = drawing.resolved.of(Request)
    paths = [(name, asked[name]) for name in FILES if asked.get(name) and asked[name] != MASK_ALPHA]
    paths += [(name, one.picture) for name, conditions in _conditions(drawing).items() for one in conditions]
    return [(name, _read(name, path)) for name, path in paths]


def _read(field: str, given: str) -> tuple[str, bytes]:
    """The name and content of a file. Raises RequestError with the field in which it was given."""
    path = user_path(given, field)
    try:
        return path.name, read_file(path, LARGEST_UPLOAD)
    except CheckpointError as error:
        raise RequestError(f"{field}: {error}", fields=(field,)) from None


def _packed(body: Record, files: Sequence[tuple[str, tuple[str, bytes]]]) -> tuple[bytes, str]:
    """A request and its files as the content of a POST, and its type."""
    import httpx

    text = json.dumps(body)
    if not files:
        return text.encode(), "application/json"
    packed = httpx.Request("POST", "http://localhost", data={"request": text}, files=files)
    return packed.read(), packed.headers["Content-Type"]


# ---------------------------------------------------------------------- what is answered


def _object(answer: bytes) -> Record:
    try:
        return json_object("the answer", answer)
    except CheckpointError as error:
        raise Refused(f"{error}; is this the url of a `zimage serve`?") from None


def _checked(kind: Hint, place: str, value: Plain) -> Any:
    """A value of a server's answer. Raises Refused where it is not of its kind."""
    if found := mistake(value, kind, place):
        raise Refused(f"the server's answer cannot be used: {found}; is it another version?")
    return value


def _checked_job(job: Plain) -> Record:
    request: Record = _checked(JOB, "the job", job)["request"]
    _checked({name: kind for name, kind in SAMPLING.items() if name in request}, "the job's request", request)
    return dict(job)


def _checked_image(image: Plain) -> Record:
    """What is said of a picture; its settings go into files and names of files."""
    record: Record = _checked(IMAGE, "the picture", image)["settings"]
    if max(image["width"], image["height"]) > MAX_SIDE:
        raise Refused(f"the server's answer cannot be used: a picture has sides of at most {MAX_SIDE} px")
    if record["request"]["shift"] is None and not record["request"].get("sigmas"):
        raise Refused("the server's answer cannot be used: a picture has neither a shift nor sigmas")
    for lora in record["lora"]:
        _checked(LORA, "the picture's lora", lora)
    try:
        check_values("the server's picture", record["request"])
    except RequestError as error:
        raise Refused(str(error)) from None
    return dict(image)


def _id(named: Record) -> str:
    """The id of a job or a picture, fit to be part of an address."""
    if not ID.fullmatch(named["id"]):
        raise Refused(f"the server's answer cannot be used: {quoted(named['id'])} is not an id")
    return str(named["id"])


def _check_png(content: bytes, image: Record) -> None:
    """Raise Refused unless the bytes are an intact PNG of the size that was told; its pixels are not decoded."""
    from zimage.pictures.opening import opened_bytes

    try:
        with opened_bytes("the picture", content) as picture:
            right = picture.format == "PNG" and picture.size == (image["width"], image["height"])
            picture.verify()
    except RequestError:
        right = False
    if not right:
        size = f"{image['width']} × {image['height']} px"
        raise Refused(f"the server sent a picture that is not an intact PNG of {size}")


def _records(job: Record) -> list[Record]:
    """What names the files of the pictures to come, as far as it is known: the request of each."""
    request, seeds, prompts = job["request"], job["seeds"], _prompts(job)
    if not prompts or len(seeds) % len(prompts):
        raise Refused(f"the server's answer cannot be used: {len(seeds)} seeds do not belong to {len(prompts)} prompts")
    each = [prompt for prompt in prompts for _ in range(len(seeds) // len(prompts))]
    pairs = zip(each, seeds, strict=True)
    return [{"request": {**request, "prompt": prompt, "seed": seed}} for prompt, seed in pairs]


def _prompts(job: Record) -> list[str]:
    prompt = job["request"]["prompt"]
    return prompt if isinstance(prompt, list) else [prompt]


def _introduction(job: Record, url: str) -> Iterator[str]:
    """What the user did not choose and should know."""
    yield introduced(job["request"], f"on {url}")
    yield from job["notes"]
    rewritten, prompts = job["rewritten"], _prompts(job)
    if rewritten and len(rewritten) != len(prompts):
        raise Refused(f"the server's answer cannot be used: {len(rewritten)} of {len(prompts)} prompts are rewritten")
    for rewrite, text in zip(rewritten, prompts[: len(rewritten)], strict=True):
        yield rewriting_told(_checked(REWRITTEN, "what was rewritten", rewrite), text)
