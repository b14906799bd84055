"""Triton's interpreter made trustworthy: bf16 as on a GPU, and every access to memory watched.

The interpreter runs kernels on CPU tensors, but computes bf16 with the bits as if they were integers, truncates where
a GPU rounds, passes NaN on where a GPU drops it, and lets programs read and write anywhere. `install()` mends all but
the last; `watch` records that.
TRITON_INTERPRET=1 must be set before Triton is first imported (see conftest.py).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


class MemoryFault(AssertionError):
    """A kernel touched what is not its own."""


# ------------------------------------------------------------------ bf16 and fp8


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 → bf16 bit patterns, rounded to nearest, ties to even, as PyTorch and the GPU do."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()


def to_fp8_bits(values: np.ndarray) -> np.ndarray:
    """fp32 → fp8 e4m3 bit patterns; the interpreter's own cast loses carries."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.uint16)).view(torch.bfloat16).float().numpy()


def _is_bf16(value: object) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def install() -> None:
    """Make casts to bf16 and fp8 and maxima a GPU's, and bf16 arithmetic an error. Once per process."""
    cast = Builder.cast_impl

    def cast_impl(self, source, kind):
        before, after = source.dtype.scalar, kind.scalar
        if before == tl.float32 and after == tl.bfloat16:
            return Handle(to_bf16_bits(source.data), after)
        if before == tl.bfloat16 and after == tl.float32:
            return Handle(from_bf16_bits(source.data), after)
        return cast(self, source, kind)

    def create_fp_to_fp(self, source, kind, rounding):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.float8e4nv:
            return Handle(to_fp8_bits(source.data), kind.scalar)
        return between_floats(self, source, kind, rounding)

    between_floats = Builder.create_fp_to_fp

    def create_dot(self, a, b, total, *rest):
        a, b = (Handle(from_bf16_bits(h.data), tl.float32) if _is_bf16(h) else h for h in (a, b))
        return product(self, a, b, total, *rest)

    product = Builder.create_dot
    Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    # A GPU's maximum and minimum of a number and NaN are the number, unless a kernel asks for NaN.
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    for name in ("binary_op", "unary_op", "create_fma"):
        if hasattr(Builder, name):
            setattr(Builder, name, _refuse_bf16(name, getattr(Builder, name)))
    check = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self, values):
        if any(v.type.scalar == tl.bfloat16 for v in values if isinstance(v, tl.tensor)):
            raise TypeError("a reduction of bf16 would work on bit patterns; .to(tl.float32) first")
        return check(self, values)

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


def _refuse_bf16(name, method):
    def refusing(self, *arguments, **options):
        if any(map(_is_bf16, arguments)):
            raise TypeError(f"{name} on bf16 would work on bit patterns; .to(tl.float32) first")
        return method(self, *arguments, **options)

    return refusing


# ------------------------------------------------------------------ memory


@dataclass
class Traffic:
    """What a launch did to memory."""

    loaded: int = 0  # bytes
    stored: int = 0
    writers: dict[int, int] = field(default_factory=dict)  # address → program
    readers: dict[int, set[int]] = field(default_factory=dict)


