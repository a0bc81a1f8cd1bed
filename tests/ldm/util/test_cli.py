import errno
import os
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError

import pytest
import torch

from ldm.util.cli import (
    OUT_OF_MEMORY,
    UserError,
    add_base_flags,
    check_range,
    components,
    count,
    find_device,
    naming,
    number,
    numbers,
    report,
    seed,
)
from ldm.util.config import ROOT


def said(capsys, error: BaseException) -> tuple[int, str]:
    """Exit status and stderr of a command that fails."""

    @report
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


def test_what_a_user_can_put_right_is_one_line(capsys):
    assert said(capsys, UserError("--steps: 0\n  is too few")) == (2, "error: --steps: 0 is too few\n")


BUG = """
import numpy as np
from ldm.util.cli import report

@report
def main():
    np.zeros(2) + np.zeros(3)

main()
"""


def test_a_bug_shows_its_traceback_and_exits_with_1():
    ended = subprocess.run([sys.executable, "-c", BUG], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("Traceback")
    assert ended.stderr.splitlines()[-1].startswith("ValueError: operands could not be broadcast together")


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug"), OSError("a bug")]
)
def test_faults_of_the_program_keep_their_traceback(error):
    @report
    def main() -> None:
        raise error

    with pytest.raises(type(error), match="a bug"):
        main()


def test_a_mistake_is_named_and_a_bug_is_not():
    with pytest.raises(UserError, match="^cat.pt: no tensor"), naming("cat.pt"):
        raise UserError("no tensor")
    with pytest.raises(ValueError, match="^a bug"), naming("cat.pt"):
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "error: out.png: No space left on device: make room; what was there before is unchanged\n"),
        (errno.EACCES, "error: out.png: Permission denied: allow it, or name another place\n"),
        (errno.EROFS, "error: out.png: Read-only file system: allow it, or name another place\n"),
        (errno.ENAMETOOLONG, "error: out.png: File name too long\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(capsys, number, line):
    assert said(capsys, OSError(number, os.strerror(number), "out.png")) == (2, line)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_a_want_of_memory_says_what_lowers_it(capsys, error):
    assert said(capsys, error) == (2, f"error: {OUT_OF_MEMORY}\n")
    for flag in ("batch_size", "small_card.yaml", "--n_samples", "--precision autocast"):
        assert flag in OUT_OF_MEMORY


def test_a_want_of_memory_on_the_cpu(capsys):
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert said(capsys, raised.value) == (2, f"error: {OUT_OF_MEMORY}\n")


def test_the_end_of_another_process_is_one_line(capsys):
    gloo = RuntimeError(
        "[pair.cc:561] Connection closed by peer. This is typically caused by a remote worker crashing."
    )
    status, line = said(capsys, gloo)
    assert status == 2 and line.startswith("error: another process of this run has ended") and line.count("\n") == 1


def test_an_interrupt_ends_quietly(capsys):
    assert said(capsys, KeyboardInterrupt()) == (130, "stopped\n")


def test_values():
    assert number("-1e-3") == -0.001
    assert numbers("0.5,2") == [0.5, 2.0]
    assert count("12") == 12
    assert seed("0") == 0 and seed(str(2**63 - 1)) == 2**63 - 1
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("kind", "text"),
    [(number, "inf"), (numbers, "1,,2"), (numbers, "nan"), (count, "0"), (count, "1.5"), (seed, "-1"), (seed, 2**63)],
)
def test_what_they_refuse(kind, text):
    with pytest.raises(ArgumentTypeError, match="is not a"):
        kind(str(text))


def test_components_of_a_base_model():
    parser = ArgumentParser()
    add_base_flags(parser)
    assert components("unet=a=b.pt, vae=c.pt") == {"unet": "a=b.pt", "vae": "c.pt"}
    flags = parser.parse_args(["--part", "unet=a.pt", "--part", "vae=b.pt,unet=c.pt", "--use_ema"])
    assert flags.part == {"unet": "c.pt", "vae": "b.pt"} and flags.use_ema is True
    flags = parser.parse_args([])
    assert flags.part is None and flags.use_ema is None and flags.ckpt is None
    parser.set_defaults(part="text=d.pt")  # as a picture says it
    assert parser.parse_args([]).part == {"text": "d.pt"}
    assert parser.parse_args(["--part", "vae=b.pt", "--no-use_ema"]).part == {"vae": "b.pt"}
    for text, message in {"vae": "such as unet=FILE", "vea=x": "did you mean `vae`", "vae=": "such as"}.items():
        with pytest.raises(ArgumentTypeError, match=message):
            components(text)


@pytest.mark.parametrize("name", ["warp:9", "mps", "xpu:1", "", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=f"^--device: {name} cannot be used here; there is cpu(, cuda:\\d)*$"):
        find_device(name)


@pytest.mark.parametrize(
    ("value", "limits", "said"),
    [
        (0, {"low": 1}, "at least 1"),
        (1001, {"low": 1, "high": 1000}, "from 1 to 1,000"),
        (0, {"low": 0, "inside": True}, "above 0"),
        (1.0, {"low": 0, "high": 1, "inside": True}, "above 0 and below 1"),
        (float("nan"), {}, "a finite number"),
        (float("inf"), {"low": 0}, "at least 0"),
        (10**400, {"high": 5}, "at most 5"),
    ],
)
def test_numbers_out_of_range_are_named_with_their_limits(value, limits, said):
    with pytest.raises(UserError, match=f"^rows: must be {said}, not "):
        check_range("rows", value, **limits)


def test_limits_themselves_are_in_range_but_where_they_are_excluded():
    check_range("rows", 1, low=1, high=1)
    check_range("rows", 1e-300, low=0, inside=True)
    check_range("rows", -1e300)
