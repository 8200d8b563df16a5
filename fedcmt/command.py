"""What every command does with errors: one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fedcmt.errors import InputError, RunError


def run_command(command: Callable[[], None]) -> int:
    """Run a command.

    Returns:
        0; 2 after a user's mistake; 1 where the run or the disk gave out; 130 after Ctrl-C. Each is one line on stderr.
        Any other error is a defect and keeps its traceback.
    """
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: out of memory ({error}); lower batch_size, patch_size or features", file=sys.stderr)
        return 1
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished round", file=sys.stderr)
        return 130
    return 0
