"""Which of several failures is reported: the one that explains the others, once, with the replica it came from."""

from __future__ import annotations

import json

import pytest

from dptrain.errors import AbortedError, ConfigError, PeerLostError
from dptrain.runtime.failure_report import Cause, Ending, FailureReport, read_failures, root_cause, write_failure


def said(sentence, *, trace="", is_consequence=False):
    return FailureReport(sentence=sentence, trace=trace, is_consequence=is_consequence)


LOST = said("another replica ended", is_consequence=True)


def ends(*endings):
    """Endings (rank, code, report) in the order of time."""
    return [
        Ending(rank=rank, code=code, report=report, outcome=code if code in (0, 75) else None)
        for rank, code, report in endings
    ]


@pytest.mark.parametrize("code", [0, 75])
def test_where_all_end_as_wanted_there_is_nothing_to_tell(code):
    """Done by all, or stopped by all: only then is it said that the run can be resumed."""
    assert root_cause(ends((1, code, None), (0, code, None))) == Cause(code=code)


CASES = {
    "a crash in another": (
        ends((0, 70, LOST), (1, 1, said("ValueError: x", trace="Traceback…\n"))),
        Cause(code=1, sentence="replica 1 of 2 failed with ValueError: x", trace="Traceback…\n"),
    ),
    "a sentence of rank 0": (
        ends((1, 70, LOST), (0, 74, said("disk full"))),
        Cause(code=74, sentence="disk full"),
    ),
    "a sentence of another": (
        ends((1, 2, said("no such file")), (0, 70, LOST)),
        Cause(code=2, sentence="replica 1 of 2: no such file"),
    ),
    "the same found by both": (
        ends((1, 2, said("no such task")), (0, 2, said("no such task"))),
        Cause(code=2, sentence="no such task"),
    ),
    "killed by a signal": (
        ends((0, 70, LOST), (1, -11, None)),
        Cause(code=139, sentence="replica 1 of 2 was killed by SIGSEGV"),
    ),
    "killed by a signal without a name": (
        ends((1, -40, None), (0, 70, LOST)),
        Cause(code=168, sentence="replica 1 of 2 was killed by signal 40"),
    ),
    "ended without a word": (
        ends((0, 3, None), (1, 70, LOST)),
        Cause(code=3, sentence="replica 0 of 2 ended with exit code 3 and left no reason"),
    ),
    "done too early": (
        ends((1, 0, None), (0, 70, LOST)),
        Cause(code=70, sentence="replica 1 of 2 ended with exit code 0 before the others"),
    ),
    "one done, one stopped": (
        ends((1, 0, None), (0, 75, None)),
        Cause(code=70, sentence="replica 1 of 2 ended with exit code 0 before the others"),
    ),
    "only consequences": (
        ends((1, 70, LOST), (0, 70, LOST)),
        Cause(code=70, sentence="replica 1 of 2: another replica ended"),
    ),
    "ended at the second signal": (
        ends((0, 130, None), (1, 130, None)),
        Cause(code=130, sentence="replica 0 of 2 was ended by SIGINT before it had saved"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_reported_and_its_consequences_are_not(case):
    """The replica that ended first; with the exit code of the cause."""
    endings, expected = CASES[case]
    assert root_cause(endings) == expected


@pytest.mark.parametrize(
    ("asked", "killed", "sentence"),
    [
        (True, [1], "replica 1 of 2 could not stop in time, and had to be killed"),
        (False, [1], "replica 1 of 2 did not answer any more, and had to be killed"),
        (True, [0, 1], "replicas 0, 1 of 2 could not stop in time, and had to be killed"),
    ],
)
def test_what_the_launcher_had_to_kill_hung(asked, killed, sentence):
    """What the others then say is a consequence; exit code 71."""
    endings = ends((0, -9 if 0 in killed else 70, None if 0 in killed else LOST), (1, -9, None))
    assert root_cause(endings, killed=killed, asked_to_stop=asked) == Cause(code=71, sentence=sentence)


def test_a_kill_by_the_launcher_hides_no_cause():
    """A replica crashes, another does not end of itself: the crash is reported."""
    endings = ends((0, 1, said("ValueError: x", trace="T")), (1, -9, None))
    assert root_cause(endings, killed=[1]).sentence == "replica 0 of 2 failed with ValueError: x"


def environment(tmp_path, rank=1):
    return {"DPTRAIN_STORE": str(tmp_path / "store"), "RANK": str(rank)}


def test_words_come_over_as_they_were(tmp_path):
    """An error that was foreseen is a sentence, another brings its traceback with notes."""
    assert write_failure(ConfigError("seed must\nbe int"), environment=environment(tmp_path))
    assert read_failures(tmp_path, rank=1) == said("seed must be int")
    with pytest.raises(KeyError) as caught:
        {}["data"]
    caught.value.add_note("in step 7")
    assert write_failure(caught.value, environment=environment(tmp_path, rank=0))
    report = read_failures(tmp_path, rank=0)
    assert report.sentence == "KeyError: 'data'"
    assert report.trace.startswith("Traceback")
    assert report.trace.rstrip().endswith("in step 7")
    assert not report.is_consequence


@pytest.mark.parametrize("kind", [AbortedError, PeerLostError])
def test_what_another_has_caused_says_so(tmp_path, kind):
    """So that the launcher waits for the other's report."""
    assert write_failure(kind("see there"), environment=environment(tmp_path))
    assert read_failures(tmp_path, rank=1).is_consequence


def test_without_a_launcher_the_error_is_reported_by_who_has_it(tmp_path):
    """The same where the folder is gone."""
    assert not write_failure(ValueError(), environment={"RANK": "1"})
    assert not write_failure(ValueError(), environment=environment(tmp_path / "gone"))
    assert read_failures(tmp_path, rank=0) is None


def test_words_that_are_being_written_are_not_read(tmp_path):
    """They appear whole: a replica that is killed while it writes has said nothing."""
    (tmp_path / "replica-0.new").write_text(json.dumps({"sentence": "x"})[:5])
    assert read_failures(tmp_path, rank=0) is None


@pytest.mark.parametrize(("sentence", "hang"), [("Timed out waiting 300 s", True), ("closed by peer", False)])
def test_a_peer_that_hangs_is_distinguished_from_one_that_ended(sentence, hang):
    """For the report of one that hangs there is no point in waiting."""
    assert Ending(rank=0, code=70, report=said(sentence, is_consequence=True)).blames_a_hang is hang
