"""Tasks of a line of Python each, on Ray."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from threading import Thread

import pytest

from ldm.util.cli import UserError
from scripts.experiments.graph import Task
from scripts.experiments.run import Driver, duration, perform, seconds_of


@pytest.fixture
def task(tmp_path):
    """Makes a task that runs `code` after noting that it was started."""

    def make(name: str, code: str = "pass", **more) -> Task:
        folder = tmp_path / name
        noted = f"open({str(tmp_path / 'started')!r}, 'a').write({name!r} + ' '); "
        return Task("train", name, name, folder, (sys.executable, "-c", noted + code), folder / "run", **more)

    return make


def started(tmp_path) -> list[str]:
    return (tmp_path / "started").read_text().split()


def wait_for(there, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_failure_leaves_the_rest_complete_and_is_named(local, task, tmp_path, capsys):
    good, bad = task("good"), task("bad", "import sys; sys.exit('error: no such thing')")
    needing, late = task("needing", needs=(bad,)), task("late", needs=(good,), after=(bad,))
    tasks = [bad, good, needing, late]
    driver = Driver(tmp_path, cores=1, gpus=None)
    driver.run(tasks)
    assert sorted(started(tmp_path)) == ["bad", "good", "late"] and good.is_done and late.is_done
    assert driver.failed == {
        bad: "exit status 1: error: no such thing",
        needing: "not started: train: bad failed",
    }
    assert capsys.readouterr().err.splitlines()[-1] == "2 of 4 done, 2 failed"
    assert "failed   train: bad" in (tmp_path / "state.txt").read_text()
    driver.run(tasks)  # what is done is not repeated, nor is what failed
    assert len(started(tmp_path)) == 3 and len(driver.failed) == 2
    mended = task("bad")
    Driver(tmp_path, cores=1, gpus=0).run([mended, good, task("needing", needs=(mended,)), late], again=True)
    assert started(tmp_path)[3:] == ["bad", "needing"] and seconds_of(mended) > 0


def test_a_command_that_is_killed_is_started_again(local, task, tmp_path):
    mark = str(tmp_path / "mark")
    code = f"import os; first = not os.path.exists({mark!r}); open({mark!r}, 'w'); first and os.kill(os.getpid(), 9)"
    stopped = f"import sys; {code.replace('mark', 'stop').replace('os.kill(os.getpid(), 9)', 'sys.stdout.write(said)')}"
    killed = task("killed", code)
    ended = task("ended", f"said = 'stopped; resume by: python main.py'; {stopped}")  # as main.py on SIGTERM
    driver = Driver(tmp_path, cores=1, gpus=0)
    driver.run([killed, ended])
    assert not driver.failed and sorted(started(tmp_path)) == ["ended", "ended", "killed", "killed"]


def test_a_task_whose_worker_is_killed_is_started_again(local, task, tmp_path):
    noted = tmp_path / "noted"
    code = (
        f"import os, time; again = os.path.exists({str(noted)!r}); open({str(noted)!r}, 'a').write(str(os.getppid())); "
    )
    slow = task("slow", code + "time.sleep(0 if again else 600)")

    def kill() -> None:
        wait_for(lambda: noted.exists() and noted.read_text())
        os.kill(int(noted.read_text()), signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    driver = Driver(tmp_path, cores=1, gpus=0)
    driver.run([slow])
    killer.join()
    assert slow.is_done and not driver.failed and started(tmp_path) == ["slow", "slow"]


def test_the_command_of_a_dead_worker_is_waited_for(task, tmp_path):
    """Where nobody ends it with its worker; a second one must not work in the same folder meanwhile."""
    began, ended = tmp_path / "began", tmp_path / "ended"
    code = f"import time; open({str(began)!r}, 'a').write('b'); time.sleep(2); open({str(ended)!r}, 'a').write("
    slow = task("slow", code + f"str(len(open({str(began)!r}).read())) + ' ')")
    worker = get_context("spawn").Process(target=perform, args=(slow, str(tmp_path), 1))
    worker.start()
    wait_for(began.exists)
    worker.kill()
    worker.join()
    assert not ended.exists()
    perform(slow, str(tmp_path), 1)
    assert slow.is_done and ended.read_text() == "1 2 "  # the first had ended when the second began


def test_what_no_machine_has_is_one_line(local, tmp_path):
    with pytest.raises(UserError, match="gpus: no machine has 1 for a task"):
        Driver(tmp_path, cores=1, gpus=1)
    with pytest.raises(UserError, match="cores: no machine has 64"):
        Driver(tmp_path, cores=64, gpus=0)


def test_how_long_is_left_is_told_from_what_is_done(local, task, tmp_path, capsys):
    driver = Driver(tmp_path, cores=1, gpus=0, estimate=lambda task: 7200.0)
    driver.say([task("one"), task("two")], {})
    assert capsys.readouterr().err == "0 of 2 done, 0 failed, about 4.0 h left\n"
    (tmp_path / "one").mkdir()
    (tmp_path / "one/done").write_text("600.0\n")
    driver.say([task("one"), task("two")], {})
    assert capsys.readouterr().err == "1 of 2 done, 0 failed, about 10 min left\n"
    assert [duration(seconds) for seconds in (20, 3599, 9 * 3600, 90 * 3600)] == ["20 s", "60 min", "9.0 h", "90 h"]
