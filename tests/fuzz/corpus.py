"""The smallest case of every kind of fault that was ever found: each once ended in a traceback, a hang or a wrong file.

All of them are always run. Where a case is a file for another program's eyes, its comment says what went wrong.
"""

import functools
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tiny
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import zimage
from zimage.cli import main
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL

Cases = Iterator[tuple[str, Callable[[], object]]]
DEEP = "[" * 10_000 + "]" * 10_000
LONG = "9" * 5000
HUGE = "9" * 400
RENDER = ["-q", "--width", "32", "--height", "32", "--steps", "1", "--seed", "1"]

CONFIGS: dict[str, list[tuple[str, object]]] = {
    "text_encoder": [
        ("layer_types", 3),
        ("layer_types", [["full_attention"]]),
        ("layer_types", [None]),
        ("rope_parameters", "text"),
        ("rope_parameters", [1]),
        ("rope_scaling", 1.5),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 2**63),
        ("hidden_size", -64),
        ("vocab_size", 0),
        ("head_dim", 0),
        ("head_dim", 7),
        ("rms_norm_eps", "1e-6"),
        ("rope_theta", 0),
        ("model_type", ["qwen3"]),
        ("num_key_value_heads", 3),
    ],
    "transformer": [
        ("axes_dims", [None, 48, 48]),
        ("axes_dims", ["8", "12", "12"]),
        ("axes_dims", [[8], [12], [12]]),
        ("axes_dims", []),
        ("axes_dims", [8, 12]),
        ("axes_dims", [7, 13, 12]),
        ("axes_lens", [[1], [2], [3]]),
        ("axes_lens", [256]),
        ("n_refiner_layers", 1_000_000_000),
        ("n_layers", -1),
        ("n_heads", 0),
        ("n_heads", 2**63),
        ("dim", 10**12),
        ("dim", 65),
        ("_class_name", ["ZImageTransformer2DModel"]),
        ("_class_name", {}),
        ("norm_eps", []),
        ("t_scale", None),
        ("in_channels", 0),
        ("cap_feat_dim", 2.5),
        ("all_patch_size", 2),
    ],
    "vae": [
        ("block_out_channels", "text"),
        ("block_out_channels", True),
        ("block_out_channels", 1.5),
        ("block_out_channels", {}),
        ("block_out_channels", []),
        ("block_out_channels", [8, 16, 16, 15]),
        ("block_out_channels", [8, 16, None, 16]),
        ("block_out_channels", [2**40] * 4),
        ("_class_name", ["AutoencoderKL"]),
        ("_class_name", 3),
        ("norm_num_groups", 3),
        ("norm_num_groups", 0),
        ("layers_per_block", 10**9),
        ("latent_channels", -16),
        ("scaling_factor", 0),
        ("scaling_factor", "0.3611"),
        ("sample_size", "64"),
        ("sample_size", -1),
    ],
    "scheduler": [("shift", 0), ("shift", "3"), ("shift", [3.0]), ("_class_name", [])],
}


def cases(chance: random.Random, folder: Path) -> Cases:
    """Every case once, in a folder of its own."""
    for number, (name, call) in enumerate(_all()):
        place = folder / str(number)
        place.mkdir()
        yield name, functools.partial(_inside, place, call)


def _inside(place: Path, call: Callable[[Path], object]) -> object:
    os.chdir(place)
    return call(place)


def _all() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for part, changes in CONFIGS.items():
        for key, value in changes:
            yield f"{part} config {key} = {value!r:.40}", functools.partial(_config, part, key, value)
    for kind, text in {"deep": f'{{"a": {DEEP}}}', "long": f'{{"a": {LONG}}}', "huge": f'{{"a": {HUGE}}}'}.items():
        for name, write in JSON_FILES.items():
            yield f"{kind} JSON in {name}", functools.partial(write, text)
    yield from FILES.items()
    yield from TEXTS.items()
    for name, mutate in STATES.items():
        yield f"state: {name}", functools.partial(_state, mutate)
    for name, settings in PEFT.items():
        yield f"PEFT: {name}", functools.partial(_peft, settings)


# ------------------------------------------------------------------------------------------ sound files


@functools.cache
def _sound() -> Path:
    parts = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    return tiny.write_model(Path(tempfile.mkdtemp(prefix="sound-")) / "model", *states, tiny.KL)


def _model(place: Path) -> Path:
    return Path(shutil.copytree(_sound(), place / "model"))


def _load(folder: Path) -> object:
    return zimage.ZImage.load(folder, device="cpu", dtype="fp32")


def _header(file: Path, text: str) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode())


