"""The steps of a render one by one, in one process: seconds, memory, and whether repetition leaks."""

import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from bench.machine import describe_machine
from bench.options import JSON

SHORT = "a cat face on a blue background"
MEDIUM = " ".join(["A quiet harbour at dawn, fishing boats at anchor, gulls over the mole, light on wet stone."] * 6)
TEMPLATE = "photo-overcast"
LEAK_ROUNDS = 20
WRITTEN = 17  # tokens
SWITCHES: dict[str, Any] = {"true": True, "false": False}


class Profile:
    """A model under test; each scenario is a method that yields (figure, seconds or bytes)."""

    def __init__(self, model: Path | None, settings: dict[str, Any]):
        self.model, self.settings = model, settings
        self.pipe = self._load()

    def _load(self):
        import zimage

        return zimage.ZImage.load(self.model, **{"cache_entries": 0, **self.settings})  # every encode is a real one

    def cuda_sync(self) -> Iterator[tuple[str, float]]:
        """The cost of waiting for an idle GPU; nothing elsewhere."""
        yield "sync_s", self._timed(lambda: None)

    def load_encoder(self) -> Iterator[tuple[str, float]]:
        """Loading the text encoder from files, cold or warm as the page cache is."""
        self.pipe.release()
        yield "load_s", self._timed(lambda: self.pipe.text_encoder)

    def load_pipeline(self) -> Iterator[tuple[str, float]]:
        """Opening and checking a model folder, and loading its largest component."""
        yield "open_s", self._timed(self._load)
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
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize(self.pipe.device)
        return time.perf_counter() - start

    def _held(self) -> int:
        if self.pipe.device.type == "cuda":
            return torch.cuda.memory_allocated(self.pipe.device)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


SCENARIOS = [name for name, member in vars(Profile).items() if callable(member) and not name.startswith("_")]


def choices(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    """A comma-separated list of scenarios."""
    names = SCENARIOS if value is None else value.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise click.BadParameter(f"{name!r} is unknown; use {', '.join(SCENARIOS)}")
    return names


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Model folder. Default: the bundled demo.")
@click.option("--tests", callback=choices, help=f"Comma-separated. Default: all of {', '.join(SCENARIOS)}.")
@click.option("--repeat", default=3, show_default=True, help="Rounds of every scenario.")
@click.option(
    "--device", "devices", multiple=True, default=["auto"], show_default=True, help="Repeat to sweep over devices."
)
@click.option(
    "--sweep",
    multiple=True,
    metavar="KEY=VALUE,…",
    help="Try every value of a load setting (dtype, attention, precision, residency); repeat for combinations.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Also write the JSON here.")
@click.option("--show-info", is_flag=True, help="Describe the machine first.")
@JSON
def profile(
    model: Path | None,
    tests: list[str],
    repeat: int,
    devices: tuple[str, ...],
    sweep: tuple[str, ...],
    output: Path | None,
    show_info: bool,
    as_json: bool,
) -> None:
    """Measure the steps of a render one by one: loading, encoding, leaks, all; swept over settings and devices."""
    if show_info and not as_json:
        print(json.dumps(describe_machine(), indent=2))
    runs = []
    for settings in configurations(devices, sweep):
        tested = Profile(model, settings)
        rounds = {name: [dict(getattr(tested, name)()) for _ in range(repeat)] for name in tests}
        medians = {
            name: {figure: statistics.median(r[figure] for r in found) for figure in found[0]}
            for name, found in rounds.items()
        }
        runs.append({"settings": settings, "median": medians, "rounds": rounds})
        if not as_json:
            print_run(runs[-1])
    line = json.dumps({"machine": describe_machine(), "model": model and model.name, "runs": runs})
    if output:
        output.write_text(line + "\n")
    print(line)


def configurations(devices: tuple[str, ...], sweep: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of devices and swept settings."""
    axes: dict[str, list[Any]] = {"device": list(devices)}
    for axis in sweep:
        key, _, listed = axis.partition("=")
        if not listed:
            raise click.BadParameter(f"--sweep {axis!r} should be KEY=VALUE,VALUE")
        axes[key] = [SWITCHES.get(value, value) for value in listed.split(",")]
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def print_run(run: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in run["settings"].items()))
    for name, figures in run["median"].items():
        cells = [f"{f.removesuffix('_s')} {value:.4g}{' s' * f.endswith('_s')}" for f, value in figures.items()]
        print(f"  {name:22}" + ", ".join(cells))


if __name__ == "__main__":
    profile()
