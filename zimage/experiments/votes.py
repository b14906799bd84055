"""Blind votes: two pictures that differ on one axis, which of them is better, and what all votes say together.

Who votes sees neither the settings nor the ids. A vote is a line of `votes.jsonl` in the folder, which is only ever
added to. A tie is half a win for both; the interval of a share is Wilson's (1927), at 95 %.
"""

import datetime
import itertools
import json
import math
import os
import random
import secrets
import stat
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zimage.errors import CheckpointError, RequestError, quoted
from zimage.experiments.folder import Cell, Experiment, shown
from zimage.formats.atomic import extend
from zimage.formats.files import is_inside, read_file
from zimage.formats.json_text import json_object
from zimage.settings.fields import Plain
from zimage.settings.plain import mistake

VOTES = "votes.jsonl"
CHOICES = ("left", "right", "tie")
LARGEST = 64 << 20  # bytes of a file of votes
MOST_OPEN = 1000  # pairs that are shown and not voted on yet
Z = 1.959964  # the standard normal's 97.5th percentile


@dataclass(frozen=True)
class Vote:
    """`left` and `right` are ids as they were shown, `at` the time in UTC."""

    axis: str
    left: str
    right: str
    choice: str
    at: str


@dataclass(frozen=True)
class Pair:
    """Two cells that differ on one axis alone, in the order in which they are shown."""

    axis: str
    left: Cell
    right: Cell


@dataclass(frozen=True)
class Standing:
    """How a value of an axis did: `share` of wins, a tie counting half, between `low` and `high`."""

    value: str
    votes: int
    wins: int
    ties: int
    losses: int
    share: float
    low: float
    high: float


class Ballot:
    """The votes on an experiment. May be used from several threads."""

    def __init__(self, folder: Path, chance: random.Random | None = None):
        self.path, self._chance, self._lock = folder / VOTES, chance or random.Random(), threading.Lock()
        self.votes, self.unread = read_votes(self.path)
        self._open: OrderedDict[str, Pair] = OrderedDict()

    def draw(self, experiment: Experiment, axis: str) -> tuple[str, Pair]:
        """A pair among those with the fewest votes, on sides by chance, and the token that a vote on it needs.

        Raises RequestError where no two cells with pictures differ on the axis alone.
        """
        pairs = pairs_of(experiment, axis)
        if not pairs:
            raise RequestError(f"no two pictures differ in {quoted(axis)} alone", fields=("axis",))
        with self._lock:
            votes = Counter(frozenset((vote.left, vote.right)) for vote in self.votes)
            pending = Counter(frozenset((pair.left.id, pair.right.id)) for pair in self._open.values())
            counts = [votes[key] + pending[key] for key in (frozenset((a.id, b.id)) for a, b in pairs)]
            rare = [pair for pair, count in zip(pairs, counts, strict=True) if count == min(counts)]
            token, two = secrets.token_urlsafe(16), list(self._chance.choice(rare))
            self._chance.shuffle(two)
            self._open[token] = Pair(axis, *two)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            return token, self._open[token]

    def pair(self, token: str) -> Pair | None:
        """The pair of a token that nobody has voted on yet."""
        return self._open.get(token)

    def cast(self, token: str, choice: str) -> Vote:
        """Store a vote; it is on the disk when this returns. Raises RequestError, OSError."""
        if choice not in CHOICES:
            raise RequestError(f"choice {quoted(choice)} is not known; use {', '.join(CHOICES)}", fields=("choice",))
        with self._lock:
            pair = self._open.get(token)
            if pair is None:
                raise RequestError("this pair has been voted on, or is too old; ask for another one", fields=("token",))
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            vote = Vote(pair.axis, pair.left.id, pair.right.id, choice, now)
            _append(self.path, json.dumps(asdict(vote), ensure_ascii=False))
            self.votes.append(vote)
            del self._open[token]
            return vote


def pairs_of(experiment: Experiment, axis: str) -> list[tuple[Cell, Cell]]:
    """Every two cells with pictures that differ on this axis and on no other."""
    alike: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in experiment.cells:
        if cell.path is not None and axis in cell.values:
            alike[tuple(value for name, value in cell.values.items() if name != axis)].append(cell)
    found = (pair for cells in alike.values() for pair in itertools.combinations(cells, 2))
    return [(a, b) for a, b in found if a.values[axis] != b.values[axis]]


def standings(votes: Iterable[Vote], experiment: Experiment, axis: str) -> list[Standing]:
    """Of each value on which there are votes, the best first. Votes on cells that are gone do not count."""
    cells: Mapping[str, Cell] = {cell.id: cell for cell in experiment.cells}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if vote.axis != axis or vote.left not in cells or vote.right not in cells:
            continue
        for side in ("left", "right"):
            value = cells[getattr(vote, side)].values.get(axis, "null")
            counts[value]["ties" if vote.choice == "tie" else "wins" if vote.choice == side else "losses"] += 1
    return sorted((_standing(value, count) for value, count in counts.items()), key=lambda s: (-s.share, -s.votes))


def interval(wins: float, votes: int) -> tuple[float, float]:
    """Wilson's interval of a share: the values that so many wins in so many votes do not refute at 95 %."""
    share, room = wins / votes, Z * Z / votes
    middle = (share + room / 2) / (1 + room)
    half = Z * math.sqrt(share * (1 - share) / votes + room / votes / 4) / (1 + room)
    return max(0.0, middle - half), min(1.0, middle + half)


def read_votes(path: Path) -> tuple[list[Vote], int]:
    """The votes of a file, and how many of its lines cannot be read. Raises RequestError for a file that is not one."""
    if not path.exists() and not path.is_symlink():
        return [], 0
    if not is_inside(path.parent, path):
        raise RequestError(f"{path} leads out of its folder by a link, which is not followed")
    try:
        lines: Sequence[bytes] = read_file(path, LARGEST).splitlines()
    except CheckpointError as error:
        raise RequestError(str(error)) from None
    votes = [vote for vote in map(_vote, lines) if vote is not None]
    return votes, sum(1 for line in lines if line.strip()) - len(votes)


def _vote(line: bytes) -> Vote | None:
    try:
        plain: dict[str, Plain] = json_object("a vote", line) if line.strip() else {}
    except CheckpointError:  # cut off as it was written
        return None
    return Vote(**plain) if not mistake(plain, Vote, "a vote") and plain["choice"] in CHOICES else None


def _append(path: Path, line: str) -> None:
    """Written at the end of a regular file; a line that was cut off is ended first."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags, 0o644), "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise RequestError(f"{path} is not a regular file; move it away")
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size > 0 and file.read(1) != b"\n"
        extend(file, (b"\n" if torn else b"") + line.encode() + b"\n")


def _standing(value: str, count: Counter[str]) -> Standing:
    votes = count.total()
    wins = count["wins"] + count["ties"] / 2
    return Standing(
        shown(value), votes, count["wins"], count["ties"], count["losses"], wins / votes, *interval(wins, votes)
    )
