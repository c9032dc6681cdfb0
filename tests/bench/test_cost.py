"""CPU seconds of this process and of what it set to work."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from splitpoint.bench.cost import cost_of, cpu_seconds

BURN = "import time\nwhile time.process_time() < 0.5: pass\n"


def test_own_work_counts():
    def burn() -> str:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return "done"

    result, cost = cost_of(burn)
    assert result == "done"
    assert cost.cpu_s >= 0.2
    assert cost.wall_s >= 0.2


@pytest.mark.processes
def test_an_ended_child_counts():
    _, cost = cost_of(lambda: subprocess.run([sys.executable, "-c", BURN], check=True))
    assert cost.cpu_s >= 0.5


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_live_grandchild_counts_and_is_counted_once():
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {BURN + 'print(flush=True); input()'!r}],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline(); print(flush=True); input()\n"
        "child.communicate('end')\n"
    )
    before = cpu_seconds()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child.stdout.readline()  # the grandchild has used its half second and waits
    alive = cpu_seconds() - before
    child.communicate("end")
    ended = cpu_seconds() - before
    assert alive >= 0.5 - 0.02  # each process's time is cut to whole ticks of 10 ms
    # What was counted of the living is not counted again among the dead; and nothing is lost
    # but what a tick of the system's clock rounds off.
    assert alive - 0.05 <= ended < alive + 0.4
