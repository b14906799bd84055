"""A render that survives its process: `--save-state` keeps its state in a file, `--resume` goes on from there."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zimage.cli.origin import FILES, Record
from zimage.cli.progress import counted
from zimage.errors import CheckpointError, RequestError
from zimage.settings.declared import LoadSettings
from zimage.settings.fields import Plain, as_plain
from zimage.settings.profiles import FIELDS, OWNERS

if TYPE_CHECKING:
    from zimage.render.job import Job
    from zimage.render.state import RenderState, StateFile

SAME = ("model", "dtype", "precision", "lora")  # without these the bits would be others; the rest is only noted


@dataclass
class Keeping:
    """What a render's state is kept in, and what was found there: `state` and `record`, if it had begun."""

    path: Path | None = None
    state: "RenderState | None" = None
    record: Record = field(default_factory=dict)
    note: str = ""

    @property
    def begun(self) -> bool:
        return self.state is not None

    @property
    def settings(self) -> Record:
        """All settings of the render that had begun, files by their paths."""
        return {**_request_of(self.path, self.record), **self.record["loading"]}

    def start(self, job: "Job", records: list[Record], loading: Record, output: str | None) -> "StateFile | None":
        """The consumer of events that keeps the state; None if no state is to be kept.

        Raises RequestError where a render that had begun could not end in its bits.
        """
        from zimage.render.state import StateFile

        if self.path is None:
            return None
        if self.begun:
            _check_same(self.path, self.record, job, records[0])
            return StateFile(self.path, self.record, self.state)
        return StateFile(self.path, _record(job, records, loading, output))


def open_state(save_state: Path | None, resume: Path | None, picture: Path | None, given: Record) -> Keeping:
    """What the options ask for. Raises RequestError, also where something else is asked for than what had begun."""
    path = resume or save_state
    if path is None:
        return Keeping()
    if save_state and resume and save_state != resume:
        raise RequestError(f"save-state: --resume already keeps the state in {resume}; leave out --save-state")
    if not path.parent.is_dir():
        raise RequestError(f"save-state: the folder {str(path.parent)!r} does not exist; create it first")
    if not path.exists():
        return Keeping(path, note=f"{path} does not exist yet: starting from the beginning" if resume else "")
    if resume is None:
        raise RequestError(f"save-state: {path} exists; continue with --resume {path}, or delete it to start anew")
    if picture is not None:
        raise RequestError("resume: all settings come from the state; leave out --from")
    from zimage.render.state import load_state

    state, record = load_state(path)
    stored = _request_of(path, record)
    for name, value in given.items():
        now, then = (os.path.abspath(value) if name in FILES else value), stored.get(name)
        if name == "template":
            then = record["template"]
        if now != then and as_plain(OWNERS[name].check_one(name, now)) != then:
            raise RequestError(
                f"resume: the render in {path} has {name} {then!r}, not {value!r}; leave it out or start anew",
                fields=(name,),
            )
    return Keeping(path, state, record, f"continuing {path}: {_progress(state)}")


def _progress(state: "RenderState") -> str:
    finished = len(state.finished)
    done = f"{counted(finished, 'image')} denoised" if finished else f"{counted(state.step, 'step')} done"
    return f"{done}, {state.decoded} saved" if state.decoded else done


def _record(job: "Job", records: list[Record], loading: Record, output: str | None) -> Record:
    """What a state has to tell besides latents: the job, how the model was loaded, where the pictures go.

    Files are held by their full paths: unlike a picture, a state is not made to be given away.
    """
    settings = LoadSettings.from_mapping(loading).to_mapping()
    return {
        "job": job.to_dict(),
        "loading": {name: _absolute(name, value) for name, value in settings.items() if value is not None},
        "template": job.request.template,
        "rewritten": [record["rewritten"] for record in records[:: job.request.images] if "rewritten" in record],
        "output": output,
        **{name: records[0][name] for name in SAME},
    }


def _absolute(name: str, value: Plain) -> Plain:
    if not FIELDS[name].metadata["path"]:
        return value
    one = isinstance(value, str)
    full = [os.path.abspath(os.path.expanduser(text)) for text in ([value] if one else value)]
    return full[0] if one else full


def _request_of(path: Path | None, record: Record) -> Record:
    """The settings of the job's request; the template's parts stand in their own fields."""
    try:
        stored = {n: v for n, v in record["job"]["request"].items() if v is not None and n != "template"}
        _ = record["loading"].items(), record["template"], record["output"], [record[name] for name in SAME]
        return stored | {name: stored[name]["path"] for name in FILES if name in stored}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold a complete state; start anew") from error


def _check_same(path: Path, record: Record, job: "Job", metadata: Record) -> None:
    for name in SAME:
        if record[name] != metadata[name]:
            raise RequestError(f"resume: the render in {path} has {name} {record[name]}, not {metadata[name]}")
    for name in FILES:
        then = record["job"]["request"].get(name)
        if then and getattr(job.request, name).hash != then["hash"]:
            raise RequestError(f"resume: {then['path']} is not the file that the render in {path} began with")
