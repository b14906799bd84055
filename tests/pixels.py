"""Some forty requests, one or more of every mode, whose pixels a change of structure must not move.

`python tests/pixels.py FILE` renders them all and writes {name: SHA-256 of the pixels}; run it at two commits on one
machine and compare the files (the last bits differ between processors). `test_pixels.py` holds the same requests
against the thumbnails in `goldens/pixels.png`, on any machine.
"""

import contextlib
import hashlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import loose
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import zimage
from bench import writers
from zimage.weights import DEMO

CAT = "a cat face on a blue background"
PAIR = "a red apple and a dog face on a white background"
FOX = "a fox face on a green background"
LONG = " ".join(["a tree and a rocket on a yellow background"] * 220)
FP32: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}

# name → how the model is loaded (a name of FILES stands for its path), what is asked for.
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"prompt": CAT}),
    "steps": ({}, {"prompt": CAT, "steps": 3}),
    "shift": ({}, {"prompt": CAT, "shift": 6.0}),
    "wide": ({}, {"prompt": PAIR, "width": 192, "height": 96}),
    "tall": ({}, {"prompt": PAIR, "width": 64, "height": 160}),
    "two prompts": ({}, {"prompt": [CAT, PAIR]}),
    "images": ({}, {"prompt": CAT, "images": 2}),
    "seeds": ({}, {"prompt": [CAT, FOX], "seed": [5, 6]}),
    "guidance": ({}, {"prompt": CAT, "guidance": 2.0}),
    "negative": ({}, {"prompt": CAT, "guidance": 1.5, "negative": "a dog face on a red background"}),
    "truncated": ({}, {"prompt": CAT, "guidance": 2.0, "cfg_truncation": 0.5}),
    "normalised": ({}, {"prompt": CAT, "guidance": 3.0, "cfg_normalization": 1.0}),
    "batch": ({}, {"prompt": [CAT, FOX], "batch_size": 2}),
    "unequal batch": ({}, {"prompt": [CAT, PAIR + " " + LONG[:300]], "batch_size": 2}),
    "guided batch": ({}, {"prompt": [CAT, PAIR], "batch_size": 2, "guidance": 1.0}),
    "hires": ({}, {"prompt": CAT, "hires": 2.0, "width": 256, "height": 256}),
    "hires strength": ({}, {"prompt": CAT, "hires": 1.5, "width": 192, "height": 144, "strength": 0.4, "images": 2}),
    "image": ({}, {"prompt": FOX, "image": "picture"}),
    "image strength": ({}, {"prompt": FOX, "image": "picture", "strength": 0.9, "guidance": 1.0}),
    "mask": ({}, {"prompt": FOX, "image": "picture", "mask": "mask", "paste": False}),
    "mask strength": ({}, {"prompt": FOX, "image": "picture", "mask": "mask", "strength": 0.7, "paste": False}),
    "image of another size": ({}, {"prompt": FOX, "image": "picture", "width": 96}),
    "lora": ({"lora": ["lora:0.8"]}, {"prompt": CAT}),
    "two loras": ({"lora": ["lora:0.5", "lora:-0.2"]}, {"prompt": CAT, "guidance": 1.0}),
    "int8": ({"precision": "int8"}, {"prompt": CAT}),
    "int8 lora": ({"precision": "int8", "lora": ["lora"]}, {"prompt": CAT}),
    "fp8": ({"precision": "fp8"}, {"prompt": CAT}),
    "gguf": ({"dit": "gguf", "variant": "turbo"}, {"prompt": CAT}),
    "gguf int8": ({"dit": "gguf", "variant": "turbo", "precision": "int8"}, {"prompt": CAT}),
    "gguf lora": ({"dit": "gguf", "variant": "turbo", "lora": ["gguf lora"]}, {"prompt": CAT}),
    "bf16": ({"dtype": "bf16"}, {"prompt": CAT}),
    "stage by stage": ({"residency": "stage"}, {"prompt": [CAT, FOX]}),
    "long": ({}, {"prompt": LONG}),
    "long pooled": ({}, {"prompt": LONG, "long_prompt": "attention_pool"}),
    "layers": ({}, {"prompt": CAT, "layer_weights": {-2: 0.7, -1: 0.3}}),
    "chat parts": ({}, {"prompt": CAT, "system_prompt": "Paint.", "thinking_content": "A cat."}),
    "template": ({}, {"prompt": CAT, "template": "photo-overcast"}),
    "strips": ({}, {"prompt": PAIR, "tile_mode": "exact", "tile_size": 64}),
    "blended": ({}, {"prompt": PAIR, "tile_mode": "blend", "tile_size": 64, "tile_overlap": 32}),
    "resumed": ({}, {"prompt": [CAT, FOX], "guidance": 1.0}),
    "pasted": ({}, {"prompt": FOX, "image": "picture", "mask": "mask", "mask_blur": 6.0}),
    "region": ({}, {"prompt": FOX, "image": "picture", "mask": "mask", "mask_invert": True, "mask_crop": 0}),
    "extended": ({}, {"prompt": FOX, "image": "picture", "extend": "0,0,61,0", "strength": 0.9}),
}


