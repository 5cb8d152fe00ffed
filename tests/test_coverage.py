"""The sweep: hard architectures through the real command, and what happens when a worker dies, hangs or is cut off."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from convsurgery.cli import run
from convsurgery.coverage import HARD, Row, choose, read_rows, summary_text, sweep, write_table
from convsurgery.coverage.report import BEGIN, END
from convsurgery.errors import ArgumentError, ModelError, StorageError

SMALL = "resnet10t"

#: of the hard ones, those of which each is hard in another way and small; ``convsurgery coverage --sample`` takes all
QUICK = [
    "nf_regnet_b0",
    "tf_mobilenetv3_small_minimal_100",
    "edgenext_xx_small",
    "levit_128s",
    "ghostnet_050",
    "mobileone_s0",
    "mobilenetv4_conv_small_035",
    "starnet_s1",
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision/raft_small",
    "torchvision/quantized_shufflenet_v2_x0_5",
    "torchvision/r3d_18",
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Some hard architectures, by the command."""
    output = tmp_path_factory.mktemp("sweep") / "rows.jsonl"
    assert run(["coverage", *QUICK, "--output", str(output)]) == 0
    return read_rows(output)


def test_hard_architectures_are_listed_and_stay_what_they_are(sample: list[Row]) -> None:
    assert {row.name for row in sample} == set(QUICK)
    assert set(QUICK) < set(HARD)
    assert len(HARD) >= 60
    for row in sample:
        assert row.exceptions == [], row.name
        if row.convolutions:
            assert row.planned == row.visible == row.convolutions - row.uncalled, row.name
            assert (row.listed, row.null_equal, row.state_equal, row.train_equal) == (True, True, True, True), row.name
            assert row.converted == row.planned, row.name


def test_the_summary_fits_a_terminal(sample: list[Row]) -> None:
    text = summary_text(sample)
    assert "time to plan to timm's FX trace, median" in text
    assert "no row needs an explanation" in text
    assert max(map(len, text.splitlines())) <= 80


def test_rows_go_to_json_and_back(sample: list[Row]) -> None:
    assert all(Row.from_json(row.to_json()) == row for row in sample)


def test_a_sweep_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    output, news = tmp_path / "rows.jsonl", []
    names = [SMALL, "torchvision/r3d_18"]
    first = sweep(names, output, checks=["plan"], processes=1, report=lambda row, *_: news.append(row.name))
    assert news == names
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[1][:40])
    again = sweep(names, output, checks=["plan"], processes=1, report=lambda row, *_: news.append(row.name))
    assert news == [*names, names[1]]
    assert [row.name for row in again] == names
    assert again[0] == first[0]
    assert len(read_rows(output)) == 2
    news.clear()
    sweep(names, output, checks=["plan", "null"], processes=1, report=lambda row, *_: news.append(row.name))
    assert news == names  # other checks are another sweep


#: architectures that end their process or never end, in a module that workers find by its entry point
MISCHIEF = """
import os, time
from torch import nn
from timm.models import register_model

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return self.conv(x).mean((2, 3))

@register_model
def mischief_dies(pretrained=False, **kwargs):
    os._exit(7)

@register_model
def mischief_hangs(pretrained=False, **kwargs):
    time.sleep(600)

@register_model
def mischief_breaks(pretrained=False, **kwargs):
    raise RuntimeError("no such luck")
"""


@pytest.fixture
def mischief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mischief.py").write_text(MISCHIEF)
    (tmp_path / "sitecustomize.py").write_text("import mischief\n")  # what a spawned worker imports when it starts
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import mischief  # noqa: F401

    yield
    from timm.models import _registry

    for name in ("mischief_dies", "mischief_hangs", "mischief_breaks"):
        _registry._model_entrypoints.pop(name)
    del sys.modules["mischief"]


@pytest.mark.usefixtures("mischief")
def test_architectures_that_misbehave_cost_a_row_each(tmp_path: Path) -> None:
    names = ["mischief_dies", "mischief_hangs", "mischief_breaks", SMALL]
    rows = sweep(names, tmp_path / "rows.jsonl", checks=["plan"], processes=1, timeout=30)
    errors = [row.error and (row.error["type"], row.error["text"]) for row in rows]
    assert errors[0] == ("WorkerDied", "the process ended by exit code 7, perhaps for want of memory")
    assert errors[1] == ("Timeout", "not done after 30 s")
    assert errors[2] == ("ModelError", "mischief_breaks cannot be built: no such luck")
    assert errors[3] is None
    assert rows[3].planned == rows[3].convolutions > 0


def test_patterns_choose_names() -> None:
    assert choose(["resnet1?", "torchvision/raft_*"]) == [
        "resnet18",
        "torchvision/raft_large",
        "torchvision/raft_small",
    ]
    assert len(choose([])) > 1400
    with pytest.raises(ModelError, match="no architecture matches 'resnt18'; did you mean 'resnet18'"):
        choose(["resnt18"])


def test_bad_usage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["coverage", "resnt18", "-o", str(tmp_path / "rows.jsonl")]) == 2
    assert "no architecture matches 'resnt18'" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="there is no check 'nul'"):
        sweep([SMALL], tmp_path / "rows.jsonl", checks=["nul"])
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(StorageError, match=r"other.jsonl, line 1, is not a row of a coverage sweep"):
        sweep([SMALL], tmp_path / "other.jsonl", checks=["plan"])


def test_the_table_replaces_what_stands_between_its_marks(tmp_path: Path, sample: list[Row]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nbehind\n")
    write_table(sample, page)
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\nMeasured with convsurgery")
    assert text.endswith(f"{END}\n\nbehind\n")
    assert "old" not in text
    assert "| torchvision/detection | 1 |" in text
    assert "Rows that need an explanation: none." in text
    write_table(sample, page)
    assert page.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    page.write_text("no marks\n")
    with pytest.raises(StorageError, match="has no place for the table: a line <!-- generated by"):
        write_table(sample, page)
    assert page.read_text() == "no marks\n"


def test_rows_that_are_not_as_they_should_be_are_explained(sample: list[Row]) -> None:
    good = next(row for row in sample if row.convolutions)
    bad = dataclasses.replace(good, null_equal=False, listed=False)
    assert bad.exceptions == [
        "a convolution is called that the plan does not list so",
        "the output changes under the null rule",
    ]
    assert f"the output changes under the null rule: {good.name}" in summary_text([bad])
    assert json.loads(bad.to_json())["null_equal"] is False
