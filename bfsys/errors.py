"""One exception for everything that a user can put right, and the way a command ends on it.

Alternative refused: a family of exception classes. Nobody catches them apart, and each message already
says where the trouble is, what was got, what is allowed and what to do.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_STOPPED = 130  # on request


class UserError(Exception):
    """Bad input. Holds one message per problem, so that all are reported at once."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Put the problems of a `UserError` into the list instead of stopping at it."""
    try:
        yield
    except UserError as error:
        problems.extend(error.problems)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 2 with one line per problem on a `UserError`, 130 on Ctrl-C."""
    try:
        status = main()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("stopped on request", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:  # `… | head` closed our output: nothing is wrong
        sys.stderr.close()
        sys.exit(0)
    sys.exit(status or 0)
