"""Qwen3-VL alone: its files under every naming, values that are refused, places in a text, memory as planned."""

import json
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from test_architecture import ODD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zimage
from zimage.errors import CheckpointError, ConfigError, RequestError, ZImageError
from zimage.loading.files import Component
from zimage.loading.plan import Workload
from zimage.loading.streaming import stream
from zimage.loading.weights import on_meta
from zimage.loading.work import vision_bytes
from zimage.text import Qwen3VL
from zimage.text.chat import seen_text
from zimage.text.qwen3_vl import Qwen3VLConfig, Qwen3VLTower
from zimage.text.sight import Sight, positions
from zimage.text.vision_input import PixelLimits, Pixels, grouped, pixels_of

PAD = tiny.VISION["image_token_id"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dict(tiny.randomised(Qwen3VL.from_config(tiny.VISION), 5).state_dict())


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    generator, limits = torch.Generator().manual_seed(1), PixelLimits(4096, 16_384)
    levels = [torch.randint(256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in ((64, 96), (70, 33))]
    return [pixels_of(Image.fromarray(level.numpy()), limits) for level in levels]


def write(folder: Path, state: dict[str, Tensor], config=tiny.VISION) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    return folder


def shortened(old: str, new: str = ""):
    return lambda key: key.replace(old, new, 1) if key.startswith(old) else key


# ------------------------------------------------------------------ files

NAMINGS = {
    "transformers": lambda key: key,
    "bare": shortened("model."),
    "split": lambda key: shortened("model.language_model.", "model.")(shortened("model.visual.", "visual.")(key)),
}
TOWERS = {"transformers": lambda key: key, "split": shortened("model."), "tower": shortened("model.visual.")}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("head", [False, True])
def test_namings(state, pictures, tmp_path, naming, head):
    """Each gives the same model, with a head, which is not read, or without one."""
    renamed = {NAMINGS[naming](key): value for key, value in state.items()}
    if head and naming != "bare":
        renamed["lm_head.weight"] = torch.zeros(tiny.VOCAB, 64)
    model = zimage.load_component(write(tmp_path / "vl", renamed), "vision", dtype="fp32")
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        k: v.tolist() for k, v in state.items()
    }
    whole, tower = (zimage.load_component(tmp_path / "vl", n, dtype="fp32") for n in ("vision", "vision_tower"))
    assert tower.text is None
    assert torch.equal(whole.look(pictures).tokens, tower.look(pictures).tokens)


@pytest.mark.parametrize("naming", TOWERS)
def test_a_tower_alone(state, pictures, tmp_path, naming):
    """With the whole model's config or with its own."""
    alone = {TOWERS[naming](key): value for key, value in state.items() if key.startswith("model.visual.")}
    own = {**tiny.VISION["vision_config"], "model_type": "qwen3_vl_vision"}
    for i, config in enumerate((tiny.VISION, own)):
        folder = write(tmp_path / str(i), alone, config)
        for name in ("vision", "vision_tower"):
            model = zimage.load_component(folder, name, dtype="fp32")
            assert model.text is None
            assert torch.isfinite(model.look(pictures).tokens).all()


def test_shards(state, tmp_path):
    folder, keys = tmp_path / "vl", sorted(state)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.VISION))
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, name in enumerate(names):
        save_file({key: state[key].contiguous() for key in keys[i::2]}, folder / name)
    index = {"weight_map": {key: names[i % 2] for i, key in enumerate(keys)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(zimage.load_component(folder, "vision").state_dict()) == len(state)


@pytest.mark.parametrize("with_text", [True, False])
def test_a_loose_file(tmp_path, with_text):
    """Heads of 128 and 16 heads, as published: the shapes tell the rest."""
    text = {**tiny.QWEN, "model_type": "qwen3_vl_text", "head_dim": 128, "rope_theta": 5e6, "vocab_size": 151_656}
    tower = {**tiny.VISION["vision_config"], "depth": 24, "hidden_size": 64, "num_heads": 16}
    tower["deepstack_visual_indexes"] = [5, 11, 17]
    config = {"model_type": "qwen3_vl", "vision_config": tower, **({"text_config": text} if with_text else {})}
    save_file(dict(Qwen3VL.from_config(config).bfloat16().state_dict()), tmp_path / "qwen3vl.safetensors")
    found = Component.open("vision", tmp_path / "qwen3vl.safetensors").skeleton.config
    assert found == Qwen3VL.from_config(config).config


def test_a_loose_tower_of_another_depth_is_refused(state, tmp_path):
    save_file(state, tmp_path / "vl.safetensors")
    with pytest.raises(CheckpointError, match=r"a vision tower of 5 layers; .*use a folder with its config.json"):
        Component.open("vision", tmp_path / "vl.safetensors")


def test_missing_tensors_are_named(state, tmp_path):
    key = "model.visual.deepstack_merger_list.1.norm.weight"
    folder = write(tmp_path / "vl", {name: value for name, value in state.items() if name != key})
    with pytest.raises(CheckpointError, match=f"1 tensors missing: {key}"):
        zimage.load_component(folder, "vision")


def test_streamed_blocks_give_the_same_bits(state, pictures, tmp_path):
    """Pictures one after another, then a text: the tower's blocks run again before the text stack's."""
    component = Component.open("vision", write(tmp_path / "vl", state))
    whole = component.load(CPU, torch.float32)
    every = range(len(list(whole.blocks())))
    streamed = component.load(CPU, torch.float32, streamed=every)
    stream(streamed, every, CPU)
    ids = torch.tensor([[1, *[PAD] * sum(whole.look(pictures).counts[:1]), 2, *[PAD] * whole.look(pictures).counts[1]]])
    for layer in (-2, -1):
        found = [model.text(ids, layer, sight=model.look(pictures)) for model in (whole, streamed)]
        assert torch.equal(*found)


# ------------------------------------------------------------------ configs


def complaint(config) -> str | None:
    try:
        with on_meta():
            Qwen3VL.from_config(config)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("part", ["", "vision_config", "text_config"])
def test_every_value_of_another_kind_or_size_is_named(part):
    for key in tiny.VISION[part] if part else ("vision_config", "image_token_id", "model_type"):
        for value in ODD:
            changed = {part: {**tiny.VISION[part], key: value}} if part else {key: value}
            said = complaint({**tiny.VISION, **changed})
            assert said is None or (len(said) < 400 and (not part or key in said)), (key, value, said)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("", {"model_type": "qwen3_vl_moe"}, "model_type = 'qwen3_vl_moe' is not implemented; it must be 'qwen3_vl'"),
        ("", {"image_token_id": 10**6}, "image_token_id = 1000000 should be of type int, from 0 to 260"),
        ("", {"image_token_id": "x"}, "image_token_id = 'x' should be of type int"),
        ("", {"vision_config": None}, "the key 'vision_config' is missing"),
        ("", {"vision_config": [1]}, "vision_config = [1] should be an object"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act = 'silu' is not implemented"),
        ("vision_config", {"num_heads": 5}, "hidden_size = 48 must be a multiple of num_heads = 5"),
        ("vision_config", {"num_heads": 8}, "hidden_size / num_heads = 6 must be a multiple of 4"),
        ("vision_config", {"num_position_embeddings": 35}, "num_position_embeddings = 35 must be a square"),
        ("vision_config", {"deepstack_visual_indexes": [0, 5]}, "= [0, 5] must rise within depth = 5"),
        ("vision_config", {"deepstack_visual_indexes": [3, 1]}, "= [3, 1] must rise"),
        ("vision_config", {"temporal_patch_size": 1}, "temporal_patch_size = 1 is not implemented; it must be 2"),
        ("vision_config", {"in_channels": 4}, "in_channels = 4 should be of type int, 3"),
        ("vision_config", {"patch_size": [16, 16]}, "patch_size = [16, 16] should be of type int, from 1 to 256"),
        ("vision_config", {"rope_parameters": {"rope_type": "default"}}, "rope_type = 'default' is not implemented"),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size = 32 must equal the text stack's hidden_size = 64"),
        ("text_config", {"rope_scaling": {"mrope_interleaved": False}}, "mrope_interleaved = False is not implemented"),
        ("text_config", {"rope_scaling": {"mrope_section": [6, 6, 6]}}, "must add up to head_dim / 2 = 12"),
        ("text_config", {"rope_scaling": {"mrope_section": [12]}}, "mrope_section = [12] should be a list of 3"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn' is not implemented"),
        ("text_config", {"attention_bias": True}, "attention_bias = True is not implemented"),
    ],
)  # fmt: skip
def test_what_would_be_right_is_said(part, change, words):
    config = {**tiny.VISION, part: {**tiny.VISION[part], **change}} if part else {**tiny.VISION, **change}
    assert words in (complaint(config) or "")


def test_rope_as_either_version_of_transformers_writes_it():
    new = dict(tiny.VISION["text_config"])
    rope = {**new.pop("rope_scaling"), "rope_theta": new.pop("rope_theta")}
    new["rope_parameters"] = rope
    assert Qwen3VLConfig.read({**tiny.VISION, "text_config": new}) == Qwen3VLConfig.read(tiny.VISION)


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0), (1, 201), (201, 1), (10_000, 49)])
def test_pictures_that_are_too_narrow(width, height):
    with pytest.raises(
        RequestError, match=f"{width}×{height} cannot be read: its longer side may be at most 200 times"
    ):
        pixels_of(Image.new("RGB", (width, height)))


