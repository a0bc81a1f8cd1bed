"""Output that never ends the work."""

import io
import subprocess
import sys

import pytest

from ldm.util.cli import report
from ldm.util.config import ROOT
from ldm.util.console import lasting_output


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "\\u03b2 \\xf6"), ("cp1252", "\\u03b2 ö"), ("utf-8", "β ö")])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_letter_that_the_console_lacks_is_escaped(monkeypatch, name, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, name, stream)
    with lasting_output():
        print("β ö", file=getattr(sys, name))
    assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"
    assert getattr(sys, name) is stream


def test_a_process_without_output_works(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)

    @report
    def main() -> None:
        print("β")

    main()
    assert sys.stdout is None


WORK = """
import sys
from ldm.util.cli import report

@report
def main():
    for i in range(100_000):
        print(i, file=getattr(sys, sys.argv[1]))
    open(sys.argv[2], "w").close()

main()
"""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_leaves_does_not_end_the_work(tmp_path, name):
    pipes = {name: subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", WORK, name, str(tmp_path / "done")], cwd=ROOT, **pipes)
    with getattr(process, name) as reader:
        assert reader.readline() == b"0\n"
    assert process.wait(60) == 0
    assert (tmp_path / "done").is_file()


def test_a_full_disk_is_still_an_error():
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-c", WORK, "stdout", "/dev/null"]
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 2 and ended.stderr.startswith(b"error: No space left on device")
