import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import (
    CoresUsed,
    Memory,
    cpu_s,
    memory,
    parse_smaps_rollup,
    renice,
    server_processes,
)

ROLLUP = """559d8c9f5000-7ffc7a1f2000 ---p 00000000 00:00 0    [rollup]
Rss:              123456 kB
Pss:               65432 kB
Pss_Anon:          40000 kB
Anonymous:         54321 kB
Swap:                  0 kB
"""


def test_memory_is_the_share_of_what_is_resident_and_what_is_private():
    assert parse_smaps_rollup(ROLLUP) == Memory(pss=65432, private=54321)


def test_a_process_that_is_gone_has_no_memory():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    with pytest.raises(OSError, match="No such file"):
        memory(process.pid)
    assert cpu_s(process.pid) == 0.0


def test_the_memory_of_a_process_is_read():
    assert memory(os.getpid()).private > 1000


def test_without_a_server_on_the_port_there_are_no_processes():
    assert server_processes(1) == {}


def test_all_threads_of_a_process_become_nicer():
    script = "import threading, sys; e = threading.Event()\n"
    script += "threading.Thread(target=e.wait).start(); print(flush=True)\n"
    script += "sys.stdin.read(); e.set()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        process.stdout.readline()

        renice(process.pid, 7)

        tasks = [int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(tasks) == 2
        assert {os.getpriority(os.PRIO_PROCESS, task) for task in tasks} == {7}


def test_the_work_of_this_process_is_not_that_of_others():
    cores = CoresUsed({})
    while cpu_s(os.getpid()) < 0.5:
        sum(range(10_000))

    assert cores.result().keys() == {CoresUsed.CLIENT, CoresUsed.OTHERS}
