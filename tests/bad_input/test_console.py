"""Consoles that lack letters, through every command."""

import io
import sys
from importlib import import_module

import pytest

from tests.bad_input.bench import COMMANDS, fresh_process


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_on_any_console(monkeypatch, command, encoding):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    with fresh_process([command, "--help"]), pytest.raises(SystemExit) as ended:
        import_module(COMMANDS[command]).main()
    assert ended.value.code == 0
    assert console.buffer.getvalue().startswith(b"usage: ")
