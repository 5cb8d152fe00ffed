"""Other people's code on converted models: folding, pruning, saving, compilers. The same answers, or an error of ours.

Libraries beyond timm and torchvision come with the extra ``compat``; without them their tests are skipped.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import needs
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import ConversionError, ConvSurgeryError, ExportError

RULES = ["all-conv->kerv-poly", "first-conv->kerv-gauss", "conv[k=3]->pnn", "all-conv->kerv-poly by blend(0.5)"]


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def same_or_told(fold: Callable[[], nn.Module], image: Tensor, before: Tensor) -> str:
    """What folding came to: "same" answers, or the text of our error. Anything else fails."""
    try:
        folded = fold()
    except ConvSurgeryError as error:
        return str(error)
    out = folded(image)
    out = out[0] if isinstance(out, (tuple, list)) else out
    assert close(out, before), float((out - before).abs().max())
    return "same"


class Folding(nn.Module):
    """Two convolutions, each with its BatchNorm, statistics as after training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.conv2, self.bn2 = nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        with torch.no_grad():
            for norm in (self.bn1, self.bn2):
                norm.running_mean.normal_()  # type: ignore[union-attr]
                for tensor in (norm.running_var, norm.weight):
                    tensor.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return out


OPERATORS = ["kerv-poly", "kerv-gauss", "kerv-l1", "kerv-l2", "kerv-sigmoid", "kerv-linear", "pnn", "lbc"]


@pytest.mark.parametrize("operator", [*OPERATORS, "linear-mix(extend=true)", "kerv-poly by blend(0.5)"])
@torch.no_grad()
def test_folding_by_torch(operator: str) -> None:
    import torch.fx.experimental.optimization as by_fx
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    x = torch.randn(2, 4, 12, 12)
    model = cs.convert(Folding().eval(), f"first-conv->{operator}", example_inputs=x).eval()
    before = model(x)

    def folded() -> nn.Module:
        new = copy.deepcopy(model)
        new.conv1, new.bn1 = fuse_conv_bn_eval(new.conv1, new.bn1), nn.Identity()  # type: ignore[arg-type]
        return new

    assert "fuse_conv_bn_eval (utils/fusion.py) folds the filters of a convolution" in same_or_told(folded, x, before)
    with pytest.raises(AssertionError, match="did not find fuser method"):  # torch's own words, which name the classes
        torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["conv1", "bn1", "relu"]])
    frozen = torch.jit.freeze(torch.jit.trace(model, x))
    assert close(torch.jit.optimize_for_inference(frozen)(x), before)
    if operator == "pnn":
        with pytest.raises(ConvSurgeryError, match="keep a Perturbation2d whole"):
            by_fx.fuse(model)
    else:
        assert same_or_told(lambda: by_fx.fuse(model), x, before) == "same"


def fuse_conv_and_bn(conv: Any, norm: Any) -> nn.Conv2d:
    """A folding as many repositories have it: a new convolution of the old one's filters."""
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    scale = norm.weight / torch.sqrt(norm.eps + norm.running_var)
    fused.weight.data = conv.weight * scale.view(-1, 1, 1, 1)
    return fused


def _fuse_conv_bn(conv: Any, norm: Any) -> Any:
    """The same into the layer itself."""
    conv.weight = nn.Parameter(conv.weight * (norm.weight / torch.sqrt(norm.running_var)).view(-1, 1, 1, 1))
    return conv


