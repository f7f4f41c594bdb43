"""The first moments of a command: until its modules are imported, Ctrl-C ends the process without a traceback.

This module imports almost nothing, so that Ctrl-C can interrupt little before this. `exit_code_of` takes over.
"""

import signal


def main(name: str | None = None, prog: str | None = None) -> None:
    """Entry point of the console command, and of files that are the command `name` and were called as `prog`; exits."""
    let_signals_end_the_process()
    from bfsys.cli import main

    main(name, prog)


def let_signals_end_the_process() -> None:
    """A shell shows 130 for a process that Ctrl-C ended. A command in the background ignores Ctrl-C, and continues to
    do so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
