"""Imported first: off a GPU, kernels run in Triton's interpreter, which is chosen when Triton is first imported."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
with contextlib.suppress(ImportError):
    import triton  # noqa: F401 - before zimage.kernels, which otherwise does without