def _dit_file(place: Path) -> Path:
    return _model(place) / "transformer" / "diffusion_pytorch_model.safetensors"


def _config(part: str, key: str, value: object, place: Path) -> object:
    file = _model(place) / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    return _load(place / "model")


# ------------------------------------------------------------------------------------------ JSON in all files


def _json_file(name: str, text: str, place: Path) -> object:
    (_model(place) / name).write_text(text)
    return _load(place / "model")


def _json_header(text: str, place: Path) -> object:
    _header(_dit_file(place), text)
    return _load(place / "model")


def _json_metadata(key: str, text: str, place: Path) -> object:
    file = place / "dit.safetensors"
    save_file({"layers.0.attention.to_q.weight": torch.zeros(4, 4)}, file, {key: text})
    return zimage.load_component(file, "dit")


def _json_comfy(text: str, place: Path) -> object:
    file = place / "dit.safetensors"
    described = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file(
        {
            "layers.0.attention.qkv.weight": torch.zeros(4, 4).to(torch.int8),
            "layers.0.attention.qkv.comfy_quant": described,
        },
        file,
    )
    return zimage.load_component(file, "dit")


def _json_adapter(text: str, place: Path) -> object:
    _lora(place)
    (place / "adapter_config.json").write_text(text)
    return zimage.ZImage.load(_sound(), device="cpu", lora=[str(place / "a.safetensors")])


def _json_lora_header(text: str, place: Path) -> object:
    _lora(place, {"lora_adapter_metadata": text})
    return zimage.ZImage.load(_sound(), device="cpu", lora=[str(place / "a.safetensors")])


def _json_state(text: str, place: Path) -> object:
    metadata = {"format": "zimage-render", "version": "2", "state": text}
    save_file({"latents": torch.zeros(1, 16, 4, 4)}, place / "s.safetensors", metadata)
    return main(["gen", "--resume", "s.safetensors"])


def _json_embeddings(text: str, place: Path) -> object:
    metadata = {"format": "zimage-embeddings", "version": "1", "request": text, "encoder": "e"}
    save_file({"embeddings": torch.ones(4, 64)}, place / "e.safetensors", metadata)
    return main(["gen", "--embeddings", "e.safetensors", *RENDER])


def _json_png(text: str, place: Path) -> object:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("zimage", text)
    Image.new("RGB", (16, 16)).save(place / "p.png", pnginfo=chunks)
    return main(["gen", "--from", "p.png", "-q"])


def _json_exif(text: str, place: Path) -> object:
    exif = Image.Exif()
    exif[0x010E] = text
    Image.new("RGB", (16, 16)).save(place / "p.jpg", exif=exif)
    return main(["gen", "--from", "p.jpg", "-q"])


def _json_comfy_png(text: str, place: Path) -> object:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", text)
    Image.new("RGB", (16, 16)).save(place / "p.png", pnginfo=chunks)
    return main(["gen", "--from", "p.png", "-q"])


def _json_vocabulary(text: str, place: Path) -> object:
    (_model(place) / "vocabulary.json").write_text(text)
    return main(["gen", "a cat", "--model", "model", *RENDER])


def _json_record(text: str, place: Path) -> object:
    (_model(place) / ".zimage-manifest.json").write_text(text)
    return main(["weights", "verify", "model"])


JSON_FILES: dict[str, Callable[[str, Path], object]] = {
    **{
        name: functools.partial(_json_file, name)
        for name in (
            "text_encoder/config.json",
            "transformer/config.json",
            "vae/config.json",
            "scheduler/scheduler_config.json",
            "text_encoder/generation_config.json",
            "text_encoder/model.safetensors.index.json",
            "tokenizer/tokenizer.json",
        )
    },
    "a header of safetensors": _json_header,
    "the description of quantised layers": functools.partial(_json_metadata, "_quantization_metadata"),
    "comfy_quant": _json_comfy,
    "adapter_config.json": _json_adapter,
    "lora_adapter_metadata": _json_lora_header,
    "a state": _json_state,
    "embeddings": _json_embeddings,
    "a PNG": _json_png,
    "a JPEG": _json_exif,
    "ComfyUI's PNG": _json_comfy_png,
    "vocabulary.json": _json_vocabulary,
    "a fetch's record": _json_record,
}


# ------------------------------------------------------------------------------------------ weight files


def _loose(place: Path, changes: dict[str, torch.Tensor | None]) -> object:
    """The DiT's file alone, with other tensors; None removes one."""
    from safetensors.torch import load_file

    state = load_file(_sound() / "transformer" / "diffusion_pytorch_model.safetensors") | changes
    file = place / "dit.safetensors"
    save_file({key: value for key, value in state.items() if value is not None}, file)
    return zimage.load_component(file, "dit")