def test_modes_of_pictures(pictures):
    """What is not RGB becomes it."""
    grey = Image.new("L", (64, 64), 7)
    assert (pixels_of(grey).levels == 7).all()
    assert pixels_of(grey).levels.dtype == torch.uint8


def test_groups_of_neighbours():
    values = torch.arange(24).view(4, 6)
    assert grouped(values, 2).tolist()[:8] == [0, 1, 6, 7, 2, 3, 8, 9]
    assert grouped(values, 1).tolist() == list(range(24))


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 4096, "max_pixels": 8192},
        {"size": {"shortest_edge": 4096, "longest_edge": 8192}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 4096, "max_pixels": 8192},
        {"size": {"shortest_edge": 4096, "longest_edge": 8192}, "min_pixels": None, "image_mean": [0.5, 0.5, 0.5]},
    ],
)
def test_limits_under_either_naming(tmp_path, config):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    read = Qwen3VLConfig.read(tiny.VISION).pixel_limits
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"min_pixels": 1, "max_pixels": 2}}')
    assert read(tmp_path) == read(tmp_path / "loose.safetensors") == PixelLimits(4096, 8192)


def test_limits_as_transformers_5_writes_them(tmp_path):
    config = {"image_processor": {"size": {"shortest_edge": 4096, "longest_edge": 8192}, "rescale_factor": 1 / 255}}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    assert Qwen3VLConfig.read(tiny.VISION).pixel_limits(tmp_path) == PixelLimits(4096, 8192)


