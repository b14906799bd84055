"""A render that survives its process: `--save-state` keeps its state in a file, `--resume` goes on from there.

A state may come from somebody else: everything in it is checked, it does not say where on this machine to write, and
what it says was saved is looked for.
"""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimage.cli.origin import CONDITIONS, FILES, Record
from zimage.cli.progress import counted
from zimage.cli.target import check_output, holds
from zimage.errors import CheckpointError, RequestError
from zimage.formats.atomic import destination
from zimage.formats.lock import Lock
from zimage.settings.declared import MASK_ALPHA, Request
from zimage.settings.fields import Hint, Plain, as_plain
from zimage.settings.guiding import FIELD as METHOD
from zimage.settings.guiding import GuidanceMethod
from zimage.settings.loading import LoadSettings
from zimage.settings.merging import FIELDS, OWNERS
from zimage.settings.paths import user_path
from zimage.settings.plain import mistake

if TYPE_CHECKING:
    from zimage.pipeline import ZImage
    from zimage.render.job import Job
    from zimage.render.state import RenderState, StateFile

SAME = ("model", "dtype", "precision", "lora")  # without these the bits would be others; the rest is only noted
NOT_KEPT = ("cache_folder",)  # of how the model was loaded: it moves no bit, and is a place to write to
# What a state's record is, for `mistake`, beside the job.
RECORD: dict[str, Hint] = {
    "loading": dict[str, Any],
    "template": str | None,
    "rewritten": list[dict[str, str | int]],
    "output": str | None,
    "saved": list[str],  # where each picture is that was saved, in order
    "model": dict[str, str],
    "dtype": str,
    "precision": str,
    "lora": list[dict[str, str | float]],
}


@dataclass
class Keeping:
    """What a render's state is kept in, and what was found there: `state` and `record`, if it had begun."""

    path: Path | None = None
    state: "RenderState | None" = None
    record: Record = field(default_factory=dict)
    note: str = ""
    lock: Lock | None = None

    @property
    def begun(self) -> bool:
        return self.state is not None

    @property
    def settings(self) -> Record:
        """All settings of the render that had begun, files by their paths."""
        loading = {name: value for name, value in self.record["loading"].items() if name not in NOT_KEPT}
        return {**_request_of(self.record), **loading}

    def output(self, given: str | None) -> str | None:
        """Where the pictures go: as given now, else as before. Raises RequestError for a place elsewhere."""
        if given is not None or not self.begun:
            return given
        before, here = self.record["output"], os.path.realpath(".")
        if before is not None and "\0" in before:
            raise CheckpointError(f"{self.path} does not hold a complete state (its output is not a path); start anew")
        if before is not None and os.path.commonpath([os.path.realpath(before), here]) != here:
            told = f"resume: {self.path} writes to {before[:200]!r}, outside of the current folder"
            raise RequestError(f"{told}; pass that with -o if it should")
        return str(before) if before is not None else None

    def start(
        self, pipe: "ZImage", job: "Job", records: list[Record], loading: Record, output: str | None
    ) -> "StateFile | None":
        """The consumer of events that keeps the state; None if no state is to be kept.

        Raises RequestError where a render that had begun could not end in its bits, CheckpointError for a state that
        is not one of this render, and OutputError where it cannot be written.
        """
        from zimage.render.state import StateFile

        if self.path is None:
            return None
        if self.state is None:
            return StateFile(self.path, _record(job, records, loading, output), lock=self.lock)
        _check_same(self.path, self.record, job, records[0])
        try:
            pipe.check_state(self.state, job)
        except RequestError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        self._look_for_saved(records)
        return StateFile(self.path, self.record, self.state, self.lock)

    def _look_for_saved(self, records: list[Record]) -> None:
        """Count as decoded only what is there; the rest is drawn again from its latents, which takes little."""
        assert self.state is not None
        saved = self.record["saved"]
        there = (holds(Path(path), record) for path, record in zip(saved, records[: len(saved)], strict=True))
        found = sum(itertools.takewhile(bool, there))
        self.record["saved"] = saved[:found]
        self.state.decoded = min(found, self.state.decoded)


def open_state(save_state: Path | None, resume: Path | None, picture: Path | None, given: Record) -> Keeping:
    """What the options ask for. Raises RequestError, also where something else is asked for than what had begun."""
    path = resume or save_state
    if path is None:
        return Keeping()
    if save_state and resume and save_state != resume:
        raise RequestError(f"save-state: --resume already keeps the state in {resume}; leave out --save-state")
    check_output(path, "save-state")
    path = destination(path)
    if not path.exists():
        note = f"{path} does not exist yet: starting from the beginning" if resume else ""
        return Keeping(path, note=note, lock=_until_the_end(Lock(path)))
    if resume is None:
        raise RequestError(f"save-state: {path} exists; continue with --resume {path}, or delete it to start anew")
    if picture is not None:
        raise RequestError("resume: all settings come from the state; leave out --from")
    return _opened(path, given)


def _until_the_end(lock: Lock) -> Lock:
    """A lock that the command gives up when it ends."""
    click.get_current_context().call_on_close(lock.close)
    return lock


