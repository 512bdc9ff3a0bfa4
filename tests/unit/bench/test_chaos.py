"""The command line and the recovery times of the chaos bench: bench/chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.chaos import main, recovery_times
from bench.chaos_plan import Fault
from bench.client_log import Attempt, ClientLog
from bench.fault_injector import InjectedFault


def test_the_plan_is_printed_without_a_run(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--plan` prints the plan, which is the same in each run with one seed."""
    assert main(["--plan", "--seed", "3", "--faults", "15"]) == 0
    first_output = capsys.readouterr().err
    assert main(["--plan", "--seed", "3", "--faults", "15"]) == 0
    assert capsys.readouterr().err == first_output
    assert "kill worker" in first_output and "editor 0" in first_output


def test_a_recovery_is_the_next_answer_to_a_later_question() -> None:
    """The recovery time of a fault ends with the response to a request that was sent after the fault. It is
    infinite if there is none."""
    log = ClientLog()
    log.attempts = [Attempt("a", "generate", "200", 0.0, 3.0), Attempt("a", "generate", "200", 2.0, 9.0)]
    faults = [
        InjectedFault(1.0, Fault(0, "kill worker", 0, 0)),
        InjectedFault(5.0, Fault(0, "kill worker", 0, 0)),
    ]
    assert recovery_times(log, faults) == [8.0, float("inf")]
