"""Processes in slots: what runs when and where, what a death means, and that nothing outlives the runner."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from devices import SlotFlags, Slots, find_slots, visible_gpus
from errors import FolderBusy, UserError
from job_runner import Beginning, End, Entry, Job, JobRunner
from local_processes import LocalProcesses

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
    begin = begin or (lambda job: Beginning((tmp_path / f"{job.name}.log",)))
    with LocalProcesses(slots) as processes:
        runner = JobRunner(jobs, processes, begin, lambda job, _: job.name, **options)
        outcomes = {job.name: outcome for job, outcome in runner.run().items()}
    return outcomes, runner


def times(tmp_path, jobs):
    """Job name to (start, end, CUDA_VISIBLE_DEVICES, OMP_WAIT_POLICY)."""
    return {job.name: json.loads((tmp_path / f"{job.name}.log").read_text()) for job in jobs}


def most_at_once(intervals):
    return max(sum(start <= moment < end for start, end, *_ in intervals) for moment, *_ in intervals)


def test_as_many_at_once_as_there_are_places(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
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
    assert find_slots(SlotFlags(gpus="1,1")) == Slots(1, ("1",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,GPU-a")
    assert visible_gpus() == ["GPU-a", "GPU-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,-1,1")  # CUDA looks no further
    assert visible_gpus() == ["0"]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert find_slots(SlotFlags()) == Slots(1)
        with pytest.raises(UserError, match="--gpus: got 0, no GPU is visible here"):
            find_slots(SlotFlags(gpus="0"))


def test_who_profits_from_a_cache_waits_until_it_is_filled(tmp_path):
    """The first of each entry alone among those of its cache; then all together; other caches are no hindrance."""
    jobs = [job(f"a{i}", seconds=0.3, fills=(Entry("a", i // 2),)) for i in range(4)]
    jobs += [job("b", seconds=0.3, fills=(Entry("b", 0),)), job("free", seconds=0.3)]
    run(tmp_path, jobs, Slots(8))
    seen = times(tmp_path, jobs)
    assert seen["a0"][1] <= seen["a1"][0] and seen["a0"][1] <= seen["a2"][0]
    assert seen["a2"][1] <= seen["a3"][0]
    for other in ("b", "free"):
        assert seen[other][0] < seen["a0"][1]


def test_a_failed_first_is_no_filled_cache(tmp_path):
    jobs = [job("a", "raise SystemExit(1)", fills=(Entry("x", 0),)), *(job(f"b{i}", seconds=0.3, fills=(Entry("x", 0),)) for i in (1, 2))]
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


def test_what_was_tried_counts_when_the_work_is_stopped_before_the_next_try(tmp_path):
    jobs = [job("dies", "print('first'); raise SystemExit(3)"), job("bad", "raise SystemExit(1)")]
    outcomes, _ = run(tmp_path, jobs, retries=2, continue_on_error=False)
    assert (outcomes["dies"].state, outcomes["dies"].tries, outcomes["dies"].reason) == ("failed", 1, "first")


class Losing(LocalProcesses):
    """Says of the first processes that they were lost, as a cluster does of those on a node that is gone."""

    losses = 0

    def start(self, job, beginning, place, tries, ended):
        self.losses -= 1
        lost = self.losses >= 0
        return super().start(
            job, beginning, place, tries, lambda end: ended(End(130, "lost: gone", end.log, lost=True) if lost else end)
        )


@pytest.mark.parametrize(("losses", "state"), [(2, "completed"), (3, "failed")])
def test_what_is_lost_uses_up_no_try_but_not_for_ever(tmp_path, losses, state):
    with Losing(ONE) as executor:
        executor.losses = losses
        begin = lambda job: Beginning((tmp_path / f"{job.name}.log",))  # noqa: E731
        outcome = JobRunner([one := job("x", "print('said')")], executor, begin, lambda job, _: job.name).run()[one]
    assert (outcome.state, outcome.tries) == (state, 3)
    assert outcome.reason == ("" if state == "completed" else "lost: gone")


def test_the_log_holds_all_tries(tmp_path):
    run(tmp_path, [job("dies", "print('said', flush=True); raise SystemExit(3)")], retries=1)
    assert (tmp_path / "dies.log").read_text() == "said\n--- try 2 ---\nsaid\n"


def test_a_log_may_be_renamed(tmp_path):
    code = f"import os; os.rename({str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}); print('why'); raise SystemExit(1)"
    outcomes, _ = run(tmp_path, [job("x", code)], begin=lambda _: Beginning((tmp_path / "a", tmp_path / "b")))
    assert (outcomes["x"].log, outcomes["x"].reason) == (tmp_path / "b", "why")


def test_a_log_of_before_stays_where_another_is_asked_for(tmp_path):
    (tmp_path / "b").write_text("before")
    run(tmp_path, [job("x", "print('now')")], begin=lambda _: Beginning((tmp_path / "a", tmp_path / "b")))
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("now\n", "before")


def test_being_busy_costs_no_try(tmp_path, monkeypatch):
    monkeypatch.setattr("job_runner.SECONDS_UNTIL_NEXT_TRY_OF_BUSY", 0.1)
    mark = tmp_path / "mark"
    code = f"import os, pathlib; m = pathlib.Path({str(mark)!r}); n = len(m.read_text()) if m.exists() else 0; m.write_text('x' * (n + 1));"
    outcomes, _ = run(tmp_path, [job("x", code + "n == 0 and os._exit(4); n == 1 and os.kill(os.getpid(), 9)")], retries=1)
    assert (outcomes["x"].state, outcomes["x"].tries) == ("completed", 2)


def test_what_cannot_begin(tmp_path):
    def begin(job):
        if job.name == "done":
            return None
        if job.name == "unwritable":
            raise PermissionError(13, "Permission denied", "x")
        return Beginning((tmp_path / "nowhere" / "log" if job.name == "no folder" else tmp_path / f"{job.name}.log",))

    jobs = [job(name) for name in ("done", "unwritable", "no folder", "good")]
    jobs += [Job("no program", ("/no/such/program",)), Job("no word", (sys.executable, "a\0b"))]
    outcomes, _ = run(tmp_path, jobs, begin=begin)
    states = [outcome.state for outcome in outcomes.values()]
    assert states == ["skipped", "failed", "failed", "completed", "failed", "failed"]
    assert "Permission denied" in outcomes["unwritable"].reason


def test_what_another_process_is_at_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr("job_runner.SECONDS_UNTIL_NEXT_TRY_OF_BUSY", 0.2)
    free_again = time.monotonic() + 0.5

    def begin(job):
        if time.monotonic() < free_again:
            raise FolderBusy("another run is writing to x")
        return Beginning((tmp_path / f"{job.name}.log",))

    outcomes, _ = run(tmp_path, [job("busy")], begin=begin)
    assert (outcomes["busy"].state, outcomes["busy"].tries) == ("completed", 1)


def test_what_a_job_leaves_behind_ends_with_it(tmp_path):
    code = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))"
    run(tmp_path, [job("parent", code)])
    wait_until_gone([int((tmp_path / "pid").read_text())], 5)


# --- Stopping: in a process of its own, which gets the signals ---

PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from errors import run_command
from devices import Slots
from job_runner import Beginning, Job, JobRunner
from local_processes import LocalProcesses
folder = Path({folder!r})
child = "import sys; sys.path.insert(0, {root!r}); from errors import run_command; import pathlib, os, time\\n" \\
    "def main():\\n    pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); {work}\\nrun_command(main)"
jobs = [Job(n, (sys.executable, "-c", child, str(folder / (n + ".pid")))) for n in ("a", "b", "c")]
def main():
    with LocalProcesses(Slots(2)) as processes:
        runner = JobRunner(jobs, processes, lambda job: Beginning((folder / (job.name + ".log"),)), lambda job, outcome: job.name)
        outcomes = runner.run()
    print([outcome.state for outcome in outcomes.values()], runner.interrupted)
run_command(main)
"""
POLITE = "time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path(sys.argv[1] + '.deaf').write_text('1'); time.sleep(60)"


