"""Mutated states of renders, for `gen --resume`: none is believed, and none loses a picture."""

import contextlib
import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import zimage
from zimage.cli import main
from zimage.cli.resume import _record
from zimage.render.state import FORMAT, VERSION

Call = Callable[[], object]
Tensors = dict[str, torch.Tensor]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "~nosuch/x", "/", "a\0b", "\ud800", "\x1b]0;x\x07", "x" * 10_000, "..", "{seed:c}.png"),
    *([], {}, [[]], [None], ["x"], {"": ""}, {"x": {}}, [0, 0, 0], [[[[0]]]]),
)
OUTPUTS = ("/tmp/x.png", "../x.png", "here/../../x.png", "/dev/null", "link/x.png", "link.png", "{seed:>99999}.png")


def cases(chance: random.Random, folder: Path) -> Iterator[tuple[str, Call]]:
    """States that are mutated, without an end: their names, and calls that resume them in `folder`."""
    here = folder / "deep" / "here"
    here.mkdir(parents=True, exist_ok=True)
    for name, target in (("link", "../.."), ("link.png", "../../elsewhere.png")):
        with contextlib.suppress(FileExistsError):
            (here / name).symlink_to(target)
    sound = [_sound(settings) for settings in ({"images": 2}, {"hires": 2.0})]
    while True:
        record, shape = copy.deepcopy(chance.choice(sound))
        tensors = _tensors(record, shape, chance)
        mutate = chance.choice(MUTATIONS)
        told = mutate(record, tensors, chance)
        yield f"state: {told}", _resuming(here, record, tensors, chance.random() if mutate is _bytes else None)


def _sound(settings: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What a state of the demo's render tells, and the shape of its latents."""
    pipe = zimage.ZImage.load(device="cpu", dtype="fp32")
    job = pipe.prepare(zimage.Request("a cat", seed=1, width=32, height=32, steps=2, **settings))
    records = [pipe.metadata(job, i) for i in range(job.count)]
    loading = {"device": "cpu", "dtype": "fp32"}
    return json.loads(json.dumps(_record(job, records, loading, "{index}.png"))), (1, 16, 4, 4)


def _tensors(record: dict[str, Any], shape: tuple[int, ...], chance: random.Random) -> Tensors:
    """The latents of a moment of the render, and what the record says of it."""
    count = len(record["job"]["seeds"])
    done = chance.randrange(count + 1)
    found = {f"finished.{i}": torch.randn(shape) for i in range(done)}
    if record["job"]["request"]["hires"]:
        small = (*shape[:2], shape[2] // 2, shape[3] // 2)
        found = {name.replace("finished", "small"): torch.randn(small) for name in found}
    begun = done < count and chance.random() < 0.5
    if begun:
        found["latents"] = torch.randn(shape if not record["job"]["request"]["hires"] else small)
    record |= {"step": int(begun), "decoded": 0}
    return found


def _resuming(here: Path, record: dict[str, Any], tensors: Tensors, cut: float | None) -> Call:
    def call() -> int:
        state = here / "state"
        metadata = {"format": FORMAT, "version": VERSION, "state": json.dumps(record)}
        save_file(tensors, state, metadata)
        if cut is not None:
            content = bytearray(state.read_bytes())
            place = int(cut * len(content))
            state.write_bytes(content[:place] if place % 2 else content[:place] + b"\xff" + content[place + 1 :])
        before = {path for path in here.parent.parent.rglob("*") if here not in path.parents}
        with contextlib.chdir(here):
            status = main(["gen", "--resume", "state", "-q"])
        pictures = list(here.glob("*.png"))
        assert {path for path in here.parent.parent.rglob("*") if here not in path.parents} == before, (
            "written elsewhere"
        )
        assert state.exists() == (status != 0), f"status {status}, and the state is {state.exists()}"
        assert status in (0, 1, 2)
        assert status or any(not picture.is_symlink() for picture in pictures), "nothing drawn"
        for path in (*pictures, state):
            if not path.is_symlink():
                path.unlink(missing_ok=True)
        return status

    return call


# ---------------------------------------------------------------------- mutations: each says what it did


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _somewhere(record: dict[str, Any], chance: random.Random) -> tuple[Any, Any, str]:
    """What holds a random value, its key there, and its place in words."""
    path = chance.choice(list(_places(record)))
    holder: Any = record
    for key in path[:-1]:
        holder = holder[key]
    return holder, path[-1], ".".join(map(str, path))[:80]


def _another_value(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    holder, key, place = _somewhere(record, chance)
    holder[key] = copy.deepcopy(chance.choice(VALUES))
    return f"{place} = {holder[key]!r:.40}"


def _a_field_missing(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    holder, key, place = _somewhere(record, chance)
    del holder[key]
    return f"without {place}"


def _a_list_of_another_length(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    lists = [(h, k, p) for h, k, p in (_somewhere(record, chance) for _ in range(50)) if isinstance(h[k], list)]
    if not lists:
        return _another_value(record, tensors, chance)
    holder, key, place = chance.choice(lists)
    holder[key] = chance.choice([[], holder[key][1:], holder[key] * 2])
    return f"{place} of another length"


def _numbers(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    name = chance.choice(("step", "decoded"))
    record[name] = chance.choice((1, 2, 3, 10**9, -1, 2**63, "0", 0.0, True, None))
    return f"{name} = {record[name]!r}"


def _output(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    record["output"] = chance.choice(OUTPUTS)
    return f"output = {record['output']!r}"


def _saved(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    record |= {"saved": chance.choice((["/etc/passwd"], ["1.png"], ["/dev/zero"], ["x"] * 9)), "decoded": 1}
    return f"saved = {record['saved']}"


def _a_tensor(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    name = chance.choice([*tensors, "finished.0", "small.0", "latents", "finished.7", "other", "finished.01"])
    kinds = {
        "missing": None,
        "of rank 0": torch.tensor(0.0),
        "of rank 3": torch.zeros(16, 4, 4),
        "of rank 5": torch.zeros(1, 1, 16, 4, 4),
        "of 4 channels": torch.zeros(1, 4, 4, 4),
        "of 2 images": torch.zeros(2, 16, 4, 4),
        "of no image": torch.zeros(0, 16, 4, 4),
        "larger": torch.zeros(1, 16, 8, 4),
        "NaN": torch.full((1, 16, 4, 4), float("nan")),
        "infinite": torch.full((1, 16, 4, 4), float("inf")),
        "in half": torch.zeros(1, 16, 4, 4, dtype=torch.float16),
        "in integers": torch.zeros(1, 16, 4, 4, dtype=torch.int64),
        "as it should be": torch.zeros(1, 16, 4, 4),
    }
    kind = chance.choice(list(kinds))
    value = kinds[kind]
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value.clone()
    return f"{name} {kind}"


def _bytes(record: dict[str, Any], tensors: Tensors, chance: random.Random) -> str:
    return "bytes of the file"


MUTATIONS = (_another_value, _another_value, _a_field_missing, _a_list_of_another_length, _numbers, _output)
MUTATIONS += (_saved, _a_tensor, _a_tensor, _bytes)
