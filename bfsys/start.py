"""The first moments of a command: until its modules are imported, Ctrl-C ends the process without a traceback.

This module imports almost nothing, so that Ctrl-C can interrupt little before this. `exit_code_of` takes over.
"""

import signal


def main() -> None:
    """Entry point of the console command; exits."""
    let_signals_end_the_process()
    from bfsys.cli import main

    main()


def run_as(name: str, prog: str) -> None:
    """Run a command for a file that was called as `prog`, with the arguments of this process; exits."""
    let_signals_end_the_process()
    from bfsys.cli import run_as

    run_as(name, prog)


def let_signals_end_the_process() -> None:
    """A shell shows 130 for a process that Ctrl-C ended. A command in the background ignores Ctrl-C, and continues to
    do so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
