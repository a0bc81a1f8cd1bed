"""Errors that a user can fix: one line on stderr and exit code 2."""

import argparse
import functools
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NoReturn


class UserError(Exception):
    """Something that the user can put right; the message names the flag, key or file and says what to do."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == ""
        return action.help if absent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows the defaults and whose complaints are `UserError`s."""

    def __init__(self, **options):
        super().__init__(formatter_class=Defaults, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def suggestion(name: str, known: list[str]) -> str:
    """`; did you mean X?`, or what there is to choose from, for a name that is not known."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def report(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: `UserError` and `ValueError` become one line `error: …` and exit code 2, without a traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except (UserError, ValueError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    return wrapped
