"""What every command line of the project does with errors: a user's mistake is one sentence, a bug is a traceback."""

import errno
import sys
from collections.abc import Callable


class Unavailable(RuntimeError):
    """Something outside the process (server, disk, network) is not there; the message says what and what to do."""


class Ended(RuntimeError):
    """A run that ends before its last step, with a checkpoint behind it; the message says why and what to do.

    Args:
        status: 3 where the run has gone wrong (``convsearch.runs.collapse``), 143 (128 + SIGTERM) where it was told to stop.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def run(main: Callable[[], None]) -> None:
    """Calls ``main``; ValueError and Unavailable end in ``error: <sentence>`` and exit status 2, as does a full or missing disk.

    Ctrl-C ends with the shell's status 130 and a word instead of a traceback, ``Ended`` with its own status.
    """
    try:
        main()
    except (ValueError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Ended as end:
        print(f"stopped: {end}", file=sys.stderr)
        sys.exit(end.status)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend it"
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: {error.strerror or error}{where}: nothing that was complete is lost; {remedy} and run the same command again",
            file=sys.stderr,
        )
        sys.exit(2)
