"""From logits to a token: a penalty, filters, and a draw from what they leave.

The filters follow transformers' processors in their order and treatment of ties; the presence penalty of OpenAI's
interface comes before them. `probabilities` is the definition. All of it runs in fp32 on the CPU, so a seed gives the
same text on every device as far as the logits agree.

Top-p sorts the vocabulary, which takes longer than all the rest. `shortlisted` finds the same token among the few
largest logits, which the device picks out, unless rounding or ties leave it open: then the definition decides.

Shapes: V vocabulary, K shortlist.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from zimage.errors import NonFiniteError
from zimage.settings.rewriting import Sampling

SHORTLIST = 512  # tokens
# How far fp32 may be off, relatively: probabilities added up over a vocabulary, and the ratio of two of them. Far more
# than is ever seen: 150,000 terms in the 16 lanes of a sum are off by at most 6e-4.
SUMS, RATIOS = 1e-3, 1e-4


# ------------------------------------------------------------------ the definition


def penalised(logits: Tensor, generated: Collection[int], penalty: float) -> Tensor:
    """logitᵢ − penalty · [i ∈ generated]: once per token, however often it occurred (OpenAI's presence penalty)."""
    if not penalty or not generated:
        return logits
    seen = torch.tensor(sorted(set(generated)))
    return logits.index_add(0, seen, logits.new_ones(len(seen)), alpha=-penalty)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """−∞ below the k-th largest logit; all logits equal to it stay (Fan et al. 2018)."""
    least = logits.topk(min(k, len(logits))).values[-1]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """−∞ for the least likely tokens whose probabilities add up to 1 − p or less (Holtzman et al. 2020).

    The most likely token always stays. All V logits are sorted, though most may be −∞, because their order decides
    which of several equal ones at the limit are dropped.
    """
    ascending, order = logits.sort()
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[-1] = False
    return logits.index_fill(0, order[tail], -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """−∞ for tokens less likely than p times the most likely one (Nguyen et al. 2024)."""
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < p * probability.amax(), -torch.inf)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (V,) of logits that penalty and temperature have been applied to."""
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(-1)


def probabilities(logits: Tensor, generated: Collection[int], sampling: Sampling) -> Tensor:
    """Probabilities (V,) of the next token, fp32, from raw logits (V,) and the tokens so far; temperature above 0."""
    return filtered(penalised(logits, generated, sampling.presence_penalty) / sampling.temperature, sampling)


def draw_noise(vocabulary: int, sampling: Sampling, generator: torch.Generator) -> Tensor | None:
    """Exponential noise (V,): the token of the largest probability / noise has been drawn by its probability.

    The numbers that `torch.multinomial` draws. None at temperature 0, which needs no chance.
    """
    return torch.empty(vocabulary).exponential_(generator=generator) if sampling.temperature else None


# ------------------------------------------------------------------ one token


class Offer(NamedTuple):
    """Raw logits (V,) fp32 on the host, and the indices (K,) of the largest; none where they are not needed."""

    logits: Tensor
    largest: Tensor


def pack(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (V,) on any device and the indices of the largest as one tensor, so that one copy brings both here.

    An index below 2²⁴ is exact in fp32, and no vocabulary is larger.
    """
    if not sampling.temperature or (not sampling.top_k and sampling.top_p == 1):
        return logits
    return torch.cat((logits, logits.topk(min(SHORTLIST, len(logits))).indices.float()))


def unpack(packed: Tensor, vocabulary: int) -> Offer:
    """What `pack` has packed; waits for the device."""
    logits, largest = packed.cpu().tensor_split((vocabulary,))
    return Offer(logits, largest.long())


def choose(offer: Offer, generated: Collection[int], sampling: Sampling, noise: Tensor | None) -> int:
    """The next token: the most likely one at temperature 0, else the one that `noise` draws. Raises NonFiniteError."""
    if not offer.logits.isfinite().all():
        raise NonFiniteError("the text encoder produced NaN or infinity; fetch its weights again or try dtype fp32")
    logits = penalised(offer.logits, generated, sampling.presence_penalty)
    if noise is None:
        return int(logits.argmax())
    logits, token = logits / sampling.temperature, None
    if len(offer.largest):
        floor = offer.logits[offer.largest[-1]] / sampling.temperature
        token = shortlisted(logits, offer.largest, floor, sampling, noise)
    return int((filtered(logits, sampling) / noise).argmax()) if token is None else token


# ------------------------------------------------------------------ the shortlist


def shortlisted(logits: Tensor, largest: Tensor, floor: Tensor, sampling: Sampling, noise: Tensor) -> int | None:
    """The token that (filtered(logits) / noise).argmax() gives, or None where these few logits do not tell.

    `logits` (V,) as `filtered` takes them; those that are not in `largest` (K,) are at most `floor`. The winner among
    all tokens that may be left wins whichever of them are left, if it is itself left for certain.
    """
    x, order = logits[largest].sort(descending=True)
    if len(largest) < len(logits):
        x = x[x > floor]  # all tokens above it
    if not len(x) or sampling.top_k > len(x) < len(logits):
        return None
    if sampling.top_k:
        x = x[x >= x[min(sampling.top_k, len(x)) - 1]]
    mass = (x.double() - x[0]).exp()
    rest = 0.0 if sampling.top_k else float((logits.double() - x[0]).exp().sum() - mass.sum())
    kept = _kept(x, mass, max(rest, 0.0), sampling)
    if kept is None:
        return None
    (certain, possible), tokens = kept, largest[order[: len(x)]]
    score = torch.where(possible, mass / noise[tokens], 0.0)
    best = int(score.argmax())
    near = score >= (1 - RATIOS) * score[best]
    return int(tokens[best]) if certain[best] and int(near.sum()) == 1 and mass[best] > 1e-30 else None


def _kept(x: Tensor, mass: Tensor, rest: float, sampling: Sampling) -> tuple[Tensor, Tensor] | None:
    """Which of the logits x (descending) top-p and min-p keep for certain, and which they may keep.

    `mass` is exp(x − x₀), `rest` that of all other tokens, which are below x. None where these may be kept too.
    """
    certain = possible = torch.ones(len(x), dtype=torch.bool)
    if sampling.top_p < 1:
        dropped, slack = 1 - sampling.top_p, SUMS * (1 - sampling.top_p) + 1e-10
        tail = (mass.flip(0).cumsum(0).flip(0) + rest) / (mass.sum() + rest)  # of each token and all below it
        if rest / (mass.sum() + rest) > dropped - slack:
            return None
        surely, perhaps = (max(1, int((tail > dropped + s).sum())) for s in (slack, -slack))
        # Which of equal logits go is open, so all of them are possible and none is certain.
        certain = x > (x[surely] if surely < len(x) else -torch.inf)
        possible = x >= x[perhaps - 1]
    if sampling.min_p:
        certain = certain & ((mass >= sampling.min_p * (1 + RATIOS)) | (x == x[0]))
        possible = possible & (mass >= sampling.min_p * (1 - RATIOS))
    return certain, possible
