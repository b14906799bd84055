"""Previews on a pretended card: what a render itself has to do for them, and what their thread does."""

import dataclasses

import pytest
import torch
from pretended import needs_pretended, pretend

import zimage
from zimage.render.preview import Factors, Previews

pytestmark = [pytest.mark.cuda, needs_pretended]
FACTORS = Factors([[0.0] * 3] * 16, [0.0] * 3)


def test_a_render_launches_copies_and_waits_for_nothing_more(tiny_folder):
    with torch.no_grad(), pretend() as card:
        pipe = zimage.ZImage.load(tiny_folder)
        counts, request = [], zimage.Request(prompt="a cat", steps=3)
        for previews in (None, None, Previews(FACTORS, list.append, pause=0)):  # the first loads; no thread is begun
            hooks = [previews.hook] if previews else []
            with card.count() as count:
                for event in pipe.run(request, hooks=hooks):
                    if previews:
                        previews.take(event)
            counts.append(count)
        _, alone, beside = counts
        assert beside.launches == alone.launches
        assert beside.copies == alone.copies
        assert beside.syncs == alone.syncs
        last = previews._next()
        before = last._replace(event=dataclasses.replace(last.event, step=2))
        for step, copies in ((last, 1), (before, 2)):  # the finished latents; what was evaluated, and its velocity
            with card.count() as count:
                preview = previews._drawn(step)
            assert (preview.step, preview.width) == (step.event.step, 16)
            assert not count.launches
            assert [copy.bytes for copy in count.copies] == [16 * 8 * 8 * 4] * copies  # of one image
