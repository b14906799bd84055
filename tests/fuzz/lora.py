"""Mutated LoRA files of every form and mutated settings of PEFT, used as a user would: added, drawn with, removed."""

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zimage
from zimage.nn.adapters import linear_shapes

Q, ADA, NORM = "layers.0.attention.to_q", "layers.0.adaLN_modulation.0", "layers.0.attention_norm1"
CASES = 150  # in one ring
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "F4", "C64", "X", 7, None, []]
HUGE = [2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1, 1.5, True, None, "4", [4]]
NUMBERS = [*HUGE, 0, 1, 3, -4, 1e300, 5e-324, float("nan"), float("inf"), 10**400, {}, "", "x" * 3000]
PATTERNS = [
    *(r"(\w+\.?)+x", "(?i)to_q", "(a+)+$", "(.*)*", "[", "(", ")", "\\", "a{1,99}{1,99}", "(?P<a>.)", r"(.)\1"),
    *("", "." * 400, "((((((((a))))))))", ".*" * 100, "(" * 150 + ")" * 150, "\n", "\ud800", "to_q|" * 50, "^$"),
]
NAMES = [
    *("", ".", "_", "__", "layers", "layers.0", "layers.999999999.attention.to_q", "a\nb", "\x1b]0;x\x07", "é" * 200),
    *("text_encoder.x", "lora_te_x", "model.layers.0.self_attn.q_proj", "norm_final", "x_pad_token", "model_" * 3000),
]
ENDINGS = [
    *("", ".diff", ".diff_b", ".w_norm", ".alpha", ".dora_scale", ".oft_R.weight", ".oft_R.scaled_oft", ".oft_blocks"),
    *(".rescale", ".lora_A.weight", ".lora_B.weight", ".lora_A.x.weight", ".lokr_w1", ".lokr_w2_a", ".hada_w1_a"),
    *(".boft_R", ".lora_mid.weight", ".oft_diag", ".a1.weight", ".lora_magnitude_vector", ".weight"),
]

Content = dict[str, Tensor]


@functools.cache
def pipeline(precision: str = "bf16") -> zimage.ZImage:
    """The demo, its DiT in memory; every case leaves it as it was."""
    pipe = zimage.ZImage.load(device="cpu", dtype="fp32", residency="keep", precision=precision)
    assert pipe.dit is not None
    return pipe


