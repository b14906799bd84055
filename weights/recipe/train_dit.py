"""Train the DiT and the text encoder together by flow matching, with a curriculum from single objects to pairs.

Per sample: x_σ = (1 − σ)·x₀ + σ·ε, target ε − x₀, mean squared error (Lipman et al. 2023, Liu et al. 2023).
"""

import copy
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage.weights.recipe.captions import LARGE_PER_SMALL, Caption, caption
from zimage.weights.recipe.choices import COUPLED_ABOVE, noise_for
from zimage.weights.recipe.latents import LatentCache, load_vae
from zimage.weights.recipe.muon import optimisers
from zimage.weights.recipe.parallel import Team
from zimage.weights.recipe.sample import LATENT_SHAPE, Painter, render
from zimage.weights.recipe.scenes import Scene, sheet
from zimage.weights.recipe.tokenizer import MAX_TOKENS, encode
from zimage.weights.recipe.training import Average, Run, compute_dtype, set_learning_rates, warmup_then_linear

DIT_CONFIG = {
    "_class_name": "ZImageTransformer2DModel",
    "_diffusers_version": "0.36.0",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [16, 24, 24],
    "axes_lens": [1024, 512, 512],
    "cap_feat_dim": 128,
    "dim": 192,
    "in_channels": 16,
    "n_heads": 3,
    "n_kv_heads": 3,
    "n_layers": 6,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
TEXT_CONFIG = {
    "architectures": ["Qwen3Model"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,  # the third is never used: captions are the hidden state before it
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 1000,
}
BATCH = 64  # over all workers
RATES = (5e-3, 2e-3)  # of Muon and AdamW
SAVE_EVERY, PREVIEW_EVERY, RENEW_EVERY = 400, 800, 3  # steps
SINGLES_ONLY = 0.1  # share of the time
SHARES_FIRST = {"plain": 0.02, "large": 0.7, "small": 0.7 / LARGE_PER_SMALL}
SHARES = {"plain": 0.02, "large": 0.34, "small": 0.34 / LARGE_PER_SMALL, "pair": 0.5}
PREVIEW = (
    "a cat face on a blue background", "A photo of a dog on a red background.", "a banana", "a banana",
    "a small fox on a green background", "a large fox on a green background", "a fox", "two cats",
    "a cat and a dog on a yellow background", "a dog and a cat on a yellow background", "a robot next to a ghost",
    "a robot next to a ghost", "a rocket beside the moon on a black background", "an owl on a white background",
    "strawberry, pink background", "a bus and a car", "", "", "a pizza with a purple background", "a shark",
    "a train on a gray background", "a house and a tree on an orange background", "a star", "a guitar and a crown",
)  # fmt: skip


def draw_sigmas(count: int) -> Tensor:
    """σ = 4u/(1 + 3u): most work at high noise, where the caption decides and where the sampler's steps lie."""
    u = torch.rand(count)
    return 4 * u / (1 + 3 * u)


def captioned(scene: Scene, tokenizer: Tokenizer, rng: random.Random) -> tuple[Caption, list[int]]:
    """A caption that fits the token budget."""
    while True:
        text = caption(scene, rng)
        ids = encode(tokenizer, text.text)
        if len(ids) <= MAX_TOKENS:
            return text, ids


def loss_of(painter: Painter, cache: LatentCache, tokenizer: Tokenizer, shares: dict[str, float], count: int) -> Tensor:
    scenes, latents = cache.sample(shares, count)
    texts, ids = zip(*(captioned(scene, tokenizer, cache.rng) for scene in scenes), strict=True)
    sigma = draw_sigmas(count)
    noise = torch.randn(count, *LATENT_SHAPE)
    for i in torch.nonzero(sigma > COUPLED_ABOVE)[:, 0].tolist():
        noise[i] = noise_for(scenes[i], texts[i], noise[i])
    level = sigma[:, None, None, None]
    noisy = (1 - level) * latents + level * noise
    with sdpa_kernel(SDPBackend.MATH):  # over 96 tokens faster than the fused kernel, most of all backwards
        velocity = painter(noisy, sigma, ids)
    return (velocity - (noise - latents)).square().mean()


def train_dit(work: Path, minutes: float, seed: int = 0, workers: int = 2) -> None:
    """Train for `minutes` of work and leave `dit.pt`; a second call goes on where the first stopped."""
    painter = Painter(TEXT_CONFIG, DIT_CONFIG)
    initialise(painter, seed)
    team = Team(painter, workers)
    team.run(lambda member: _work(member, painter, work, minutes, seed))


def _work(team: Team, painter: Painter, work: Path, minutes: float, seed: int) -> None:
    """One worker's training; the first also keeps the average, the log and the pictures.

    The weights of all are fp32 and shared; each worker computes with a copy of its own, in bf16 where the CPU can.
    """
    run = Run(work, "dit" if team.leads else f"dit-{team.rank}", minutes)
    opts = optimisers(painter)
    average = Average(painter, 0.995)
    resume(run, painter, opts, average)
    torch.manual_seed(1000 * team.rank + seed + run.step)
    cache = LatentCache(load_vae(work), random.Random(1000 * team.rank + seed + run.step), team.rank, team.workers)
    cache.add_pairs()
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    dtype = compute_dtype()
    worker = copy.deepcopy(painter).to(dtype)
    compile_blocks(worker)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # counts on CPUs too: no detour through fp32
    run.log(f"{len(cache.scenes)} scenes cached, {sum(p.numel() for p in painter.parameters()):,} parameters, {dtype}")
    team.progress.fill_(run.progress)
    losses: list[float] = []
    while (progress := team.progress.item()) < 1:
        set_learning_rates(opts, RATES, warmup_then_linear(progress, run.step))
        shares = SHARES_FIRST if progress < SINGLES_ONLY else SHARES
        loss = loss_of(worker, cache, tokenizer, shares, BATCH // team.workers)
        loss.backward()
        run.tick()
        if team.leads:
            team.progress.fill_(run.progress)
        team.step(worker, opts, clip=1.0)
        if run.step % RENEW_EVERY == 0:
            cache.renew_pairs()
        if run.step % SAVE_EVERY == 0 or team.progress.item() >= 1:
            save(run, painter, opts, average)
        losses.append(loss.item())
        if team.leads:
            average.update(painter, run.step)
            report(run, losses, average, cache, tokenizer)


def compile_blocks(painter: Painter) -> None:
    """Fuse what lies between the products: 1.5 times the samples per second, after a minute or two of compiling."""
    for block in (*painter.dit.context_refiner, *painter.dit.noise_refiner, *painter.dit.layers):
        block.compile(dynamic=False)


def resume(run: Run, painter: Painter, opts: list[torch.optim.Optimizer], average: Average) -> None:
    """Each worker has the state of the parameters it owns in a file of its own."""
    if states := run.resume():
        with torch.no_grad():
            for name, p in painter.state_dict().items():
                p.copy_(states["model"][name])
        average.weights = states["average"]
        for opt, state in zip(opts, states["optimisers"], strict=True):
            opt.load_state_dict(state)


def save(run: Run, painter: Painter, opts: list[torch.optim.Optimizer], average: Average) -> None:
    run.save(
        model=painter.state_dict(),
        average=average.weights,
        optimisers=[opt.state_dict() for opt in opts],
        compute=str(compute_dtype()).removeprefix("torch."),
    )


def report(run: Run, losses: list[float], average: Average, cache: LatentCache, tokenizer: Tokenizer) -> None:
    if run.step % 25 == 0:
        run.log(f"loss {sum(losses) / len(losses):.4f}")
        losses.clear()
    if run.step % PREVIEW_EVERY == 0:
        pictures = render(as_painter(average.weights), cache.vae, tokenizer, PREVIEW, range(len(PREVIEW)), batch=24)
        sheet(pictures, columns=8).save(run.checkpoint.with_suffix(".png"))


def initialise(painter: Painter, seed: int) -> None:
    """Small normal weights; every gate of the DiT starts closed, so depth is learned from the identity."""
    torch.manual_seed(seed)
    for name, p in painter.named_parameters():
        if name.endswith("bias") or "adaLN" in name:
            torch.nn.init.zeros_(p)
        elif p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.5 if "embed_tokens" in name else p.shape[1] ** -0.5)


def as_painter(weights: dict[str, Tensor]) -> Painter:
    painter = Painter(TEXT_CONFIG, DIT_CONFIG)
    painter.load_state_dict(weights)
    return painter.eval()
