"""The accuracy that each way to store the DiT costs: one file of every kind, made from the demo model."""

import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import zimage
from bench import writers
from bench.machine import command_line, describe_machine
from bench.options import JSON
from zimage.formats.checkpoint import Checkpoint
from zimage.loading.files import Component
from zimage.weights import DEMO

PROMPTS = ("a cat face on a blue background", "a red apple and a dog face on a white background", "a tree", "a rocket")
SEED, STEPS = 1, 8
GGUF = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
KINDS = {
    "native names, bf16": None,
    "fp8, cast": writers.cast_fp8,
    "fp8, scaled (older Comfy)": writers.old_comfy_fp8,
    "fp8, scaled (Comfy)": writers.new_comfy_fp8,
    "fp8, scaled per channel (LightX2V)": writers.lightx2v_fp8,
    "int8 ConvRot": writers.int8_convrot,
    "nvfp4": writers.nvfp4,
    **{f"GGUF {kind}": kind for kind in GGUF},
}


@click.command()
@JSON
def formats(as_json: bool) -> None:
    """Measure the velocity's relative error and the pictures' PSNR for every file format, on the demo model in fp32."""
    plain = zimage.ZImage.load(device="cpu", dtype="fp32")
    state = load_file(DEMO / "transformer" / "diffusion_pytorch_model.safetensors")
    expected, rows = observe(plain), []
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in KINDS.items():
            pipe = zimage.ZImage.load(device="cpu", dtype="fp32")
            checkpoint = Checkpoint.of_file(write(Path(folder), state, kind), "dit")
            pipe.model.components["dit"] = Component("dit", plain.model.components["dit"].config, checkpoint)
            size = checkpoint.stored_bytes() / plain.model.components["dit"].checkpoint.stored_bytes()
            rows.append({"format": name, **compare(observe(pipe), expected), "size / bf16": round(size, 2)})
            if not as_json:
                print(json.dumps(rows[-1]))
    print(json.dumps({"machine": describe_machine(), "command": command_line(), "rows": rows}))


def write(folder: Path, state: writers.State, kind: Any) -> Path:
    """Write the DiT under native names, quantised as `kind` says."""
    native = writers.renamed("dit", "native", {key: value.bfloat16() for key, value in state.items()})
    if isinstance(kind, str):
        writers.write_gguf(folder / "dit.gguf", "lumina2", native, kind, writers.is_matrix)
        return folder / "dit.gguf"
    tensors = writers.quantised(native, kind)[0] if kind else native
    return writers.save(tensors, folder / "dit.safetensors")


def observe(pipe: zimage.ZImage) -> tuple[Tensor, list[np.ndarray]]:
    """The velocity at half noise, and the pictures of PROMPTS."""
    captions = pipe.encode(PROMPTS)
    noise = torch.randn(len(PROMPTS), 16, 16, 16, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        velocity = torch.cat([pipe.dit(noise[i : i + 1], torch.tensor([0.5]), [c]) for i, c in enumerate(captions)])
    images = pipe.generate(list(PROMPTS), seed=SEED, steps=STEPS).images
    return velocity, [np.asarray(image, dtype=np.float64) for image in images]


def compare(found: tuple, expected: tuple) -> dict[str, float]:
    """Relative RMS error of the velocity; the median picture's PSNR in dB (99: equal)."""
    error = (found[0] - expected[0]).norm() / expected[0].norm()
    middle = statistics.median(decibels(a, b) for a, b in zip(found[1], expected[1], strict=True))
    return {"velocity, relative RMS error": float(f"{error:.2g}"), "picture, PSNR in dB": round(middle, 1)}


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    """The PSNR of a picture with 256 levels; 99 where it is equal."""
    error = float(np.mean((found - expected) ** 2))
    return 10 * math.log10(255**2 / error) if error else 99.0
