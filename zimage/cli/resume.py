"""A render that survives its process: `--checkpoint` keeps its state in a file, `--resume` goes on from there."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage.cli.origin import FILES
from zimage.errors import CheckpointError, RequestError
from zimage.settings.declared import LoadSettings, Request
from zimage.settings.profiles import FIELDS

SAME = ("model", "dtype", "precision", "lora")  # without these the bits would be others; the rest is only noted


@dataclass
class Keeping:
    """What a render's state is kept in, and what was found there: `state` and `record`, if it had begun."""

    path: Path | None = None
    state: Any = None
    record: dict[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def begun(self) -> bool:
        return self.state is not None

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the render that had begun, files by their paths."""
        return {**_request_of(self.path, self.record), **self.record["loading"]}

    def start(self, request: Request, records: list[dict], asked: dict[str, Any], output: str | None) -> Any:
        """The consumer of events that keeps the state; nothing where nobody asked for it.

        Raises RequestError where a render that had begun could not end in its bits.
        """
        if self.path is None:
            return None
        if self.begun:
            _check_same(self.path, self.record, request, records[0])
            return StateFile(self.path, self.record, self.state)
        return StateFile(self.path, _record(request, records, asked, output))


class StateFile:
    """Keeps the state of a render. `record` tells what is rendered.

    A state holds the latents of all finished images. It is written when an image is finished or saved, and after a step
    unless that would take more than a tenth of the time.
    """

    def __init__(self, path: Path, record: dict[str, Any], state: Any = None):
        from zimage.render.state import RenderState

        self.path, self.record, self.state = path, record, state or RenderState()
        self._write()

    def update(self, event: Any) -> None:
        if self.state.update(event) and (event.step == event.total or time.monotonic() >= self._due):
            self._write()

    def remove(self) -> None:
        """When all pictures are saved there is nothing to go on with."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        from zimage.render.state import save_state

        begun = time.monotonic()
        try:
            save_state(self.path, self.state, self.record)
        except Exception as error:  # safetensors raises its own for a full disk
            raise RequestError(f"checkpoint: {self.path} cannot be written: {error}") from error
        now = time.monotonic()
        self._due = now + 9 * (now - begun)


def open_state(checkpoint: Path | None, resume: Path | None, source: Path | None, given: dict[str, Any]) -> Keeping:
    """What the options ask for. Raises RequestError, also where something else is asked for than what had begun."""
    if checkpoint is None and resume is None:
        return Keeping()
    if checkpoint and resume and checkpoint != resume:
        raise RequestError(f"checkpoint: with --resume the state is kept in {resume}; leave --checkpoint out")
    path = resume or checkpoint
    if not path.parent.is_dir():
        raise RequestError(f"checkpoint: the folder {str(path.parent)!r} does not exist; make it first")
    if not path.exists():
        return Keeping(path, note=f"{path} is not there yet: starting afresh" if resume else None)
    if resume is None:
        raise RequestError(
            f"checkpoint: {path} exists; go on with --resume {path}, or remove it if that render is not wanted"
        )
    if source is not None:
        raise RequestError("resume: all settings come from the state; leave --from out")
    from zimage.render.state import load_state

    state, record = load_state(path)
    stored = _request_of(path, record)
    for name, value in given.items():
        now, then = (os.path.abspath(value) if name in FILES else value), stored.get(name)
        if name == "template":
            then = record["template"]
        if now != then and Request.from_mapping({name: now}).to_mapping()[name] != then:
            raise RequestError(
                f"resume: {path} goes on with {name} {then!r}, not {value!r}; leave it out or start anew"
            )
    return Keeping(path, state, record, f"going on with {path}: {_progress(state)}")


def _progress(state: Any) -> str:
    done = f"{len(state.finished)} images denoised" if state.finished else f"{state.step} steps done"
    return f"{done}, {state.decoded} saved" if state.decoded else done


def _record(request: Request, records: list[dict], asked: dict[str, Any], output: str | None) -> dict[str, Any]:
    """What a state has to tell besides latents: the resolved request, how the model was loaded, where pictures go.

    Files are held by their full paths: unlike a picture, a state is not made to be given away.
    """
    plain = {**request.to_mapping(), "template": None}
    plain |= {name: {**plain[name], "path": os.path.abspath(asked[name])} for name in FILES if plain[name]}
    loading = LoadSettings.from_mapping({n: v for n, v in asked.items() if n in LoadSettings.names()}).to_mapping()
    return {
        "request": plain,
        "loading": {name: _absolute(name, value) for name, value in loading.items() if value is not None},
        "template": request.template,
        "rewritten": [record.get("rewritten") for record in records[:: request.images] if "rewritten" in record],
        "output": output,
        **{name: records[0][name] for name in SAME},
    }


def _absolute(name: str, value: Any) -> Any:
    if not FIELDS[name].metadata["path"]:
        return value
    one = isinstance(value, str)
    full = [os.path.abspath(os.path.expanduser(text)) for text in ([value] if one else value)]
    return full[0] if one else full


def _request_of(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    try:
        stored = {name: value for name, value in record["request"].items() if value is not None}
        _ = record["loading"].items(), record["template"], record["output"], [record[name] for name in SAME]
        return stored | {name: stored[name]["path"] for name in FILES if name in stored}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold all of a render; start anew") from error


def _check_same(path: Path, record: dict[str, Any], request: Request, metadata: dict[str, Any]) -> None:
    for name in SAME:
        if record[name] != metadata[name]:
            raise RequestError(f"resume: {path} began with another {name}: {record[name]}; now {metadata[name]}")
    for name in FILES:
        then = record["request"].get(name)
        if then and getattr(request, name).hash != then["hash"]:
            raise RequestError(f"resume: {then['path']} is not the file that {path} began with")