def start(tmp_path, work=POLITE, mark="", **options):
    """Start the program; returns it when its first two jobs run, with their process ids."""
    code = PROGRAM.format(root=str(ROOT), folder=str(tmp_path), work=work)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    marks = [tmp_path / f"{name}.pid{mark}" for name in ("a", "b")]
    while not all(path.exists() and path.stat().st_size for path in marks):
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
    assert "stopping: waiting for 2 runs; once more kills what is left" in stderr
    assert not any(map(is_alive, pids))
    assert "interrupted: what was finished is kept" in (tmp_path / "a.log").read_text()


def test_asked_twice_it_kills_them(tmp_path):
    process, pids = start(tmp_path, DEAF, ".deaf")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # as ``timeout`` sends its request twice
    time.sleep(2)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.6)
    assert all(map(is_alive, pids))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert stdout.strip() == "['interrupted', 'interrupted', 'not started'] True"
    assert "killing 2 runs" in stderr
    assert not any(map(is_alive, pids))


def test_jobs_that_end_at_the_moment_of_the_stop_are_no_reason_to_hang(tmp_path):
    """As when a whole group of processes is asked to end."""
    for _ in range(5):
        for path in tmp_path.iterdir():
            path.unlink()
        process, pids = start(tmp_path)
        for pid in (*pids, process.pid):
            os.kill(pid, signal.SIGTERM)
        stdout, _ = process.communicate(timeout=20)
        assert "'not started'] True" in stdout or "'interrupted'] True" in stdout


def test_no_job_survives_a_runner_that_is_killed(tmp_path):
    process, pids = start(tmp_path)
    process.kill()
    process.communicate()
    wait_until_gone(pids, 10)
    assert "interrupted: what was finished is kept" in (tmp_path / "a.log").read_text()


def test_nor_what_its_jobs_started(tmp_path):
    work = "import subprocess; p = subprocess.Popen(['sleep', '60']); pathlib.Path(sys.argv[1] + '.deaf').write_text(str(p.pid)); time.sleep(60)"
    process, pids = start(tmp_path, work, mark=".deaf")
    pids += [int((tmp_path / f"{name}.pid.deaf").read_text()) for name in ("a", "b")]
    process.kill()
    process.communicate()
    wait_until_gone(pids, 10)


def test_nor_does_one_that_does_not_listen(tmp_path, monkeypatch):
    process, pids = start(tmp_path, DEAF.replace("import signal", "import signal, errors; errors.SECONDS_TO_END = 0.5"), ".deaf")
    process.kill()
    process.communicate()
    wait_until_gone(pids, 10)


def test_a_hang_up_that_is_ignored_is_no_reason_to_stop(tmp_path):
    """As under nohup."""
    process, _ = start(tmp_path, "time.sleep(1)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    stdout, _ = process.communicate(timeout=30)
    assert stdout.strip() == "['completed', 'completed', 'completed'] False"
