"""The reference implementations at the sizes of `tiny`, called alike. Needs the extra `parity`."""

import copy
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny import DIT, KL, QWEN, SCHEDULER, VISION, WAN, arguments, randomised
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()


def text_encoder(seed: int) -> transformers.Qwen3ForCausalLM:
    config = transformers.Qwen3Config(**arguments(QWEN))
    return randomised(transformers.Qwen3ForCausalLM(config), seed).eval()


def dit(seed: int) -> diffusers.ZImageTransformer2DModel:
    return randomised(diffusers.ZImageTransformer2DModel(**arguments(DIT)), seed).eval()


def kl(seed: int) -> diffusers.AutoencoderKL:
    return randomised(diffusers.AutoencoderKL(**arguments(KL)), seed).eval()


def wan(seed: int) -> diffusers.AutoencoderKLWan:
    return randomised(diffusers.AutoencoderKLWan(**arguments(WAN)), seed).eval()


@torch.no_grad()
def hidden_states(model, ids: Tensor) -> list[Tensor]:
    return list(model(input_ids=ids, output_hidden_states=True).hidden_states)


@torch.no_grad()
def velocity(model, latents: Tensor, sigma: Tensor, captions: list[Tensor]) -> Tensor:
    """The model's output for latents (B, C, h, w), negated as its pipeline does."""
    out = model(list(latents.unsqueeze(2).unbind()), 1 - sigma, captions, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


def vision(seed: int, **text: Any) -> transformers.Qwen3VLForConditionalGeneration:
    """With changes to the text stack's config. Its learned positions count as much as the patches."""
    config = copy.deepcopy(VISION)
    config["text_config"].update(text)
    model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**config))
    randomised(model, seed).model.visual.pos_embed.weight.data.mul_(8)
    return model.eval()


class Seen(NamedTuple):
    """What the reference gives for pictures and, if it was passed ids, for a text with them."""

    tokens: Tensor
    deepstack: list[Tensor]
    states: list[Tensor]  # what each text layer reads, and the last one's output after the norm


@torch.no_grad()
def seen(model, inputs, ids: Tensor | None = None) -> Seen:
    """`inputs` are the processor's, `ids` (1, L) of a text."""
    looked = model.model.visual(inputs["pixel_values"].to(model.dtype), grid_thw=inputs["image_grid_thw"])
    states: list[Tensor] = []
    if ids is not None:
        # Its list of hidden states holds what layers return, before the features of pictures are added to that.
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
            for layer in model.model.language_model.layers
        ]
        kinds = (ids == model.config.image_token_id).int()
        states.append(model.model(input_ids=ids, mm_token_type_ids=kinds, **inputs).last_hidden_state)
        for hook in hooks:
            hook.remove()
    return Seen(looked.pooler_output, looked.deepstack_features, states)


def vision_inputs(pictures, least: int, most: int):
    """Patches and grids of pictures, from the processor that reads Qwen3-VL's settings."""
    half = [0.5] * 3
    size = {"shortest_edge": least, "longest_edge": most}
    processor = Qwen2VLImageProcessorPil(size=size, patch_size=16, image_mean=half, image_std=half)
    return processor(images=pictures, return_tensors="pt")


def statistics(model) -> tuple[Tensor, Tensor]:
    """(centre, spread) of the latents, either a number or one per channel: latents = (z − centre) / spread."""
    if isinstance(model, diffusers.AutoencoderKL):
        return torch.tensor(model.config.shift_factor), torch.tensor(1 / model.config.scaling_factor)
    stats = torch.tensor((model.config.latents_mean, model.config.latents_std))
    return stats[0].view(-1, 1, 1), stats[1].view(-1, 1, 1)


@torch.no_grad()
def encode(model, images: Tensor) -> Tensor:
    """Scaled latents in at least fp32: the posterior's mode."""
    still = isinstance(model, diffusers.AutoencoderKLWan)
    z = model.encode(images.unsqueeze(2) if still else images).latent_dist.mode()
    z = z.squeeze(2) if still else z
    z = z if z.dtype == torch.float64 else z.float()
    centre, spread = statistics(model)
    return (z - centre) / spread


@torch.no_grad()
def decode(model, latents: Tensor) -> Tensor:
    """Clamped images of scaled latents; the scaling runs in at least fp32, which flatters the reference in bf16."""
    centre, spread = statistics(model)
    z = ((latents if latents.dtype == torch.float64 else latents.float()) * spread + centre).to(model.dtype)
    still = isinstance(model, diffusers.AutoencoderKLWan)
    image = model.decode(z.unsqueeze(2) if still else z).sample
    return (image.squeeze(2) if still else image).clamp(-1, 1)


def denoise(
    model, latents: Tensor, captions: list[Tensor], negative: list[Tensor] | None, guidance: float, **settings
) -> Tensor:
    """Eight Euler steps through the reference's own pipeline."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    pipe = diffusers.ZImagePipeline(scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=captions,
        negative_prompt_embeds=negative,
        latents=latents,
        height=8 * latents.shape[2],
        width=8 * latents.shape[3],
        num_inference_steps=8,
        guidance_scale=guidance,
        output_type="latent",
        return_dict=False,
        **settings,
    )[0]


@torch.no_grad()
def from_picture(
    model,
    vae,
    picture,
    mask,
    seeds: list[int],
    captions: list[Tensor],
    negative: list[Tensor] | None,
    *,
    output_type: str = "latent",
    **settings,
) -> Tensor:
    """Image to image, or inpainting with a mask, through the reference's own pipelines; one seed per caption.

    They draw the posterior before the noise: with its mode in that place, the generator's first draw is the noise.
    """
    build = diffusers.ZImageImg2ImgPipeline if mask is None else diffusers.ZImageInpaintPipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    pipe = build(scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    with mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()):
        return pipe(
            prompt_embeds=captions,
            negative_prompt_embeds=negative,
            image=picture,
            **({} if mask is None else {"mask_image": mask}),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type=output_type,
            return_dict=False,
            **settings,
        )[0]


@torch.no_grad()
def controlled(
    model,
    vae,
    net,
    control,
    seeds: list[int],
    captions: list[Tensor],
    negative: list[Tensor] | None,
    **settings,
) -> Tensor:
    """Latents of a run with a ControlNet through the reference's own pipelines, of which one inpaints a picture."""
    inpainting = "mask_image" in settings
    build = diffusers.ZImageControlNetInpaintPipeline if inpainting else diffusers.ZImageControlNetPipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    pipe = build(scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=model, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=captions,
        negative_prompt_embeds=negative,
        control_image=control,
        width=control.width,
        height=control.height,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        return_dict=False,
        **settings,
    )[0]


def pixels(picture) -> Tensor:
    """(1, 3, H, W) in [−1, 1], as the reference's pipelines read a PIL image."""
    return diffusers.image_processor.VaeImageProcessor(vae_scale_factor=16).preprocess(picture)


def mask_pixels(mask, width: int, height: int) -> Tensor:
    """(1, 1, H, W) of zeros and ones, as its inpainting pipeline reads a mask."""
    read = diffusers.image_processor.VaeImageProcessor(
        vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    return read.preprocess(mask, height=height, width=width)
