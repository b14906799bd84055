"""Encoding and writing with the text encoder on a pretended RTX 4090: launches, waits, copies, memory."""

import pytest
import torch
from counted import Card, Count
from pretended import needs_pretended, pretend
from tiny import QWEN

from bench.card import random_model
from zimage.loading.plan import Workload
from zimage.loading.work import graph_bytes, text_encoder_bytes
from zimage.nn.graphs import CudaGraphs, use_graphs
from zimage.text import Qwen3
from zimage.text.generate import Sampling, generate

pytestmark = [pytest.mark.cuda, needs_pretended]
CARD = torch.device("cuda", 0)
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(top_k=0, presence_penalty=1.0),
    Sampling(top_k=0, top_p=1.0),
]


def third_token(card: Card, model: Qwen3, sampling: Sampling) -> Count:
    """What writing one token does, once the prompt has been read."""
    tokens = generate(model, [1, 2, 3], sampling, 8, (), torch.Generator())
    next(tokens)
    next(tokens)
    with card.count() as count:
        next(tokens)
    return count


@torch.no_grad()
def test_the_published_encoder():
    """At most 25 launches per layer and token."""
    with pretend() as card:
        model = random_model("text_encoder", CARD)
        writing = third_token(card, model, Sampling())
        with card.count() as encoding:
            model(torch.zeros(1, 32, dtype=torch.long, device=CARD))
        use_graphs(model, CudaGraphs(CARD))
        with card.count() as replayed:
            third_token(card, model, Sampling())
    config, text = model.config, Workload(1024, 1024, 3, stored_tokens=10)
    planned = text_encoder_bytes(config, text, torch.bfloat16) + graph_bytes(config, text, torch.bfloat16)
    assert 0.8 * planned <= replayed.peak <= planned
    assert len(writing.launches) <= 25 * model.config.num_hidden_layers == 900
    assert writing.by_name()["cat"] == 1, "keys and values are written in place"
    assert writing.seconds() <= 0.009
    assert len(encoding.launches) <= 500
    assert not encoding.syncs
    assert not encoding.copies
    assert encoding.peak <= text_encoder_bytes(model.config, Workload(1024, 1024, 32), torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_token_is_waited_for_once(sampling):
    """For the logits that it is drawn from, however it is drawn."""
    with pretend() as card:
        count = third_token(card, Qwen3.from_config(QWEN).bfloat16().to(CARD), sampling)
    assert [line.split(":")[0] for line in count.syncs] == ["zimage/text/sampling.py"]
    assert [copy.target.type for copy in count.copies] == ["cpu"]


@torch.no_grad()
def test_a_token_from_a_graph_is_waited_for_once():
    with pretend() as card:
        writer = Qwen3.from_config(QWEN).bfloat16().to(CARD)
        use_graphs(writer, CudaGraphs(CARD))
        count = third_token(card, writer, Sampling())
    assert len(card.captures) == 1
    assert [line.split(":")[0] for line in count.syncs] == ["zimage/text/sampling.py"]