def _twice(place: Path) -> object:
    """The same tensor in two shards: the last one counted, silently."""
    folder = _model(place) / "transformer"
    whole = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(whole, folder / "a.safetensors")
    whole.rename(folder / "b.safetensors")
    keys = ZImageDiT.from_config(tiny.DIT).state_dict()
    weight_map = {key: "ab"[i % 2] + ".safetensors" for i, key in enumerate(keys)}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return _refused(lambda: _load(place / "model"))


def _refused(call: Callable[[], object]) -> object:
    """For what may not be accepted."""
    call()
    raise AssertionError("it was accepted")


def _index(content: object, place: Path) -> object:
    folder = _model(place) / "transformer"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    return _refused(lambda: _load(place / "model"))


def _fifo(name: str, place: Path) -> object:
    file = _model(place) / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    return _load(place / "model")


def _sparse(name: str, place: Path) -> object:
    os.truncate(_model(place) / name, 400 << 20)
    return _load(place / "model")


def _shown(place: Path, **pixels: object) -> object:
    """It once made the text round the picture first, of 2 GB."""
    from fuzz import seeing

    content = json.dumps({**seeing.PIXELS, **pixels}).encode()
    return seeing.see(seeing.model_in(place / "model"), place / "vision", {"preprocessor_config.json": content})


FILES: dict[str, Callable[[Path], object]] = {
    "pads without rows": lambda place: _loose(place, {"x_pad_token": torch.zeros(1, 0)}),
    "pads of one dimension": lambda place: _loose(place, {"x_pad_token": torch.zeros(64)}),
    "heads without size": lambda place: _loose(place, {"layers.0.attention.norm_q.weight": torch.zeros(0)}),
    "an embedder of one dimension": lambda place: _loose(place, {"all_x_embedder.2-1.weight": torch.zeros(64)}),
    "a caption width of 0": lambda place: _loose(place, {"cap_embedder.0.weight": torch.zeros(0)}),
    "codes whose companion has no size": lambda place: _loose(
        place,
        {
            "layers.0.feed_forward.w1.weight": torch.zeros(64, 64, dtype=torch.int8),
            "layers.0.feed_forward.w1.weight_scale": torch.zeros(0),
        },
    ),
    "codes of the wrong kind": lambda place: _loose(
        place,
        {
            "layers.0.feed_forward.w1.weight": torch.zeros(64, 64, dtype=torch.uint8),
            "layers.0.feed_forward.w1.weight_scale": torch.zeros(64, dtype=torch.int8),
        },
    ),
    "a tensor in two shards": _twice,
    "an index without weight_map": functools.partial(_index, {}),
    "an index of numbers": functools.partial(_index, {"weight_map": {"a": 1}}),
    "an index of lists": functools.partial(_index, {"weight_map": [["a", "b"]]}),
    "an index that climbs": functools.partial(_index, {"weight_map": {"a": "../../x.safetensors"}}),
    "an index of nothing": functools.partial(_index, {"weight_map": {}}),
    "a pipe as config": functools.partial(_fifo, "vae/config.json"),
    "a pipe as weights": functools.partial(_fifo, "vae/diffusion_pytorch_model.safetensors"),
    "a pipe as tokenizer": functools.partial(_fifo, "tokenizer/tokenizer.json"),
    "a pipe as schedule": functools.partial(_fifo, "scheduler/scheduler_config.json"),
    "a sparse config": functools.partial(_sparse, "vae/config.json"),
    "a sparse schedule": functools.partial(_sparse, "scheduler/scheduler_config.json"),
    "a sparse tokenizer": functools.partial(_sparse, "tokenizer/tokenizer.json"),
    "a vision model that asks for pictures of half a billion pixels": lambda place: _shown(
        place, size={"shortest_edge": 1 << 29, "longest_edge": 1 << 30}
    ),
}


# ------------------------------------------------------------------------------------------ LoRAs and their settings


def _lora(place: Path, metadata: dict[str, str] | None = None) -> Path:
    name = "transformer.layers.0.attention.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, place / "a.safetensors", metadata)
    return place / "a.safetensors"


