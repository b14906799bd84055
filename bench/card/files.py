"""What comes from files: quantised kinds, renders in little memory, whole renders beside diffusers'.

The files are made on the card from a seed: the DiT and the VAE at full size, the text encoder at full width and with 8
of its 36 layers, so that all of it takes 15 GB.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zimage
from bench import pairs, writers
from bench.card.models import a_step, free, random_model
from bench.card.pictures import loaded
from bench.card.rows import Absent, Bench, Row, Task, as_planned, must, needs
from bench.card.steps import dit_config, middle
from bench.kernels import relative
from bench.machine import drop_from_cache
from bench.timing import timed
from bench.weights import SMALL, TEXT_ENCODER, write_model
from zimage.loading.files import load_component
from zimage.settings.loading import LoadSettings

PROMPT = "a cat face on a blue background"
ENCODER_LAYERS = 8
# Kinds of files, their quantiser or GGUF's name, and the most by which a velocity may differ, as a share of its size.
# (Differences on the demo model are in README; random weights have no outliers and no structure.)
KINDS: dict[str, tuple[Any, float]] = {
    "fp8, cast": (writers.cast_fp8, 0.1),
    "fp8, scaled": (writers.old_comfy_fp8, 0.1),
    "int8, scale per row": (writers.int8_rows, 0.05),
    "int8 ConvRot": (writers.int8_convrot, 0.05),
    "nvfp4": (writers.nvfp4, 0.3),
    "GGUF Q8_0": ("Q8_0", 0.05),
    "GGUF Q4_0": ("Q4_0", 0.3),
    "GGUF Q4_K": ("Q4_K", 0.3),
}
NEEDS = {"int8 ConvRot": "comfy_kitchen", "nvfp4": "comfy_kitchen"}
LANDING_MB = 68  # through which weights pass while they load, out of what the plan keeps in reserve
BUDGETS = (12.0, 8.0)  # GB
STEPS, STEPS_OF_SMALL = 8, 2


# ------------------------------------------------------------------ quantised files


def packed(bench: Bench) -> Iterator[Task]:
    """Steps of two blocks and two refiners, from a file of every kind, against the same in bf16."""
    shallow = {**dit_config(bench), "n_layers": 2, "n_refiner_layers": 1}
    dit = cache(lambda: random_model("transformer", bench.device, config=shallow))
    expected = cache(lambda: _velocity(bench, dit()))

    def plain() -> Row:
        return {"ms": timed(_shallow_step(bench, dit()), bench.device, bench.repeats, 1.0).ms}

    def measured(name: str, kind: Any, most: float) -> Row:
        for module in (*([NEEDS[name]] if name in NEEDS else []), *(["gguf"] if "GGUF" in name else [])):
            needs(module)
        wanted, file = expected(), _write(Path(bench.folder), dit().state_dict(), kind)
        started = time.perf_counter()
        read: Any = load_component(file, "dit", str(bench.device), "bf16")
        row: Row = {"load_s": time.perf_counter() - started, "file_mb": round(file.stat().st_size / 1e6)}
        row["difference"] = difference = relative(_velocity(bench, read), wanted)
        row["ms"] = timed(_shallow_step(bench, read), bench.device, bench.repeats, 1.0).ms
        file.unlink()
        return must(row, difference <= most, f"the velocity differs by {difference:.3g}; {most:g} is expected at most")

    yield Task("bf16", plain)
    for name, (kind, most) in KINDS.items():
        yield Task(name, partial(measured, name, kind, most))


def _shallow_step(bench: Bench, dit: Any) -> Callable[[], Any]:
    torch.manual_seed(1)
    return a_step(dit, middle(bench), bench.device)


def _velocity(bench: Bench, dit: Any) -> Tensor:
    return _shallow_step(bench, dit)()


def _write(folder: Path, state: dict[str, Tensor], kind: Any) -> Path:
    """A file of the DiT under native names, quantised as `kind` says; GGUF's package computes on the CPU."""
    native = writers.renamed("dit", "native", state)
    if isinstance(kind, str):
        on_host = {key: value.cpu() for key, value in native.items()}
        writers.write_gguf(folder / "packed.gguf", "lumina2", on_host, kind, writers.is_matrix, read_back=False)
        return folder / "packed.gguf"
    return writers.save(writers.quantised(native, kind)[0], folder / "packed.safetensors")


# ------------------------------------------------------------------ in little memory