def _opened(path: Path, given: Record) -> Keeping:
    from zimage.render.state import hold, load_state

    lock = _until_the_end(hold(path))
    state, record = load_state(path)
    record.setdefault("saved", [])  # states of earlier versions did not say
    _check_record(path, record)
    stored = _request_of(record)
    for name, value in given.items():
        is_path = name in FILES and value != MASK_ALPHA
        now, then = (os.path.abspath(value) if is_path else value), stored.get(name)
        if name in CONDITIONS:
            now, then = _named(name, value), _named(name, then)
        if name == "template":
            then = record["template"]
        if name == METHOD:
            now = GuidanceMethod.parse(str(value)).describe()
        if now != then and as_plain(OWNERS[name].check_one(name, now)) != then:
            raise RequestError(
                f"resume: the render in {path} has {name} {then!r:.80}, not {value!r:.80}; leave it out or start anew",
                fields=(name,),
            )
    return Keeping(path, state, record, f"continuing {path}: {_progress(state)}", lock)


def _progress(state: "RenderState") -> str:
    finished = len(state.finished)
    done = f"{counted(finished, 'image')} denoised" if finished else f"{counted(state.step, 'step')} done"
    return f"{done}, {state.decoded} saved" if state.decoded else done


def _record(job: "Job", records: list[Record], loading: Record, output: str | None) -> Record:
    """What a state has to tell besides latents: the job, how the model was loaded, where the pictures go.

    Files are held by their full paths: unlike a picture, a state is not made to be given away.
    """
    settings = LoadSettings.from_mapping(loading).to_mapping()
    kept = {name: value for name, value in settings.items() if value is not None and name not in NOT_KEPT}
    return {
        "job": job.to_dict(),
        "loading": {name: _absolute(name, value) for name, value in kept.items()},
        "template": job.request.template,
        "rewritten": [record["rewritten"] for record in records[:: job.request.images] if "rewritten" in record],
        "output": output,
        "saved": [],
        **{name: records[0][name] for name in SAME},
    }


def _named(name: str, conditions: Plain) -> Plain:
    """The files and numbers of conditions, however they were passed."""
    kind = CONDITIONS[name]
    parsed = [kind.parse(one) for one in conditions or []]
    return [
        tuple(os.path.abspath(value) if n in kind.FILES else value for n, value in vars(one).items()) for one in parsed
    ]


def _absolute(name: str, value: Plain) -> Plain:
    if not FIELDS[name].metadata["path"]:
        return value
    one = isinstance(value, str)
    full = [os.path.abspath(user_path(text, name)) for text in ([value] if one else value)]
    return full[0] if one else full


def _request_of(record: Record) -> Record:
    """The settings of the job's request; the template's parts stand in their own fields."""
    stored = {n: v for n, v in record["job"]["request"].items() if v is not None and n != "template"}
    return stored | {name: stored[name]["path"] for name in FILES if name in stored}


def _check_record(path: Path, record: Record) -> None:
    """Raise CheckpointError unless everything that a state says is of its kind, and its lists belong together."""
    from zimage.render.job import job_mistake

    fault = mistake(record, RECORD, "state") or job_mistake(record.get("job"))
    if not fault:
        try:
            request = Request.from_mapping(_request_of(record))
            LoadSettings.from_mapping(record["loading"])
        except RequestError as error:
            fault = str(error)
        else:
            counts = len(record["saved"]), len(record["job"]["seeds"]), len(record["rewritten"])
            if counts[0] > request.count or counts[1] != request.count or counts[2] not in (0, len(request.prompts)):
                fault = f"its lists do not have the lengths that {counted(request.count, 'image')} need"
    if fault:
        raise CheckpointError(f"{path} does not hold a complete state ({fault}); start anew")


def _check_same(path: Path, record: Record, job: "Job", metadata: Record) -> None:
    for name in SAME:
        if record[name] != metadata[name]:
            raise RequestError(f"resume: the render in {path} has {name} {record[name]}, not {metadata[name]}")
    for name in FILES:
        then = record["job"]["request"].get(name)
        if then and getattr(job.request, name).hash != then["hash"]:
            raise RequestError(f"resume: {then['path']} is not the file that the render in {path} began with")
    for name, condition in CONDITIONS.items():
        began, current = record["job"]["request"].get(name) or [], getattr(job.request, name) or []
        for was, now_is in zip(began, (one.point() for one in current), strict=True):
            if other := [was[role] for role in condition.FILES if was[f"{role}_hash"] != now_is[f"{role}_hash"]]:
                raise RequestError(f"resume: {other[0]} is not the file that the render in {path} began with")
    from zimage.render.job import DECIDED

    now = job.to_dict()
    if changed := next((name for name in DECIDED if record["job"][name] != now[name]), ""):
        told = (
            f"resume: the {changed.replace('_', ' ')} of the render in {path} are not those that its settings give now"
        )
        raise RequestError(f"{told}: it was edited, or a template or the tokenizer was; start anew")
