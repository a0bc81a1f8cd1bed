"""Runs tasks on Ray: each is a command in a process of its own, whose output is a file.

`done` and `failed` in a task's folder say how it ended. They are written where the task ran, so that they hold
whatever becomes of the driver.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import ray

from ldm.util.cli import UserError
from ldm.util.files import write
from scripts.experiments.graph import Task

TRIES = 5  # of a task whose process or machine dies
FAILED = "failed"  # mark, with the reason
STOPPED = "stopped; resume by: "  # said by main.py, which a signal ends with exit status 0
LOCAL = {"include_dashboard": False, "object_store_memory": 80_000_000}  # no task's result is large


class Killed(Exception):
    """A task's process was ended from outside; it is started once more."""


def perform(task: Task, cwd: str, cores: int) -> None:
    """Runs a task to its end, in the folder `cwd`, and marks it.

    A command that a dead worker has left at work is waited for: its process holds the lock, too.

    Raises:
        Killed: the command was ended by a signal.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    with open(task.folder / ".lock", "w") as lock, open(task.log, "ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if task.is_done:
            return
        started, before = time.monotonic(), log.tell()
        variables = os.environ | {"OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1"}
        status = subprocess.run(
            task.to_run(),
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
        ).returncode
        said = task.log.read_bytes()[before:].decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        if status < 0 or said[0].startswith(STOPPED):
            raise Killed(f"{task.shown()}: {said[0]}")
        if status:
            write(task.folder / FAILED, f"exit status {status}: {said[0]}\n".encode())
            return
        (task.result / "models/last.ckpt").unlink(missing_ok=True)  # for resuming only, and the largest file
        write(task.folder / "done", f"{time.monotonic() - started:.2f}\n".encode())


def failure(task: Task) -> str:
    """What a task said when it failed; "" if it did not."""
    mark = task.folder / FAILED
    return mark.read_text().strip() if mark.is_file() else ""


class Driver:
    """Starts what can be started, and says how far it is.

    Args:
        cores, gpus: that a task takes; gpus None is 1 where there is a GPU.
        estimate: expected seconds of a task, or None.
        address: of a Ray cluster; None starts Ray on this machine, with `limit` cores or all.

    Raises:
        UserError: no machine has what a task takes, or no cluster is there.
    """

    def __init__(
        self,
        out: Path,
        cores: int,
        gpus: float | None,
        estimate: Callable[[Task], float | None] = lambda task: None,
        address: str | None = None,
        limit: int | None = None,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            there = {"address": address} if address else LOCAL | {"num_cpus": limit, "address": "local"}
            try:
                ray.init(log_to_driver=False, logging_level="ERROR", **there)
            except ConnectionError as error:
                raise UserError(f"--address: there is no Ray cluster at {address}: see docs/experiments.md") from error
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = float(any(one.get("GPU") for one in machines)) if gpus is None else gpus
        for name, wanted in (("CPU", cores), ("GPU", gpus)):
            if max(one.get(name, 0) for one in machines) < wanted:
                raise UserError(f"{'cores' if name == 'CPU' else 'gpus'}: no machine has {wanted:g} for a task")
        self.slots = sum(
            min(int(one.get("CPU", 0) // cores), int(one.get("GPU", 0) / gpus) if gpus else 10**6) for one in machines
        )
        self.out, self.cores, self.gpus, self.estimate = out, cores, gpus, estimate
        kept = {"num_cpus": cores, "num_gpus": gpus, "max_retries": TRIES, "retry_exceptions": [Killed]}
        self._remote = ray.remote(perform).options(**kept)
        self.failed: dict[Task, str] = {}

    def run(self, tasks: Sequence[Task], again: bool = False) -> None:
        """Runs tasks to their ends; `failed` then has those that failed, or need one that did, and why.

        Args:
            again: start those that failed in an earlier process.
        """
        for task in tasks if again else ():
            if task not in self.failed:
                (task.folder / FAILED).unlink(missing_ok=True)
        self.failed = {task: found for task in tasks if (found := failure(task))}
        waiting = [task for task in tasks if not task.is_done and task not in self.failed]
        running: dict[ray.ObjectRef, Task] = {}
        while waiting or running:
            at_work = {*waiting, *running.values()}
            for task in list(waiting):
                if lacking := next((one for one in task.needs if one in self.failed), None):
                    self.failed[task] = f"not started: {lacking.shown()} failed"
                elif at_work.isdisjoint({*task.needs, *task.after}):
                    running[self._remote.remote(task, str(Path.cwd()), self.cores)] = task
                else:
                    continue
                waiting.remove(task)
            self.say(tasks, running)
            ended, _ = ray.wait(list(running), num_returns=1) if running else ([], [])
            for one in ended:
                task = running.pop(one)
                try:
                    ray.get(one)
                except ray.exceptions.RayError as error:
                    write(task.folder / FAILED, f"{str(error).strip().splitlines()[-1]}\n".encode())
                if not task.is_done:
                    self.failed[task] = failure(task)
        self.say(tasks, running)

    def say(self, tasks: Sequence[Task], running: Mapping[object, Task]) -> None:
        """One line, and the state of every task in `state.txt`."""
        done = [task for task in tasks if task.is_done]
        left = [task for task in tasks if task not in done and task not in self.failed]
        seconds = [self.expected(task, done) for task in left]
        about = f", about {duration(sum(seconds) / self.slots)} left" if seconds and None not in seconds else ""
        line = f"{len(done)} of {len(tasks)} done, {len(self.failed)} failed{about}"
        terminal = sys.stderr.isatty()
        end = "" if terminal and left else "\n"
        print(f"\r{line}\033[K" if terminal else line, file=sys.stderr, end=end, flush=True)
        words = {task: "running" for task in running.values()} | {task: "failed" for task in self.failed}
        words |= {task: "done" for task in done}
        rows = [f"{words.get(task, 'waiting'):8} {task.shown():50} {task.log}" for task in tasks]
        write(self.out / "state.txt", "\n".join([line, "", *rows, ""]).encode())

    def expected(self, task: Task, done: Sequence[Task]) -> float | None:
        """Seconds: the mean of finished tasks of the same kind and size, or the estimate, or those of the kind."""
        alike = [one for one in done if (one.kind, one.like, one.count) == (task.kind, task.like, task.count)]
        kind = [one for one in done if one.kind == task.kind]
        found = None if alike else self.estimate(task)
        return found if found is not None or not (alike or kind) else fmean(seconds_of(one) for one in alike or kind)


def seconds_of(task: Task) -> float:
    """How long a finished task took."""
    return float((task.folder / "done").read_text())


def duration(seconds: float) -> str:
    """9 h, 40 min or 20 s."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h" if seconds < 36000 else f"{seconds / 3600:.0f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
