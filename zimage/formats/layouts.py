"""The names of a component's tensors in files of other tools, as tables that are read in both directions.

Canonical names are those of the published folders (diffusers naming). The components in a file are recognised by its
keys, never by its name: an all-in-one file holds several, each behind a prefix.

In a pair of templates `{name}` stands for any text, `{i}` and `{j}` stand for numbers, and `{~i}` for one that counts
from the other end.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

Pair = tuple[str, str]  # canonical, foreign

NATIVE_DIT: tuple[Pair, ...] = (
    ("all_final_layer.2-1.{rest}", "final_layer.{rest}"),
    ("all_x_embedder.2-1.{rest}", "x_embedder.{rest}"),
    ("{block}.attention.to_out.0.{rest}", "{block}.attention.out.{rest}"),
    ("{block}.attention.norm_q.{rest}", "{block}.attention.q_norm.{rest}"),
    ("{block}.attention.norm_k.{rest}", "{block}.attention.k_norm.{rest}"),
)
NATIVE_CONTROL = NATIVE_DIT[2:]  # the blocks' names; its embedder keeps its own
LDM_VAE: tuple[Pair, ...] = (
    ("encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.{rest}", "encoder.down.{i}.block.{j}.nin_shortcut.{rest}"),
    ("encoder.down_blocks.{i}.resnets.{j}.{rest}", "encoder.down.{i}.block.{j}.{rest}"),
    ("encoder.down_blocks.{i}.downsamplers.0.conv.{rest}", "encoder.down.{i}.downsample.conv.{rest}"),
    ("decoder.up_blocks.{i}.resnets.{j}.conv_shortcut.{rest}", "decoder.up.{~i}.block.{j}.nin_shortcut.{rest}"),
    ("decoder.up_blocks.{i}.resnets.{j}.{rest}", "decoder.up.{~i}.block.{j}.{rest}"),
    ("decoder.up_blocks.{i}.upsamplers.0.conv.{rest}", "decoder.up.{~i}.upsample.conv.{rest}"),
    ("{side}.mid_block.resnets.0.{rest}", "{side}.mid.block_1.{rest}"),
    ("{side}.mid_block.resnets.1.{rest}", "{side}.mid.block_2.{rest}"),
    ("{side}.mid_block.attentions.0.group_norm.{rest}", "{side}.mid.attn_1.norm.{rest}"),
    ("{side}.mid_block.attentions.0.to_q.{rest}", "{side}.mid.attn_1.q.{rest}"),
    ("{side}.mid_block.attentions.0.to_k.{rest}", "{side}.mid.attn_1.k.{rest}"),
    ("{side}.mid_block.attentions.0.to_v.{rest}", "{side}.mid.attn_1.v.{rest}"),
    ("{side}.mid_block.attentions.0.to_out.0.{rest}", "{side}.mid.attn_1.proj_out.{rest}"),
    ("{side}.conv_norm_out.{rest}", "{side}.norm_out.{rest}"),
)
GGUF_QWEN3: tuple[Pair, ...] = (
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    ("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    ("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    ("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    ("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    ("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
    ("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    ("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    ("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    ("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    ("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
)
BARE_QWEN3: tuple[Pair, ...] = (("model.{rest}", "{rest}"),)  # saved from the decoder alone

BARE_VL: tuple[Pair, ...] = (("model.{rest}", "{rest}"),)  # saved without the head
SPLIT_VL: tuple[Pair, ...] = (("model.visual.{rest}", "visual.{rest}"), ("model.language_model.{rest}", "model.{rest}"))
TOWER_VL: tuple[Pair, ...] = (("model.visual.{rest}", "{rest}"),)  # saved from the vision tower alone


@dataclass(frozen=True)
class Layout:
    """How one tool names the tensors of one component. Keys that match no pair have the same name on both sides."""

    name: str
    component: str
    signature: str  # a foreign key that no other layout of the component has
    pairs: tuple[Pair, ...] = ()
    fused: bool = False  # q, k and v of the DiT's attention lie in one matrix
    flat: str = r"(?!)"  # canonical matrices that are stored as 1 × 1 convolutions
    unused: frozenset[str] = field(default_factory=frozenset)  # foreign keys of tensors that no model needs
    stem: str = ""  # what its keys begin with; it counts where another component has the same prefix

    def canonical(self, key: str, last: int = 0) -> str:
        """The canonical name of a foreign key; `last` is the highest index, from which `{~i}` counts down."""
        return _renamed(key, [(foreign, own) for own, foreign in self.pairs], last)

    def foreign(self, key: str, last: int = 0) -> str:
        """The name of a canonical key in this layout."""
        return _renamed(key, self.pairs, last)

    def last_index(self, keys: Iterable[str]) -> int:
        """The highest index of a decoder block among canonical or foreign keys."""
        found = (re.match(r"decoder\.up(?:_blocks)?\.(\d+)\.", key) for key in keys)
        return max((int(match[1]) for match in found if match), default=0)


_LM_HEAD = frozenset({"lm_head.weight", "output.weight"})  # tied: a second copy of the embeddings
LAYOUTS = (
    Layout("diffusers", "dit", "layers.0.attention.to_q.weight"),
    Layout(
        "native",
        "dit",
        "layers.0.attention.qkv.weight",
        NATIVE_DIT,
        fused=True,
        unused=frozenset({"norm_final.weight"}),
    ),
    Layout("native", "control", "control_layers.0.attention.qkv.weight", NATIVE_CONTROL, fused=True, stem="control_"),
    Layout("diffusers", "control", "control_all_x_embedder.2-1.weight", stem="control_"),
    Layout("transformers", "text_encoder", "model.layers.0.self_attn.q_proj.weight", unused=_LM_HEAD),
    Layout("bare", "text_encoder", "layers.0.self_attn.q_proj.weight", BARE_QWEN3, unused=_LM_HEAD),
    Layout("gguf", "text_encoder", "blk.0.attn_q.weight", GGUF_QWEN3, unused=_LM_HEAD),
    Layout("transformers", "vision", "model.visual.patch_embed.proj.weight", unused=_LM_HEAD),
    Layout("bare", "vision", "language_model.embed_tokens.weight", BARE_VL),
    Layout("split", "vision", "visual.patch_embed.proj.weight", SPLIT_VL, unused=_LM_HEAD),
    Layout("tower", "vision", "deepstack_merger_list.0.norm.weight", TOWER_VL),
    Layout("diffusers", "vae", "decoder.mid_block.resnets.0.conv1.weight"),
    Layout(
        "ldm",
        "vae",
        "decoder.mid.block_1.conv1.weight",
        LDM_VAE,
        flat=r"\.mid_block\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight$",
    ),
)
PREFIXES = {
    "dit": ("", "model.diffusion_model.", "diffusion_model."),
    "text_encoder": ("", "text_encoders.qwen3_4b.transformer.", "text_encoders.llm."),  # ComfyUI's, sd.cpp's
    "vae": ("", "vae.", "first_stage_model."),
    "vision": ("",),
    "control": ("", "model.diffusion_model.", "diffusion_model."),
}


def layout(component: str, name: str) -> Layout:
    """The layout `name` of a component. Raises KeyError."""
    return {(known.component, known.name): known for known in LAYOUTS}[component, name]


def recognise(keys: Mapping[str, object]) -> dict[str, tuple[str, Layout]]:
    """Component → (prefix, layout), for each component whose keys a file holds."""
    found: dict[str, tuple[str, Layout]] = {}
    for known in LAYOUTS:
        for prefix in PREFIXES[known.component]:
            if prefix + known.signature in keys:
                found.setdefault(known.component, (prefix, known))
    return found


def begins(keys: Mapping[str, object]) -> dict[str, str]:
    """Component → what its keys in a file begin with: its prefix, and its stem where another has that prefix too."""
    found = recognise(keys)
    prefixes = [prefix for prefix, _ in found.values()]
    return {
        component: prefix + (known.stem if prefixes.count(prefix) > 1 else "")
        for component, (prefix, known) in found.items()
    }


def split_names(fused: str) -> tuple[str, str, str] | None:
    """The canonical names of the three matrices in a fused one, or None for any other key."""
    if not fused.endswith(".attention.qkv.weight"):
        return None
    stem = fused.removesuffix("qkv.weight")
    return f"{stem}to_q.weight", f"{stem}to_k.weight", f"{stem}to_v.weight"


def fused_name(split: str) -> str | None:
    """The name of the fused matrix that holds a canonical q, k or v matrix, or None for any other key."""
    match = re.fullmatch(r"(.*\.attention\.)to_([qkv])\.weight", split)
    return f"{match[1]}qkv.weight" if match else None


def _renamed(key: str, pairs: Iterable[Pair], last: int) -> str:
    for old, new in pairs:
        match = _pattern(old).fullmatch(key)
        if match:
            return "".join(_filled(new, match.groupdict(), last))
    return key


def _filled(template: str, values: Mapping[str, str], last: int) -> Iterator[str]:
    for text, mirrored, name in re.findall(r"([^{]+)|\{(~?)(\w+)\}", template):
        if not name:
            yield text
        else:
            # Only one side of a pair has {~i}, so the number is mirrored whether that side is the pattern or is filled.
            value = values.get(name) or values[f"mirrored_{name}"]
            yield str(last - int(value)) if mirrored or name not in values else value


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = []
    for text, mirrored, name in re.findall(r"([^{]+)|\{(~?)(\w+)\}", template):
        kind = r"\d+" if len(name) == 1 else ".+?" if name != "rest" else ".+"
        pieces.append(f"(?P<{'mirrored_' if mirrored else ''}{name}>{kind})" if name else re.escape(text))
    return re.compile("".join(pieces))
