"""What a training does about SIGTERM, SIGINT and SIGUSR1."""

import re
import signal

import pytest
import torch

from tests.reliability.runs import learned, words


def step_of(run) -> int:
    return torch.load(run / "models/last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_end_finishes_its_step_and_says_how_to_go_on(launch, entry, whole, tmp_path, number):
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), "save_every=100", "keep=3", signals=[(number, 2)])
    assert ended.status == 0, ended.said
    assert step_of(run) == 3  # the step was the third
    assert "finishing the step, then saving" in ended.said
    assert re.search(rf"stopped; resume by: python \S*main.py --resume {run} -t save_every=100 keep=3\n", ended.said)
    assert not (run / "models/step=000003.safetensors").exists()
    ended = launch("main", "--resume", run, "-t", "save_every=1", "keep=3")
    assert ended.status == 0, ended.said
    found, wanted = learned(run), learned(whole[0])
    assert {name: found[name] for name in wanted} == wanted


def test_an_interrupt_before_the_first_step_ends_at_once(launch, entry, whole, tmp_path):
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), signals=[(signal.SIGINT, -1)])
    assert ended.status != 0 and not (run / "models").exists()
    ended = launch("main", *words(entry, run))
    assert ended.status == 0, ended.said
    assert learned(run) == learned(whole[0])


def test_a_second_interrupt_ends_at_once_and_what_was_saved_is_good(launch, entry, whole, tmp_path):
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), signals=[(signal.SIGINT, 3), (signal.SIGINT, 3)])
    assert ended.status == -signal.SIGINT
    assert step_of(run) == 3
    ended = launch("main", *words(entry, run))
    assert ended.status == 0, ended.said
    assert learned(run) == learned(whole[0])


def test_a_state_on_demand(launch, entry, tmp_path):
    run = tmp_path / "run"
    demands = [(signal.SIGUSR1, 2), (signal.SIGKILL, 4)]
    ended = launch("main", *words(entry, run), "save_every=100", signals=demands)
    assert ended.status == -signal.SIGKILL
    assert step_of(run) == 3


def test_a_requeued_job_goes_on_by_the_same_command(launch, entry, whole, tmp_path):
    """SLURM: before the time is over it sends SIGUSR1, and Lightning saves and asks for the job to be started anew."""
    run, asked = tmp_path / "run", tmp_path / "asked"
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "training", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{scontrol.parent}:/usr/bin:/bin"}
    command = ["--base", entry, "-t", "--logdir", run]
    signals = [(signal.SIGUSR1, 3), (signal.SIGTERM, 4)]
    ended = launch("main", *command, "save_every=2", signals=signals, environment=job)
    assert ended.status == 0, ended.said
    assert asked.read_text() == "requeue 7\n"
    ended = launch("main", *command, "save_every=2", environment=job | {"SLURM_RESTART_COUNT": "1"})
    assert ended.status == 0, ended.said
    assert not list(run.glob("hpc_ckpt*"))
    assert learned(run) == learned(whole[0])
