"""Blind votes: pairs that differ in one thing, sides by chance, every vote on the disk, ties counted as half."""

import json
import os
import random
from collections import Counter

import pytest
from sweeps import folder_of, records

from zimage.errors import RequestError
from zimage.experiments.folder import Experiment, shown
from zimage.experiments.votes import VOTES, Ballot, Vote, interval, pairs_of, read_votes, standings


@pytest.fixture
def experiment(tmp_path):
    return Experiment.open(folder_of(tmp_path / "sweep", records(prompts=("a fox", "a dog"), seeds=(0, 1))))


def value_of(experiment, id, axis="steps"):
    return shown(experiment.cell(id).values[axis])


def test_a_pair_differs_in_its_axis_alone(experiment):
    pairs = pairs_of(experiment, "steps")
    assert len(pairs) == 3 * 2 * 2 * 2  # of three values, for each shift, prompt and seed
    for a, b in pairs:
        assert [name for name in a.values if a.values[name] != b.values[name]] == ["steps"]


def test_pairs_come_by_turns_and_sides_by_chance(experiment):
    ballot = Ballot(experiment.folder, random.Random(7))
    drawn, lefts = Counter(), Counter()
    for _ in range(240):
        token, pair = ballot.draw(experiment, "steps")
        drawn[frozenset((pair.left.id, pair.right.id))] += 1
        lefts[pair.left.id < pair.right.id] += 1
        ballot.cast(token, "tie")
    assert set(drawn.values()) == {10}
    assert 80 < lefts[True] < 160


def test_a_vote_is_a_line_at_once_and_counts_once(experiment):
    ballot = Ballot(experiment.folder)
    token, pair = ballot.draw(experiment, "shift")
    ballot.cast(token, "left")
    (line,) = (experiment.folder / VOTES).read_text().splitlines()
    kept = json.loads(line)
    assert (kept["axis"], kept["left"], kept["right"], kept["choice"]) == ("shift", pair.left.id, pair.right.id, "left")
    for wrong in (token, "unknown"):
        with pytest.raises(RequestError, match="another one"):
            ballot.cast(wrong, "left")
    token, _ = ballot.draw(experiment, "shift")
    with pytest.raises(RequestError, match="left, right, tie"):
        ballot.cast(token, "both")
    assert Ballot(experiment.folder).votes == ballot.votes
    with pytest.raises(RequestError, match="differ in 'size' alone"):
        ballot.draw(experiment, "size")


def test_a_line_that_was_cut_off_spoils_no_other(experiment):
    path = experiment.folder / VOTES
    ballot = Ballot(experiment.folder)
    ballot.cast(ballot.draw(experiment, "steps")[0], "right")
    path.write_bytes(path.read_bytes() + b'{"axis": "steps", "le')
    ballot = Ballot(experiment.folder)
    assert (len(ballot.votes), ballot.unread) == (1, 1)
    ballot.cast(ballot.draw(experiment, "steps")[0], "tie")
    votes, unread = read_votes(path)
    assert ([vote.choice for vote in votes], unread) == (["right", "tie"], 1)


DAMAGED = ["[]", "{}", '{"axis": 1, "left": "a", "right": "b", "choice": "left", "at": ""}', "\x00", "{" * 100]
DAMAGED.append('{"axis": "steps", "left": "a", "right": "b", "choice": "both", "at": ""}')


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:20]))
def test_what_is_not_a_vote_is_counted_and_left_alone(tmp_path, line):
    (tmp_path / VOTES).write_text(line + "\n")
    assert read_votes(tmp_path / VOTES) == ([], 1)


def test_votes_lead_nowhere_else(experiment, tmp_path):
    """A folder from anybody may have a link or a pipe in the place of its votes."""
    other, path = tmp_path / "precious", experiment.folder / VOTES
    other.write_text("mine")
    path.symlink_to(other)
    with pytest.raises(RequestError, match="leads out"):
        Ballot(experiment.folder)
    path.unlink()
    ballot = Ballot(experiment.folder)
    token, _ = ballot.draw(experiment, "steps")
    path.symlink_to(other)  # put there meanwhile
    with pytest.raises(OSError, match="symbolic links"):
        ballot.cast(token, "left")
    assert other.read_text() == "mine"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RequestError, match="not a regular file"):
        ballot.cast(token, "left")
    with pytest.raises(RequestError, match="named pipe"):
        Ballot(experiment.folder)


def test_standings_count_ties_as_half_for_both(experiment):
    by = {value_of(experiment, cell.id): cell.id for cell in experiment.cells[:6:2]}
    four, eight, sixteen = by["4"], by["8"], by["16"]
    cast = [
        (four, eight, "left"),
        (eight, four, "right"),  # the same two, the other way round
        (four, eight, "tie"),
        (sixteen, four, "left"),
        (eight, sixteen, "tie"),
        ("gone", four, "left"),
    ]
    votes = [Vote("steps", left, right, choice, "") for left, right, choice in cast]
    votes.append(Vote("shift", four, eight, "left", ""))
    rows = {row.value: row for row in standings(votes, experiment, "steps")}
    counts = {value: (row.votes, row.wins, row.ties, row.losses, row.share) for value, row in rows.items()}
    assert counts == {"16": (2, 1, 1, 0, 0.75), "4": (4, 2, 1, 1, 0.625), "8": (4, 0, 2, 2, 0.25)}
    assert list(rows) == ["16", "4", "8"]
    assert sum(row.share * row.votes for row in rows.values()) == 5  # a point per vote


@pytest.mark.parametrize(
    ("wins", "votes", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_intervals_are_wilsons(wins, votes, low, high):
    """Newcombe, "Two-sided confidence intervals for the single proportion", 1998, and its formula by hand."""
    assert interval(wins, votes) == pytest.approx((low, high), abs=1e-4)
