"""How a prompt is rewritten before it is drawn, each parameter declared once as those of a request are."""

from dataclasses import dataclass

from zimage.errors import RequestError
from zimage.settings.declared import MAX_TIMEOUT
from zimage.settings.environment import REWRITER_KEY
from zimage.settings.fields import Settings, check_fields, setting
from zimage.settings.sampling import MAX_SEED, RANDOM_SEED

DEFAULT_REWRITER = "rewrite-expand"
MAX_TOKENS = 512
REWRITER_TIMEOUT = 120.0  # seconds


@dataclass(frozen=True)
class Sampling(Settings):
    """How the next token of a text is drawn. Raises RequestError with the fields at fault."""

    temperature: float = setting(
        0.6, "0 always takes the most likely token; higher values vary more.", group="Rewriting", minimum=0, maximum=5
    )
    top_p: float = setting(
        0.95,
        "Sample from the most likely tokens up to this total probability; 1 is off.",
        group="Rewriting",
        above=0,
        maximum=1,
    )
    top_k: int = setting(20, "Sample from this many of the most likely tokens; 0 is off.", group="Rewriting", minimum=0)
    min_p: float = setting(
        0.0,
        "Drop tokens below this fraction of the most likely token's probability.",
        group="Rewriting",
        minimum=0,
        maximum=1,
    )
    presence_penalty: float = setting(
        0.0,
        "Subtract this once from the logit of every token already written, against repetition.",
        group="Rewriting",
        minimum=0,
        maximum=2,
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class RewriteSettings(Sampling):
    """How a prompt is rewritten before it is drawn. Raises RequestError with the fields at fault."""

    rewriter: str | None = setting(
        None,
        "Rewrite prompts first, with a template of the category rewriter.",
        group="Rewriting",
        flag="--rewrite",
        metavar="NAME",
    )
    rewriter_url: str | None = setting(
        None,
        "Server with OpenAI's chat completions API that rewrites in place of the model's own text encoder; "
        f"its key is read from {REWRITER_KEY}.",
        group="Rewriting",
        metavar="URL",
        env="ZIMAGE_REWRITER_URL",
    )
    rewriter_model: str = setting("default", "Name of the model on the server.", group="Rewriting")
    rewriter_timeout: float = setting(
        REWRITER_TIMEOUT, "Seconds to wait for the server.", group="Rewriting", above=0, maximum=MAX_TIMEOUT
    )
    rewrite_thinking: bool = setting(
        False, "Let the rewriter think before it answers; thoughts are not drawn.", group="Rewriting"
    )
    max_tokens: int = setting(
        MAX_TOKENS, "Maximum number of tokens, thoughts included.", group="Rewriting", minimum=1, maximum=32_768
    )
    rewrite_seed: int | None = setting(
        None,
        f"Seed of the rewriting. Default, and {RANDOM_SEED}: random, and reported.",
        group="Rewriting",
        minimum=RANDOM_SEED,
        maximum=MAX_SEED,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rewrite_thinking and self.rewriter_url:
            text = "rewrite_thinking: the server at the rewriter_url decides this itself; leave it out"
            raise RequestError(text, fields=("rewrite_thinking", "rewriter_url"))
