"""Processes in slots: what runs when and where, what a death means, and that nothing outlives the runner."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from errors import FolderBusy, UserError
from job_runner import Job, JobRunner, SlotFlags, Slots, find_slots, visible_gpus

# A job that writes when it ran and what it saw, as one line of JSON.
WORK = """
import json, os, sys, time
started = time.time()
time.sleep({seconds})
print(json.dumps([started, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_WAIT_POLICY")]))
"""


def job(name, code=None, seconds=0.15, **about):
    return Job(name, (sys.executable, "-c", code or WORK.format(seconds=seconds)), **about)


ONE = Slots(1)


def run(tmp_path, jobs, slots=ONE, begin=None, **options):
    runner = JobRunner(jobs, slots, begin or (lambda job: tmp_path / f"{job.name}.log"), lambda job, _: job.name, **options)
    outcomes = {job.name: outcome for job, outcome in runner.run().items()}
    return outcomes, runner


def times(tmp_path, jobs):
    """Job name to (start, end, CUDA_VISIBLE_DEVICES, OMP_WAIT_POLICY)."""
    return {job.name: json.loads((tmp_path / f"{job.name}.log").read_text()) for job in jobs}


def most_at_once(intervals):
    return max(sum(start <= moment < end for start, end, *_ in intervals) for moment, *_ in intervals)


def test_as_many_at_once_as_there_are_places(tmp_path):
    jobs = [job(f"j{i}", seconds=0.4) for i in range(6)]
    outcomes, _ = run(tmp_path, jobs, Slots(3))
    assert {outcome.state for outcome in outcomes.values()} == {"completed"}
    assert list(outcomes) == [job.name for job in jobs]
    intervals = times(tmp_path, jobs).values()
    assert 2 <= most_at_once(intervals) <= 3
    assert {policy for *_, policy in intervals} == {"PASSIVE"}


def test_each_job_sees_one_gpu_and_no_gpu_holds_two(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [job(f"j{i}", seconds=0.3) for i in range(6)] + [job("cpu", seconds=0.3, uses_gpu=False)]
    outcomes, _ = run(tmp_path, jobs, Slots(5, ("0", "GPU-1")))
    seen = times(tmp_path, jobs)
    assert seen["cpu"][2] == ""
    for gpu in ("0", "GPU-1"):
        own = [interval for name, interval in seen.items() if name != "cpu" and interval[2] == gpu]
        assert len(own) >= 2 and most_at_once(own) == 1
    assert {outcomes[name].gpu for name in seen if name != "cpu"} == {"0", "GPU-1"}


def test_two_on_one_gpu_only_when_told(tmp_path):
    jobs = [job(f"j{i}", seconds=0.5) for i in range(4)]
    run(tmp_path, jobs, Slots(4, ("0", "0")))
    assert most_at_once(times(tmp_path, jobs).values()) == 2


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine with three GPUs, as far as anyone can tell."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_places_follow_from_flags_and_machine(nvidia_smi, monkeypatch):
    assert find_slots(SlotFlags()) == Slots(3, ("0", "1", "2"))
    assert find_slots(SlotFlags(gpus="2,0")) == Slots(2, ("2", "0"))
    assert find_slots(SlotFlags(runs_per_gpu=2, gpus="1")) == Slots(2, ("1", "1"))
    assert find_slots(SlotFlags(parallel=2)) == Slots(2, ("0", "1", "2"))
    assert find_slots(SlotFlags(parallel=2), wants_gpu=False) == Slots(2)
    with pytest.raises(UserError, match="--gpus: got 7, visible are 0, 1, 2"):
        find_slots(SlotFlags(gpus="0,7"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    assert visible_gpus() == ["GPU-a", "GPU-b"]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert find_slots(SlotFlags()) == Slots(1)
        with pytest.raises(UserError, match="--gpus: got 0, no GPU is visible here"):
            find_slots(SlotFlags(gpus="0"))


def test_who_profits_from_a_cache_waits_until_it_is_filled(tmp_path):
    """The first of each entry alone among those of its cache; then all together; other caches are no hindrance."""
    jobs = [job(f"a{i}", seconds=0.3, fills=(("a", i // 2),)) for i in range(4)]
    jobs += [job("b", seconds=0.3, fills=(("b", 0),)), job("warm", seconds=0.3, fills=(("c", 0),)), job("free", seconds=0.3)]
    run(tmp_path, jobs, Slots(8), warm=[("c", 0)])
    seen = times(tmp_path, jobs)
    assert seen["a0"][1] <= seen["a1"][0] and seen["a0"][1] <= seen["a2"][0]
    assert seen["a2"][1] <= seen["a3"][0]
    for other in ("b", "warm", "free"):
        assert seen[other][0] < seen["a0"][1]


def test_a_failed_first_is_no_filled_cache(tmp_path):
    jobs = [job("a", "raise SystemExit(1)", fills=(("x", 0),)), *(job(f"b{i}", seconds=0.3, fills=(("x", 0),)) for i in (1, 2))]
    outcomes, _ = run(tmp_path, jobs, Slots(4))
    seen = times(tmp_path, jobs[1:])
    assert outcomes["a"].state == "failed"
    assert seen["b1"][1] <= seen["b2"][0]


def test_after_a_failure_the_running_ones_finish_and_no_other_starts(tmp_path):
    jobs = [job("slow", seconds=0.8), job("bad", "print('error: no such thing'); raise SystemExit(2)"), job("late")]
    outcomes, _ = run(tmp_path, jobs, Slots(2), continue_on_error=False)
    assert [outcome.state for outcome in outcomes.values()] == ["completed", "failed", "not started"]
    assert outcomes["bad"].reason == "no such thing"
    assert outcomes["bad"].log == tmp_path / "bad.log"
    outcomes, _ = run(tmp_path, jobs, Slots(2))
    assert [outcome.state for outcome in outcomes.values()] == ["completed", "failed", "completed"]


DIES_ONCE = """
import os, pathlib, signal
first = not pathlib.Path({mark!r}).exists()
pathlib.Path({mark!r}).touch()
if first: {death}
"""


@pytest.mark.parametrize(
    ("death", "state"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "completed"),
        ("raise SystemExit(3)", "completed"),  # memory ran out
        ("raise SystemExit(130)", "completed"),  # asked to end by somebody else
        ("raise SystemExit(1)", "failed"),
    ],
)
def test_who_dies_is_tried_again_and_who_fails_is_not(tmp_path, death, state):
    jobs = [job("fragile", DIES_ONCE.format(mark=str(tmp_path / "mark"), death=death)), job("other")]
    outcomes, _ = run(tmp_path, jobs, retries=1, continue_on_error=False)
    assert outcomes["fragile"].state == state
    assert outcomes["fragile"].tries == (2 if state == "completed" else 1)
    (tmp_path / "mark").unlink()
    outcomes, _ = run(tmp_path, jobs, retries=0)
    assert outcomes["fragile"].state == "failed"


def test_tries_come_to_an_end(tmp_path):
    outcomes, _ = run(tmp_path, [job("dies", "import os; os.kill(os.getpid(), 9)")], retries=2)
    assert (outcomes["dies"].state, outcomes["dies"].tries) == ("failed", 3)
    assert outcomes["dies"].reason == "killed by signal 9 (Killed)"


def test_what_cannot_begin(tmp_path):
    def begin(job):
        if job.name == "done":
            return None
        if job.name == "busy":
            raise FolderBusy("another run is writing to x")
        if job.name == "unwritable":
            raise PermissionError(13, "Permission denied", "x")
        return tmp_path / "nowhere" / "log" if job.name == "no folder" else tmp_path / f"{job.name}.log"

    jobs = [job(name) for name in ("done", "busy", "unwritable", "no folder", "good")]
    jobs.append(Job("no program", ("/no/such/program",)))
    outcomes, _ = run(tmp_path, jobs, begin=begin)
    states = [outcome.state for outcome in outcomes.values()]
    assert states == ["skipped", "busy", "failed", "failed", "completed", "failed"]
    assert "Permission denied" in outcomes["unwritable"].reason


# --- Stopping: in a process of its own, which gets the signals ---

PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from errors import run_command
from job_runner import Job, JobRunner, Slots
folder = Path({folder!r})
child = "import sys; sys.path.insert(0, {root!r}); from errors import run_command; import pathlib, os, time\\n" \\
    "def main():\\n    pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); {work}\\nrun_command(main)"
jobs = [Job(n, (sys.executable, "-c", child, str(folder / (n + ".pid")))) for n in ("a", "b", "c")]
def main():
    runner = JobRunner(jobs, Slots(2), lambda job: folder / (job.name + ".log"), lambda job, outcome: job.name)
    outcomes = runner.run()
    print([outcome.state for outcome in outcomes.values()], runner.interrupted)
run_command(main)
"""
POLITE = "time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path(sys.argv[1] + '.deaf').touch(); time.sleep(60)"


def start(tmp_path, work=POLITE, **options):
    """Start the program; returns it when its first two jobs run, with their process ids."""
    code = PROGRAM.format(root=str(ROOT), folder=str(tmp_path), work=work)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    marks = [tmp_path / f"{name}.pid{'.deaf' if work == DEAF else ''}" for name in ("a", "b")]
    while not all(mark.exists() for mark in marks):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.05)
    return process, [int((tmp_path / f"{name}.pid").read_text()) for name in ("a", "b")]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_until_gone(pids, seconds):
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, "a child survived its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_it_asks_its_jobs_and_sums_up(tmp_path, how):
    process, pids = start(tmp_path)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=20)
    assert stdout.strip() == "['interrupted', 'interrupted', 'not started'] True"
    assert "stopping: waiting for 2 runs; once more kills them" in stderr
    assert not any(map(is_alive, pids))
    assert "interrupted: what was finished is kept" in (tmp_path / "a.log").read_text()


def test_asked_twice_it_kills_them(tmp_path):
    process, pids = start(tmp_path, DEAF)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert all(map(is_alive, pids))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert stdout.strip() == "['interrupted', 'interrupted', 'not started'] True"
    assert "killing 2 runs" in stderr
    assert not any(map(is_alive, pids))


def test_no_job_survives_a_runner_that_is_killed(tmp_path):
    process, pids = start(tmp_path)
    process.kill()
    process.communicate()
    wait_until_gone(pids, 10)
    assert "interrupted: what was finished is kept" in (tmp_path / "a.log").read_text()


def test_nor_does_one_that_does_not_listen(tmp_path, monkeypatch):
    process, pids = start(tmp_path, DEAF.replace("import signal", "import signal, errors; errors.SECONDS_TO_END = 0.5"))
    process.kill()
    process.communicate()
    wait_until_gone(pids, 10)


def test_a_hang_up_that_is_ignored_is_no_reason_to_stop(tmp_path):
    """As under nohup."""
    process, _ = start(tmp_path, "time.sleep(1)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    stdout, _ = process.communicate(timeout=30)
    assert stdout.strip() == "['completed', 'completed', 'completed'] False"
