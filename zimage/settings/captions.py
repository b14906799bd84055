"""How a prompt and pictures become a caption, each parameter declared once."""

from dataclasses import dataclass

from zimage.errors import RequestError
from zimage.settings.conditions import Reference
from zimage.settings.fields import Conditions, Settings, Weights, check_fields, setting

VISION_BLENDS = ("interpolate", "linear", "concat", "style_only", "graduated", "attention_weighted", "adain")
VISION_TOKENS = ("image", "all")
LONG_PROMPTS = ("none", "truncate", "interpolate", "pool", "attention_pool")
TEXT_PARTS = ("template", "system_prompt", "thinking_content", "assistant_content")
LONGEST_TEXT = 100_000  # characters of a prompt or a chat part; some sixty pages
MAX_TEXT_TOKENS = 32_768  # of a whole text: what Qwen3 was trained for, twenty times what the DiT was
HIDDEN_LAYER = -2  # what the model was trained with: the output of the last layer but one, without a norm


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """How a prompt becomes a caption. None means: what the template says, else nothing.

    Raises RequestError with the fields at fault.
    """

    template: str | None = setting(None, "Template that supplies the chat parts that no option sets.", group="Text")
    system_prompt: str | None = setting(None, "System message before the prompt.", group="Text", longest=LONGEST_TEXT)
    thinking_content: str | None = setting(
        None, "Content of the think block, as if the model had thought it.", group="Text", longest=LONGEST_TEXT
    )
    assistant_content: str | None = setting(
        None,
        "Assistant message after the prompt, as if the model had written it.",
        group="Text",
        longest=LONGEST_TEXT,
    )
    force_think_block: bool | None = setting(
        None, "Always or never write a think block. Default: only if it has content.", group="Text"
    )
    strip_quotes: bool = setting(False, 'Remove " from all chat parts: the model paints quoted text.', group="Text")
    weights_in_prompt: bool = setting(
        False,
        r"Read (words:1.2) as words that weigh 1.2, (words) as 1.1 and [words] as 1/1.1; \( is a bracket. "
        "Default: brackets are text.",
        group="Text",
    )
    hidden_layer: int | None = setting(
        None,
        "Layer of the text encoder to use, counted from the end; the first is the token embeddings. "
        f"Default: {HIDDEN_LAYER}.",
        group="Text",
        minimum=-1000,
        maximum=-1,
    )
    layer_weights: Weights | None = setting(
        None, "Weighted blend of several layers, instead of one.", group="Text", metavar="LAYER:WEIGHT,…"
    )
    long_prompt: str = setting(
        "none",
        "How to shorten captions beyond the trained length; 'none' keeps all tokens and warns.",
        group="Text",
        choices=LONG_PROMPTS,
    )

    def __post_init__(self):
        check_fields(self)
        if self.layer_weights is not None and self.hidden_layer is not None:
            text = "layer_weights: hidden_layer is set too; pass only one of them"
            raise RequestError(text, fields=("layer_weights", "hidden_layer"))
        if self.force_think_block is False and self.thinking_content:
            text = "thinking_content: it needs a think block, but force_think_block is off"
            raise RequestError(text, fields=("thinking_content", "force_think_block"))

    @property
    def layers(self) -> Weights:
        """Each layer that the caption is made of, with its weight."""
        return self.layer_weights or {HIDDEN_LAYER if self.hidden_layer is None else self.hidden_layer: 1.0}


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(TextSettings):
    """The same with pictures: how captions of references are made and mixed in. Raises RequestError."""

    reference: Conditions = setting(
        None,
        "Picture that the prompt's caption is mixed with, or what `see` saved of one, and how much of it, from 0 to 1; "
        "repeat it to add several. Default: none, and 0.3 of each.",
        group="References",
        metavar=Reference.FORM,
        condition=Reference,
    )
    vision_blend: str = setting(
        VISION_BLENDS[0],
        "How a reference's caption is mixed with the prompt's: resampled to its length (interpolate), then only in the "
        "last third of the dimensions (style_only), more towards the end (graduated) or sparing what matters "
        "(attention_weighted); at the longer length (linear); behind it (concat; ALPHA is the share of its tokens); or "
        "by mean and deviation alone (adain).",
        group="References",
        choices=VISION_BLENDS,
    )
    vision_layer: int = setting(
        HIDDEN_LAYER,
        "Layer at which references are read, counted from the end; some find -6 or -8 cleaner.",
        group="References",
        minimum=-1000,
        maximum=-1,
    )
    vision_tokens: str = setting(
        VISION_TOKENS[0],
        "Which tokens of a reference are used: its image tokens, or all, including the text around it.",
        group="References",
        choices=VISION_TOKENS,
    )
    vision_text: str = setting(
        "",
        "Text that is read after each reference; needs --vision-tokens all, since image tokens come before it.",
        group="References",
        longest=LONGEST_TEXT,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reference and self.vision_text and self.vision_tokens == VISION_TOKENS[0]:
            text = "vision_text: image tokens come before it and do not see it; pass vision_tokens all, or leave it out"
            raise RequestError(text, fields=("vision_text", "vision_tokens"))