PEFT: dict[str, str] = {
    "a pattern that backtracks": '{"r": 2, "lora_alpha": 2, "alpha_pattern": {"(\\\\w+\\\\.?)+x": 4}}',
    "a pattern with flags inside": '{"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_q(?i)": 4}}',
    "a pattern that does not close": '{"r": 2, "lora_alpha": 2, "alpha_pattern": {"(to_q": 4}}',
    "an alpha of 400 digits": f'{{"r": 2, "lora_alpha": {HUGE}}}',
    "an alpha that is infinite": '{"r": 2, "lora_alpha": 1e999}',
    "a rank that is text": '{"r": "2", "lora_alpha": 2}',
    "a rank of 0": '{"r": 0, "lora_alpha": 2}',
    "patterns as a list": '{"r": 2, "lora_alpha": 2, "alpha_pattern": ["to_q"]}',
    "patterns of lists": '{"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": [2]}}',
    "use_rslora as text": '{"r": 2, "lora_alpha": 2, "use_rslora": "yes"}',
}


def _peft(text: str, place: Path) -> object:
    file = _lora(place)
    (place / "adapter_config.json").write_text(text)
    return zimage.ZImage.load(_sound(), device="cpu", lora=[str(file)])


# ------------------------------------------------------------------------------------------ states

RAW = dict[str, object]
STATES: dict[str, Callable[[RAW, dict[str, torch.Tensor]], object]] = {
    "no job": lambda record, tensors: record.pop("job"),
    "a job that is a number": lambda record, tensors: record.update(job=3),
    "a request that is a list": lambda record, tensors: record["job"].update(request=[]),
    "decoded as text": lambda record, tensors: record.update(decoded="0"),
    "decoded beyond all": lambda record, tensors: record.update(decoded=10**9),
    "a step below 0": lambda record, tensors: record.update(step=-1),
    "a step beyond all": lambda record, tensors: record.update(step=10**6),
    "an output that is a number": lambda record, tensors: record.update(output=7),
    "an output elsewhere": lambda record, tensors: record.update(output="/tmp/elsewhere-{seed}.png"),
    "rewritten as a number": lambda record, tensors: record.update(rewritten=7),
    "loading as a list": lambda record, tensors: record.update(loading=[1]),
    "no seeds": lambda record, tensors: record["job"].update(seeds=[]),
    "no texts": lambda record, tensors: record["job"].update(texts=[]),
    "no noise levels": lambda record, tensors: record["job"].update(passes=[]),
    "latents of another rank": lambda record, tensors: tensors.update(latents=torch.zeros(16, 4, 4)),
    "latents of another size": lambda record, tensors: tensors.update(latents=torch.zeros(1, 16, 8, 8)),
    "latents of other channels": lambda record, tensors: tensors.update(latents=torch.zeros(1, 4, 4, 4)),
    "latents that are whole numbers": lambda record, tensors: tensors.update(latents=torch.zeros(1, 16, 4, 4).long()),
    "latents that are no numbers": lambda record, tensors: tensors["latents"].fill_(float("nan")),
}


@functools.cache
def _kept() -> Path:
    """The state of a render that was closed after its first step."""
    from zimage.render.state import StateFile

    place = Path(tempfile.mkdtemp(prefix="state-"))
    here = os.getcwd()
    os.chdir(place)
    try:
        update = StateFile.update

        def stop(kept: StateFile, event: object) -> None:
            update(kept, event)  # type: ignore[arg-type]
            if getattr(event, "stage", "") == "denoise" and event.step == 1:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        StateFile.update = stop  # type: ignore[method-assign, assignment]
        try:
            main(["gen", "a red cat", "--save-state", "s.safetensors", *RENDER, "--steps", "2", "-o", "x.png"])
        finally:
            StateFile.update = update  # type: ignore[method-assign]
    finally:
        os.chdir(here)
    return place / "s.safetensors"


