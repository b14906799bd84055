"""What a worker tells of its model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from zimage.settings.fields import Plain


@dataclass(frozen=True)
class About:
    """`model`: name, fingerprint, is_demo; `defaults`: what its kind asks for where a request leaves it open.

    `vision` is the model that looks at references, with its name and mode; empty where there is none.
    `token_limit` is the longest text that it was trained for; `notes` are lines about what loose files leave open.
    """

    model: Mapping[str, Plain]
    defaults: Mapping[str, Plain]
    token_limit: int
    dtype: str
    device: str
    notes: list[str]
    vision: Mapping[str, Plain] = field(default_factory=dict)
