"""Prompts rewritten before they are drawn, by the text encoder's own weights, here or elsewhere, or by a chat server.

prompt ─ rewriter's template, chat format ─→ text ─ write ─→ thoughts and answer ─ split ─→ prompt
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from zimage.errors import RequestError, RewriteError
from zimage.loading.memory import out_of_memory_in
from zimage.loading.planner import Planner
from zimage.loading.registry import ROWS, TEXT_ENCODER
from zimage.loading.residency import Residency
from zimage.render.conditioning import Texts
from zimage.render.remote_encoder import RemoteEncoder
from zimage.settings.declared import Request
from zimage.settings.environment import rewriter_key
from zimage.settings.rewriting import DEFAULT_REWRITER, RewriteSettings
from zimage.settings.sampling import drawn_seed
from zimage.text.chat import format_chat
from zimage.text.templates import REWRITER, Template
from zimage.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rewrite:
    """A prompt as it was rewritten, and what it came from."""

    prompt: str
    thinking: str = field(repr=False)
    original: str
    rewriter: str
    seed: int

    def describe(self) -> dict[str, Any]:
        """Plain values for a picture's metadata."""
        return {"original": self.original, "rewriter": self.rewriter, "seed": self.seed}


class Rewriter:
    """Rewrites prompts for a pipeline."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        residency: Residency,
        texts: Texts,
        planner: Planner,
        remote: RemoteEncoder | None = None,
    ):
        self._tokenizer, self._residency, self._texts, self._planner = tokenizer, residency, texts, planner
        self._remote = remote

    def pieces(self, prompt: str, settings: RewriteSettings) -> Generator[str, None, Rewrite]:
        """Yield the text as it is written, thoughts included; returns the result. Closing the generator cancels.

        Raises RequestError, RemoteError, or RewriteError where no prompt came of it.
        """
        Request.check_one("prompt", prompt)
        template = self.template(settings)
        seed = drawn_seed(settings.rewrite_seed)
        if self._remote is not None and not settings.rewriter_url:
            answer, thinking = self._remote.rewrite(prompt, settings, seed, template.name)
            yield answer
            return Rewrite(answer, thinking, prompt, template.name, seed)
        write = self._ask if settings.rewriter_url else self._write
        text = yield from write(prompt, template, settings, seed)
        from zimage.text.generate import split_thinking

        thinking, answer = split_thinking(text)
        answer = _unquoted(answer)
        if not answer:
            if thinking:
                text = f"the rewriter was still thinking after {settings.max_tokens} tokens"
                text = f"{text}; raise max_tokens or turn off rewrite_thinking"
                raise RewriteError(text, fields=("max_tokens", "rewrite_thinking"))
            text = "the rewriter wrote nothing; try another rewriter, rewrite_seed or temperature"
            raise RewriteError(text, fields=("rewriter", "rewrite_seed", "temperature"))
        return Rewrite(answer, thinking, prompt, template.name, seed)

    def template(self, settings: RewriteSettings) -> Template:
        """The rewriter that is named, else the usual one. Raises RequestError."""
        template = self._texts.templates.get(settings.rewriter or DEFAULT_REWRITER, "rewriter")
        if template.category != REWRITER:
            known = ", ".join(t.name for t in self._texts.templates.list(REWRITER))
            raise RequestError(
                f"template {template.name!r} is not a rewriter; use one of {known}", fields=("rewriter",)
            )
        if template.assistant_content:
            raise RequestError(
                f"rewriter {template.name!r} has assistant_content, which would end the answer", fields=("rewriter",)
            )
        return template

    def _write(
        self, prompt: str, template: Template, settings: RewriteSettings, seed: int
    ) -> Generator[str, None, str]:
        """With the text encoder. Unless it should think, the think block is closed at once."""
        from zimage.text.generate import write

        thinking = template.thinking_content
        block = bool(thinking) or not settings.rewrite_thinking
        chat = format_chat(prompt, template.system_prompt, thinking, think_block=block)
        tokens, text = len(self._texts.tokenize(chat)) + settings.max_tokens, ""
        plan, residency = self._planner.plan_writing(tokens, self._residency.copies), self._residency
        with out_of_memory_in(ROWS[TEXT_ENCODER].title):
            residency.begin(TEXT_ENCODER, plan)
        try:
            with residency.use(TEXT_ENCODER, plan) as encoder:  # its cache makes it the one that writes to the end
                pieces = write(encoder, self._tokenizer, chat, settings, settings.max_tokens, seed)
            del encoder
            while True:
                with out_of_memory_in(ROWS[TEXT_ENCODER].title), residency.hold(TEXT_ENCODER), torch.no_grad():
                    piece = next(pieces, None)
                if piece is None:
                    return text
                text += piece
                yield piece
        finally:
            residency.finish(TEXT_ENCODER, plan, keep=True)  # what was written is encoded next

    def _ask(self, prompt: str, template: Template, settings: RewriteSettings, seed: int) -> Generator[str, None, str]:
        """With a server, which answers in one piece."""
        from zimage.text.remote import complete

        messages = [{"role": "system", "content": template.system_prompt}, {"role": "user", "content": prompt}]
        text = complete(
            settings.rewriter_url or "",
            settings.rewriter_model,
            messages,
            settings,
            settings.max_tokens,
            seed,
            timeout=settings.rewriter_timeout,
            api_key=rewriter_key(),
        )
        yield text
        return text


def _unquoted(answer: str) -> str:
    """Without quotation marks around the whole: the model would paint it as lettering."""
    inner = answer[1:-1]
    whole = len(answer) > 1 and answer[0] == answer[-1] == '"' and '"' not in inner
    return inner.strip() if whole else answer
