"""What every command shares: a user's mistake ends in one message and exit code 2, never in a traceback."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from configs.load import UserError

Main = Callable[[Sequence[str] | None], None]


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return the exit code: 0, 2 for a `UserError` or a full disk, 130 when interrupted,
    141 when whoever reads the output has left (`| head`)."""
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        return _fail(
            f"the disk is full{where}; free some space and run the same command again: what was saved before is intact",
            2,
        )
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # a library's message may have several lines
    return code