def _state(mutate: Callable[[RAW, dict[str, torch.Tensor]], object], place: Path) -> object:
    from safetensors import safe_open

    with safe_open(_kept(), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    record = json.loads(metadata["state"])
    mutate(record, tensors)
    save_file(tensors, place / "s.safetensors", {**metadata, "state": json.dumps(record)})
    status = main(["gen", "--resume", "s.safetensors", "-q"])
    assert status in (1, 2), f"status {status}: the state was accepted"
    assert (place / "s.safetensors").is_file(), "the state is gone"
    return status


# ------------------------------------------------------------------------------------------ texts


def _tokenizer(change: Callable[[dict], None], place: Path) -> object:
    file = _model(place) / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    pipe = _load(place / "model")
    return pipe.tokenize("a cat" + "a" * 40)  # type: ignore[attr-defined]


def _piped(data: bytes, *command: str) -> object:
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    try:
        return main([*command])
    finally:
        sys.stdin = before


def _settings(text: str, place: Path) -> object:
    (place / "z.toml").write_text(text)
    return main(["config", "show", "--config", "z.toml"])


def _template(text: str, place: Path) -> object:
    (place / "t").mkdir()
    (place / "t" / "mine.md").write_text(text)
    return main(["tokens", "a cat", "--templates", "t", "--template", "mine"])


def _cache_pipe(place: Path) -> object:
    (place / "cache").mkdir()
    main(["gen", "a cat", *RENDER, "--cache-folder", "cache"])
    for file in (place / "cache").glob("*.safetensors"):
        file.unlink()
        os.mkfifo(file)
    return main(["gen", "a cat", *RENDER, "--cache-folder", "cache", "-o", "again.png"])


def _from_long(place: Path) -> object:
    main(["gen", "a cat", *RENDER, "-o", "p.png"])
    with Image.open("p.png") as image:
        record = json.loads(image.info["zimage"])
        record["request"]["prompt"] = "a cat " * 80_000
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("zimage", json.dumps(record))
        image.save("q.png", pnginfo=chunks)
    return main(["gen", "--from", "q.png", "-q"])


def _eps(place: Path) -> object:
    """Pillow would have started Ghostscript."""
    (place / "p.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n%%EOF\n")
    return main(["gen", "a cat", "--image", "p.png", *RENDER])


def _pipe_image(place: Path) -> object:
    os.mkfifo(place / "p.png")
    return main(["gen", "a cat", "--image", "p.png", *RENDER])


def _chain(count: int) -> str:
    return "".join(f'[p{i}]\ninherit = "p{i + 1}"\n' for i in range(count)) + f"[p{count}]\nsteps = 4\n"


TEXTS: dict[str, Callable[[Path], object]] = {
    "a tokenizer that replaces nothing": lambda place: _tokenizer(
        lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}), place
    ),
    "a tokenizer whose pattern backtracks": lambda place: _tokenizer(
        lambda c: c.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+a+)+b"}, "behavior": "Isolated", "invert": False}
        ),
        place,
    ),
    "a tokenizer that prepends without end": lambda place: _tokenizer(
        lambda c: c.update(normalizer={"type": "Prepend", "prepend": "x" * 10**7}), place
    ),
    "a tokenizer without model": lambda place: _tokenizer(lambda c: c.pop("model"), place),
    "half a character as prompt": lambda place: main(["tokens", "\udced\udcb2\udc80"]),
    "half a character to be drawn": lambda place: main(["gen", "a \udcff cat", *RENDER]),
    "half a character to be encoded": lambda place: main(["encode", "\udced", "-o", "x.safetensors"]),
    "standard input of another encoding": lambda place: _piped(b"a cat \xff\xfe", "gen", "-", *RENDER),
    "standard input of another encoding, counted": lambda place: _piped(b"\xed\xb2\x80", "tokens", "-"),
    "a name of a width of 10⁹": lambda place: main(["gen", "a", *RENDER, "-o", "{seed:>1000000000}.png"]),
    "a name of a precision of 10⁹": lambda place: main(["gen", "a", *RENDER, "-o", "{seed:.1000000000f}.png"]),
    "a name that asks attributes": lambda place: main(["gen", "a", *RENDER, "-o", "{prompt.__class__}.png"]),
    "profiles in a circle": lambda place: _settings('[a]\ninherit = "b"\n[b]\ninherit = "a"\n', place),
    "profiles in a long chain": lambda place: _settings(_chain(5000), place),
    "a string of quotes": lambda place: _settings("[default]\nprompt = " + '"' * 20_001, place),
    "a long string of quotes": lambda place: _settings("[default]\nsteps = '''" + "'\"" * 50_000, place),
    "settings nested deep": lambda place: _settings("[default]\nsteps = " + "[" * 5000, place),
    "a stranger's home": lambda place: main(["gen", "a", *RENDER, "--model", "~nosuch/x"]),
    "a stranger's home in a file": lambda place: _settings('[default]\nmodel = "~nosuch/x"\n', place),
    "front matter of sequences": lambda place: _template("---\n- - a\n  - b\n---\ntext\n", place),
    "front matter nested deep": lambda place: _template("---\na: " + "[" * 3000 + "\n---\ntext\n", place),
    "a template of 60,000 tokens": lambda place: _template("---\ndescription: x\n---\n" + "cat " * 60_000, place),
    "a pipe in the cache": _cache_pipe,
    "a prompt of hundreds of thousands of characters": _from_long,
    "a prompt of a million characters": lambda place: main(["gen", "a" * 1_000_000, *RENDER]),
    "an option of a million characters": lambda place: main(["gen", "a", *RENDER, "--device", "x" * 1_000_000]),
    "PostScript as a picture": _eps,
    "a pipe as a picture": _pipe_image,
}
