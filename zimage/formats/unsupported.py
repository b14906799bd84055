"""Quantised weights of tools whose codes are not read here, told by their tensors' names or by a config.

A list of missing and unexpected keys would not tell a user that the file is sound and only of another kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zimage.errors import CheckpointError
from zimage.formats.stored import FLOATS, Stored

TWINFLOW = "t_embedder_2"  # in keys of the DiT
INSTEAD = "use a file of the same model in bf16, fp8, int8, nvfp4 or GGUF"


@dataclass(frozen=True)
class Tool:
    """`leaves`: last parts of tensor names that only it writes. `beside`: those that it writes beside codes `.weight`.

    `methods`: what its configs call it.
    """

    name: str
    leaves: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()


def _tool(name: str, leaves: str = "", beside: str = "", methods: str = "") -> Tool:
    return Tool(name, *(frozenset(words.split()) for words in (leaves, beside, methods)))


TOOLS = (
    _tool(
        "nunchaku (SVDQuant)", "wscales wtscale wcscales smooth_factor smooth_factor_orig", methods="svdquant nunchaku"
    ),
    _tool("SDNQ", "svd_up svd_down", "scale zero_point", "sdnq sdnq_training"),
    _tool("MLX", "", "scales biases", "mlx"),
    _tool(
        "bitsandbytes",
        "absmax quant_map nested_absmax nested_quant_map bitsandbytes__nf4 bitsandbytes__fp4 SCB",
        methods="bitsandbytes bitsandbytes_4bit bitsandbytes_8bit",
    ),
    _tool("GPTQ or AWQ", "qzeros g_idx", methods="gptq awq"),
    _tool("quanto", "_data", methods="quanto"),
    _tool("compressed-tensors", "weight_packed", methods="compressed-tensors"),
    _tool("HQQ", "W_q", methods="hqq"),
    _tool("torchao", methods="torchao"),
    # Its nvfp4 has ComfyUI's names and shapes, but the other order of halves and of scales.
    _tool("ModelOpt", "_amax", methods="modelopt modelopt_fp4"),
)


def foreign_tool(tensors: Mapping[str, Stored]) -> tuple[str, str] | None:
    """The name of the tool whose codes these tensors are, and a key that shows it; None for all that is known here."""
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        weight = tensors.get(f"{module}.weight")
        beside_codes = weight is not None and weight.dtype not in FLOATS
        for tool in TOOLS:
            if leaf in tool.leaves or (leaf in tool.beside and beside_codes):
                return tool.name, key
    return None


def check_tensors(origin: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise CheckpointError, by its name, for codes of a tool or a kind of model that is not implemented."""
    found = foreign_tool(tensors)
    if second := next((key for key in tensors if TWINFLOW in key), None):
        text = f"it is TwinFlow's, which has a second time embedder ({second}) and is drawn in another way"
        raise CheckpointError(f"{origin}: {text}; that is not implemented; use Z-Image or Z-Image-Turbo")
    if found:
        raise CheckpointError(f"{origin} is quantised by {found[0]} ({found[1]}), which is not implemented; {INSTEAD}")


def check_config(path: Path, config: Mapping[str, object]) -> None:
    """Raise CheckpointError, which names the tool, where a config says that another one quantised the weights."""
    about = config.get("quantization_config")
    method = about.get("quant_method", about.get("method")) if isinstance(about, dict) else None
    if isinstance(config.get("quantization"), dict):  # mlx_lm's
        method = "mlx"
    for tool in TOOLS:
        if isinstance(method, str) and method.lower() in tool.methods:
            raise CheckpointError(f"{path} says that {tool.name} quantised it, which is not implemented; {INSTEAD}")
