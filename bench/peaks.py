"""What GPUs can do at most, as their makers state it, and the least time of work by that."""

import re
from typing import NamedTuple

import torch


class Peaks(NamedTuple):
    """Dense FLOP/s (or OP/s) of products by the dtype of their factors, and bytes/s."""

    bf16: float
    int8: float
    fp8: float
    fp16_sums: float  # of fp16 products that add up in fp16
    fp32: float  # outside the tensor cores
    bandwidth: float

    def rate(self, dtype: torch.dtype | None, attention: bool = False, fp16_sums: bool = False) -> float:
        """FLOP/s of a product; FlashAttention adds up in fp32 whatever its factors are."""
        if dtype is torch.int8:
            return self.int8
        if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return self.fp8
        if dtype is torch.float32:
            return self.fp32
        return self.fp16_sums if fp16_sums and dtype is torch.float16 and not attention else self.bf16

    def seconds(self, flops: float, traffic: float, rate: float | None = None) -> float:
        """The least time of some work: its arithmetic at `rate` (by default bf16's) or its traffic, in bytes."""
        return max(flops / (rate or self.bf16), traffic / self.bandwidth)


RTX4090 = Peaks(bf16=165e12, int8=660e12, fp8=330e12, fp16_sums=330e12, fp32=82.6e12, bandwidth=1008e9)
DEVICES = {
    "rtx4090": RTX4090,
    "h100": Peaks(bf16=989e12, int8=1979e12, fp8=1979e12, fp16_sums=989e12, fp32=67e12, bandwidth=3350e9),
    "h200": Peaks(bf16=989e12, int8=1979e12, fp8=1979e12, fp16_sums=989e12, fp32=67e12, bandwidth=4800e9),
}
SLOWER = r"(?!d$|laptop|pcie|nvl)"  # cards of a name that has other figures


def peaks_of(gpu: str) -> Peaks | None:
    """By the name that the driver gives a GPU, such as "NVIDIA GeForce RTX 4090"; None for one that is not listed."""
    plain = gpu.lower().replace(" ", "")
    return next((peaks for name, peaks in DEVICES.items() if re.search(name + SLOWER, plain)), None)
