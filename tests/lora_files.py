"""LoRA files as the trainers write them, all with the same deltas, for the tiny DiT."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zimage.dit import ZImageDiT
from zimage.loading.registry import DIT
from zimage.nn.adapters import linear_shapes, vector_sizes
from zimage.pipeline import ZImage

RANK = 4
ALPHA = 2.0  # half the rank: powers of two, so that every way to write the scale gives the same bits

with torch.device("meta"):
    MODEL = ZImageDiT.from_config(tiny.DIT)
SHAPES, SIZES = linear_shapes(MODEL), vector_sizes(MODEL)
BLOCKS = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
PROJECTIONS = [f"{block}.attention.{name}" for block in BLOCKS for name in ("to_q", "to_k", "to_v", "to_out.0")]
ONE = "layers.0.attention.to_q"

Factors = dict[str, tuple[Tensor, Tensor]]  # path → down (RANK, in), up (out, RANK)


def factors(paths, seed: int = 91, size: float = 0.5) -> Factors:
    """Random factors, so large that no layer's delta goes unnoticed; q, k and v of a block share `down`."""
    made = {}
    for path in paths:
        out, into = SHAPES[path]
        block, _, name = path.rpartition(".to_")
        place = block + ".qkv" if name in ("q", "k", "v") else path
        down = torch.randn(RANK, into, generator=torch.Generator().manual_seed(seed + hash_of(place)))
        up = torch.randn(out, RANK, generator=torch.Generator().manual_seed(seed + 1 + hash_of(path)))
        made[path] = (down, up * size / into**0.5)
    return made


def hash_of(name: str) -> int:
    return sum(ord(letter) * i for i, letter in enumerate(name, 1))


def matrices(given: Factors) -> dict[str, Tensor]:
    """The deltas by definition: alpha / rank · up · down."""
    return {path: (ALPHA / RANK) * (up @ down) for path, (down, up) in given.items()}


def native(path: str) -> str:
    path = path.replace(".to_out.0", ".out")
    return path.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")


def named(name: Callable[[str], str], down: str, up: str, alpha: bool) -> Callable[[Factors], dict[str, Tensor]]:
    """A trainer's file: with `.alpha` tensors, or with the scale worked into `up` where another place has it not."""

    def write(given: Factors) -> dict[str, Tensor]:
        tensors = {}
        for path, (a, b) in given.items():
            tensors |= {name(path) + down: a, name(path) + up: b}
            if alpha:
                tensors[name(path) + ".alpha"] = torch.tensor(ALPHA)
        return tensors

    return write


def baked(write: Callable) -> Callable[[Factors], dict[str, Tensor]]:
    """For files without any alpha, which then equals the rank."""
    return lambda given: write({path: (down, up * ALPHA / RANK) for path, (down, up) in given.items()})


def fused(name: Callable[[str], str], down: str, up: str) -> Callable[[Factors], dict[str, Tensor]]:
    """q, k and v as one layer of the native modules, with `.alpha`."""

    def write(given: Factors) -> dict[str, Tensor]:
        tensors = {}
        for path, (a, b) in given.items():
            if path.endswith((".to_k", ".to_v")):
                continue
            if path.endswith(".to_q"):
                b = torch.cat([given[path[:-1] + part][1] for part in "qkv"])
                path = path.replace("to_q", "qkv")
            module = name(native(path))
            tensors |= {module + down: a, module + up: b, module + ".alpha": torch.tensor(ALPHA)}
        return tensors

    return write


def duplicated(given: Factors) -> dict[str, Tensor]:
    """Dotted but for alpha and to_out, and the attention once more under native names, with values to be skipped."""
    dotted = {}
    for path, (down, up) in given.items():
        module = path.replace("_", ".").replace("to.out.", "to_out.")
        dotted |= {f"{module}.lora.down.weight": down, f"{module}.lora.up.weight": up}
        dotted[f"{path}.alpha"] = torch.tensor(ALPHA)
    again = fused(str, ".lora.down.weight", ".lora.up.weight")(given)
    again = {key: value for key, value in again.items() if re.search(r"\.(qkv|out)\.lora|qkv\.alpha", key)}
    return dotted | {key: torch.full_like(value, 7.0) for key, value in again.items()}


def underscored(path: str) -> str:
    return path.replace(".", "_")


