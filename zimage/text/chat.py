"""The text that Qwen3 is given for a prompt: its chat format, with no system turn and no think block."""

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


def format_prompt(prompt: str) -> str:
    """One user turn and the opened assistant turn, exactly as the published pipeline writes them."""
    return f"{IM_START}user\n{prompt}{IM_END}\n{IM_START}assistant\n"
