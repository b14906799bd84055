"""The input of products in the form that their layers take, made once for all layers that share it.

A quantised layer rounds its input before it multiplies. Layers say in their attribute `form` how they want it; where
all layers of an input agree, the op before them writes that form at once, and none of them rounds it again. Layers
without the attribute (plain ones, and those with adapters beside them) take a plain tensor, as every layer does.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zimage.kernels.norm import rms_norm_scale, rms_norm_scale_quantised
from zimage.kernels.quantise import Operand, quantise_rows
from zimage.kernels.rotate import rotate
from zimage.kernels.swiglu import swiglu, swiglu_quantised
from zimage.nn.layers import RMSNorm

Input = Tensor | Operand


class Form(NamedTuple):
    """How a layer takes its input."""

    dtype: torch.dtype  # of the values that are multiplied
    rotated: int = 0  # columns that are rotated together before they are rounded (ConvRot); 0: none


def common_form(*layers: nn.Module) -> Form | None:
    """The form that all of these layers take, or None: a plain tensor."""
    first, *others = (getattr(layer, "form", None) for layer in layers)
    return first if all(form == first for form in others) else None


def operand(x: Input, form: Form | None) -> Input:
    """x (…, C) in a form; what is an operand already stays as it is."""
    if form is None or isinstance(x, Operand):
        return x
    return quantise_rows(rotate(x, form.rotated) if form.rotated else x, form.dtype)


def scaled_norm(norm: RMSNorm, x: Tensor, scale: Tensor, form: Form | None, unit: float = 1.0) -> Input:
    """norm(x · unit) · scale in a form, in one pass unless it is rotated."""
    eps = norm.eps / unit**2
    if form is None or form.rotated:
        return operand(rms_norm_scale(x, norm.weight, scale, eps), form)
    return rms_norm_scale_quantised(x, norm.weight, scale, eps, form.dtype)


def gated_activation(gate: Tensor, up: Tensor, form: Form | None) -> Input:
    """silu(gate) · up in a form, in one pass unless it is rotated."""
    if form is None or form.rotated:
        return operand(swiglu(gate, up), form)
    return swiglu_quantised(gate, up, form.dtype)
