"""The text that Qwen3 reads: a prompt and up to three more parts, in its chat format.

    <|im_start|>system          only with a system prompt
    {system_prompt}<|im_end|>
    <|im_start|>user
    {prompt}<|im_end|>          pictures stand before it
    <|im_start|>assistant
    <think>                     only with a think block, which may be empty
    {thinking_content}
    </think>

    {assistant_content}<|im_end|>

The assistant's turn stays open if it has no content: the model was trained on captions that end with its header.
"""

from collections.abc import Sequence

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK = "<think>"
END_THINK = "</think>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
PARTS = ("system_prompt", "thinking_content", "assistant_content")


def format_chat(
    prompt: str,
    system_prompt: str | None = None,
    thinking_content: str | None = None,
    assistant_content: str | None = None,
    think_block: bool = False,
) -> str:
    """One conversation; for a prompt alone, exactly the text of the published pipeline. Empty parts count as absent."""
    if thinking_content and not think_block:
        raise ValueError("thinking_content needs a think block")
    think = f"{THINK}\n{thinking_content or ''}\n{END_THINK}\n\n" if think_block else ""
    answer = f"{assistant_content}{IM_END}" if assistant_content else ""
    return f"{before_prompt(system_prompt)}{prompt}{IM_END}\n{IM_START}assistant\n{think}{answer}"


def before_prompt(system_prompt: str | None = None) -> str:
    """What such a conversation begins with, up to the prompt."""
    system = f"{IM_START}system\n{system_prompt}{IM_END}\n" if system_prompt else ""
    return f"{system}{IM_START}user\n"


def seen_text(text: str, counts: Sequence[int], system_prompt: str | None = None) -> str:
    """One conversation about pictures with `counts` image tokens each: exactly the text of Qwen3-VL's own template."""
    pictures = "".join(f"{VISION_START}{IMAGE_PAD * count}{VISION_END}" for count in counts)
    return format_chat(pictures + text, system_prompt)
