"""What all commands share: the form of --help, and errors: a mistake of the user is one sentence, a bug a traceback."""

import argparse
import errno
import sys
from collections.abc import Callable


class Unavailable(RuntimeError):
    """Something outside the process (server, disk, network) is unavailable; the message says what, and what to do."""


class Ended(RuntimeError):
    """A run that ended before its last step and saved a checkpoint; the message says why, and what to do.

    Args:
        status: 3 for a run that has collapsed (``convsearch.runs.collapse``), 143 (128 + SIGTERM) for one that was
        terminated.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m MODULE``."""
    return argparse.ArgumentParser(f"python -m {module}", description=description, formatter_class=HelpFormatter)


def run(main: Callable[[], None]) -> None:
    """Calls ``main`` and exits with status 2 and ``error: <sentence>`` after ValueError, Unavailable or a disk error.

    Ctrl-C exits with the shell's status 130 and one line instead of a traceback, ``Ended`` with its own status.
    """
    try:
        main()
    except (ValueError, Unavailable) as error:
        _exit(f"error: {error}", 2)
    except Ended as end:
        _exit(f"stopped: {end}", end.status)
    except KeyboardInterrupt:
        _exit("interrupted: run the same command again to go on", 130)
    except FileNotFoundError as error:
        _exit(f"error: there is no {error.filename}: check the path", 2)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "repair it"
        where = f" ({error.filename})" if error.filename else ""
        kept = "nothing that was complete is lost"
        _exit(f"error: {error.strerror or error}{where}: {kept}; {remedy} and run the same command again", 2)


def _exit(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
