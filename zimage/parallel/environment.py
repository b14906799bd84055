"""What torchrun tells a rank in its environment, and the file in which a rank leaves word of its end. No torch here."""

import json
import os
import time
from typing import Any, NamedTuple

from zimage.interrupts import TORCHRUN

LAUNCHED = "zimage-"  # begins the name of a run that `gen --gpus` has started; its process id follows
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# Why a rank ended, the reason that explains others first: a rank that was killed leaves no word.
FAILED, KILLED, INTERRUPTED, LOST = "failed", "killed", "interrupted", "lost"
REASONS = (FAILED, KILLED, INTERRUPTED, LOST)


class Place(NamedTuple):
    """A rank among the `size` of its group, and its number on its machine, which is also that of its GPU."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether it does what the command says; the others follow it. One that is alone leads."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1


def place() -> Place:
    """That of this process."""
    if TORCHRUN not in os.environ:  # what other launchers leave in RANK is not meant for us
        return Place()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def is_launched() -> bool:
    """Whether `gen --gpus` started this rank, and says in one line how all of them ended."""
    return os.environ.get(TORCHRUN, "").startswith(LAUNCHED)


def starter() -> int:
    """The process that started this rank, by its id.

    By the name of the run where that tells, since the process may have gone before anybody asks.
    """
    return int(os.environ[TORCHRUN].removeprefix(LAUNCHED)) if is_launched() else os.getppid()


def leave_word(line: str, reason: str) -> None:
    """Tell torchrun why this rank ends, in the form in which its agent reads that: half of it would end the agent."""
    if file := os.environ.get(ERROR_FILE):
        word = {"message": line, "extraInfo": {"timestamp": str(int(time.time())), "reason": reason}}
        with open(f"{file}.part", "w", encoding="utf-8") as out:
            json.dump({"message": word}, out)
        os.replace(out.name, file)


def word_of(left: dict[str, Any]) -> tuple[str, str]:
    """The line and the reason in what a rank left; empty where it left nothing."""
    word = left.get("message")
    if not isinstance(word, dict):
        return "", ""
    return str(word.get("message", "")), str(word.get("extraInfo", {}).get("reason", ""))