def test_limits_where_no_file_states_them(tmp_path):
    published = PixelLimits(65_536, 16_777_216)
    assert Qwen3VLConfig.read(tiny.VISION).pixel_limits(tmp_path) == published
    (tmp_path / "processor_config.json").write_text("{}")
    assert Qwen3VLConfig.read(tiny.VISION).pixel_limits(tmp_path) == published


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": None}, "the key 'min_pixels' is missing, and so is 'shortest_edge' in 'size'"),
        ({"size": {"shortest_edge": 5}}, "the key 'max_pixels' is missing"),
        ({"size": 5}, "size = 5 should be an object"),
        ({"max_pixels": 10}, "min_pixels = 4096 must not exceed max_pixels = 10"),
        ({"max_pixels": "10"}, "max_pixels = '10' should be of type int"),
        ({"min_pixels": 0}, "min_pixels = 0 should be of type int, from 1"),
        ({"patch_size": 14}, "patch_size = 14 must be the vision tower's 16"),
        ({"merge_size": 1}, "merge_size = 1 must be the vision tower's 2"),
        ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean = [0.48, 0.46, 0.41] is not implemented"),
        ({"do_resize": False}, "do_resize = False is not implemented"),
        ({"resample": 2}, "resample = 2 is not implemented"),
        ({"temporal_patch_size": 1}, "temporal_patch_size = 1 is not implemented"),
        ({"rescale_factor": 1.0}, "rescale_factor = 1.0 is not implemented"),
    ],
)
def test_limits_that_cannot_be_used(tmp_path, change, words):
    config = {"size": {"shortest_edge": 4096, "longest_edge": 8192}, **change}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        Qwen3VLConfig.read(tiny.VISION).pixel_limits(tmp_path)
    assert words in str(error.value)


def refusal(read, path: Path) -> str | None:
    try:
        read(path)
    except ZImageError as error:
        return str(error)
    return None


