"""A pretended Mac: the pipeline runs on `mps`, and what PyTorch has no kernel for there is told.

    with pretend_mac() as mac:
        zimage.ZImage.load().generate("a cat")    # fails where an op has no kernel, or makes what cannot be there
    assert "convolution" in mac.ops

Which ops have a kernel is read from PyTorch's own list, which its wheel holds.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchgen
from counted import Card, project_line
from pretended import _guard, _weight_patches
from pretended_ops import PretendedOps
from torch import Tensor
from torch.utils._pytree import tree_iter

from zimage.nn.attention import SCORES

LIST = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
# float64 and float8 do not exist there, and no other complex numbers than these.
DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool} | {
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
}
ATTENTION = "_scaled_dot_product_attention_math_for_mps"


class MacOps(PretendedOps):
    """Records each op; one without a kernel there, or with a result that cannot be there, fails the test."""

    def __init__(self, memory: float):
        super().__init__(Card(1, (0, 0), memory), "mps")
        self.ops: set[str] = set()

    def _run(self, op, args, kwargs):
        namespace, name = op._schema.name.split("::")
        name = f"{name}.{op._overloadname}".removesuffix(".default")
        if namespace != "prim" and not has_kernel(name):  # those of `prim` ask for a tensor's device or shape
            pytest.fail(f"{name} at {project_line()}: PyTorch has no kernel for it on a Mac's GPU")
        return self.seen(name, super()._run(op, args, kwargs))

    def _record(self, op, args, kwargs, out) -> None:
        """What it costs is of no interest here."""

    def _copied(self, op, args, kwargs):
        return self.seen("copy_", super()._copied(op, args, kwargs))

    def seen(self, name: str, out):
        self.ops.add(name)
        for result in tree_iter(out):
            if isinstance(result, Tensor) and result.device.type == "mps" and result.dtype not in DTYPES:
                pytest.fail(f"{name} at {project_line()}: {result.dtype} does not exist on a Mac's GPU")
        return out


@contextlib.contextmanager
def pretend_mac(memory: float = 16e9) -> Iterator[MacOps]:
    _guard()
    ops = MacOps(memory)
    with contextlib.ExitStack() as stack:
        for patch in (*_mac_patches(ops, int(memory)), *_weight_patches(ops.fake)):
            stack.enter_context(patch)
        stack.enter_context(ops)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield ops
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def _mac_patches(ops: MacOps, memory: int) -> Iterator[contextlib.AbstractContextManager]:
    replaced: dict[tuple[object, str], object] = {
        (torch.backends.mps, "is_available"): lambda: True,
        (torch.backends.mps, "is_macos_or_newer"): lambda major, minor: (major, minor) <= (14, 0),
        (torch.mps, "recommended_max_memory"): lambda: memory,
        (torch.mps, "driver_allocated_memory"): lambda: 0,
        (torch.mps, "empty_cache"): lambda: None,
        (F, "scaled_dot_product_attention"): _attention(ops, F.scaled_dot_product_attention),
    }
    for (module, name), value in replaced.items():
        yield mock.patch.object(module, name, value)


def _attention(ops: MacOps, original: Callable) -> Callable:
    @functools.wraps(original)
    def attend(q, k, v, **options):
        if q.device.type != "mps":
            return original(q, k, v, **options)
        assert len({x.device for x in (q, k, v)}) == len({x.dtype for x in (q, k, v)}) == 1
        assert q.shape[:3].numel() * k.shape[2] * 4 <= SCORES, f"{q.shape} × {k.shape}: all scores are kept there"
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        ops.seen(ATTENTION, out)
        return out

    return attend


# ------------------------------------------------------------------ PyTorch's list of ops


def has_kernel(name: str) -> bool:
    """Whether an op runs on a Mac's GPU: by a kernel of its own, or as a composition of others."""
    keys = _dispatch_keys()[name]
    return not keys or any(key == "MPS" or key.startswith("Composite") for key in keys)


@functools.cache
def _dispatch_keys() -> dict[str, set[str]]:
    """The backends of each op, by its name with its overload; none for a composition of others."""
    entries = {}
    for entry in LIST.read_text(encoding="utf-8").split("\n- func: ")[1:]:
        name = entry.partition("(")[0]
        delegate = re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE)
        dispatch = re.search(r"^  dispatch:\n((?:    .*\n?)+)", entry, re.MULTILINE)
        rows = re.findall(r"^    ([\w, ]+):", dispatch[1], re.MULTILINE) if dispatch else []
        entries[name] = (delegate and delegate[1], {key.strip() for row in rows for key in row.split(",")})
    return {name: keys | (entries[delegate][1] if delegate else set()) for name, (delegate, keys) in entries.items()}