def kohya(path: str) -> str:
    return "lora_unet_" + underscored(path)


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
NAMINGS = {
    "diffusers": baked(named("transformer.{}".format, *A_B, False)),
    "peft default": baked(named("transformer.{}".format, *DEFAULT, False)),
    "ai-toolkit": baked(named("diffusion_model.{}".format, *A_B, False)),
    "ai-toolkit with alpha": named("diffusion_model.{}".format, *A_B, True),
    "native fused": fused("diffusion_model.{}".format, *A_B),
    "native fused, down and up": fused("diffusion_model.{}".format, *DOWN_UP),
    "kohya": named(kohya, *DOWN_UP, True),
    "kohya fused": fused(kohya, *DOWN_UP),
    "onetrainer": named("transformer.{}".format, *DOWN_UP, True),
    "onetrainer bare": named(str, *DOWN_UP, True),
    "lycoris": named(lambda path: "lycoris_" + underscored(path), *DOWN_UP, True),
    "dotted with duplicates": duplicated,
    "diffsynth": baked(named(str, *DEFAULT, False)),
    "raw peft": baked(named("base_model.model.{}".format, *A_B, False)),
    "raw peft of an adapter called weight": baked(
        named("base_model.model.{}".format, ".lora_A.weight.weight", ".lora_B.weight.weight", False)
    ),
    "diffsynth of an adapter with a name": baked(
        named("pipe.dit.{}".format, ".lora_A.my-style.weight", ".lora_B.my-style.weight", False)
    ),
    "videox-fun": named(lambda path: "lora_unet__" + underscored(path), *DOWN_UP, True),
    "wrapped twice": baked(named("base_model.model.transformer.{}".format, *A_B, False)),
}


def write(file: Path, tensors: dict[str, Tensor], config: dict | None = None) -> Path:
    """A safetensors file; `config` goes into its header as diffusers writes it."""
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config is not None else {})
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file, metadata=metadata)
    return file


def strong(file: Path, pipe: ZImage) -> Path:
    """An adapter of every linear layer of a model's blocks, strong enough to change each picture."""
    made, tensors = torch.Generator().manual_seed(1), {}
    for path, (out, into) in linear_shapes(pipe.model.skeleton(DIT)).items():
        if path.startswith("layers."):
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(4, into, generator=made) / into**0.5
            tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(out, 4, generator=made) / 4
    return write(file, tensors)


def lokr(path: str, rows: int, columns: int, low: str, rank: int = RANK, seed: int = 92) -> dict[str, Tensor]:
    """Factors of a LoKr, w1 (rows, columns); those named in `low` are products of this rank."""
    out, into = SHAPES[path] if path in SHAPES else (3 * SHAPES[path.replace("qkv", "to_q")][0], tiny.DIT["dim"])
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (height, width) in (("w1", (rows, columns)), ("w2", (out // rows, into // columns))):
        if name in low:
            tensors[f"lokr_{name}_a"] = torch.randn(height, rank, generator=generator)
            tensors[f"lokr_{name}_b"] = torch.randn(rank, width, generator=generator) / width
        else:
            tensors[f"lokr_{name}"] = torch.randn(height, width, generator=generator) / width
    return tensors


def loha(out: int, into: int, seed: int = 93) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1_a": (out, RANK), "w1_b": (RANK, into), "w2_a": (out, RANK), "w2_b": (RANK, into)}
    return {f"hada_{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def oft(inputs: int, side: int, size: float = 0.1, shared: bool = False, seed: int = 94) -> Tensor:
    """The values above the diagonals of an OFT's blocks, as PEFT keeps them."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(1 if shared else inputs // side, side * (side - 1) // 2, generator=generator)


def oft_blocks(outputs: int, side: int, size: float = 0.1, seed: int = 95) -> Tensor:
    """The blocks of an OFT, as LyCORIS keeps them."""
    return size * torch.randn(outputs // side, side, side, generator=torch.Generator().manual_seed(seed))


def vectors(model: nn.Module, seed: int = 96) -> dict[str, Tensor]:
    """A difference for every norm's weight and every bias."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(size, generator=generator) for name, size in vector_sizes(model).items()}


def differences(given: dict[str, Tensor], name: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Weights and biases as the extracting tools name their differences."""
    endings = {"weight": "diff", "bias": "diff_b"}
    parts = {key: key.rpartition(".") for key in given}
    return {f"{name(parts[key][0])}.{endings[parts[key][2]]}": value for key, value in given.items()}


def write_kinds(folder: Path) -> Path:
    """style: the attention; all: every linear layer of the DiT; kron, hadamard, dora: ONE alone; returns `folder`."""
    write(folder / "style.safetensors", NAMINGS["kohya"](factors(PROJECTIONS)))
    write(folder / "all.safetensors", NAMINGS["onetrainer"](factors(SHAPES, seed=7, size=0.1)))
    down, up = factors([ONE])[ONE]
    magnitude = torch.rand(64, 1, generator=torch.Generator().manual_seed(98)) + 0.5
    kinds = {
        "kron": lokr(ONE, 8, 4, "w2"),
        "hadamard": loha(64, 64),
        "dora": {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude},
    }
    for name, tensors in kinds.items():
        module = f"lycoris_{underscored(ONE)}"
        write(folder / f"{name}.safetensors", {f"{module}.{key}": value for key, value in tensors.items()})
    return folder
