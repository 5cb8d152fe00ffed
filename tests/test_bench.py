"""The benchmarks run and report, on shapes so small that their numbers mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import needs

from convsurgery.bench import diffusion, operators, run_bench, runtime, starts


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (operators, runtime):
        for name, value in (("BATCH", 1), ("CHANNELS", 4), ("SIZE", 8)):
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(diffusion, "BATCH", 1)
    monkeypatch.setattr(diffusion, "SIZE", 12)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_operators() -> None:
    found = json.loads(run_bench("ops", repeats=1, threads=1, as_json=True))
    names = {row["name"] for row in found["ops"]}
    assert names == set(operators.PROMISED)
    assert all(row["inference"] > 0 and row["training"] > 0 for row in found["ops"])
    assert found["memory beside the output, in outputs"]["pnn(fanout=4)"] > 0
    text = run_bench("ops", repeats=1, threads=1)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_nodes_in_onnx_runtime() -> None:
    found = json.loads(run_bench("onnx", repeats=1, threads=1, as_json=True))
    assert set(found["onnx"]) == set(runtime.PROMISED)


def test_diffusion(tmp_path: Path) -> None:
    found = json.loads(run_bench("diffusion", repeats=1, threads=1, as_json=True))
    assert set(found["diffusion"]) == set(diffusion.PROMISED)
    assert all(set(ratios) >= {"64", "128", "256"} for ratios in found["diffusion"].values())
    assert set(found["diffusion in ONNX Runtime"]) == {"28²", "14²"}
    needs("matplotlib", "docs")
    diffusion.draw_figure(tmp_path / "img" / "figure.svg", repeats=1)
    assert (tmp_path / "img" / "figure.svg").read_text(encoding="utf-8").count("<path") > 20


def test_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("matplotlib", "docs")
    # Every section but that of memory, which measures processes of its own, on one tiny network.
    monkeypatch.setattr(starts, "MODELS", {"test_resnet": (1, 2e-3)})
    model, data = starts.trained("test_resnet")
    monkeypatch.setattr(starts, "trained", lambda name: (model, data))
    monkeypatch.setattr(starts, "BLEND_EPOCHS", 1)
    monkeypatch.setattr(starts, "BUDGET", "params<=-5%")
    monkeypatch.setattr(starts, "SECTIONS", {k: v for k, v in starts.SECTIONS.items() if k not in ("memory", "fit")})
    lines = list(starts.bench_starts(tmp_path / "curve.svg"))
    assert len(lines) > 25
    assert any(line.startswith("scan of ") for line in lines)
    assert (tmp_path / "curve.svg").is_file()
