"""Mutations of weight files: headers and values, quantised weights and their companions, indexes, GGUF."""

import functools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loose
import tiny
import torch
from damaged import HEADERS, gguf_damaged
from safetensors.torch import save
from torch import Tensor

import zimage
from zimage.dit import ZImageDiT
from zimage.nn.packed import PackedLinear
from zimage.text import Qwen3
from zimage.text.tokenizer import Tokenizer
from zimage.vae import AutoencoderKL

Chance = random.Random
Case = tuple[str, Callable[[], None]]
State = dict[str, Tensor]
DIT = {**loose.DIT, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1}
QWEN = {**tiny.QWEN, "num_hidden_layers": 1, "hidden_size": 64, "head_dim": 32}
KL = {**tiny.KL, "block_out_channels": [32, 32], "norm_num_groups": 32}
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1.5, 2**63, "", "int8", [], {}, [[1]], "x" * 10_000)


def cases(chance: Chance, folder: Path) -> Iterator[Case]:
    """Endless mutations, each of a file drawn anew; the calls write below `folder` and load what they wrote."""
    while True:
        kind = chance.random()
        if kind < 0.15:
            yield _of_index(chance, folder)
        elif kind < 0.3:
            yield _of_gguf(chance, folder)
        else:
            yield _of_file(chance, folder)


@functools.cache
def _parts() -> dict[str, State]:
    models = {"dit": ZImageDiT.from_config(DIT), "text_encoder": Qwen3.from_config(QWEN)}
    models["vae"] = AutoencoderKL.from_config(KL)
    return {name: {key: value.bfloat16() for key, value in m.state_dict().items()} for name, m in models.items()}


@functools.cache
def _sources() -> list[tuple[str, str, State]]:
    """Files of a component: its name, what kind of file it is, the tensors."""
    parts = _parts()
    return [
        ("dit", "plain", parts["dit"]),
        ("dit", "native", loose.renamed("dit", "native", parts["dit"])),
        ("text_encoder", "plain", parts["text_encoder"]),
        ("vae", "ldm", loose.renamed("vae", "ldm", parts["vae"])),
        *(("dit", name, loose.quantised(parts["dit"], writer)[0]) for name, writer in QUANTISED.items()),
    ]


