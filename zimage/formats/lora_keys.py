"""The keys of LoRA files: which tensors form one adapter, and of which layer, whichever trainer wrote the names.

A key is any number of wrappers, a module's name and an ending that says what the tensor is. With "." written as "_",
the module's name is that of the checkpoint, except for a few native names and the fused q, k and v:

    transformer.layers.0.attention.to_q.lora_A.weight      diffusers; with other wrappers PEFT, ComfyUI, ai-toolkit
    lora_unet_layers_0_attention_to_q.lora_down.weight     kohya, musubi; lycoris_ in LyCORIS
    layers.0.attention.to.q.lora.down.weight               dots throughout, with duplicates under the native names
    layers.0.attention.to_q.lora_A.NAME.weight             PEFT's own, with the adapter's name
    diffusion_model.layers.0.attention.qkv.lora_A.weight   native: three layers as one, with rows in the order q, k, v
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from zimage.errors import CheckpointError
from zimage.formats.checkpoint import listing
from zimage.formats.layouts import LAYOUTS

# What trainers put round a module's name, one within another in any order; parts of names with "." written as "_".
WRAPPERS = (
    "base_model_model_",  # PEFT
    "model_diffusion_model_",  # all-in-one checkpoints
    "diffusion_model_",  # ComfyUI, ai-toolkit
    "transformer_",  # diffusers, OneTrainer
    "model_",
    "module_",  # a model in parallel
    "pipe_dit_",  # DiffSynth
    "dit_",
    "unet_",
    "lora_unet__",  # VideoX-Fun
    "lora_unet_",  # kohya, musubi
    "lora_transformer_",
    "oft_unet_",  # kohya
    "lycoris_",  # LyCORIS
)
LONGEST_NAME = 300  # characters of a module's name, wrappers included
MOST_READINGS = 12  # of a name without some of its wrappers
TEXT_ENCODER = ("text_encoder", "lora_te", "te_", "te1_", "conditioner_", "qwen3_")
TEXT_ENCODER_LAYERS = ("_self_attn_", "_mlp_gate_proj", "_mlp_up_proj", "_mlp_down_proj", "_layernorm", "_embed_tokens")
NATIVE = {
    "attention_to_out_0": "attention_out",
    "attention_norm_q": "attention_q_norm",
    "attention_norm_k": "attention_k_norm",
    "all_x_embedder_2-1": "x_embedder",
    "all_final_layer_2-1": "final_layer",
}
FUSED = "attention_qkv"
FUSED_PARTS = ("attention_to_q", "attention_to_k", "attention_to_v")  # in the order of its rows
# Modules in native files that no model needs; whoever subtracts two such files has their difference too.
UNUSED = {
    key.removesuffix(".weight").replace(".", "_")
    for layout in LAYOUTS
    if layout.component == "dit"
    for key in layout.unused
}

ENDINGS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    ".oft_R.weight": "oft_R",  # PEFT, OneTrainer
    ".oft_R.scaled_oft": "scaled_oft",  # OneTrainer
    ".oft_blocks": "oft_blocks",  # LyCORIS, kohya
    ".rescale": "rescale",
    ".diff": "diff",
    ".w_norm": "diff",  # LyCORIS
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
}
WITH_ADAPTER = (".lora_", ".lokr_", ".hada_", ".oft_R")  # endings that PEFT writes its adapter's name into
REPEATING = ".lora.down.weight"  # trainers that write this repeat layers under their native names

# What a key has that belongs to a kind of adapter which is not implemented.
OTHER_KINDS = {
    "t_embedder_2": "TwinFlow, which has a second time embedder (t_embedder_2)",
    "boft_R": "BOFT",
    "boft_s": "BOFT",
    "ia3_l": "IA3",
    "on_input": "IA3",
    "vera_": "VeRA",
    "oft_diag": "an older OFT (oft_diag), whose meaning differs between versions of LyCORIS",
    **{f".{name}.weight": "GLoRA" for name in ("a1", "a2", "b1", "b2", "bm", "bm1", "bm2")},
    "glora_": "GLoRA",
    "lora_E": "AdaLoRA",
    "lora_B.bias": "a LoRA with biases of its own (lora_bias)",
    "lora_mid": "a LoRA of convolutions",
    "hada_t1": "a LoHa of convolutions",
    "lokr_t2": "a LoKr of convolutions",
    "hra_u": "HRA",
    "fourierft_": "FourierFT",
    "waveft_": "WaveFT",
    "vblora_": "VB-LoRA",
    "randlora_": "RandLoRA",
    "shira_": "SHiRA",
    "c3a_": "C3A",
    "miss_block": "MiSS",
    "road_theta": "RoAd",
    "gralora_": "GraLoRA",
    "hira_": "HiRA",
    "delora_": "DeLoRA",
}
KNOWN_KINDS = "LoRA, LoKr, LoHa, OFT, DoRA or differences of weights"
TEXT_ENCODER_PART = "text_encoder"  # what `skip` may name


@dataclass(frozen=True)
class Group:
    """One adapter: its module's name in the file, the layers that it changes, and role → key of its tensors."""

    module: str
    layers: tuple[str, ...]
    keys: dict[str, str]


