"""What every command does with errors: one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fedcmt.errors import InputError


def run_command(command: Callable[[], None]) -> int:
    """Run a command.

    Returns:
        0; 2 after a user's mistake, which is one line on stderr; 130 after Ctrl-C. Other errors keep their traceback.
    """
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished round", file=sys.stderr)
        return 130
    return 0