def render(name: str, files: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a request; `files` is what `write_files` made."""
    loading, asked = REQUESTS[name]
    loading = {**FP32, **loading}
    if "dit" in loading:
        loading["dit"] = files[loading["dit"]]
    if "lora" in loading:
        loading["lora"] = [
            files[name] + colon + scale for name, colon, scale in (t.partition(":") for t in loading["lora"])
        ]
    asked = {"seed": 11, **asked, **{key: files[asked[key]] for key in ("image", "mask") if key in asked}}
    pipe = zimage.ZImage.load(files["model"] if "dit" in loading else None, **loading)
    if name != "resumed":
        return pipe.generate(**asked).images
    return resumed(pipe, zimage.Request.from_mapping(asked))


def resumed(pipe: zimage.ZImage, request: zimage.Request) -> list[Image.Image]:
    """Broken off in the middle of the second image's steps, and gone on with from the state."""
    from zimage.render.state import RenderState

    state = RenderState()
    job = pipe.prepare(request)
    events = pipe.run(job)
    for event in itertools.takewhile(lambda e: not (e.stage == "denoise" and e.index == 1 and e.step == 4), events):
        state.update(event)
    events.close()
    return [event.image for event in pipe.run(job, state) if event.image is not None]


def write_files(folder: Path) -> dict[str, Any]:
    """A picture, a mask, LoRAs, and a random model with a GGUF of its DiT; the same each time."""
    pipe = zimage.ZImage.load(**FP32)
    picture = pipe.generate(PAIR, seed=3).images[0]
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 64, 128))
    picture.save(folder / "picture.png")
    mask.save(folder / "mask.png")
    parts = loose.states()
    loose.write_folder(folder / "loose", parts)
    native = writers.renamed("dit", "native", parts["dit"])
    writers.write_gguf(folder / "dit.gguf", "lumina2", native, "Q8_0", writers.is_matrix)
    return {
        "picture": str(folder / "picture.png"),
        "mask": str(folder / "mask.png"),
        "lora": write_lora(
            load_file(DEMO / "transformer" / "diffusion_pytorch_model.safetensors"), folder / "lora.safetensors"
        ),
        "gguf lora": write_lora(parts["dit"], folder / "gguf-lora.safetensors"),
        "gguf": str(folder / "dit.gguf"),
        "model": str(folder / "loose"),
    }


def write_lora(state: dict[str, Tensor], path: Path) -> str:
    """An adapter of rank 4 on part of a DiT's layers."""
    generator, lora = torch.Generator().manual_seed(7), {}
    for key, weight in state.items():
        if key.endswith(("to_q.weight", "to_out.0.weight", "w2.weight")):
            name = key.removesuffix(".weight")
            lora[f"{name}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.02
            lora[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.2
    save_file(lora, path)
    return str(path)


def digest(images: list[Image.Image]) -> str:
    together = hashlib.sha256()
    for image in images:
        together.update(f"{image.size}".encode() + image.tobytes())
    return together.hexdigest()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files, found = write_files(Path(folder)), {}
        for name in REQUESTS:
            found[name] = digest(render(name, files))
            print(name, found[name][:12], flush=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(Path(sys.argv[1]))
