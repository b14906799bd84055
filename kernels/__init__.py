"""The fused operations of the model, one file per op: plain-PyTorch reference, Triton kernel, dispatch and SPEC.

Off a GPU every op is its reference. Tests and bench walk `specs()`; an op is added by adding a file and naming it here.
"""


def specs() -> list:
    """The specification of every op that has a kernel."""
    from zimage.kernels import gated_residual, group_norm, layer_norm, norm, qk_norm_rope, quantise, swiglu, tiles

    return [
        qk_norm_rope.SPEC,
        norm.SPEC,
        gated_residual.SPEC,
        swiglu.SPEC,
        layer_norm.SPEC,
        group_norm.STATISTICS_SPEC,
        group_norm.NORMALISE_SPEC,
        tiles.ADD_SPEC,
        tiles.LEVELS_SPEC,
        quantise.INT8_SPEC,
        quantise.FP8_SPEC,
    ]
