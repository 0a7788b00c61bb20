"""The watchdog: it barks where no beat comes, and not before; it is gone when the run is."""

from __future__ import annotations

import subprocess
import sys


def run(body, **environment):
    program = f"import time\nfrom dptrain.runtime.watchdog import Watchdog\n{body}"
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment or None,
    )


def test_who_beats_lives():
    """Many times the patience pass, and each beat comes in time."""
    ended = run("""
with Watchdog(world_size=2, patience_s=1.0) as watchdog:
    for _ in range(30):
        watchdog.beat()
        time.sleep(0.1)
""")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_it_begins_with_the_first_beat():
    """What comes before the first step, such as a compilation, may take its time; and so may what comes afterwards."""
    ended = run("""
with Watchdog(world_size=2, patience_s=0.3) as watchdog:
    time.sleep(1)
    watchdog.beat()
time.sleep(1)
""")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_environment_sets_the_patience():
    """A quarter more than that of the collectives: the collective of a waiting rank reports first."""
    ended = run(
        """
with Watchdog(world_size=2) as watchdog:
    watchdog.beat()
    time.sleep(20)
""",
        DPTRAIN_COLLECTIVE_TIMEOUT_S="0.4",
        RANK="3",
        WORLD_SIZE="8",
    )
    assert ended.returncode == 71
    assert ended.stderr.startswith("dptrain: replica 3 of 8 made no step for 0.5 s; it stands here:\n")
    assert "time.sleep" not in ended.stderr
    assert 'File "<string>", line 6' in ended.stderr


def test_a_first_step_that_never_comes_is_not_waited_for_without_end():
    """A loader that hangs before the first beat: its own, longer patience, here half a second."""
    ended = run("""
from dptrain.runtime import watchdog
watchdog._PATIENCE_FIRST_S = 0.5
with Watchdog(world_size=2, patience_s=0.2):
    time.sleep(20)
""")
    assert ended.returncode == 71
    assert "made no step for 0.5 s" in ended.stderr
