"""How a caption becomes latents: noise, schedule, solver and guidance, each parameter declared once."""

from dataclasses import dataclass

from zimage.errors import RequestError
from zimage.settings.captions import CaptionSettings
from zimage.settings.fields import setting
from zimage.settings.guiding import GuidanceMethod

SAMPLERS = ("euler", "heun")  # the rows of `flow.SOLVERS`
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(CaptionSettings):
    """None means: what the checkpoint's kind asks for. Raises RequestError with the fields at fault."""

    steps: int | None = setting(
        None,
        "Denoising steps, one model evaluation each. Default: 8 (Turbo) or 30 (Base).",
        group="Sampling",
        minimum=1,
        maximum=1000,
    )
    sampler: str | None = setting(
        None, "Solver of the denoising steps. Default: euler.", group="Sampling", choices=SAMPLERS
    )
    seed: int | list[int] | None = setting(
        None,
        "Seed of the noise; image k of a prompt uses seed + k. Default: random, and reported.",
        group="Sampling",
        minimum=0,
        maximum=MAX_SEED,
    )
    variety: float = setting(
        0.0,
        "Let seeds differ more: noise on the caption in the first fifth of the steps; 0 is off, 1 is visible and "
        "still obedient.",
        group="Sampling",
        minimum=0,
        maximum=10,
    )
    guidance: float | None = setting(
        None,
        "Classifier-free guidance; 0 is off. Default: 0 (Turbo) or 4 (Base).",
        group="Sampling",
        minimum=0,
        maximum=100,
    )
    guidance_method: str | None = setting(
        None,
        "How guidance is made, NAME or NAME:KEY=VALUE,…: cfg, cfg_zero (zero_init_steps=1), apg (eta=0, threshold=15, "
        "momentum=-0.5) or slg (layers=7+8+9, scale=2.8, start=0.01, stop=0.2). Default: cfg.",
        group="Sampling",
        metavar="METHOD",
        longest=200,
    )
    shift: float | None = setting(
        None,
        "Shift of the noise schedule. Default: from the checkpoint's scheduler config.",
        group="Sampling",
        above=0,
        maximum=100,
    )
    cfg_truncation: float = setting(
        1.0, "Turn guidance off on steps where 1 − sigma exceeds this.", group="Sampling", minimum=0, maximum=1
    )
    cfg_normalization: float = setting(
        0.0,
        "Limit the guided velocity's norm to this multiple of the unguided norm; 0 is off.",
        group="Sampling",
        minimum=0,
        maximum=100,
    )
    batch_size: int = setting(
        1,
        "Images denoised together; above 1 the bits depend on the batch. Helps on large GPUs only.",
        group="Sampling",
        minimum=1,
        maximum=1024,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_method is not None:
            method = GuidanceMethod.parse(self.guidance_method)
            if self.guidance == 0 and method.name != "cfg":
                text = f"guidance_method: {method.name} has no effect at guidance 0; pass a guidance above 0"
                raise RequestError(f"{text} or leave it out", fields=("guidance_method", "guidance"))
