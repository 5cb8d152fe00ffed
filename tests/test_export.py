"""ONNX files of whole models: what is in them, that they are verified, and what remains when they are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import ExportError, ParityError
from convsurgery.operators import KervPoly
from convsurgery.operators.onnx import DOMAIN


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    # Without zero_init_last the residual branches count.
    model = cs.create_model("resnet10t", num_classes=10, in_chans=1, img_size=32, zero_init_last=False)
    model.train()(torch.randn(16, 1, 32, 32))
    return cs.convert(model.eval(), "first-conv->kerv-poly; conv[k=1]->kerv-gauss; conv[in=BasicBlock]->kerv-l2")


@pytest.fixture(scope="module")
def exported(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    cs.export_onnx(converted, path)
    return path


def _run(path: Path, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": images.numpy()})[0]


def test_file_computes_what_the_model_computes(converted: nn.Module, exported: Path) -> None:
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 32, 32)
        with torch.no_grad():
            wanted = converted(x).numpy()
        np.testing.assert_allclose(_run(exported, x), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_file_has_one_node_per_operator_and_their_bodies(converted: nn.Module, exported: Path) -> None:
    proto = onnx.load(exported)
    onnx.checker.check_model(proto, full_check=True)
    edits = cs.record(converted).edits
    custom = [node for node in proto.graph.node if node.domain == DOMAIN]
    assert sorted(node.name for node in custom) == sorted(entry.site.name for entry in edits)
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 18), (DOMAIN, 1)}
    bodies = {(f.domain, f.name, f.overload) for f in proto.functions}
    assert bodies == {(node.domain, node.op_type, node.overload) for node in custom}
    # Their batch norms were folded.
    left = sum(node.op_type == "BatchNormalization" for node in proto.graph.node)
    assert left == 0
    shaped = {value.name for value in proto.graph.value_info} | {value.name for value in proto.graph.output}
    assert {node.output[0] for node in custom} <= shaped
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [value.name for value in proto.graph.output] == ["output"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_metadata_hold_the_plan_and_no_path_of_this_machine(converted: nn.Module, exported: Path) -> None:
    proto = onnx.load(exported)
    held = {prop.key: prop.value for prop in proto.metadata_props}
    assert cs.Plan.from_dict(json.loads(held["convsurgery.plans"])[0]) == cs.record(converted).plans[0]
    assert json.loads(held["convsurgery.base"])["name"] == "resnet10t"
    assert held["convsurgery.version"] == cs.__version__
    assert str(Path(cs.__file__).parent).encode() not in exported.read_bytes()
    assert str(Path.home()).encode() not in exported.read_bytes()


@pytest.mark.parametrize("opset", [20, 23])
def test_inlined_file_holds_standard_operators_only(converted: nn.Module, tmp_path: Path, opset: int) -> None:
    path = tmp_path / "inline.onnx"
    parity = cs.export_onnx(converted, path, inline=True, opset=opset)
    assert parity.error < 1e-4
    proto = onnx.load(path)
    assert not proto.functions
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}


def test_reference_runtime_agrees(converted: nn.Module, exported: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(1, 1, 32, 32)
    got = ReferenceEvaluator(str(exported)).run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        wanted = converted(x).numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_static_batch_and_own_inputs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).eval()
    x = torch.randn(3, 2, 9, 7)
    new = cs.convert(model, "all-conv->kerv-l1", example_inputs=x)
    parity = cs.export_onnx(new, tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False)
    assert parity.batches == (3,)
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [3, 2, 9, 7]


def test_unconverted_model_exports_too(tmp_path: Path) -> None:
    model = cs.create_model("resnet10t", num_classes=3, img_size=32)
    assert cs.export_onnx(model, tmp_path / "m.onnx").agreement == 1.0
    assert not onnx.load(tmp_path / "m.onnx").functions


def test_exported_model_is_not_changed(converted: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    converted.train()
    cs.export_onnx(converted, tmp_path / "m.onnx")
    assert converted.training
    converted.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in converted.state_dict().items())


def test_verify_accepts_the_right_model_and_real_data(converted: nn.Module, exported: Path, digits: object) -> None:
    parity = cs.verify_onnx(exported, converted, data=list(digits.val)[:2])
    assert parity.images == 1 + 2 + 5 + 128
    assert parity.error < 1e-4
    assert parity.agreement == 1.0
    assert "136 images in batches of 1, 2, 5" in str(parity)


def test_verify_names_the_first_node_that_differs(converted: nn.Module, exported: Path) -> None:
    import copy

    other = copy.deepcopy(converted)
    with torch.no_grad():
        other.layer2[0].conv1.weight[0] += 0.5
    with pytest.raises(ParityError, match=r"first node that differs: layer2\.0\.conv1 \(L2Dial2d\), by "):
        cs.verify_onnx(exported, other)
    other = copy.deepcopy(converted)
    with torch.no_grad():
        other.fc.weight[0] += 0.5
    with pytest.raises(ParityError, match=r"All operators agree; the difference arises behind the last.*layer4"):
        cs.verify_onnx(exported, other)


def test_nan_output_is_a_failure(converted: nn.Module, exported: Path) -> None:
    import copy

    broken = copy.deepcopy(converted)
    with torch.no_grad():
        broken.fc.bias[0] = float("nan")
    with pytest.raises(ParityError, match="does not compute"):
        cs.verify_onnx(exported, broken)


def test_wrong_body_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body with an error in it is caught before the file appears, and an older file survives."""
    from dataclasses import replace

    def wrong(form: object) -> list[str]:
        return [line.replace("Tanh", "Sigmoid") for line in right(form)]

    from convsurgery.operators import KervSigmoid

    right = KervSigmoid.onnx.body
    monkeypatch.setattr(KervSigmoid, "onnx", replace(KervSigmoid.onnx, body=wrong))
    model = cs.create_model("resnet10t", num_classes=10, img_size=32, zero_init_last=False)
    new = cs.convert(model, "conv[name=layer1.0.conv1]->kerv-sigmoid", start="copy")
    path = tmp_path / "model.onnx"
    path.write_text("older")
    with pytest.raises(ParityError, match=r"first node that differs: layer1\.0\.conv1"):
        cs.export_onnx(new, path)
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    path.unlink()
    with pytest.raises(ParityError):
        cs.export_onnx(new, path)
    assert list(tmp_path.iterdir()) == []