def test_odd_limits_are_one_line(tmp_path):
    file, read = tmp_path / "preprocessor_config.json", Qwen3VLConfig.read(tiny.VISION).pixel_limits
    keys = ("size", "min_pixels", "max_pixels", "patch_size", "merge_size", *PixelLimits.IMPLEMENTED)
    for key in keys:
        for value in ODD:
            config = {"size": {"shortest_edge": 4096, "longest_edge": 8192}, key: value}
            file.write_text(json.dumps(config))
            said = refusal(read, tmp_path)
            assert said is None or (len(said) < 400 and "\n" not in said), (key, value)


# ------------------------------------------------------------------ places in a text


def test_positions_by_hand():
    """Two tokens, a picture of 2 × 3, a token, one of 1 × 2, and nothing behind it."""
    ids = torch.tensor([5, 6, *[PAD] * 6, 7, *[PAD] * 2])
    assert positions(ids, [(2, 3), (1, 2)], PAD).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]
    assert positions(torch.tensor([1, 2]), [], PAD).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("ids", "grids"),
    [([PAD], []), ([1], [(1, 1)]), ([PAD] * 3, [(2, 2)]), ([PAD] * 5, [(2, 2)]), ([PAD, 1, PAD], [(1, 2)])],
)
def test_image_tokens_that_are_no_picture(ids, grids):
    with pytest.raises(RequestError, match=r"image tokens where its pictures have .*leave <.image_pad.> out of texts"):
        positions(torch.tensor(ids), grids, PAD)


def test_a_text_with_other_image_tokens_is_refused_before_it_runs(state, pictures):
    model = Qwen3VL.from_config(tiny.VISION)
    with pytest.raises(RequestError, match=r"the text has 3 image tokens where its pictures have 6 \+ 6"):
        model.text(torch.tensor([[1, PAD, PAD, PAD]]), sight=model.look(pictures))
    with pytest.raises(ValueError, match="2 texts share"):
        model.text(torch.full((2, 6), PAD), sight=model.look(pictures))


def test_sight_changes_no_bit_of_what_stands_before_it(state, pictures):
    model = Qwen3VL.from_config(tiny.VISION)
    model.load_state_dict(state)
    sight = model.look(pictures[:1])
    plain = torch.randint(PAD, (1, 9), generator=torch.Generator().manual_seed(3))
    ids = torch.cat((plain, torch.full((1, sight.counts[0]), PAD), plain), dim=1)
    with torch.no_grad():
        for seen, unseen in zip(
            model.text.hidden_states(ids, sight=sight), model.text.hidden_states(plain), strict=True
        ):
            assert (seen[:, :9] - unseen).abs().max() <= 1e-5 * unseen.abs().max()
            assert torch.isfinite(seen).all()
        blended = model.text.blend(ids, {-2: 1, -3: 3}, sight)
        states = [model.text(ids, layer, sight=sight) for layer in (-2, -3)]
    torch.testing.assert_close(blended, 0.25 * states[0] + 0.75 * states[1])


def test_the_chat_text_about_pictures():
    assert seen_text("what?", (2, 1)) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|><|vision_start|><|image_pad|>"
        "<|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert seen_text("", (1,), "Look.").startswith("<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n<|vision_")


# ------------------------------------------------------------------ memory


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside take at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            key = storage._cdata
            if key not in self.held and key not in before:
                self.held[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, key)
        return out

    def freed(self, key: int) -> None:
        self.now -= self.held.pop(key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_looking_takes_the_memory_that_is_planned(dtype):
    """A tower of the published proportions. What a process takes on a CPU is another matter (test_seeing.py)."""
    tower = {**tiny.VISION["vision_config"], "depth": 4, "hidden_size": 256, "intermediate_size": 1024}
    tower |= {"num_heads": 4, "out_hidden_size": 640, "deepstack_visual_indexes": [0, 1, 2]}
    model = Qwen3VLTower.from_config({"model_type": "qwen3_vl", "vision_config": tower}).to(dtype)
    pixels = Pixels(torch.zeros(1600, 3, 16, 16, dtype=torch.uint8), (40, 40))
    with Live() as live:
        model.look([pixels])
    work = Workload(16, 16, 0, vision_patches=1600)
    assert vision_bytes(model.config, work, dtype, torch.device("cuda")) == pytest.approx(live.most, rel=0.1)


def test_a_sight_counts_its_tokens():
    assert Sight(torch.zeros(8, 4), (), ((2, 3), (1, 2)), PAD).counts == (6, 2)