class Rep(nn.Module):
    """Two branches that become one, as in structural reparameterisation; asks its children through a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wide(x) + self.narrow(x) if hasattr(self, "narrow") else self.wide(x)
        return out

    @staticmethod
    def kernel(conv: Any) -> Tensor:
        weight: Tensor = conv.weight
        return weight

    def switch_to_deploy(self) -> None:
        weight = self.kernel(self.wide) + F.pad(self.kernel(self.narrow), [1, 1, 1, 1])
        bias = self.wide.bias + self.narrow.bias  # type: ignore[operator]
        del self.narrow
        self.wide.weight.data, self.wide.bias.data = weight, bias  # type: ignore[union-attr]


class Strict(Rep):
    """One that asks for the class."""

    def switch_to_deploy(self) -> None:
        assert isinstance(self.wide, nn.Conv2d)


@torch.no_grad()
def test_folding_written_by_anybody() -> None:
    x = torch.randn(2, 4, 8, 8)
    model = cs.convert(Folding().eval(), "first-conv->kerv-gauss", example_inputs=x)
    for function in (fuse_conv_and_bn, _fuse_conv_bn):
        with pytest.raises(ConversionError, match=f"{function.__name__} .* folds the filters"):
            function(model.conv1, model.bn1)
        assert isinstance(function(model.conv2, model.bn2), nn.Conv2d)  # a Conv2d is theirs
    image = torch.randn(1, 3, 8, 8)
    for kind, text in ((Rep, "switch_to_deploy"), (Strict, "Strict.switch_to_deploy folds convolutions and found a")):
        rep = cs.convert(nn.Sequential(kind()).eval(), "all-conv->kerv-poly", example_inputs=image)
        twins = (rep, copy.deepcopy(rep), pickle.loads(pickle.dumps(rep)))
        for twin in twins:
            with pytest.raises(ConversionError, match=text):
                twin[0].switch_to_deploy()
    plain = nn.Sequential(Rep()).eval()
    null = cs.convert(plain, "all-conv->conv", example_inputs=image)
    null[0].switch_to_deploy()
    assert close(null(image), plain(image))


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        *(
            (name, True)
            for name in ("fuse", "_fuse_bn_tensor", "fuseConv", "convBnFuse", "fuse_conv_bn_eval", "fusing")
        ),
        *((name, True) for name in ("reparameterize", "switch_to_deploy", "fold_bn", "merge_conv_bn", "bn_fold")),
        *((name, True) for name in ("absorb_bn", "conv_bn_fusion", "squash_in_bn", "get_reparam_kernel")),
        *((name, False) for name in ("diffusion", "refuse", "confuse_labels", "is_fused", "train", "unfold", "merge")),
        *((name, False) for name in ("init_fusion_weights", "fold", "manifold", "test_fuse", "deploy", "forward")),
    ],
)
def test_functions_that_fold_are_known_by_their_names(name: str, folds: bool) -> None:
    layer = cs.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3)), "all-conv->kerv-gauss", example_inputs=torch.randn(1, 3, 8, 8)
    )
    space: dict[str, Any] = {}
    exec(f"def {name}(layer):\n    return layer.weight\n", space)
    if folds:
        with pytest.raises(ConversionError, match=f"^{name} "):
            space[name](layer[0])
    else:
        assert isinstance(space[name](layer[0]), nn.Parameter)


def test_filters_are_read_and_set_like_a_parameter() -> None:
    """What folds is refused; everything else that torch does with a Parameter goes on."""
    from torch.nn.utils import parametrizations, prune

    x = torch.randn(1, 4, 8, 8)

    def layer() -> Any:
        return cs.convert(Folding().eval(), "first-conv->kerv-gauss", example_inputs=x).conv1

    one = layer()
    assert isinstance(one.weight, nn.Parameter)
    assert "weight" in dict(one.named_parameters())
    one.weight = nn.Parameter(one.weight * 2)
    assert torch.equal(one.state_dict()["weight"], one.weight)
    del one.weight
    assert not hasattr(one, "weight")
    for wrap in (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: torch.nn.utils.weight_norm(m),
        lambda m: torch.nn.utils.spectral_norm(m),
        lambda m: parametrizations.weight_norm(m),
    ):
        with_it = wrap(layer())
        with_it(x).sum().backward()
        assert any(p.grad is not None for p in with_it.parameters())
    one = layer()
    assert torch.equal(torch.compile(one, backend="eager", fullgraph=True)(x), one(x))


@pytest.mark.parametrize(
    "name",
    ["repvgg_a0", "tiny_vit_5m_224", "repghostnet_050"],
)
@torch.no_grad()
def test_reparameterisation_by_timm(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    told = set()
    for rule in RULES[:2]:
        new = cs.convert(model, rule).eval()
        before = new(x)
        told.add(same_or_told(lambda new=new: timm.utils.reparameterize_model(new), x, before))
    assert told - {"same"}
    ready = timm.utils.reparameterize_model(model)
    assert close(cs.convert(ready, "all-conv->kerv-poly")(x), model(x))
    if name not in ("repghostnet_050", "lcnetv2_base", "nextvit_small", "ghostnetv3_050"):
        assert any("can fold its convolutions by" in note for note in cs.plan(model, "all-conv->kerv-poly").notes)


@pytest.mark.parametrize(
    "name",
    [
        "mobileone_s0",
        "levit_conv_128s",
        "fastvit_t8",
        "repvit_m0_9",
        "shvit_s1",
        "iformer_t",
        "efficientvim_m1",
        "efficientvit_m0",
        "ghostnetv3_050",
        "lcnetv2_base",
        "nextvit_small",
    ],
)
def test_reparameterisation_of_more_of_timm(name: str) -> None:
    needs("ultralytics", "compat")  # a minute, for those who asked for the long way
    test_reparameterisation_by_timm(name)


@pytest.mark.parametrize("config", ["yolov8n.yaml", "yolo11n.yaml", "yolov10n.yaml", "yolov5n.yaml"])
@torch.no_grad()
def test_ultralytics(config: str) -> None:
    needs("ultralytics", "compat")
    from ultralytics.nn.tasks import DetectionModel

    model, x = DetectionModel(config, verbose=False).eval(), torch.rand(1, 3, 64, 64)

    def boxes(out: Any) -> Tensor:
        found: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return found

    before = boxes(model(x))
    for rule in ("all-conv->conv", "first-conv->kerv-poly", "all-conv->kerv-gauss", "conv[k=3]->pnn"):
        new = cs.convert(model, rule, example_inputs=x).eval()
        told = same_or_told(lambda new=new: copy.deepcopy(new).fuse(verbose=False), x, boxes(new(x)))
        assert (told == "same") == (rule == "all-conv->conv")
    fused = copy.deepcopy(model).fuse(verbose=False)
    assert close(boxes(fused(x)), before)
    after = cs.convert(fused, "all-conv->kerv-poly", example_inputs=x)
    assert close(boxes(after(x)), before)
    assert close(boxes(after.fuse(verbose=False)(x)), before)  # its predictor asks for it again


@torch.no_grad()
def test_segmentation_models(tmp_path: Path) -> None:
    needs("segmentation_models_pytorch", "compat")
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.encoders.mobileone import reparameterize_model

    x = torch.randn(1, 3, 64, 64)
    model = smp.Unet("mobileone_s0", encoder_weights=None).eval()
    for rule in ("all-conv->conv", "all-conv->kerv-poly"):
        new = cs.convert(model, rule, example_inputs=x).eval()
        told = same_or_told(lambda new=new: reparameterize_model(new), x, new(x))
        assert (told == "same") == (rule == "all-conv->conv")
    plain = smp.Unet("resnet18", encoder_weights=None).eval()
    check_saving(plain, lambda: smp.Unet("resnet18", encoder_weights=None), x, tmp_path)
    with pytest.raises(RuntimeError, match="state_dict"):
        smp.from_pretrained(str(tmp_path / "saved"))


@torch.no_grad()
def test_transformers(tmp_path: Path) -> None:
    needs("transformers", "compat")
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5)
    model = ResNetForImageClassification(config).eval()
    check_saving(model, lambda: ResNetForImageClassification(config), torch.randn(1, 3, 64, 64), tmp_path)


def check_subclasses(model: nn.Module, x: Tensor, least: int, tmp_path: Path) -> None:
    def out(model: nn.Module) -> Tensor:
        found = model(x)
        return found if isinstance(found, Tensor) else found.last_hidden_state

    plan = cs.plan(model, "all-conv->conv", example_inputs=x)
    assert len(plan.edits) >= least
    assert all(entry.reason == "no forward call reaches it" for entry in plan.entries if entry not in plan.edits)
    for rule in ("all-conv->conv", "all-conv->kerv-poly"):
        assert torch.equal(out(cs.convert(model, rule, example_inputs=x)), out(model))
    new = cs.convert(model, "first-conv->kerv-gauss; conv[k=3]->lbc; all-conv->kerv-poly", example_inputs=x)
    cs.set_nonlinearity(new, 0.1)
    cs.save(new, tmp_path / "out", check=False)
    assert torch.equal(out(cs.load(tmp_path / "out", base=model)), out(new))
    assert close(out(cs.fuse(new)), out(new))


@torch.no_grad()
def test_subclasses_of_segmentation_models(tmp_path: Path) -> None:
    needs("segmentation_models_pytorch", "compat")
    import segmentation_models_pytorch as smp

    model = smp.Unet("efficientnet-b0", encoder_weights=None).eval()
    check_subclasses(model, torch.randn(1, 3, 64, 64), 91, tmp_path)


@torch.no_grad()
def test_subclasses_of_transformers(tmp_path: Path) -> None:
    needs("transformers", "compat")
    from transformers import BitConfig, BitModel

    config = BitConfig(depths=[1, 1], hidden_sizes=[128, 256], embedding_size=32, global_padding="same")
    check_subclasses(BitModel(config).eval(), torch.randn(1, 3, 64, 96), 7, tmp_path)


def check_saving(model: nn.Module, build: Callable[[], nn.Module], x: Tensor, tmp_path: Path) -> None:
    new = cs.convert(model, "first-conv->kerv-poly; last-conv->kerv-gauss", example_inputs=x).eval()
    cs.set_nonlinearity(new, 0.2)
    with pytest.warns(cs.errors.ConvSurgeryWarning, match="builds the model as it was before the conversion"):
        new.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    loaded = cs.load(tmp_path / "saved" / "convsurgery", base=build()).eval()
    outs = [out if isinstance(out, Tensor) else out.logits for out in (loaded(x), new(x))]
    assert torch.equal(*outs)
    assert copy.deepcopy(new).save_pretrained.owner is not new  # type: ignore[union-attr]


def test_saving_by_timm_is_refused_by_its_loader(tmp_path: Path) -> None:
    needs("huggingface_hub", "compat")
    new = cs.convert(timm.create_model("resnet18").eval(), "first-conv->kerv-poly")
    timm.models.save_for_hf(new, tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv1.balance"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("operator", ["conv", *OPERATORS])
def test_pruning(operator: str) -> None:
    needs("torch_pruning", "compat")
    import torch_pruning as tp

    from convsurgery.pruning import torch_pruning

    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("resnet18").eval()

    def pruned(model: nn.Module) -> nn.Module:
        with torch_pruning(model) as known:
            importance = tp.importance.GroupMagnitudeImportance(target_types=known.target_types)
            pruner = tp.pruner.BasePruner(
                model, x, importance, pruning_ratio=0.5, ignored_layers=[model.fc], **known.options
            )
        pruner.step()
        return model

    new = cs.convert(model, f"all-conv->{operator}").eval()
    if operator in ("pnn", "lbc"):
        with pytest.raises(ConversionError, match="prune the model first and convert it then"):
            pruned(new)
        first = pruned(copy.deepcopy(model))
        assert cs.convert(first, f"all-conv->{operator}", example_inputs=x)(x).shape == (1, 1000)
        return
    small, reference = pruned(new), pruned(copy.deepcopy(model))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in reference.parameters())
    assert all("forward" not in vars(module) for module in small.modules())
    if operator != "kerv-l1":  # whose start is no convolution
        assert torch.equal(small(x), reference(x))
    assert close(cs.fuse(small)(x), small(x))


def test_pruning_refuses_what_it_would_break() -> None:
    needs("torch_pruning", "compat")
    from convsurgery.pruning import torch_pruning

    x = torch.randn(2, 4, 12, 12)
    fitted = cs.convert(Folding().eval(), "all-conv->kerv-poly", example_inputs=x, calibration=x)
    grouped = cs.convert(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "all-conv->kerv-poly", example_inputs=x)
    blended = cs.convert(Folding().eval(), "all-conv->kerv-poly by blend", example_inputs=x)
    for model, text in ((fitted, "for each channel"), (grouped, "in 4 groups"), (blended, "is a Blend")):
        with pytest.raises(ConversionError, match=text), torch_pruning(model):
            pass


def test_torchscript_names_the_way_out() -> None:
    x = torch.randn(1, 4, 12, 12)
    for operator in OPERATORS:
        model = cs.convert(Folding().eval(), f"all-conv->{operator}", example_inputs=x)
        with pytest.raises(ExportError, match=r"torch\.jit\.trace"):
            torch.jit.script(model)
        assert close(torch.jit.trace(model, x)(x), model(x))
    null = cs.convert(Folding().eval(), "all-conv->conv", example_inputs=x)
    assert torch.equal(torch.jit.script(null)(x), null(x))


LOADS = """
import torch
{line}
x, y = torch.load({folder!r} + "/xy.pt")
for name, load in (("a.pt2", lambda f: torch.export.load(f).module()), ("a.ts", torch.jit.load)):
    assert torch.equal(load({folder!r} + "/" + name)(x), y), name
"""


def test_exported_programs_load_in_a_new_process(tmp_path: Path) -> None:
    x = torch.randn(1, 4, 12, 12)
    rule = "first-conv->kerv-poly; last-conv->lbc"
    model = cs.convert(Folding().eval(), rule, example_inputs=x).requires_grad_(False)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "a.pt2")
    torch.export.save(program.run_decompositions(), tmp_path / "alone.pt2")
    torch.jit.save(torch.jit.trace(model, x), tmp_path / "a.ts")
    torch.save((x, model(x)), tmp_path / "xy.pt")
    for line in ("import convsurgery", "import convsurgery.functional"):
        code = LOADS.format(line=line, folder=str(tmp_path))
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    alone = LOADS.format(line="", folder=str(tmp_path)).replace("a.pt2", "alone.pt2")
    alone = alone.replace(', ("a.ts", torch.jit.load)', ",")
    subprocess.run([sys.executable, "-c", alone], check=True, timeout=300)
