"""The steps of a render one by one, in one process: seconds, memory, and whether repetition leaks.

A run of one scenario under one configuration is a record, of the form that cells of a sweep have
(`zimage/experiments/record.py`): medians as `timings`, their range as `spread`.
"""

import gc
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from bench.machine import command_line, describe_gpu, describe_machine
from bench.options import JSON
from zimage.errors import RequestError
from zimage.experiments.axes import OWNERS, parse_axis
from zimage.experiments.measured import peaks, reset_peaks
from zimage.experiments.record import Record
from zimage.experiments.running import told
from zimage.formats.atomic import write_text
from zimage.loading.memory import process_memory
from zimage.loading.registry import REQUIRED
from zimage.settings.loading import LoadSettings, absolute_paths
from zimage.version import __version__

SHORT = "a cat face on a blue background"
MEDIUM = " ".join(["A quiet harbour at dawn, fishing boats at anchor, gulls over the mole, light on wet stone."] * 6)
TEMPLATE = "photo-overcast"
LEAK_ROUNDS = 20
WRITTEN = 17  # tokens
Settings = dict[str, Any]


class Profile:
    """A model under test; each scenario is a method that yields (figure, seconds or bytes)."""

    def __init__(self, load: Settings):
        self.load = load
        self.pipe = self._open()

    def _open(self):
        import zimage

        settings = {"cache_entries": 0, **self.load}  # every encode is a real one
        return zimage.ZImage.load(settings.pop("model", None), **settings)

    def cuda_sync(self) -> Iterator[tuple[str, float]]:
        """The cost of waiting for an idle GPU; nothing elsewhere."""
        yield "sync_s", self._timed(lambda: None)

    def load_encoder(self) -> Iterator[tuple[str, float]]:
        """Loading the text encoder from files, cold or warm as the page cache is."""
        self.pipe.release()
        yield "load_s", self._timed(lambda: self.pipe.text_encoder)

    def load_pipeline(self) -> Iterator[tuple[str, float]]:
        """Opening and checking a model folder, and loading its largest component."""
        yield "open_s", self._timed(self._open)
        self.pipe.release()
        yield "dit_s", self._timed(lambda: self.pipe.dit)

    def encode_short(self) -> Iterator[tuple[str, float]]:
        yield from self._encode(SHORT)

    def encode_medium(self) -> Iterator[tuple[str, float]]:
        yield from self._encode(MEDIUM)

    def encode_with_template(self) -> Iterator[tuple[str, float]]:
        """A short prompt behind a template's system prompt."""
        yield from self._encode(SHORT, template=TEMPLATE)

    def encode_with_thinking(self) -> Iterator[tuple[str, float]]:
        """A short prompt before a think block with content."""
        yield from self._encode(SHORT, thinking_content=MEDIUM)

    def generate_text(self) -> Iterator[tuple[str, float]]:
        """Writing with the text encoder: seconds to the first token, and for each token after it."""
        from zimage.settings.rewriting import Sampling
        from zimage.text.generate import generate

        ids = self.pipe.tokenize(SHORT, template=TEMPLATE)
        most_likely = Sampling(temperature=0.0)
        with torch.no_grad():
            tokens = generate(self.pipe.text_encoder, ids, most_likely, WRITTEN, (), torch.Generator())
            yield "first_s", self._timed(lambda: next(tokens))
            yield "token_s", self._timed(lambda: list(tokens)) / (WRITTEN - 1)

    def repeated_encode(self) -> Iterator[tuple[str, float]]:
        """Whether repeated encoding leaks: bytes kept per round, after a few rounds of warm-up."""
        for _ in range(3):
            self.pipe.encode([SHORT])
        before = self._held()
        yield "encode_s", self._timed(lambda: [self.pipe.encode([SHORT]) for _ in range(LEAK_ROUNDS)]) / LEAK_ROUNDS
        gc.collect()
        yield "leak_bytes", max(self._held() - before, 0) / LEAK_ROUNDS

    def full_generation(self) -> Iterator[tuple[str, float]]:
        """A whole render at the model's own size and steps, by stage."""
        started = time.perf_counter()
        result = self.pipe.generate(SHORT, seed=0)
        yield "total_s", time.perf_counter() - started
        yield from ((f"{stage}_s", seconds) for stage, seconds in result.timings.items())

    def _encode(self, prompt: str, **text: str) -> Iterator[tuple[str, float]]:
        self.pipe.encode([prompt], **text)
        yield "encode_s", self._timed(lambda: self.pipe.encode([prompt], **text))
        yield "tokens", len(self.pipe.tokenize(prompt, **text))

    def _timed(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        for device in self._gpus():
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def _held(self) -> int:
        gpus = self._gpus()
        return sum(map(torch.cuda.memory_allocated, gpus)) if gpus else process_memory()

    def _gpus(self) -> set[torch.device]:
        return {place.device for place in self.pipe.places.values() if place.device.type == "cuda"}


SCENARIOS = [name for name, member in vars(Profile).items() if callable(member) and not name.startswith("_")]


def measured(tested: Profile, settings: Settings, name: str, repeat: int) -> Record:
    """The record of a scenario; one that fails is a record with its error."""
    pipe = tested.pipe
    reset_peaks(pipe)
    try:
        rounds = [dict(getattr(tested, name)()) for _ in range(repeat)]
    except Exception as error:
        return _record(settings, name, repeat, tested.load, error=told(error))
    found = {figure: [one[figure] for one in rounds] for figure in rounds[0]}
    medians = {figure: statistics.median(values) for figure, values in found.items()}
    seconds = [figure for figure in found if figure.endswith("_s")]
    return _record(
        settings,
        name,
        repeat,
        tested.load,
        timings={figure.removesuffix("_s"): medians[figure] for figure in seconds},
        spread={figure.removesuffix("_s"): [min(found[figure]), max(found[figure])] for figure in seconds},
        memory=peaks(pipe) | {figure: medians[figure] for figure in found if figure.endswith("_bytes")},
        counts={"rounds": repeat} | {figure: medians[figure] for figure in found if figure == "tokens"},
        model={"name": pipe.model.name, "fingerprint": pipe.model.fingerprint},
        machine=describe_machine() | (describe_gpu(pipe.device) if pipe.device.type == "cuda" else {}),
    )


def _record(settings: Settings, name: str, repeat: int, load: Settings, **values: Any) -> Record:
    axes, asked = {**settings, "scenario": name}, {"scenario": name, "repeat": repeat}
    identity = hashlib.sha256(json.dumps([axes, values.get("model")], sort_keys=True).encode()).hexdigest()[:16]
    return Record(identity, "profile", axes=axes, load=load, request=asked, version=__version__, **values)


# ---------------------------------------------------------------------- what is measured


def choices(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    """A comma-separated list of scenarios."""
    names = SCENARIOS if value is None else value.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise click.BadParameter(f"{name!r} is unknown; use {', '.join(SCENARIOS)}")
    return names


def swept(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, list[Any]]:
    """Settings of loading and the values of each, None for its default."""
    try:
        axes = [parse_axis(text) for text in value]
    except RequestError as error:
        raise click.BadParameter(str(error)) from None
    for (name,) in (axis.names for axis in axes):
        if OWNERS[name] is not LoadSettings:
            raise click.BadParameter(f"{name} is not a setting of loading; `bench sweep --vary` takes it")
    return {axis.names[0]: [value for (value,) in axis.points] for axis in axes}


def here() -> list[str]:
    """The devices that PyTorch can use on this machine."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def placements(devices: Sequence[str]) -> dict[str, list[Any]]:
    """Every component on every device, as axes."""
    return {f"{name}_device": list(devices) for name in REQUIRED}


def configurations(axes: dict[str, list[Any]]) -> Iterator[Settings]:
    """Every combination of the axes' values."""
    for values in itertools.product(*axes.values()):
        yield {name: value for name, value in zip(axes, values, strict=True) if value is not None}


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Model folder. Default: the bundled demo.")
@click.option("--tests", callback=choices, help=f"Comma-separated. Default: all of {', '.join(SCENARIOS)}.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Rounds of every scenario.")
@click.option("--device", "devices", multiple=True, help="Repeat to sweep over devices. Default: auto.")
@click.option(
    "--sweep-devices", is_flag=True, help="Try every component on every device of this machine, in all combinations."
)
@click.option(
    "--sweep",
    "axes",
    multiple=True,
    callback=swept,
    metavar="NAME=VALUE,…",
    help="Try every value of a setting of loading (model, dtype, attention, precision, residency, …); repeat for "
    "combinations.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Also write the records here, one per line.")
@click.option("--show-info", is_flag=True, help="Describe the machine first.")
@JSON
def profile(
    model: Path | None,
    tests: list[str],
    repeat: int,
    devices: tuple[str, ...],
    sweep_devices: bool,
    axes: dict[str, list[Any]],
    output: Path | None,
    show_info: bool,
    as_json: bool,
) -> None:
    """Measure the steps of a render one by one: loading, encoding, leaks, all; swept over settings and devices."""
    if devices and sweep_devices:
        raise click.UsageError("--sweep-devices takes every device of this machine; leave out --device")
    if output and not output.parent.is_dir():
        raise click.BadParameter(f"{output} lies in no folder; make {output.parent} first", param_hint="--output")
    if show_info and not as_json:
        print(json.dumps(describe_machine(), indent=2))
    records: list[Record] = []
    placed = placements(here()) if sweep_devices else {"device": list(devices or ["auto"])}
    for settings in configurations({**placed, **axes}):
        if not as_json:
            print(", ".join(f"{key} {value}" for key, value in settings.items()))
        for record in profiled(model, settings, tests, repeat):
            records.append(record)
            if not as_json:
                print_record(record)
            if output:  # what is measured is there, whatever happens to the rest
                write_text(output, "".join(record.line() + "\n" for record in records))
    plain = [json.loads(record.line()) for record in records]
    print(json.dumps({"machine": describe_machine(), "command": command_line(), "records": plain}))


def profiled(model: Path | None, settings: Settings, tests: Sequence[str], repeat: int) -> Iterator[Record]:
    """The records of a configuration; where it cannot be opened, each has that error."""
    load = absolute_paths({**({"model": str(model)} if model else {}), **settings})
    try:
        tested = Profile(load)
    except Exception as error:
        yield from (_record(settings, name, repeat, load, error=told(error)) for name in tests)
        return
    yield from (measured(tested, settings, name, repeat) for name in tests)


def print_record(record: Record) -> None:
    cells = [f"{name} {seconds:.4g} s" for name, seconds in record.timings.items()]
    cells += [f"{name} {record.counts[name]:g}" for name in ("tokens",) if name in record.counts]
    cells += [f"{name} {size:.4g}" for name, size in record.memory.items() if name.endswith("_bytes")]
    print(f"  {record.axes['scenario']:22}" + (record.error or ", ".join(cells)))


if __name__ == "__main__":
    profile()
