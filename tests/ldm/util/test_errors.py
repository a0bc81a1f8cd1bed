import errno
import os

import pytest
import torch

from ldm.util.errors import OUT_OF_MEMORY, UserError, report


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
    assert said(capsys, ValueError("key: wrong")) == (2, "error: key: wrong\n")


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


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug")])
def test_faults_of_the_program_keep_their_traceback(error):
    @report
    def main() -> None:
        raise error

    with pytest.raises(type(error), match="a bug"):
        main()