class Watch:
    """Checks each access against the elements of known tensors, and programs against one another.

    With `only` programs of the grid run, from the place `first` on: for the bytes or the addresses of one program of a
    large launch.
    """

    def __init__(self, only: int | None = None, races: bool = True, first: int = 0):
        self.traffic, self.only, self.races, self.first = Traffic(), only, races, first
        self.grids: list[tuple[int, ...]] = []  # of every launch, in full
        self.allowed: np.ndarray | None = None
        self.program = 0

    def permit(self, tensors: list[torch.Tensor]) -> None:
        """Only whole elements of these tensors may be touched: between the rows of a strided view is not."""
        spans = [np.array(list(_runs(t)), dtype=np.int64) for t in tensors if t.numel()]
        self.allowed = np.concatenate(spans)
        self.allowed = self.allowed[np.argsort(self.allowed[:, 0])]

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        addresses = pointers[mask.astype(bool)].astype(np.int64).ravel()
        if not addresses.size:
            return
        self._check_bounds(kind, addresses, size)
        if kind == "load":
            self.traffic.loaded += addresses.size * size
        else:
            self.traffic.stored += addresses.size * size
        if self.races:
            self._check_races(kind, addresses.tolist())

    def _check_bounds(self, kind: str, addresses: np.ndarray, size: int) -> None:
        assert self.allowed is not None
        span = np.searchsorted(self.allowed[:, 0], addresses, side="right") - 1
        begin, end = self.allowed[span].T
        outside = (span < 0) | (addresses < begin) | (addresses + size > end)
        if outside.any():
            raise MemoryFault(f"program {self.program}: {kind} of {outside.sum()} elements outside every tensor")

    def _check_races(self, kind: str, addresses: list[int]) -> None:
        writers, readers = self.traffic.writers, self.traffic.readers
        if kind == "store":
            if len(set(addresses)) < len(addresses):
                raise MemoryFault(f"program {self.program}: lanes of one store share an address")
            for address in addresses:
                if writers.setdefault(address, self.program) != self.program:
                    raise MemoryFault(f"programs {writers[address]} and {self.program} write one address")
                if readers.get(address, set()) - {self.program}:
                    raise MemoryFault(f"program {self.program} writes what another read")
        else:
            for address in addresses:
                if writers.get(address, self.program) != self.program:
                    raise MemoryFault(f"program {self.program} reads what program {writers[address]} wrote")
                readers.setdefault(address, set()).add(self.program)


def _runs(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(begin, end) addresses of the contiguous runs that a tensor's elements form."""
    size = tensor.element_size()
    order = sorted((d for d in range(tensor.ndim) if tensor.shape[d] > 1), key=lambda d: tensor.stride(d))
    run = 1
    while order and tensor.stride(order[0]) == run:
        run *= tensor.shape[order.pop(0)]
    offsets = np.zeros(1, dtype=np.int64)
    for d in order:
        offsets = (offsets[:, None] + np.arange(tensor.shape[d]) * tensor.stride(d)).ravel()
    for offset in offsets.tolist():
        begin = tensor.data_ptr() + offset * size
        yield begin, begin + run * size


@contextlib.contextmanager
def watch(only: int | None = None, races: bool = True, first: int = 0) -> Iterator[Watch]:
    """Watch every launch in the block; tensors that a launch is given (and those it allocates) are its own."""
    current = Watch(only, races, first)
    run, load, store, place = (
        interpreter.GridExecutor.__call__,
        Builder.create_masked_load,
        Builder.create_masked_store,
        Builder.set_grid_idx,
    )

    def watched_run(self, *arguments, **options):
        current.permit([a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)])
        current.grids.append(tuple(self.grid))
        if current.only is not None:
            self.grid = _Sampled(self.grid, current.only)
        return run(self, *arguments, **options)

    def watched_load(self, pointers, mask, *rest):
        current.access("load", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        current.access("store", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    def watched_place(self, x, y, z):
        current.program = (x, y, z).__hash__()
        place(self, x, y, z)
        self.grid_idx = (x + current.first, y, z)

    replaced = {"create_masked_load": watched_load, "create_masked_store": watched_store, "set_grid_idx": watched_place}
    originals = {name: getattr(Builder, name) for name in replaced}
    interpreter.GridExecutor.__call__ = watched_run
    for name, method in replaced.items():
        setattr(Builder, name, method)
    try:
        yield current
    finally:
        interpreter.GridExecutor.__call__ = run
        for name, method in originals.items():
            setattr(Builder, name, method)


class _Sampled(tuple):
    """A grid of which only the first programs run."""

    def __new__(cls, grid, only):
        return super().__new__(cls, (min(grid[0], only), *(1 for _ in grid[1:])))
