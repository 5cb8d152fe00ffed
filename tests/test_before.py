"""What convsurgery 0.1 wrote is read as it was: its neutral start scaled filters, and a BatchNorm took the gain.

``before/`` was written by 0.1 (commit 86b9fb0) from ``Four`` and ``RULE`` below: a plan, an ONNX file, and three
folders (as converted, calibrated and dialled, fused), with what each of them predicted.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import naive
import onnx
import pytest
import torch
import torch.nn.functional as F
from operator_table import KERVOLUTIONS
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import convsurgery as cs
from convsurgery.errors import ConversionError, StorageError
from convsurgery.operators import Start
from convsurgery.operators.kervolution import Dialled, Kervolution2d

BEFORE = Path(__file__).with_name("before")
FOLDERS = ("started", "calibrated", "fused")
RULE = (
    "conv[name=poly]->kerv-poly; conv[name=sigmoid]->kerv-sigmoid by neutral(0.25); "
    "conv[name=gauss]->kerv-gauss(learnable=channel) by neutral(0.01); conv[name=l2]->kerv-l2 by neutral(0.1)"
)
#: of the exponential and the tanh of other processors
CLOSE = 1e-6


class Four(nn.Module):
    """A convolution for each of the kernels that have a neutral start."""

    def __init__(self) -> None:
        super().__init__()
        self.poly, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.sigmoid = nn.Conv2d(6, 6, 3, stride=2)
        self.gauss, self.norm3 = nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)
        self.l2, self.norm4 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.poly(x)))
        x = F.relu(self.sigmoid(x))
        x = F.relu(self.norm3(self.gauss(x)))
        return self.norm4(self.l2(x)).mean((2, 3))


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(BEFORE / "expected.safetensors")


def original() -> nn.Module:
    model = Four()
    model.load_state_dict(load_file(BEFORE / "original.safetensors"))
    return model.eval()


def loaded(name: str) -> nn.Module:
    return cs.load(BEFORE / name, base=Four())


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_predicts_what_it_predicted(name: str, expected: dict[str, Tensor]) -> None:
    model = loaded(name)
    assert naive.error(model(expected["input"]), expected[name]) < CLOSE
    # Today's form on the same weights would be far off: it is the form that is read, not the weights alone.
    assert naive.error(expected["original"], expected[name]) > 0.1
    layers = [m for m in model.modules() if isinstance(m, Kervolution2d)]
    assert len(layers) == 4
    assert all(layer.centered and not isinstance(layer, Dialled) for layer in layers)


def test_layers_of_a_folder_compute_their_formula(expected: dict[str, Tensor]) -> None:
    rows = {row.rule: row for row in KERVOLUTIONS}
    model = loaded("calibrated").double()
    for name, rule in (("poly", ""), ("sigmoid", ""), ("gauss", "(learnable=true)"), ("l2", "")):
        layer = model.get_submodule(name)
        x = torch.randn(2, layer.in_channels, 7, 7, dtype=torch.float64)
        assert naive.error(layer(x), rows[f"kerv-{name}{rule}"].naive(layer, x)) < 1e-12
        assert layer.scale is not None


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_written_again_as_what_it_is(name: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    model = loaded(name)
    folder = cs.save(model, tmp_path / "out")
    written = json.loads((folder / "convsurgery.json").read_text())
    assert [plan["format"] for plan in written["plans"]] == [2]
    assert [entry["scaled"] for entry in written["plans"][0]["entries"]] == [True] * 4
    back = cs.load(folder, base=Four())
    assert torch.equal(back(expected["input"]), model(expected["input"]))
    assert cs.record(back) == cs.record(model)


def test_plan_is_carried_out_as_it_was_meant(expected: dict[str, Tensor]) -> None:
    text = (BEFORE / "plan.json").read_text()
    assert json.loads(text)["format"] == 1
    plan = cs.Plan.from_json(text)
    assert {entry.start for entry in plan.edits} >= {Start("neutral", None, scaled=True)}
    assert all(entry.exactness == "approximate" for entry in plan.edits)
    assert "its gain goes into norm1" in " ".join(str(plan).split())
    new = cs.apply(original(), plan)
    assert naive.error(new(expected["input"]), expected["started"]) < CLOSE
    assert set(cs.record(new).norms) == {"norm1", "norm3", "norm4"}
    assert cs.Plan.from_json(plan.to_json()) == plan
    # The rule itself means today's form.
    today = cs.convert(original(), RULE, example_inputs=expected["input"])
    assert all(isinstance(today.get_submodule(name), Dialled) for name in ("poly", "sigmoid", "gauss", "l2"))
    assert cs.record(today).plans[0] != plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "the plan has format 3; this version reads 1 and 2"),
        ({"format": True}, "the plan has format True"),
        ({"format": "2"}, "the plan has format '2'"),
        ({"format": 2, "scaled": 1}, "scaled"),
    ],
)
def test_format_that_is_none(change: dict[str, object], message: str) -> None:
    data = json.loads((BEFORE / "plan.json").read_text())
    data["format"] = change["format"]
    if "scaled" in change:
        data["entries"][0]["scaled"] = change["scaled"]
    with pytest.raises(StorageError, match=message):
        cs.Plan.from_dict(data)


def test_its_dial_turns(expected: dict[str, Tensor]) -> None:
    model, x = loaded("started"), expected["input"]
    at_first = cs.nonlinearity(model)
    assert at_first == {"poly": 2.0**-18, "sigmoid": 0.25, "gauss": 2.0**-7, "l2": 0.125}
    cs.set_nonlinearity(model, 2.0**-12)
    assert naive.error(model(x), expected["original"]) < 0.02
    cs.set_nonlinearity(model, at_first)
    assert naive.error(model(x), expected["started"]) < CLOSE * 10
    with pytest.raises(ConversionError, match="poly: ε must be from 1e-12 to 1, not 0"):
        cs.set_nonlinearity(model, 0)


def test_it_is_calibrated_and_trained_on(expected: dict[str, Tensor]) -> None:
    model, teacher = loaded("started"), original()
    images = torch.randn(16, 3, 12, 12)
    told = cs.calibrate(model, images, teacher=teacher)
    assert len(told) == 4
    assert told["poly"] <= 1e-3
    assert set(cs.record(model).norms) == {"norm1", "norm3", "norm4"}
    before = copy.deepcopy(model.state_dict())
    train = DataLoader(TensorDataset(images, torch.randint(0, 4, (16,))), 8)
    cs.finetune(model, (train, train), epochs=2, nonlinearity=0.5, device="cpu", lr=1e-3, progress=False)
    assert set(cs.nonlinearity(model).values()) == {0.5}
    assert not torch.equal(model.poly.weight, before["poly.weight"])


def test_onnx_file_still_verifies() -> None:
    path = BEFORE / "model.onnx"
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node if node.domain == "ai.convsurgery"}
    assert kinds == {f"{kind}Kervolution2d" for kind in ("Poly", "Sigmoid", "Gauss", "L2")}
    example = torch.randn(2, 3, 12, 12)
    assert cs.verify_onnx(path, loaded("started"), example_inputs=example).error < 1e-5
    other = loaded("started")
    other.poly.weight.data[0] += 0.5
    with pytest.raises(cs.errors.ParityError, match=r"The first node that differs: poly \(PolyKervolution2d\)"):
        cs.verify_onnx(path, other, example_inputs=example)


def test_a_folder_of_then_is_exported_as_then(tmp_path: Path) -> None:
    model = loaded("calibrated")
    parity = cs.export_onnx(model, tmp_path / "model.onnx", example_inputs=torch.randn(2, 3, 12, 12))
    assert parity.error < 1e-5
    file = onnx.load(str(tmp_path / "model.onnx"))
    assert {node.op_type for node in file.graph.node if node.domain == "ai.convsurgery"} == {
        f"{kind}Kervolution2d" for kind in ("Poly", "Sigmoid", "Gauss", "L2")
    }