def layer_names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Each name that files use, underscored and without wrappers → the layers that it stands for."""
    names: dict[str, tuple[str, ...]] = {}
    for path in paths:
        name = native = underscored(path)
        for ours, theirs in NATIVE.items():
            native = native.replace(ours, theirs)
        names[name] = names[native] = (path,)
    for name, layers in list(names.items()):
        if name.endswith(FUSED_PARTS[0]):
            block = name.removesuffix(FUSED_PARTS[0])
            names[block + FUSED] = layers + names[block + FUSED_PARTS[1]] + names[block + FUSED_PARTS[2]]
    return names


def grouped(keys: Sequence[str], names: Mapping[str, tuple[str, ...]], skip: Collection[str] = ()) -> list[Group]:
    """The adapters that the keys of a file form, one for each layer; parts of the model in `skip` are left out.

    Raises CheckpointError naming the keys that are not understood.
    """
    groups, unknown, known = dict[str, Group](), [], names.keys() | UNUSED
    for key in keys:
        module, name, role = next(_readings(key, known), ("", None, ""))
        if name in UNUSED and role == "diff":
            continue
        if name is None or name in UNUSED:
            if TEXT_ENCODER_PART not in skip or not _of_text_encoder(key):
                unknown.append(key)
            continue
        group = groups.setdefault(name, Group(module[len(module) - len(name) :], names[name], {}))
        other = group.keys.setdefault(role, key)
        if other != key:
            raise CheckpointError(f"{key} and {other} are the same tensor of the same layer")
    if unknown or not groups:
        raise CheckpointError(_not_understood(unknown, len(keys)))
    return _without_duplicates(list(groups.values()))


def underscored(name: str) -> str:
    return name.replace(".", "_")


def _readings(key: str, known: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """How a key can be read: its module, the known name of that, and the role of the tensor."""
    for name in (key, *_without_adapter(key)):
        for ending, role in ENDINGS.items():
            module = name.removesuffix(ending)
            if module != name and (found := _unwrapped(module, known)):
                yield module, found, role


def _without_adapter(key: str) -> Iterator[str]:
    """PEFT's key (…lora_A.NAME.weight, …lokr_w1.NAME) without the adapter's name, which may be "weight" too."""
    for last in (".weight", ""):
        before, _, _ = key.removesuffix(last).rpartition(".")
        if key.endswith(last) and f".{before.rpartition('.')[2]}".startswith(WITH_ADAPTER):
            yield before + last


def _unwrapped(module: str, known: Collection[str]) -> str | None:
    """The longest known name at the end of a module's, with nothing but wrappers before it."""
    name = underscored(module)
    return None if len(name) > LONGEST_NAME else next((left for left in _without_wrappers(name) if left in known), None)


def _without_wrappers(name: str) -> Iterator[str]:
    """A name without any number of wrappers, in every way, the longest first."""
    left = {name}
    for _ in range(MOST_READINGS):
        if not left:
            return
        longest = max(left, key=len)
        yield longest
        left.remove(longest)
        if longest.startswith(WRAPPERS):
            left |= {longest[len(wrapper) :] for wrapper in WRAPPERS if longest.startswith(wrapper)}


def _of_text_encoder(key: str) -> bool:
    name = underscored(key[:LONGEST_NAME])
    if any(part in name for part in TEXT_ENCODER_LAYERS):
        return True
    return any(left.startswith(TEXT_ENCODER) for left in _without_wrappers(name))


def _not_understood(unknown: list[str], count: int) -> str:
    text_encoder = [key for key in unknown if _of_text_encoder(key)]
    if text_encoder:
        return (
            f"it has keys of the text encoder, {len(text_encoder)} of {count} ({listing(text_encoder)}); only adapters "
            f"of the DiT are implemented; load the rest with --lora-skip {TEXT_ENCODER_PART}"
        )
    for mark, kind in OTHER_KINDS.items():
        if marked := [key for key in unknown if mark in key]:
            text = f"it is {kind}, {len(marked)} of {count} keys ({listing(marked)}), which is not implemented"
            return f"{text}; adapters may be {KNOWN_KINDS}"
    if len(unknown) == count:
        examples = f" ({listing(unknown)})" if unknown else ""
        return f"none of its {count} keys names a layer of this DiT{examples}; use a LoRA that was trained for Z-Image"
    if not unknown:
        return f"none of its {count} keys names a layer of this DiT"
    return f"{len(unknown)} of its {count} keys cannot be matched to a layer: {listing(unknown)}"


def _without_duplicates(groups: list[Group]) -> list[Group]:
    """Each layer once: a repetition under native names is skipped, any other is an error."""
    kept: dict[str, Group] = {}
    for group in sorted(groups, key=_is_native):
        taken = [kept[layer] for layer in group.layers if layer in kept]
        if not taken:
            kept |= dict.fromkeys(group.layers, group)
        elif len(taken) < len(group.layers) or not _repeats(group):
            raise CheckpointError(f"{taken[0].module} and {group.module} are adapters of the same layer")
    return list({group.module: group for group in kept.values()}.values())


def _is_native(group: Group) -> bool:
    return underscored(group.module) != underscored(group.layers[0])


def _repeats(group: Group) -> bool:
    return _is_native(group) and group.keys.get("lora_A", "").endswith(REPEATING)