def memory(bench: Bench) -> Iterator[Task]:
    """Whole renders in less and less memory: their peak beside the plan, the same pixels as with all kept."""

    def rendered(load: Row, budget: float | None) -> tuple[Row, np.ndarray]:
        pipe = loaded(bench, load | ({"memory": budget} if budget else {}), str(model_folder(bench)))
        return _capped(bench, budget, partial(_rendered, bench, pipe))

    kept = cache(lambda: rendered({}, None))

    def within(load: Row, budget: float) -> Row:
        row, picture = rendered(load, budget)
        same = load or np.array_equal(picture, kept()[1])
        return must(row, bool(same), "not the pixels that are drawn with all kept")

    yield Task("all kept", lambda: kept()[0])
    for budget in budgets(bench):
        yield Task(f"bf16 in {budget:.3g} GB", partial(within, {}, budget))
    for precision in ("int8", "fp8"):
        yield Task(f"{precision} in {budgets(bench)[-1]:.3g} GB", partial(within, {"precision": precision}, budget))


def budgets(bench: Bench) -> Sequence[float]:
    """12 and 8 GB; for small models, what leaves no room for some of their blocks."""
    if not bench.small:
        return BUDGETS
    pipe = zimage.ZImage.load(str(model_folder(bench)), device=str(bench.device), memory=1e-9)
    least = pipe.prepare(request(bench), must_fit=False).plan.tightest.peak
    return (least / 1e9 + 1e-5,)


def request(bench: Bench) -> "zimage.Request":
    size = middle(bench)
    return zimage.Request(PROMPT, width=size, height=size, steps=1 if bench.small else 2, seed=1, guidance=0.0)


def _rendered(bench: Bench, pipe: zimage.ZImage) -> tuple[Row, np.ndarray]:
    job = pipe.prepare(request(bench))
    planned = max(stage.peak - stage.base for stage in job.plan.stages.values())
    torch.cuda.reset_peak_memory_stats(bench.device)
    started, picture = time.perf_counter(), _picture(pipe, job)
    again = time.perf_counter()
    _picture(pipe, job)
    row: Row = {"first_s": again - started, "again_s": time.perf_counter() - again}
    row |= {"peak_mb": round(torch.cuda.max_memory_allocated(bench.device) / 1e6), "planned_mb": round(planned / 1e6)}
    row["streamed"] = sum(len(stage.streamed) for stage in job.plan.stages.values())
    return as_planned(row, LANDING_MB), picture


def _picture(pipe: zimage.ZImage, job: Any) -> np.ndarray:
    return next(np.asarray(event.image) for event in list(pipe.run(job)) if event.image is not None)


def _capped(bench: Bench, budget: float | None, call: Callable[[], Any]) -> Any:
    """A call in which PyTorch may not reserve more than the budget."""
    free(bench.device)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 1e9 / total) if budget else 1.0, bench.device)
        return call()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)


# ------------------------------------------------------------------ whole renders


def render(bench: Bench) -> Iterator[Task]:
    """Whole renders in processes of their own, their files read anew or from the page cache; diffusers' beside them."""
    common = {
        "size": middle(bench),
        "steps": STEPS_OF_SMALL if bench.small else STEPS,
        "dtype": "bf16",
        "prompt": PROMPT,
        "device": str(bench.device),
    }

    def timed_render(side: str, cold: bool, settings: Row) -> Row:
        if side == "diffusers":
            needs("diffusers")
        unknown = [name for name in settings if name not in LoadSettings.__dataclass_fields__]
        if unknown:
            raise Absent(f"this version has no setting {unknown[0]}")
        folder = model_folder(bench)
        if cold:
            drop_from_cache(folder)
        figures = pairs.run_side(side, "render", {"folder": str(folder), **common, **settings})
        return {f"{name}_s": value for name, value in figures.items() if not name.endswith("_gb")} | {
            name: value for name, value in figures.items() if name.endswith("_gb")
        }

    yield Task("bf16, cold", partial(timed_render, "zimage", True, {}))
    yield Task("bf16, warm", partial(timed_render, "zimage", False, {}))
    yield Task("int8, warm", partial(timed_render, "zimage", False, {"precision": "int8"}))
    yield Task("diffusers bf16, warm", partial(timed_render, "diffusers", False, {}))
    yield Task("diffusers bf16, cold", partial(timed_render, "diffusers", True, {}))  # which takes longest


def model_folder(bench: Bench) -> Path:
    """The model's files, written when first needed."""
    encoder = {**TEXT_ENCODER, "num_hidden_layers": ENCODER_LAYERS}
    torch.manual_seed(0)
    configs = SMALL if bench.small else {"text_encoder": encoder}
    return write_model(Path(bench.folder) / "model", configs=configs, device=str(bench.device))
