"""PyTorch's ops on a pretended card: shapes by FakeTensors, and a record of what a card would have done."""

import functools
from collections.abc import Callable

import torch
from counted import Card, Copy, Launch, project_line, size_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CPU = torch.device("cpu")
NOTHING = {  # ops that neither compute nor copy
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten.record_stream.default,
}
LAUNCHES = {  # kernels of ops that need more than one
    aten.native_group_norm.default: 3,  # moments, their factors, the map
    aten.sort.default: 4,
    aten.sort.stable: 4,
    aten.topk.default: 2,
    aten.multinomial.default: 3,
}
DATA_DEPENDENT = {aten.nonzero.default, aten.equal.default, aten.masked_select.default, aten._unique2.default}


class PretendedOps(TorchDispatchMode):
    """Runs ops on CPU tensors as they are, and those that touch the card on FakeTensors."""

    def __init__(self, card: Card, kind: str = "cuda"):
        super().__init__()
        self.card, self.kind, self.fake = card, kind, FakeTensorMode(allow_non_fake_inputs=False)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (
            torch.is_inference_mode_enabled() and op.namespace == "aten"
        ):  # there ops that consist of others arrive whole
            with self:
                parts = op.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if kwargs.pop("pin_memory", False):
            out = op(*args, **kwargs)
            self.card.pinned.append(size_of(out))
            return out
        target = kwargs.get("device")
        if not any(isinstance(x, FakeTensor) for x in tree_iter((args, kwargs))) and (
            target is None or torch.device(target).type != self.kind
        ):
            return op(*args, **kwargs)
        if op in DATA_DEPENDENT:
            raise AssertionError(f"{op} on the card at {project_line()}: its result depends on data")
        if op is aten._local_scalar_dense.default:
            return self._number(args[0])
        if op is aten._to_copy.default or op is aten.copy_.default:
            return self._copied(op, args, kwargs)
        if op is aten.native_group_norm.default and not args[0].is_contiguous():  # CUDA's wants channels outermost
            x = self._run(aten.clone.default, args[:1], {"memory_format": torch.contiguous_format})
            return self._run(op, (x, *args[1:]), kwargs)
        return self._run(op, args, kwargs)

    def _run(self, op, args, kwargs):
        args, kwargs = tree_map(self._as_fake, (args, kwargs))
        with self.fake:
            out = op(*args, **kwargs)
            if op in (aten.convolution.default, aten._convolution.default) and any(map(innermost_channels, args[:2])):
                out = out.contiguous(memory_format=torch.channels_last)  # as cuDNN does
        self._record(op, args, kwargs, out)
        return out

    def _as_fake(self, value):
        """A CPU tensor's shape: beside the card's tensors it is an error, as it should be, unless it is a number."""
        return self.fake.from_tensor(value.detach()) if type(value) in (Tensor, Parameter) else value

    def _record(self, op, args, kwargs, out) -> None:
        results = [x for x in tree_iter(out) if isinstance(x, FakeTensor)]
        for result in results:
            self.card.holds(result)
        touched = {id(x): x for x in tree_iter((args, kwargs, out)) if isinstance(x, FakeTensor)}.values()
        devices = {x.device for x in touched if x.device.type == self.kind}
        if op in NOTHING or op.is_view or not devices or not _writes(op, args, results):
            return
        assert len(devices) == 1, f"{op} on {devices} at {project_line()}"
        flops, dtype = _flops(op, args, kwargs, out)
        name, (device,) = op._schema.name.removeprefix("aten::"), devices
        self.card.launched(Launch(name, device, sum(map(size_of, touched)), flops, dtype))
        for _ in range(LAUNCHES.get(op, 1) - 1):
            self.card.launched(Launch(name, device))

    def _number(self, x: Tensor) -> bool | int | float:
        """`.item()`: the host waits, and gets True or 0."""
        if x.device.type == self.kind:
            self.card.waited(project_line())
        return True if x.dtype is torch.bool else 0.0 if x.is_floating_point() else 0

    def _copied(self, op, args, kwargs):
        """A copy within a device is an op like others; one between devices is recorded, and brings zeros back."""
        into = op is aten.copy_.default
        source = args[1] if into else args[0]
        target = args[0].device if into else torch.device(kwargs.get("device") or source.device)
        if target == torch.device("mps"):
            target = torch.device("mps", 0)
        if target == torch.device("cuda"):
            target = torch.device("cuda", torch.cuda.current_device())
        if target == source.device:
            return args[0] if into and target == CPU else self._run(op, args, kwargs)
        non_blocking = (*args, False)[2] if into else kwargs.get("non_blocking", False)
        self.card.copied(Copy(source.device, target, size_of(source), project_line(), waits=not non_blocking))
        if into:
            return args[0]
        dtype = kwargs.get("dtype") or source.dtype
        if target == CPU:
            return torch.zeros(source.shape, dtype=dtype)
        shape = self._as_fake(source)
        with self.fake:
            out = torch.empty_like(shape, dtype=dtype, device=target)
        self.card.holds(out)
        if dtype != source.dtype:
            self.card.launched(Launch("_to_copy", target, size_of(source) + size_of(out)))
        return out


def innermost_channels(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _writes(op, args, results) -> bool:
    """Whether an op wrote anything: false where it returned an alias of its input."""
    if any(argument.alias_info and argument.alias_info.is_write for argument in op._schema.arguments):
        return True
    given = {x.untyped_storage()._cdata for x in tree_iter(args) if isinstance(x, FakeTensor)}
    return any(r.untyped_storage()._cdata not in given for r in results)


def _flops(op, args, kwargs, out) -> tuple[int, torch.dtype | None]:
    """FLOPs of a product, and the dtype of its factors."""
    if op._schema.name in ("aten::_int_mm", "aten::_scaled_mm"):
        few = op._schema.name == "aten::_int_mm" and args[0].shape[0] < 17
        assert not few, "an int8 product on CUDA takes more than 16 rows"
        return 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1], args[0].dtype
    count = flop_registry.get(op._overloadpacket)
    if count is None:
        return 0, None
    return count(*args, **kwargs, out_val=out), [x for x in tree_iter(args) if isinstance(x, FakeTensor)][-1].dtype


def attention(card: Card, original: Callable) -> Callable:
    """In place of scaled_dot_product_attention: FlashAttention's one launch and layout.

    Before compute capability 8.0 PyTorch has none for bf16 and takes the explicit form, with all (L, L) scores.
    """

    @functools.wraps(original)
    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        q, k, v = query, key, value
        if q.device.type != "cuda":
            return original(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        devices = {x.device for x in (q, k, v, *(() if attn_mask is None else (attn_mask,)))}
        assert len(devices) == 1, f"attention over {devices} at {project_line()}"
        assert q.dtype == k.dtype == v.dtype, f"attention of {q.dtype}, {k.dtype}, {v.dtype} at {project_line()}"
        if q.dtype is torch.bfloat16 and card.capability < (8, 0):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            return (q @ k.transpose(-1, -2)).float().softmax(-1).to(q.dtype) @ v
        B, H, L, D = q.shape
        out = torch.empty((B, L, H, v.shape[-1]), dtype=q.dtype, device=q.device).transpose(1, 2)
        flops = 4 * B * H * L * k.shape[2] * D // (2 if is_causal else 1)
        card.launched(Launch("attention", q.device, sum(map(size_of, (q, k, v, out))), flops, q.dtype))
        return out

    return attend
