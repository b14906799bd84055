"""Weights as other tools name and quantise them, written by the tools themselves where PyPI has them.

comfy-kitchen writes scaled fp8, int8 ConvRot and nvfp4, `gguf` writes GGUF; formats without a tool are written by hand.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from zimage.formats.layouts import layout

State = Mapping[str, Tensor]


def renamed(component: str, name: str, state: State, prefix: str = "") -> dict[str, Tensor]:
    """A component in the layout `name`: other keys, fused q, k and v, 1 × 1 convolutions."""
    known = layout(component, name)
    last, out = known.last_index(state), {}
    for key, value in state.items():
        if known.fused and ".attention.to_q." in key:
            fused = torch.cat([state[key.replace("to_q", f"to_{x}")] for x in "qkv"])
            out[prefix + key.replace("to_q", "qkv")] = fused
        elif not (known.fused and (".attention.to_k." in key or ".attention.to_v." in key)):
            flat = known.name == "ldm" and ".attentions.0.to_" in key and value.ndim == 2
            out[prefix + known.foreign(key, last)] = value[:, :, None, None] if flat else value
    return out


def save(tensors: State, file: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)
    return file


def is_matrix(key: str) -> bool:
    """Whether a key is of a matrix that formats quantise: those of attention and feed-forward."""
    return re.search(r"\.(attention\.(to_\w|to_out\.0|qkv|out)|feed_forward\.w\d)\.weight$", key) is not None


Quantiser = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # (suffix → tensor, the numbers that they encode)


def quantised(state: State, quantise: Quantiser) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file with quantised matrices, and the state that an exact reader finds in it."""
    file: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for key, value in state.items():
        if not is_matrix(key):
            file[key] = numbers[key] = value
            continue
        stored, numbers[key] = quantise(value)
        file |= {key.removesuffix("weight") + suffix: tensor for suffix, tensor in stored.items()}
    return file, numbers


def described(text: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)


def cast_fp8(weight: Tensor):
    codes = weight.to(torch.float8_e4m3fn)
    return {"weight": codes}, codes.float()


def _fp8(weight: Tensor, per_row: bool = False) -> tuple[Tensor, Tensor]:
    largest = weight.float().abs().amax(dim=1, keepdim=True) if per_row else weight.float().abs().max()
    scale = largest / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def old_comfy_fp8(weight: Tensor):
    codes, scale = _fp8(weight)
    return {"weight": codes, "scale_weight": scale, "scale_input": torch.ones(())}, codes.float() * scale


def lightx2v_fp8(weight: Tensor):
    codes, scale = _fp8(weight, per_row=True)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def new_comfy_fp8(weight: Tensor):
    from comfy_kitchen.tensor import TensorCoreFP8Layout as tool

    codes, params = tool.quantize(weight.float())
    about = described({"format": "float8_e4m3fn"})
    return {"weight": codes, "weight_scale": params.scale, "comfy_quant": about}, tool.dequantize(codes, params)


def int8_convrot(weight: Tensor):
    from comfy_kitchen.tensor import TensorWiseINT8Layout as tool

    group = max(size for size in (4, 16, 64, 256) if weight.shape[1] % size == 0)
    codes, params = tool.quantize(weight.float(), per_channel=True, convrot=True, convrot_groupsize=group)
    about = described({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group})
    return {"weight": codes, "weight_scale": params.scale, "comfy_quant": about}, tool.dequantize(codes, params)


def nvfp4(weight: Tensor):
    from comfy_kitchen import use_backend
    from comfy_kitchen.tensor import TensorCoreNVFP4Layout as tool

    with use_backend("eager"):  # its Triton kernel is of instructions that come with sm_100, and is tried before
        codes, params = tool.quantize(weight.float())
    stored = {"weight": codes, "weight_scale": params.block_scale, "weight_scale_2": params.scale}
    return stored | {"comfy_quant": described({"format": "nvfp4"})}, tool.dequantize(codes, params)


def mxfp8(weight: Tensor):
    from comfy_kitchen.tensor import TensorCoreMXFP8Layout as tool

    codes, params = tool.quantize(weight.float())
    about = described({"format": "mxfp8"})
    return {"weight": codes, "weight_scale": params.scale, "comfy_quant": about}, tool.dequantize(codes, params)


