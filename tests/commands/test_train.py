import argparse
import os
import signal

import pytest

from bfsys.commands import train
from bfsys.errors import UserError


@pytest.mark.parametrize(("process", "keeps"), [(1, True), (2, False)])
def test_stop_signals_kill_a_rank_that_starts_unless_it_is_process_1(process, keeps, monkeypatch):
    def stop(number, frame):
        pass

    monkeypatch.setattr(os, "getpid", lambda: process)
    before = signal.signal(signal.SIGTERM, stop), signal.getsignal(signal.SIGHUP)
    try:
        with pytest.raises(UserError, match=r"missing\.yaml"):
            train.run(argparse.Namespace(config="missing.yaml", overrides=[], dry_run=False, no_data=False))
        assert signal.getsignal(signal.SIGTERM) is (stop if keeps else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])