def cases(chance: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Mutations by their names, each with a call that uses the mutated file."""
    shapes = linear_shapes(pipeline().model.skeleton("dit"))
    for i in range(CASES):
        form = chance.choice(list(FORMS))
        mutate = chance.choice(MUTATORS)
        place = folder / f"lora-{i}"
        place.mkdir()
        config = dict(CONFIGS[form]) if chance.random() < 0.4 else None
        content = mutate(FORMS[form](shapes), config, chance, place)
        precision = chance.choice(["bf16", "bf16", "int8"])  # merged, or beside
        yield f"{form} in {precision}: {mutate.__name__} {i}", partial(use, place, content, precision)


def use(place: Path, content: bytes, precision: str) -> None:
    """What `gen --lora FOLDER` does, but for the picture."""
    try:
        (place / "adapter_model.safetensors").write_bytes(content)
        pipe = pipeline(precision)
        handle = pipe.lora.add(place, 0.5)
        pipe.lora.remove(handle)
    finally:
        shutil.rmtree(place)


# ------------------------------------------------------------------ sound files


def _random(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _product(shapes: dict[str, tuple[int, int]]) -> Content:
    (out, into), (height, width) = shapes[Q], shapes[ADA]
    return {
        **{f"transformer.{Q}.lora_A.weight": _random(4, into), f"transformer.{Q}.lora_B.weight": _random(out, 4)},
        **{f"{ADA}.lora_down.weight": _random(2, width), f"{ADA}.lora_up.weight": _random(height, 2)},
        f"{ADA}.alpha": torch.tensor(1.0),
    }


def _fused(shapes: dict[str, tuple[int, int]]) -> Content:
    (out, into), module = shapes[Q], "lora_unet_layers_0_attention_qkv"
    return {f"{module}.lora_down.weight": _random(4, into), f"{module}.lora_up.weight": _random(3 * out, 4)}


def _dora(shapes: dict[str, tuple[int, int]]) -> Content:
    return _product(shapes) | {f"{Q}.dora_scale": _random(shapes[Q][0], 1)}


def _kronecker(shapes: dict[str, tuple[int, int]]) -> Content:
    out, into = shapes[Q]
    factors = {"lokr_w1": _random(4, 8), "lokr_w2_a": _random(out // 4, 2), "lokr_w2_b": _random(2, into // 8)}
    return {f"lycoris_{Q.replace('.', '_')}.{name}": value for name, value in factors.items()}


def _hadamard(shapes: dict[str, tuple[int, int]]) -> Content:
    out, into = shapes[Q]
    sides = {"w1_a": (out, 3), "w1_b": (3, into), "w2_a": (out, 3), "w2_b": (3, into)}
    return {f"{Q}.hada_{name}": _random(*shape) for name, shape in sides.items()}


def _inputs_turned(shapes: dict[str, tuple[int, int]]) -> Content:
    return {f"base_model.model.{Q}.oft_R.weight": _random(shapes[Q][1] // 8, 28)}


def _outputs_turned(shapes: dict[str, tuple[int, int]]) -> Content:
    out = shapes[Q][0]
    return {f"{Q}.oft_blocks": _random(out // 8, 8, 8), f"{Q}.rescale": _random(out, 1), f"{Q}.alpha": torch.ones(())}


def _differences(shapes: dict[str, tuple[int, int]]) -> Content:
    (out, into), height = shapes[Q], shapes[ADA][0]
    return {f"{Q}.diff": _random(out, into), f"{NORM}.diff": _random(into), f"{ADA}.diff_b": _random(height)}


FORMS: dict[str, Callable[[dict[str, tuple[int, int]]], Content]] = {
    "product": _product,
    "fused": _fused,
    "dora": _dora,
    "kronecker": _kronecker,
    "hadamard": _hadamard,
    "inputs turned": _inputs_turned,
    "outputs turned": _outputs_turned,
    "differences": _differences,
}
_LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_q": 4}}
_OFT = {"peft_type": "OFT", "r": 0, "oft_block_size": 8, "coft": True, "eps": 0.1, "num_cayley_neumann_terms": 5}
CONFIGS: dict[str, dict[str, Any]] = {form: _OFT if form == "inputs turned" else _LORA for form in FORMS}

# ------------------------------------------------------------------ writing, also what no writer would


def packed(content: Content) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    names |= {torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.int64: "I64"}
    names |= {torch.float8_e4m3fn: "F8_E4M3"}
    header, data = dict[str, Any](), b""
    for key, tensor in content.items():
        values = tensor.contiguous().flatten()
        written = bytes(values.view(torch.uint8).tolist()) if values.numel() else b""
        offsets = [len(data), len(data) + len(written)]
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += written
    return header, data


def file_of(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def whole(content: Content, config: dict[str, Any] | None, chance: random.Random, place: Path) -> bytes:
    """With the settings in the header or beside it."""
    header, data = packed(content)
    if config is not None and chance.random() < 0.5:
        header["__metadata__"] = {"lora_adapter_metadata": json.dumps(config)}
    elif config is not None:
        (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return file_of(header, data)


# ------------------------------------------------------------------ mutations

Config = dict[str, Any] | None


def sound(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    return whole(content, config, chance, place)


def other_shape(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    key = chance.choice(list(content))
    shape = list(content[key].shape)
    kind = chance.randrange(6)
    if kind == 0:
        shape = [chance.choice([0, 1, 2, 3, 7, 64, 192]) for _ in range(chance.randrange(5))]
    elif kind == 1:
        shape = [0 if chance.random() < 0.5 else side for side in shape] or [0]
    elif kind == 2:
        shape += [1] * chance.randint(1, 6)
    elif kind == 3:
        shape = shape[::-1]
    elif kind == 4 and shape:
        shape[chance.randrange(len(shape))] += chance.choice([-1, 1])
    else:
        shape = [0, chance.choice([2**31, 2**40, 2**62])]
        header, data = packed({k: v for k, v in content.items() if k != key})
        return file_of(header | {key: {"dtype": "F32", "shape": shape, "data_offsets": [len(data)] * 2}}, data)
    return whole(content | {key: _random(*shape)}, config, chance, place)


def other_dtype(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    key = chance.choice(list(content))
    dtypes = [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float64, torch.float16, torch.float8_e4m3fn]
    return whole(content | {key: (10 * content[key]).to(chance.choice(dtypes))}, config, chance, place)


def other_values(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    key = chance.choice(list(content))
    value = chance.choice([0.0, float("nan"), float("inf"), 3e38, -3e38, 1e-45, 1e20, 1e4, 1.0])
    whole_of_it = chance.random() < 0.5
    tensor = torch.full_like(content[key], value) if whole_of_it else content[key].clone()
    tensor.view(-1)[:1] = value
    return whole(content | {key: tensor}, config, chance, place)


def missing(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    keys = chance.sample(list(content), chance.randrange(len(content)))
    return whole({key: content[key] for key in keys}, config, chance, place)


def other_names(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    key = chance.choice(list(content))
    names = [Q, ADA, NORM, "layers.0.attention.qkv", *NAMES]
    new = chance.choice(names) + chance.choice(ENDINGS)
    return whole({**content, new: content[key]}, config, chance, place)


def another_form_beside(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    shapes = linear_shapes(pipeline().model.skeleton("dit"))
    return whole(FORMS[chance.choice(list(FORMS))](shapes) | content, config, chance, place)


def many_keys(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    name = chance.choice(["layers.{}.x.alpha", "model_" * 40 + "{}.alpha", "{}", Q + ".lora_A.{}.weight"])
    more = {name.format(i): torch.ones(()) for i in range(chance.choice([100, 4000]))}
    return whole(content | more, config, chance, place)


def twice(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    header, data = packed(content)
    key = chance.choice(list(header))
    return file_of(json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}", data)


def header_value(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    header, data = packed(content)
    about = header[chance.choice(list(header))]
    name = chance.choice(["dtype", "shape", "data_offsets"])
    about[name] = chance.choice(DTYPES if name == "dtype" else [HUGE, NUMBERS, [], [[4]], {}, "x", None, [2**62] * 8])
    if chance.random() < 0.3:
        header["__metadata__"] = chance.choice([*NUMBERS[:20], {"lora_adapter_metadata": 4}, [1]])
    return file_of(header, data)


def bytes_changed(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    data = bytearray(whole(content, config, chance, place))
    if chance.random() < 0.5:
        return bytes(data[: chance.randrange(len(data))])
    for _ in range(chance.randint(1, 5)):
        data[chance.randrange(min(len(data), 1200))] = chance.randrange(256)
    return bytes(data)


def settings_value(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    config = dict(config or _LORA)
    name = chance.choice([*config, "use_rslora", "use_cayley_neumann", "alpha", "transformer.r", "block_share"])
    config[name] = chance.choice([*NUMBERS, "LORA", "BOFT", "OFT", [1], {"to_q": "x"}, {"": 4}])
    return _with_settings(content, json.dumps(config), chance, place)


def settings_pattern(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    config = dict(config or _LORA)
    patterns = chance.sample(PATTERNS, chance.randint(1, 4))
    patterns += [f"a*{i}" for i in range(chance.choice([0, 0, 90, 5000]))]
    config[chance.choice(["alpha_pattern", "rank_pattern"])] = {key: chance.choice([4, 4, "x"]) for key in patterns}
    return _with_settings(content, json.dumps(config), chance, place)


def settings_text(content: Content, config: Config, chance: random.Random, place: Path) -> bytes:
    texts = ["", "{", "[]", "3", "null", '{"r": 1' + "0" * 5000 + "}", '{"a":' * 5000, '{"r":4,"r":4}', "\ufeff{}"]
    text = chance.choice([*texts, json.dumps(config or _LORA)[: chance.randrange(40)]])
    return _with_settings(content, text, chance, place)


def _with_settings(content: Content, text: str, chance: random.Random, place: Path) -> bytes:
    header, data = packed(content)
    if chance.random() < 0.5:
        header["__metadata__"] = {"lora_adapter_metadata": text}
    else:
        (place / "adapter_config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    return file_of(header, data)


MUTATORS = [
    *(sound, other_shape, other_dtype, other_values, missing, other_names, another_form_beside, many_keys, twice),
    *(header_value, bytes_changed, settings_value, settings_pattern, settings_text),
]