def _tiles(rows: int, columns: int, kind: torch.dtype) -> Tensor:
    """Block scales as cuBLAS keeps them."""
    return torch.ones(-(-rows // 128) * 128, -(-columns // 4) * 4).to(kind)


def _mxfp8(weight: Tensor) -> tuple[State, Tensor]:
    scale = _tiles(weight.shape[0], weight.shape[1] // 32, torch.uint8)
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": scale}, weight


def _nvfp4(weight: Tensor) -> tuple[State, Tensor]:
    scale = _tiles(weight.shape[0], weight.shape[1] // 16, torch.float8_e4m3fn)
    codes = torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": torch.ones(())}, weight


def _int4(weight: Tensor) -> tuple[State, Tensor]:
    codes = torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.int8)
    about = loose.described({"format": "convrot_w4a4", "convrot_groupsize": 4})
    return {"weight": codes, "weight_scale": torch.ones(len(weight)), "comfy_quant": about}, weight


def _padded(writer: loose.Quantiser) -> loose.Quantiser:
    """Only for matrices whose columns blocks divide; others are stored as they are."""
    return lambda weight: writer(weight) if weight.shape[1] % 32 == 0 else ({"weight": weight}, weight)


QUANTISED: dict[str, loose.Quantiser] = {
    "old fp8": loose.old_comfy_fp8,
    "fp8 per row": loose.lightx2v_fp8,
    "int8": loose.undescribed(loose.int8_rows, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4}),
    "int8 in blocks": loose.in_blocks(torch.int8, 64, 64),
    "mxfp8": _padded(_mxfp8),
    "nvfp4": _padded(_nvfp4),
    "int4": _padded(_int4),
}


def _of_file(chance: Chance, folder: Path) -> Case:
    part, name, state = chance.choice(_sources())
    change = chance.choice((*HEADERS, *TENSORS))
    content = change(bytes_of(state), chance) if change in HEADERS else bytes_of(change(dict(state), chance))

    def call() -> None:
        file = folder / "mutated.safetensors"
        file.write_bytes(content)
        used(zimage.load_component(file, part, dtype="fp32"))

    return f"{part} {name}: {change.__name__}", call


def bytes_of(state: State) -> bytes:
    return save({key: value.contiguous() for key, value in state.items()})


def used(module: torch.nn.Module) -> None:
    """Decode a few rows of each quantised matrix: only then are codes and scales read together."""
    for each in module.modules():
        if isinstance(each, PackedLinear):
            each.packed.rows(0, 2).decode()


# ------------------------------------------------------------------ tensors that are sound, and wrong


def _one(state: State, chance: Chance) -> str:
    """A key: half of the time one that shows the architecture or turns codes into numbers."""
    telling = [key for key in state if key.endswith(("_scale", "scale_weight", "pad_token", "_norm.weight", "quant"))]
    telling += [key for key in state if "embed" in key or "conv1" in key or "conv_in" in key or "norm_q" in key]
    return chance.choice(telling if telling and chance.random() < 0.5 else list(state))


def dropped(state: State, chance: Chance) -> State:
    del state[_one(state, chance)]
    return state


def emptied(state: State, chance: Chance) -> State:
    """A side of 0, or no values at all."""
    key = _one(state, chance)
    sides = list(state[key].shape) or [1]
    sides[chance.randrange(len(sides))] = 0
    return {**state, key: state[key].new_empty(chance.choice([sides, [0]]))}


def reshaped(state: State, chance: Chance) -> State:
    key = _one(state, chance)
    value, count = state[key], state[key].numel()
    shapes = [(count,), (1, count), (count, 1), (1,) * 8, (2, count // 2) if count % 2 == 0 else (count,)]
    shape = chance.choice([shape for shape in shapes if torch.Size(shape).numel() == count])
    return {**state, key: value.reshape(shape)}


def resized(state: State, chance: Chance) -> State:
    """Another number of rows, columns or sides."""
    key = _one(state, chance)
    sides = [chance.choice([1, 2, 3, side - 1 or 1, side + 1, 2 * side]) for side in state[key].shape]
    sides = chance.choice([sides, sides[:-1], [*sides, 1], [chance.choice([1, 3, 7, 96])]])
    return {**state, key: torch.ones(sides).to(state[key].dtype)}


def retyped(state: State, chance: Chance) -> State:
    """The same numbers as another kind."""
    kinds = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn, torch.float8_e8m0fnu)
    key = _one(state, chance)
    return {**state, key: state[key].float().to(chance.choice(kinds))}


def exchanged(state: State, chance: Chance) -> State:
    """Two tensors under one another's names."""
    first, second = _one(state, chance), _one(state, chance)
    return {**state, first: state[second].clone(), second: state[first].clone()}


def added(state: State, chance: Chance) -> State:
    """A companion or a block that nobody wrote."""
    key = _one(state, chance)
    leaves = ("weight_scale", "weight_scale_2", "weight_scale_inv", "scale", "zero_point", "absmax", "scaled_fp8", "")
    kinds = (torch.float32, torch.uint8, torch.float8_e4m3fn, torch.int32)
    made = torch.ones(chance.choice([(), (1,), (7,), (0,), (3, 5)])).to(chance.choice(kinds))
    name = chance.choice([f"{key.rpartition('.')[0]}.{chance.choice(leaves)}", key.replace(".0.", ".998."), key + "x"])
    return {**state, name: made}


def described(state: State, chance: Chance) -> State:
    """A description that says something else, or is no JSON."""
    key = f"{_one(state, chance).rpartition('.')[0]}.comfy_quant"
    field = chance.choice(["format", "convrot", "convrot_groupsize", "group_size", "block_size"])
    formats = ("int8_tensorwise", "nvfp4", "mxfp8", "convrot_w4a4", "float8_e4m3fn", "int8_blockwise")
    about = {"format": chance.choice(formats), "convrot": chance.random() < 0.5, field: chance.choice(VALUES)}
    text = json.dumps(about).encode()
    broken = chance.choice([text, text, text, text[:-3], b"", b"[" * 3000, b"\xff\xfe", b"[1]"])
    return {**state, key: torch.tensor(list(broken), dtype=torch.uint8)}


TENSORS = (dropped, emptied, reshaped, resized, retyped, exchanged, added, described)


# ------------------------------------------------------------------ shards and their index


def _of_index(chance: Chance, folder: Path) -> Case:
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    state = _parts()["dit"]
    shards = dict(zip(names, (sorted(state)[::2], sorted(state)[1::2]), strict=True))
    index = {key: name for name, keys in shards.items() for key in keys}
    files = {name: bytes_of({key: state[key] for key in keys}) for name, keys in shards.items()}
    change = chance.choice((lost, moved, elsewhere, other_map, other_text, doubled))
    return f"index: {change.__name__}", _folder_call(folder / "sharded", *change(index, files, chance))


def _folder_call(place: Path, index: bytes, files: dict[str, bytes]) -> Callable[[], None]:
    def call() -> None:
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        (place / "config.json").write_text(json.dumps(DIT))
        (place / "diffusion_pytorch_model.safetensors.index.json").write_bytes(index)
        for name, content in files.items():
            (place / name).write_bytes(content)
        zimage.load_component(place, "dit", dtype="fp32")

    return call


Index, Files = dict[str, Any], dict[str, bytes]


def _text(index: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": index}).encode()


def lost(index: Index, files: Files, chance: Chance) -> tuple[bytes, Files]:
    """A key or a shard that is not there."""
    if chance.random() < 0.5:
        del files[chance.choice(list(files))]
    else:
        del index[chance.choice(list(index))]
    return _text(index), files


def moved(index: Index, files: Files, chance: Chance) -> tuple[bytes, Files]:
    key = chance.choice(list(index))
    return _text({**index, chance.choice([key, "", key + "x", "\ud800"]): chance.choice(list(files))}), files


def elsewhere(index: Index, files: Files, chance: Chance) -> tuple[bytes, Files]:
    names = ("..", "", ".", "/dev/zero", "../../x.safetensors", "a\\b.safetensors", "x\0.safetensors", "x" * 5000, "é")
    return _text({**index, chance.choice(list(index)): chance.choice(names)}), files


def other_map(index: Index, files: Files, chance: Chance) -> tuple[bytes, Files]:
    values = (*VALUES, {**index, chance.choice(list(index)): chance.choice(VALUES)})
    return _text(chance.choice(values)), files


def other_text(index: Index, files: Files, chance: Chance) -> tuple[bytes, Files]:
    text = _text(index)
    texts = (b"", b"[]", text[: chance.randrange(len(text))], b'{"a":' * 9000, b"\xff" + text, b'{"weight_map": 1e999}')
    return chance.choice(texts), files


def doubled(index: Index, files: Files, chance: Chance) -> tuple[bytes, Files]:
    """A shard with its tensors twice, or in the other shard's place."""
    first, second = files
    return _text(index), {**files, second: files[first]}


# ------------------------------------------------------------------ GGUF


def gguf_of(state: State, file: Path, kind: str = "Q8_0") -> bytes:
    """A GGUF file of a state, with the vocabulary of tests/tiny.py and matrices of this kind."""
    import gguf

    writer, target = gguf.GGUFWriter(file, "x"), gguf.GGMLQuantizationType[kind]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = [token for token, _ in sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])]
    writer.add_token_list([*tokens, "Ġa"])
    writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256) + [1])
    writer.add_token_merges(["Ġ a"])
    for key, value in state.items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(key, gguf.quants.quantize(value.float().numpy(), target), raw_dtype=target)
        else:
            writer.add_tensor(key, value.float().numpy())
    loose.finish_gguf(writer)
    return file.read_bytes()


@functools.cache
def _gguf_files() -> dict[str, bytes]:
    names = {"dit": "native", "text_encoder": "gguf"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        return {part: gguf_of(loose.renamed(part, name, _parts()[part]), file) for part, name in names.items()}


def _of_gguf(chance: Chance, folder: Path) -> Case:
    part, content = chance.choice(list(_gguf_files().items()))
    return f"{part} GGUF", _gguf_call(folder / "mutated.gguf", part, gguf_damaged(content, chance))


def _gguf_call(file: Path, part: str, content: bytes) -> Callable[[], None]:
    def call() -> None:
        file.write_bytes(content)
        if part == "text_encoder":
            Tokenizer.load(file)
        zimage.load_component(file, part, dtype="fp32")

    return call
