"""A minute of chaos; ``python -m tests.chaos`` does hours of it."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path

import chaos
import pytest


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills a forked child")
def test_kills_leave_the_old_or_the_new(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = chaos.kills(random.Random(0), 8, tmp_path)
    assert counts["kills"] == counts.get("killed", 0) + counts.get("done before", 0) == 8
    assert counts["killed"] > 0
    assert not counts["wrong"], counts["wrong"]


def test_odd_rules_are_refused_or_read_back() -> None:
    counts = chaos.rules(random.Random(0), 3000)
    assert counts["refused"] > 100
    assert counts["read"] > 50
    assert not counts["wrong"], counts["wrong"]


def test_many_threads_plan_while_a_model_serves() -> None:
    counts = chaos.planning(8, 16)
    assert counts["answers"] > 0
    assert not counts["wrong"], counts["wrong"]


def test_the_long_run_has_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--kills", "0", "--plans", "0", "--damage", "0", "--rules", "50"])
    assert chaos.main() == 0
    assert "rules: 50" in capsys.readouterr().out
