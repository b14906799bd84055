"""The keys of LoRA files: which tensors form one adapter, and of which layer, whichever trainer wrote the names.

A key is a trainer's prefix, a module's name and an ending that says what the tensor is. With "." written as "_", the
module's name is that of the checkpoint, except for three native names and the fused q, k and v:

    transformer.layers.0.attention.to_q.lora_A.weight      diffusers; with other prefixes PEFT, ComfyUI, ai-toolkit
    lora_unet_layers_0_attention_to_q.lora_down.weight     kohya, musubi; lycoris_ in LyCORIS
    layers.0.attention.to.q.lora.down.weight               dots throughout, with duplicates under the native names
    diffusion_model.layers.0.attention.qkv.lora_A.weight   native: three layers as one, with rows in the order q, k, v
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zimage.errors import CheckpointError
from zimage.formats.checkpoint import listing

# Parts of names with "." written as "_".
PREFIXES = ("base_model_model_", "model_diffusion_model_", "diffusion_model_", "transformer_", "lora_unet_", "lycoris_")
TEXT_ENCODER = ("text_encoder", "lora_te")
NATIVE = {
    "attention_to_out_0": "attention_out",
    "all_x_embedder_2-1": "x_embedder",
    "all_final_layer_2-1": "final_layer",
}
FUSED = "attention_qkv"
FUSED_PARTS = ("attention_to_q", "attention_to_k", "attention_to_v")  # in the order of its rows

ENDINGS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_A.default.weight": "lora_A",
    ".lora_B.default.weight": "lora_B",
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".lora_magnitude_vector.default.weight": "dora_scale",
}
REPEATING = ".lora.down.weight"  # trainers that write this repeat layers under their native names


@dataclass(frozen=True)
class Group:
    """One adapter: its module's name in the file, the layers that it changes, and role → key of its tensors."""

    module: str
    layers: tuple[str, ...]
    keys: dict[str, str]


def layer_names(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Each name that files use, underscored and without prefix → the layers that it stands for."""
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


def grouped(keys: Sequence[str], names: Mapping[str, tuple[str, ...]]) -> list[Group]:
    """The adapters that the keys of a file form, one for each layer. Raises CheckpointError naming unknown keys."""
    groups, unknown = dict[str, Group](), []
    for key in keys:
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), "")
        module = _without_prefix(key.removesuffix(ending))
        layers = names.get(underscored(module))
        if not ending or layers is None:
            unknown.append(key)
            continue
        group = groups.setdefault(underscored(module), Group(module, layers, {}))
        other = group.keys.setdefault(ENDINGS[ending], key)
        if other != key:
            raise CheckpointError(f"{key} and {other} are the same tensor of the same layer")
    if unknown or not groups:
        raise CheckpointError(_not_understood(unknown, len(keys)))
    return _without_duplicates(list(groups.values()))


def underscored(name: str) -> str:
    return name.replace(".", "_")


def _without_prefix(module: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if underscored(module).startswith(prefix)), "")
    return module[len(prefix) :]


def _not_understood(unknown: list[str], count: int) -> str:
    text_encoder = [key for key in unknown if underscored(key).startswith(TEXT_ENCODER)]
    if text_encoder:
        return (
            f"it has keys of the text encoder, {len(text_encoder)} of {count} ({listing(text_encoder)}); "
            "only adapters of the DiT are implemented"
        )
    if len(unknown) == count:
        examples = f" ({listing(unknown)})" if unknown else ""
        return f"none of its {count} keys names a layer of this DiT{examples}; use a LoRA that was trained for Z-Image"
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
