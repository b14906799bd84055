"""Ring 2: whole guided runs through the DiT, live beside diffusers' modular Z-Image pipeline and its guiders.

Guidance counts from 0 here. The guiders count so in their "original formulation", which for apg is the paper's: the
others add to the negative prompt's velocity and count from 1, which is the same for cfg, cfg_zero and slg.
"""

import functools

import pytest
import tiny
import torch
from tiny import relative_error
from torch import Tensor

import zimage

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers
import references
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from diffusers.modular_pipelines.z_image.denoise import ZImageDenoiseStep

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5  # fp32, of the largest value
DEEP = {**tiny.DIT, "n_layers": 4}
SCALE = 3.5
ORIGINAL = {"guidance_scale": SCALE, "use_original_formulation": True}
FROM_ONE = {"guidance_scale": SCALE + 1}


def skipping(*layers: int) -> list[LayerSkipConfig]:
    return [LayerSkipConfig(indices=[layer], fqn="layers") for layer in layers]


def apg(eta: float, threshold: float, momentum: float | None) -> guiders.AdaptiveProjectedGuidance:
    return guiders.AdaptiveProjectedGuidance(
        eta=eta,
        adaptive_projected_guidance_rescale=threshold,
        adaptive_projected_guidance_momentum=momentum,
        **ORIGINAL,
    )


GUIDERS = {  # ours → theirs
    "cfg": lambda: guiders.ClassifierFreeGuidance(**ORIGINAL),
    "cfg_zero": lambda: guiders.ClassifierFreeZeroStarGuidance(**ORIGINAL),
    "cfg_zero:zero_init_steps=0": lambda: guiders.ClassifierFreeZeroStarGuidance(zero_init_steps=0, **FROM_ONE),
    "cfg_zero:zero_init_steps=3": lambda: guiders.ClassifierFreeZeroStarGuidance(zero_init_steps=3, **ORIGINAL),
    "apg": lambda: apg(0.0, 15.0, None),
    "apg:eta=1,threshold=0,momentum=0": lambda: guiders.AdaptiveProjectedGuidance(
        adaptive_projected_guidance_rescale=0.0, **FROM_ONE
    ),
    "apg:eta=0.3,threshold=4,momentum=0.75": lambda: apg(0.3, 4.0, 0.75),
    "apg:eta=0.5,threshold=2.5,momentum=-0.5": lambda: apg(0.5, 2.5, -0.5),
    "slg:layers=1+2,start=0,stop=0.5": lambda: guiders.SkipLayerGuidance(
        skip_layer_config=skipping(1, 2), skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5, **ORIGINAL
    ),
    "slg:layers=0+3,scale=1.5,start=0.3,stop=1": lambda: guiders.SkipLayerGuidance(
        skip_layer_config=skipping(0, 3),
        skip_layer_guidance_scale=1.5,
        skip_layer_guidance_start=0.3,
        skip_layer_guidance_stop=1.0,
        **FROM_ONE,
    ),
}


@pytest.fixture(scope="module")
def reference():
    """Its hook that skips a block asks for an argument `hidden_states`; a block of Z-Image calls its first one x."""
    TransformerBlockRegistry.get(ZImageTransformerBlock)._cached_parameter_indices = {"hidden_states": 0}
    return references.randomised(diffusers.ZImageTransformer2DModel(**tiny.arguments(DEEP)), 5).eval()


@pytest.fixture(scope="module")
def pipe(reference, tiny_folder, tmp_path_factory):
    """Ours, with the same DiT."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    parts = [zimage.load_component(tiny_folder, name).state_dict() for name in ("text_encoder", "vae")]
    tiny.write_model(folder, parts[0], reference.state_dict(), parts[1], tiny.KL, DEEP)
    return zimage.ZImage.load(folder, device="cpu", dtype="fp32")


def theirs(transformer, guider, captions: list[Tensor], negative: list[Tensor], noise: Tensor, steps: int) -> Tensor:
    """The latents at the end of its denoise loop, from noise."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    blocks = ZImageDenoiseStep().init_pipeline()
    blocks.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    blocks.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": captions, "negative_prompt_embeds": negative, "num_inference_steps": steps}
    state = blocks(latents=noise, timesteps=scheduler.timesteps, dtype=torch.float32, **given)
    return state.get("latents")


def inputs() -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(6)
    captions = [3 * torch.randn(n, tiny.DIT["cap_feat_dim"], generator=generator) for n in (9, 40, 7, 7)]
    return captions[:2], captions[2:], torch.randn(2, 16, 6, 8, generator=generator)


@pytest.fixture(scope="module")
def plain(pipe):
    """Runs of classifier-free guidance, by their steps."""
    captions, negative, noise = inputs()
    return functools.cache(lambda steps: pipe.denoise(captions, noise, steps, 3.0, SCALE, negative))


@pytest.mark.parametrize("steps", [4, 8, pytest.param(30, marks=pytest.mark.full)])
@pytest.mark.parametrize("method", GUIDERS)
def test_whole_runs(pipe, reference, plain, method, steps):
    """A batch of two captions of unequal lengths; every value that a method has, and the edges of its steps."""
    captions, negative, noise = inputs()
    expected = theirs(reference, GUIDERS[method](), captions, negative, noise, steps)
    ours = pipe.denoise(captions, noise, steps, 3.0, SCALE, negative, guidance_method=method)
    assert relative_error(ours, expected) <= TOLERANCE
    is_cfg = method in ("cfg", "apg:eta=1,threshold=0,momentum=0")
    assert (relative_error(ours, plain(steps)) < 1e-3) == is_cfg, "a method that does nothing would agree as well"


@pytest.mark.parametrize("method", ["cfg_zero", "apg", "slg:layers=1+2"])
def test_thirty_steps(pipe, reference, method):
    """At each method's defaults."""
    captions, negative, noise = inputs()
    guider = GUIDERS.get(method) or (lambda: guiders.SkipLayerGuidance(skip_layer_config=skipping(1, 2), **ORIGINAL))
    expected = theirs(reference, guider(), captions, negative, noise, 30)
    ours = pipe.denoise(captions, noise, 30, 3.0, SCALE, negative, guidance_method=method)
    assert relative_error(ours, expected) <= TOLERANCE
