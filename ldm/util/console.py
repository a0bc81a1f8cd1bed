"""Output that never ends the work: a letter that the console lacks is escaped, a reader may leave."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EINVAL)  # a pipe that nobody reads, a terminal that is closed, Windows for both


class Lasting:
    """A text stream that takes every letter, and goes to the null device once its reader has left."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            self.stream.write(text.encode(self.stream.encoding, "backslashreplace").decode(self.stream.encoding))
        except OSError as error:
            self._leave(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())  # what is still in the buffer goes there too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the `with`, standard output and standard error are `Lasting`; a process without them stays so."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is not None:
                lasting = stack.enter_context(redirect(Lasting(stream)))
                stack.callback(lasting.flush)
        yield
