"""How a caption becomes latents: noise, schedule, solver and guidance, each parameter declared once."""

import itertools
import struct
from dataclasses import dataclass

from zimage.errors import RequestError, quoted
from zimage.settings.captions import CaptionSettings
from zimage.settings.fields import either, setting
from zimage.settings.guiding import GuidanceMethod
from zimage.settings.presets import check_preset

# The rows of `flow.SOLVERS`.
SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "lcm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "res_multistep",
    "er_sde",
)
# The rows of `flow.SCHEDULES`.
SCHEDULES = (
    "simple",
    "normal",
    "beta",
    "beta_shifted",
    "karras",
    "exponential",
    "linear_quadratic",
    "kl_optimal",
)
MAX_SEED = 2**63 - 1
RANDOM_SEED = -1  # asks for one, as leaving the seed out does
DRAWN_SEEDS = 2**32  # random ones are below this, so that people can write them down
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(CaptionSettings):
    """None means: what the checkpoint's kind asks for. Raises RequestError with the fields at fault."""

    steps: int | None = setting(
        None,
        "Denoising steps. Default: 8 (Turbo) or 30 (Base).",
        group="Sampling",
        minimum=1,
        maximum=MAX_STEPS,
    )
    preset: str | None = setting(
        None,
        "Fill what is left open as another program does: comfyui, forge or diffusers; or with half of Turbo's steps: "
        "turbo-4; or as a settings file says under [presets.NAME]. Default: none.",
        group="Sampling",
        metavar="NAME",
    )
    sampler: str | None = setting(
        None,
        "Solver of the denoising steps; heun evaluates the model twice in each but the last. Default: euler.",
        group="Sampling",
        choices=SAMPLERS,
    )
    seed: int | list[int] | None = setting(
        None,
        f"Seed of the noise; image k of a prompt uses seed + k. Default, and {RANDOM_SEED}: random, and reported.",
        group="Sampling",
        minimum=RANDOM_SEED,
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
    variation: str | None = setting(
        None,
        "Mix the noise of another seed into that of --seed, by a weight from 0 to 1; image k of a prompt keeps the "
        "seed and uses SEED + k here. SEED -1 is random, and reported. Default: no other seed.",
        group="Sampling",
        metavar="SEED:WEIGHT",
        longest=60,
    )
    guidance: float | None = setting(
        None,
        "Classifier-free guidance; 0 is off. Default: 0 (Turbo) or 4 (Base).",
        group="Sampling",
        minimum=0,
        maximum=100,
    )
    nag: float = setting(
        1.0,
        "Normalised attention guidance: how strongly --negative acts within each evaluation, also at guidance 0, for "
        "about a fifth of its time at 1024 × 1024; 1 is off, 1.5 to 4 are usual.",
        group="Sampling",
        minimum=1,
        maximum=100,
    )
    guidance_method: str | None = setting(
        None,
        "How guidance is made, NAME or NAME:KEY=VALUE,…: cfg, cfg_zero (zero_init_steps=1), apg (eta=0, threshold=15, "
        "momentum=0) or slg (layers=7+8+9, scale=2.8, start=0.01, stop=0.2). Default: cfg.",
        group="Sampling",
        metavar="METHOD",
        longest=200,
    )
    schedule: str | None = setting(
        None,
        "How the noise levels of the steps lie: evenly in time (simple; normal ends nearer to 0), closer at both ends "
        "(beta, as diffusers has it; beta_shifted, as ComfyUI and Forge have it), closer towards the last (karras, "
        "exponential, kl_optimal), or nearly all near pure noise (linear_quadratic). Default: simple.",
        group="Sampling",
        choices=SCHEDULES,
    )
    shift: float | None = setting(
        None,
        "Shift of the noise schedule. Default: from the checkpoint's scheduler config.",
        group="Sampling",
        above=0,
        maximum=100,
    )
    sigmas: str | None = setting(
        None,
        "Noise levels of the steps, exactly, from 1 or less down to 0, instead of steps, schedule and shift. "
        "Default: those of the schedule.",
        group="Sampling",
        metavar="SIGMA,…,0",
        longest=32 * MAX_STEPS,
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
        if self.preset is not None:
            check_preset(self.preset)
        if self.variation is not None:
            split_variation(self.variation)
        self._check_guidance()
        if self.sigmas is not None:
            self._check_levels(self.sigmas)

    @property
    def solver(self) -> str:
        """The sampler, which is the first one where it is open."""
        return either(self.sampler, SAMPLERS[0])

    def _check_levels(self, sigmas: str) -> None:
        """What exact noise levels go together with."""
        steps = len(split_sigmas(sigmas)) - 1
        if self.steps not in (None, steps):
            text = f"sigmas: these are {steps} steps, and steps is {self.steps}; pass only one of them"
            raise RequestError(text, fields=("sigmas", "steps"))
        if others := [name for name in ("schedule", "shift") if getattr(self, name) is not None]:
            text = f"sigmas: they are the noise levels themselves; leave out {' and '.join(others)}, or the sigmas"
            raise RequestError(text, fields=("sigmas", *others))

    def _check_guidance(self) -> None:
        """Raise RequestError for a method that is not one, or that has nothing to guide."""
        name = "cfg" if self.guidance_method is None else GuidanceMethod.parse(self.guidance_method).name
        if self.guidance == 0 and name != "cfg":
            text = f"guidance_method: {name} has no effect at guidance 0; pass a guidance above 0 or leave it out"
            raise RequestError(text, fields=("guidance_method", "guidance"))


def is_open(seed: int | None) -> bool:
    """Whether a random seed is wanted."""
    return seed is None or seed == RANDOM_SEED


def drawn_seed(seed: int | None) -> int:
    """The seed that was given, or a random one where it is open."""
    import secrets  # with all that it imports, which no help needs

    return secrets.randbelow(DRAWN_SEEDS) if seed is None or is_open(seed) else seed


def split_sigmas(text: str) -> list[float]:
    """SIGMA,…,0 → noise levels. Raises RequestError unless they fall from 1 or less to 0, as fp32 too."""
    told = f"sigmas {quoted(text)}"
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        raise _sigmas_fault(
            f"{told} cannot be read; write numbers that fall from 1 to 0, such as 1,0.9,0.6,0"
        ) from None
    if not 2 <= len(levels) <= MAX_STEPS + 1:
        raise _sigmas_fault(f"{told}: pass 2 to {MAX_STEPS + 1} numbers, one more than there are steps")
    if not 0 < levels[0] <= 1:
        raise _sigmas_fault(f"{told}: the first, {levels[0]:g}, should be above 0 and at most 1, which is pure noise")
    if levels[-1] != 0:
        raise _sigmas_fault(f"{told}: the last, {levels[-1]:g}, should be 0, which is the picture")
    for high, low in itertools.pairwise(levels):
        if not (low >= 0 and _fp32(low) < _fp32(high)):
            text = (
                f"{low:.9g} stands after {high:.9g}; each should be below the one before it, in fp32, and none below 0"
            )
            raise _sigmas_fault(f"{told}: {text}")
    return levels


def _fp32(value: float) -> float:
    """As denoising computes with it; the value is at most 1."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _sigmas_fault(text: str) -> RequestError:
    return RequestError(text, fields=("sigmas",))


def split_variation(text: str) -> tuple[int, float]:
    """SEED:WEIGHT → both; −1 is a seed that is still open. Raises RequestError."""
    seed, _, weight = text.partition(":")
    try:
        found = int(seed), float(weight)
    except ValueError:
        found = -2, 0.0
    if not (-1 <= found[0] <= MAX_SEED and 0 <= found[1] <= 1):
        told = f"should be SEED:WEIGHT, a whole number from -1 to {MAX_SEED} and one from 0 to 1, such as 7:0.2"
        raise RequestError(f"variation {quoted(text)} {told}", fields=("variation",))
    return found