def int4_convrot(weight: Tensor):
    from comfy_kitchen.tensor import TensorCoreConvRotW4A4Layout as tool

    group = max(size for size in (4, 16, 64, 256) if weight.shape[1] % size == 0)
    codes, params = tool.quantize(weight.float(), convrot_groupsize=group)
    about = described({"format": "convrot_w4a4", "convrot_groupsize": group})
    return {"weight": codes, "weight_scale": params.scale, "comfy_quant": about}, tool.dequantize(codes, params)


def undescribed(quantise: Quantiser, about: dict[str, Any] | None = None) -> Quantiser:
    """Without a description, or with another one."""

    def write(weight: Tensor):
        stored, numbers = quantise(weight)
        stored = {name: tensor for name, tensor in stored.items() if name != "comfy_quant"}
        return stored | ({} if about is None else {"comfy_quant": described(about)}), numbers

    return write


def int8_rows(weight: Tensor):
    """One scale for each row, as in TensorWiseINT8Layout with `per_channel`."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    codes = (weight.float() / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale.squeeze(1)}, codes.float() * scale


def int8_whole(weight: Tensor):
    scale = weight.float().abs().max() / 127
    codes = (weight.float() / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def in_blocks(dtype: torch.dtype, height: int, width: int, name: str = "weight_scale") -> Quantiser:
    """A scale for each block of `height` × `width`; those at the lower and right edges may be smaller."""

    def write(weight: Tensor):
        rows, columns = weight.shape
        largest = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
        padded = F.pad(weight.float(), (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # (down, height, across, width)
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / largest
        codes = (blocks / scale).round().to(dtype) if dtype == torch.int8 else (blocks / scale).to(dtype)
        numbers = (codes.float() * scale).flatten(2).flatten(0, 1)[:rows, :columns]
        return {"weight": codes.flatten(2).flatten(0, 1)[:rows, :columns], name: scale[:, 0, :, 0]}, numbers

    return write


def q4_k(weight: Tensor) -> Tensor:
    """Q4_K codes (rows, bytes) of a matrix, which the package reads and does not write; by ggml's `block_q4_K`.

    A block of 256 numbers: two fp16 factors, 8 scales and 8 minima in 6 bits each, then 4 bits a number, as
    d · scale · code − dmin · minimum for every 32 numbers.
    """
    parts = weight.float().unflatten(1, (-1, 8, 32))  # (rows, blocks, 8, 32)
    least = parts.amin(-1).clamp(max=0)
    step = (parts.amax(-1).clamp(min=0) - least) / 15
    factors = [(x.amax(-1, keepdim=True) / 63).half() for x in (step, -least)]
    scale, minimum = (
        (x / f.float().clamp(min=1e-8)).round().clamp(0, 63).to(torch.uint8)
        for x, f in zip((step, -least), factors, strict=True)
    )
    d, dmin = (f.float() * x for f, x in zip(factors, (scale, minimum), strict=True))
    codes = ((parts + dmin[..., None]) / d.clamp(min=1e-8)[..., None]).round().clamp(0, 15).to(torch.uint8)
    s, m = scale, minimum
    low, high = s[..., :4] | (s[..., 4:] >> 4 << 6), m[..., :4] | (m[..., 4:] >> 4 << 6)
    six_bits = torch.cat([low, high, (s[..., 4:] & 15) | (m[..., 4:] << 4)], -1)
    pairs = codes.unflatten(2, (4, 2))
    nibbles = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(2)
    halves = torch.cat(factors, -1).view(torch.uint8)
    return torch.cat([halves, six_bits, nibbles], -1).flatten(1)


def write_gguf(
    file: Path, architecture: str, state: State, kind: str, quantise: Callable[[str], bool], read_back: bool = True
) -> State:
    """Write a GGUF file with the package; returns the numbers that it holds, if these are to be read back."""
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    target, numbers = gguf.GGMLQuantizationType[kind], {}
    for key, value in state.items():
        data = value.float().numpy()
        if quantise(key):
            codes = q4_k(value).numpy() if kind == "Q4_K" else gguf.quants.quantize(data, target)
            writer.add_tensor(key, codes, raw_dtype=target)
            if read_back:
                numbers[key] = torch.from_numpy(gguf.quants.dequantize(codes, target))
        else:
            writer.add_tensor(key, data)
            numbers[key] = value
    finish_gguf(writer)
    return numbers


def finish_gguf(writer: Any) -> None:
    """Write what a GGUFWriter was given, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
