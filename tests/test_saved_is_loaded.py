"""What is saved is what loads, or ``save`` says at once what ``load`` will need."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import convsurgery as cs
from convsurgery import zoo
from convsurgery.errors import StorageError

X = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
RULE = "first-conv->kerv-poly"


def small() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet").eval()
    return model


def scaled(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] / 255,)


def with_pre_hook(model: nn.Module) -> None:
    model.register_forward_pre_hook(scaled)


def with_hook(model: nn.Module) -> None:
    model.get_submodule("bn1").register_forward_hook(lambda module, args, out: out * 2)


def with_own_forward(model: nn.Module) -> None:
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 3, model)  # type: ignore


def with_inner_forward(model: nn.Module) -> None:
    layer = model.get_submodule("layer1")
    layer.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, x) + 1, layer)  # type: ignore


def with_other_layer(model: nn.Module) -> None:
    model.act1 = nn.Tanh()


def with_other_option(model: nn.Module) -> None:
    model.get_submodule("bn1").eps = 0.3  # type: ignore[assignment]


def with_state_hook(model: nn.Module) -> None:
    model.register_load_state_dict_post_hook(lambda module, keys: None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_pre_hook, "the model carries a forward pre-hook"),
        (with_hook, "bn1 carries a forward hook"),
        (with_own_forward, "forward of the model was replaced|no name of timm"),
        (with_inner_forward, "forward of layer1 was replaced|no name of timm"),
        (with_other_layer, "act1 is a Tanh here|no name of timm"),
        (with_other_option, "other outputs|no name of timm"),
        (with_state_hook, "load_state_dict post-hook"),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_behaviour_hung_on_from_outside_is_asked_for(
    change: Callable[[nn.Module], None], says: str, attached: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("test_resnet").eval() if attached else small()
    change(model)
    new = cs.convert(model, RULE, example_inputs=X)
    with pytest.warns(UserWarning, match=rf"base=the unconverted model[\s\S]*({says})"):
        cs.save(new, tmp_path / "out")
    with pytest.raises(StorageError, match=r"pass the unconverted model"):
        cs.load(tmp_path / "out")
    assert torch.equal(cs.load(tmp_path / "out", base=model)(X), new(X))


def test_a_folder_that_needs_nothing_says_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    new = cs.convert(small(), RULE)
    cs.save(new, tmp_path / "out")
    assert not [w for w in recwarn if "base=" in str(w.message)]
    assert torch.equal(cs.load(tmp_path / "out")(X), new(X))


def test_saving_disturbs_nothing(tmp_path: Path) -> None:
    new = cs.convert(small(), RULE).train()
    state = {key: value.clone() for key, value in new.state_dict().items()}
    drawn = torch.get_rng_state()
    new.get_submodule("bn1").eval()
    cs.save(new, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert new.training
    assert not new.get_submodule("bn1").training
    assert all(torch.equal(value, state[key]) for key, value in new.state_dict().items())


def test_a_stem_made_by_hand_is_no_resnet18(tmp_path: Path) -> None:
    model = torchvision.models.resnet18().eval()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    new = cs.convert(model, RULE, example_inputs=X)
    with pytest.warns(UserWarning, match="base=the unconverted model"):
        cs.save(new, tmp_path / "out")
    assert torch.equal(cs.load(tmp_path / "out", base=model)(X), new(X))


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


def test_a_class_of_ones_own_is_asked_for_at_once(tmp_path: Path) -> None:
    model = Mine().eval()
    new = cs.convert(model, RULE, example_inputs=X)
    with pytest.warns(UserWarning, match="base=the unconverted model.*Mine is built by no name"):
        cs.save(new, tmp_path / "out")
    assert torch.equal(cs.load(tmp_path / "out", base=model)(X), new(X))


def test_a_hook_that_drops_keys_is_refused(tmp_path: Path) -> None:
    new = cs.convert(Mine().eval(), RULE, example_inputs=X)

    def drop(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        del state["bn.weight"]

    new._register_state_dict_hook(drop)
    with pytest.raises(StorageError, match=r"leaves out bn\.weight: a state_dict hook"):
        cs.save(new, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extra_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(Mine):
        def get_extra_state(self) -> Any:
            return {"step": 3}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(StorageError, match="_extra_state is a dict, no tensor"):
        cs.save(cs.convert(Extra().eval(), RULE, example_inputs=X), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extra_state_that_is_a_tensor_comes_back(tmp_path: Path) -> None:
    class Extra(Mine):
        step = 0

        def get_extra_state(self) -> Any:
            return torch.tensor(self.step)

        def set_extra_state(self, state: Any) -> None:
            self.step = int(state)

    new = cs.convert(Extra().eval(), RULE, example_inputs=X)
    new.step = 7  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="base="):
        cs.save(new, tmp_path / "out")
    assert cs.load(tmp_path / "out", base=Extra()).step == 7


def test_a_wrapper_of_a_converted_model_is_refused(tmp_path: Path) -> None:
    new = cs.convert(small(), RULE)
    averaged = torch.optim.swa_utils.AveragedModel(new)
    with pytest.raises(StorageError, match=r"AveragedModel holds a converted model as 'module'.*save\(model\.module"):
        cs.save(averaged, tmp_path / "out")
    whole = nn.Sequential(new, nn.Softmax(1))
    with pytest.raises(StorageError, match=r"as '0'"):
        cs.save(whole, tmp_path / "out")
    cs.save(averaged.module, tmp_path / "out")
    assert torch.equal(cs.load(tmp_path / "out")(X), new(X))


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detectors_with_their_own_classes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5).eval()
    new = cs.convert(model, "first-conv->kerv-poly")
    cs.save(new, tmp_path / "out")
    loaded = cs.load(tmp_path / "out")
    images = [torch.rand(3, 96, 96)]
    with torch.no_grad():
        for one, other in zip(new(images), loaded(images), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    torch.manual_seed(0)
    model = Tied().eval()
    new = cs.convert(model, "all-conv->kerv-poly", example_inputs=X)
    assert new.a.weight is new.b.weight
    with pytest.warns(UserWarning, match="base="):
        cs.save(new, tmp_path / "out")
    loaded = cs.load(tmp_path / "out", base=model)
    assert loaded.a.weight is loaded.b.weight
    for rule in ("all-conv->pnn", "all-conv->lbc", "all-conv->linear-mix"):
        text = str(cs.plan(model, rule, example_inputs=X))
        assert "a and b share their filters" in " ".join(text.split()), rule
    assert "share their filters" not in str(cs.plan(model, "all-conv->kerv-poly", example_inputs=X))


@pytest.mark.parametrize("operator", ["pnn", "pnn by random", "lbc", "linear-mix(extend=true)"])
@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3, "groups": 4}], ids=["1x1", "depthwise"])
def test_the_originals_checkpoint_is_known_by_layers_with_weights_of_their_own(
    operator: str, options: dict[str, Any]
) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, **options)), torch.randn(2, 4, 9, 9)
    new = cs.convert(model, f"all-conv->{operator}", example_inputs=x)
    before, own = new(x), {key: value.clone() for key, value in new.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"look like the weights of the model before its conversion"):
            new.load_state_dict(model.state_dict(), strict=strict)
    new.load_state_dict(own)
    assert torch.equal(new(x), before)