def test_body_that_does_not_parse_names_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(KervPoly, "onnx", replace(KervPoly.onnx, body=lambda form: ["nonsense"]))
    (dial,) = KervPoly.more_onnx
    monkeypatch.setattr(KervPoly, "more_onnx", (replace(dial, body=lambda form: ["nonsense"]),))
    model = cs.create_model("resnet10t", img_size=32)
    for start, told in (("copy", r"PolyKervolution2d \(d3_bias\)"), ("neutral", "PolyDial2d_degree3")):
        with pytest.raises(ExportError, match=f"the body of {told} does not parse"):
            cs.export_onnx(cs.convert(model, f"first-conv->kerv-poly by {start}"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("opset", "message"), [(17, "opset must be from 18 to 23, not 17"), (99, "not 99")])
def test_opsets_that_are_refused(opset: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        cs.export_onnx(cs.create_model("resnet10t", img_size=32), tmp_path / "m.onnx", opset=opset)


def test_unwritable_place(tmp_path: Path) -> None:
    model = cs.create_model("resnet10t", img_size=32)
    with pytest.raises(ExportError, match="no such writable folder"):
        cs.export_onnx(model, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(ExportError, match="it is a folder"):
        cs.export_onnx(model, tmp_path)


def test_reduced_precision_is_refused(tmp_path: Path) -> None:
    model = cs.create_model("resnet10t", img_size=32).half()
    with pytest.raises(ExportError, match=r"export wants a float32 model, this one holds torch\.float16"):
        cs.export_onnx(model, tmp_path / "m.onnx")


def test_model_torch_cannot_export(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: int(x.sum())] if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"torch\.onnx cannot export the model"):
        cs.export_onnx(Net(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_onnx(tmp_path: Path, converted: nn.Module) -> None:
    (tmp_path / "m.onnx").write_text("hello")
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load m\.onnx"):
        cs.verify_onnx(tmp_path / "m.onnx", converted)


def test_mobilenet_with_every_operator(tmp_path: Path) -> None:
    """Depthwise and grouped sites, timm's BatchNormAct2d, squeeze-excite without BatchNorm."""
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    model.train()(torch.randn(8, 3, 64, 64))
    rule = "depthwise->kerv-gauss; pointwise[index=0..9]->kerv-l2; pointwise->kerv-poly(degree=4); conv->kerv-sigmoid"
    new = cs.convert(model.eval(), rule)
    parity = cs.export_onnx(new, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 64, 64))
    assert parity.error < 1e-4
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node if node.domain == DOMAIN}
    assert operators == {"GaussDial2d", "L2Dial2d", "PolyDial2d_degree4", "SigmoidDial2d"}


def test_a_detector_is_refused_and_its_backbone_exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    detector = cs.create_model("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=3)
    new = cs.convert(detector, "first-conv->kerv-poly")
    with pytest.raises(ExportError, match=r"how many boxes they return depends on values.*export_onnx\(model.backbone"):
        cs.export_onnx(new, tmp_path / "detector.onnx")
    assert not list(tmp_path.iterdir())
    parity = cs.export_onnx(new.backbone, tmp_path / "backbone.onnx", example_inputs=torch.rand(2, 3, 64, 64))
    assert parity.error < 1e-5
    file = onnx.load(tmp_path / "backbone.onnx")
    assert [node.op_type for node in file.graph.node if node.domain == DOMAIN] == ["PolyDial2d_degree3"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rule", ["all-conv->kerv-poly", "conv-bn->fused", "first-conv->kerv-l2; conv-bn->fused"])
def test_same_padding_survives_the_export(rule: str, tmp_path: Path) -> None:
    model = cs.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5, img_size=49)
    new = cs.convert(model, rule)
    assert cs.export_onnx(new, tmp_path / "model.onnx", example_inputs=torch.rand(2, 3, 49, 49)).error < 1e-4


class Siamese(nn.Module):
    """One network, called with two images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 2)

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return self.head((self.net(one) - self.net(two)).mean((2, 3)))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(self.conv(x)))


@pytest.mark.parametrize(("operator", "inline"), [("kerv-gauss", False), ("kerv-poly", True), ("pnn", False)])
def test_modules_that_are_called_several_times(operator: str, inline: bool, tmp_path: Path) -> None:
    images = (torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12))
    for kind, inputs, names in (
        (Siamese, images, ["net.0", "net.0 (2)", "net.3", "net.3 (2)"]),
        (Repeated, images[:1], ["conv", "conv (2)", "conv (3)"]),
    ):
        model = cs.convert(kind().eval(), f"all-conv->{operator}", example_inputs=inputs)
        if operator in ("kerv-poly", "kerv-gauss"):
            cs.set_nonlinearity(model, 0.3)
        path = tmp_path / f"{kind.__name__}.onnx"
        assert cs.export_onnx(model, path, inline=inline, example_inputs=inputs) is not None
        if not inline:
            assert sorted(node.name for node in onnx.load(path).graph.node if node.domain) == names


def test_the_call_that_differs_is_found(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = cs.convert(Repeated().eval(), "all-conv->kerv-gauss", example_inputs=x)
    cs.set_nonlinearity(model, 0.3)
    cs.export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert cs.verify_onnx(tmp_path / "m.onnx", model, example_inputs=x) is not None
    with torch.no_grad():
        model.conv.weight.mul_(1.5)
    with pytest.raises(ParityError, match=r"The first node that differs: conv \("):
        cs.verify_onnx(tmp_path / "m.onnx", model, example_inputs=x)


@pytest.mark.parametrize("rule", ["first-conv->kerv-poly; last-conv->pnn", "conv-bn->fused"])
def test_the_base_is_in_the_metadata(rule: str, tmp_path: Path) -> None:
    import timm

    new = cs.convert(timm.create_model("resnet18").eval(), rule)
    cs.export_onnx(new, tmp_path / "m.onnx", verify=False)
    props = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(props["convsurgery.base"]) == {"name": "resnet18.a1_in1k", "kwargs": {}}
