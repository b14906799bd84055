"""The demo's pictures in every configuration, against the same requests on the CPU in fp32."""

import json
import time
from collections.abc import Iterator
from functools import cache, partial

import numpy as np

import zimage
from bench.card.models import free
from bench.card.rows import Absent, Bench, Row, Task, must
from bench.formats import decibels
from zimage.errors import RequestError
from zimage.kernels import backend
from zimage.settings.loading import LoadSettings

PROMPTS = ["a cat face on a blue background", "a red apple and a dog face on a white background"]
CLOSE, QUANTISED = 45.0, 40.0  # dB of the worst picture; an H200 drew 53.5 in bf16, 51.7 in int8 and 46.4 in fp8
# Settings of the model, of the request, and the least decibels.
CONFIGURATIONS: dict[str, tuple[Row, Row, float]] = {
    "bf16": ({}, {}, CLOSE),
    "fp32": ({"dtype": "fp32"}, {}, 60.0),
    "fp16": ({"dtype": "fp16"}, {}, CLOSE),
    "int8": ({"precision": "int8"}, {}, QUANTISED),
    "fp8": ({"precision": "fp8"}, {}, QUANTISED),
    "compiled": ({"compile": True}, {}, CLOSE),
    "compiled int8": ({"compile": True, "precision": "int8"}, {}, QUANTISED),
    "CUDA graphs": ({"cuda_graphs": True}, {}, CLOSE),
    "batch with guidance": ({}, {"batch_size": 2, "guidance": 2.0, "negative": "a dog"}, CLOSE),
    "exact strips": ({}, {"tile_mode": "exact", "tile_size": 64}, CLOSE),
    "blended tiles": ({}, {"tile_mode": "blend", "tile_size": 64, "tile_overlap": 16}, CLOSE),
    "two passes": ({}, {"hires": 2.0, "width": 256, "height": 256}, QUANTISED),
    "encoder on the CPU": ({"text_encoder_device": "cpu"}, {}, CLOSE),
    "stages in turn": ({"residency": "stage"}, {}, CLOSE),
    **{
        name: ({"attention": name}, {}, CLOSE)
        for name in ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math", "flash2", "flash3", "xformers", "sage")
    },
}


def demo(bench: Bench) -> Iterator[Task]:
    """The bundled model in every configuration: its pictures against the CPU's in fp32, and twice the same bits."""

    prompts = PROMPTS[: 1 if bench.small else None]

    @cache
    def expected(request: str) -> list[np.ndarray]:
        return pictures(prompts, zimage.ZImage.load(device="cpu", dtype="fp32"), json.loads(request))

    def drawn(load: Row, request: Row, least: float) -> Row:
        request = request | ({"steps": 2} if bench.small else {})
        wanted, pipe = expected(json.dumps(request)), loaded(bench, load)
        started, first = time.perf_counter(), pictures(prompts, pipe, request)
        loading, again = time.perf_counter(), pictures(prompts, pipe, request)
        row: Row = {"first_s": loading - started, "again_s": time.perf_counter() - loading}
        row["psnr_db"] = round(min(map(decibels, first, wanted)), 1)
        must(row, row["psnr_db"] >= least, f"{row['psnr_db']} dB to the CPU's picture; at least {least:g} are expected")
        must(row, all(map(np.array_equal, first, again)), "the second run drew other bits")
        return must(row, not backend.FAILED, f"kernels that failed here: {[x.__module__ for x in backend.FAILED]}")

    for name, settings in CONFIGURATIONS.items():
        yield Task(name, partial(drawn, *settings))


def loaded(bench: Bench, settings: Row, model: str | None = None) -> zimage.ZImage:
    """The pipeline on this device. Raises Absent for a setting that does not exist or a backend that is not here."""
    free(bench.device)
    unknown = [name for name in settings if name not in LoadSettings.__dataclass_fields__]
    if unknown:
        raise Absent(f"this version has no setting {unknown[0]}")
    try:
        return zimage.ZImage.load(model, device=str(bench.device), cache_entries=0, **settings)
    except RequestError as error:
        if "attention" in error.fields and any(
            words in str(error) for words in ("is not installed", "does not run on")
        ):
            raise Absent(str(error)) from error
        raise


def pictures(prompts: list[str], pipe: zimage.ZImage, request: Row) -> list[np.ndarray]:
    return [np.asarray(image, dtype=float) for image in pipe.generate(prompts, seed=1, **request).images]
