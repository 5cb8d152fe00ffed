"""Calibration: the same each time, from whatever images come in, and what it must not touch."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_starts import pictures, relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, TensorDataset

import convsurgery as cs
from convsurgery.adapt import DataSplit
from convsurgery.adapt.calibration import Calibration
from convsurgery.adapt.fitting import LayerFit
from convsurgery.adapt.images import calibration_images
from convsurgery.errors import ConversionError, ConvSurgeryError, DataError
from convsurgery.operators import ridge, sparsefit
from convsurgery.operators.kervolution import NeutralFit

#: one layer for each kind of fit
RULE = (
    "conv[name=one]->kerv-poly; conv[name=two]->lbc(filters=12) by fit; conv[name=three]->kerv-l1 by fit; "
    "conv[name=four]->linear-mix(extend=true) by fit; conv[name=five]->kerv-gauss by copy"
)


class Net(nn.Module):
    """Five convolutions in a row, with and without BatchNorms, the activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.two, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.three = nn.Conv2d(6, 4, 3, padding=1)
        self.four, self.norm4 = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.five = nn.Conv2d(6, 5, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.one(x)))
        x = self.act(self.norm2(self.two(x)))
        x = self.act(self.three(x))
        x = self.act(self.norm4(self.four(x)))
        return self.five(x).mean((2, 3))


def images(count: int, seed: int = 0) -> Tensor:
    return pictures(count, 3, 12, seed)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for norm in (model.norm1, model.norm2, model.norm4):
        norm.momentum = None  # the mean of what is seen
    with torch.no_grad():
        model.train()(images(64, seed=9))
    return model.eval()


def to_fit(model: nn.Module, rule: str = RULE) -> nn.Module:
    """Converted and not calibrated, which :func:`cs.convert` refuses for starts by fit."""
    return cs.apply(model, cs.plan(model, rule, example_inputs=images(2)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def calibrated(data: Any, rule: str = RULE, **options: Any) -> tuple[nn.Module, Calibration]:
    model = net()
    new = to_fit(model, rule)
    return new, cs.calibrate(new, data, teacher=model, **options)


def outputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(out.detach().clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


# --- what it does


def test_every_kind_of_fit_makes_its_layer_better() -> None:
    x = images(24)
    new, found = calibrated(x)
    assert list(found) == ["one", "two", "three", "four", "five"]
    kinds = {layer.name: (layer.operator, layer.method) for layer in found.layers}
    assert kinds == {
        "one": ("kerv-poly", "neutral"),
        "two": ("lbc", "fit"),
        "three": ("kerv-l1", "fit"),
        "four": ("linear-mix", "fit"),
        "five": ("kerv-gauss", "affine"),
    }
    for layer in found.layers:
        if layer.name != "one":  # whose default is nearer than the target asks for
            assert layer.after < layer.before
        assert 0 < layer.after < 1
    assert found["one"] <= 1e-3
    model = net()
    # Later layers are fitted to what the earlier ones now give, for the teacher's outputs.
    for name in ("three", "five"):
        error = relative_error(outputs(new, name, x), outputs(model, name, x))
        assert error == pytest.approx(found[name], rel=1e-4)
    for norm, layer in (("norm1", "one"), ("norm2", "two"), ("norm4", "four")):
        error = relative_error(outputs(new, norm, x), outputs(model, norm, x))
        assert error == pytest.approx(found[layer], rel=2e-2)


class Recurrent(nn.Module):
    """One convolution called twice; what is in between works in place, or does not."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.conv, self.act, self.inplace = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        x = 1 * x
        y = self.act(self.conv(x))
        x = x.add_(y) if self.inplace else x + y
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("operator", ["kerv-poly", "lbc by fit", "kerv-l1 by fit"])
def test_layer_that_is_called_twice_is_fitted_to_both_calls(operator: str) -> None:
    x, found = images(12), []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Recurrent(inplace=inplace).eval()
        new = to_fit(model, f"all-conv->{operator}")
        assert cs.record(new).edits[0].site.calls == 2
        found.append((cs.calibrate(new, x, teacher=model), state(new)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_result_is_a_mapping_from_names_to_errors() -> None:
    told: list[LayerFit] = []
    _, found = calibrated(images(8), on_layer=told.append)
    assert tuple(told) == found.layers
    assert dict(found) == {layer.name: layer.after for layer in told}
    assert len(found) == 5
    assert "two" in found
    with pytest.raises(KeyError, match="six"):
        found["six"]


def test_table_fits_80_columns_and_names_every_layer() -> None:
    model = cs.create_model("resnet10t", num_classes=5, in_chans=1, img_size=32)
    x = pictures(2, 1, 32)
    rule = "conv[k=3]->lbc(filters=256); pointwise->kerv-sigmoid"
    new = cs.convert(model.eval(), rule, calibration=x, on_layer=(told := []).append)
    table = str(Calibration(tuple(told)))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"relative error at the output of {len(told)} layers"
    for word in ("layer", "operator", "fitted by", "before", "after", "note"):
        assert word in lines[1]
    # A long name goes on in the next lines of its column.
    width = lines[1].index("operator")
    rows: list[list[str]] = []
    for line in lines[3:]:
        if line[width:].split("  ")[0].strip():
            rows.append([line, ""])
        rows[-1][1] += line[:width].strip()
    assert [name for _, name in rows] == [layer.name for layer in told]
    for layer, (line, _) in zip(told, rows, strict=True):
        assert layer.operator in line
        assert ("least squares" if layer.method == "fit" else "ε, affine") in line
        assert f" {layer.before:.2g} " in line
        assert f" {layer.after:.2g}" in line
    assert "ridge raised to" in table
    assert "ε = " in table
    assert [e.site.name for e in cs.record(new).edits] == [layer.name for layer in told]


def test_table_names_the_model_itself_where_that_is_the_layer() -> None:
    torch.manual_seed(0)
    new = cs.convert(nn.Conv2d(3, 4, 3), "all-conv->kerv-poly", example_inputs=images(2))
    torch.manual_seed(0)
    found = cs.calibrate(new, images(4), teacher=nn.Conv2d(3, 4, 3))
    assert list(found) == [""]
    assert str(found).splitlines()[3].startswith("(the model itself)")


def test_nothing_is_printed_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    calibrated(images(4))
    assert capsys.readouterr() == ("", "")


# --- the same each time


def loaders(x: Tensor) -> dict[str, Any]:
    data = TensorDataset(x, torch.arange(len(x)))
    generator = torch.Generator().manual_seed(4)
    return {
        "plain": DataLoader(data, 8),
        "shuffled": DataLoader(data, 8, shuffle=True),
        "own generator": DataLoader(data, 8, shuffle=True, generator=generator),
        "sampler": DataLoader(data, 8, sampler=SubsetRandomSampler(range(len(x)), generator)),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "shuffled",
        "own generator",
        "sampler",
    ],
)
def test_calibration_is_the_same_each_time(kind: str) -> None:
    model = net()
    data = loaders(images(24))[kind]
    owned = [g for g in (data.generator, getattr(data.sampler, "generator", None)) if g is not None]
    found = []
    for seed in (1, 2):
        new = to_fit(model)
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), [g.get_state() for g in owned]
        result = cs.calibrate(new, data, teacher=model)
        found.append((result, state(new)))
        # What the caller draws next is as if nothing had been drawn here.
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert all(torch.equal(g.get_state(), old) for g, old in zip(owned, before[2], strict=True))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])
    if kind != "plain":
        order = [torch.cat([labels for _, labels in data]) for _ in range(2)]
        assert not torch.equal(*order)  # outside it goes on shuffling


def test_calibrating_again_changes_nothing() -> None:
    x = images(16)
    model = net()
    new = to_fit(model)
    first = cs.calibrate(new, x, teacher=model)
    before, done = state(new), cs.record(new)
    again = cs.calibrate(new, x, teacher=model)
    assert {name: layer.after for name, layer in zip(first, again.layers, strict=True)} == pytest.approx(dict(first))
    after = state(new)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)
    assert cs.record(new) == done


def test_convert_in_place_and_calibrate_give_the_same_bits() -> None:
    x = images(16)
    model = net()
    copied = cs.convert(model, RULE, example_inputs=x, calibration=x)
    in_place = net()
    optimised = in_place.norm1.weight
    assert cs.convert_(in_place, RULE, example_inputs=x, calibration=x) is in_place
    assert in_place.norm1.weight is optimised
    assert in_place.one.weight is not model.one.weight
    new = to_fit(model)
    cs.calibrate(new, x, teacher=model)
    assert_same(state(in_place), state(copied))
    assert_same(state(new), state(copied))
    assert cs.record(in_place) == cs.record(copied)
    assert cs.record(copied).norms == cs.record(new).norms
    assert not cs.record(new).norms  # the dial leaves nothing to a BatchNorm
    for made in (in_place, new):
        assert made.norm1.eps == copied.norm1.eps == model.norm1.eps
        assert torch.equal(made(x), copied(x))


# --- what images are


@pytest.fixture
def timm_model() -> nn.Module:
    torch.manual_seed(0)
    model = cs.create_model("resnet10t", num_classes=5, img_size=32).eval()
    nn.init.normal_(model.fc.bias)  # of weights as they were initialised there would be another warning
    return model


def test_every_form_of_data_gives_the_same() -> None:
    x = images(20)
    labels = torch.arange(20)
    forms = {
        "tensor": (x, 16),
        "loader": (DataLoader(TensorDataset(x, labels), 16), None),
        "list": ([x[:16], x[16:]], None),
        "tuples": ([(x[:16], labels[:16]), (x[16:], None)], None),
        "lists": ([[x[:16], labels[:16]], [x[16:]]], None),
        "split": (DataSplit(DataLoader(TensorDataset(x, labels), 16), None, 5, "mine"), None),
        "double": ([x[:16].double(), x[16:].double()], None),
        "repeatable": (type("Repeatable", (), {"__iter__": lambda self: iter([x[:16], x[16:]])})(), None),
    }
    states, model = {}, net()
    for name, (data, size) in forms.items():
        source = calibration_images(data, model, **({} if size is None else {"batch_size": size}))
        for _ in range(2):
            found = list(source)
            assert [len(batch) for batch in found] == [16, 4], name
            assert torch.equal(torch.cat(found), x), name
        new = to_fit(model)
        cs.calibrate(new, source, teacher=model)
        states[name] = state(new)
        if size is None:
            again = to_fit(model)
            cs.calibrate(again, data, teacher=model)
            assert_same(state(again), states[name])
    for name, found in states.items():
        assert_same(found, states["tensor"]), name


@pytest.mark.parametrize("limit", [1, 8, 9, 20, 99, None])
def test_limit_counts_images_over_batches(limit: int | None) -> None:
    x = images(20)
    for data in ([x[:8], x[8:12], x[12:]], loaders(x)["plain"]):
        source = calibration_images(data, net(), images=limit)
        for _ in range(2):
            assert torch.equal(torch.cat(list(source)), x[:limit])
    (one, _), (two, _) = calibrated([x], images=limit), calibrated([x[:limit]])
    assert_same(state(one), state(two))
    for data in (x, [x]):
        narrowed = calibration_images(calibration_images(data, net(), images=10), net(), images=limit)
        assert sum(map(len, narrowed)) == min(20, 10 if limit is None else limit, 10)


def test_folder_is_prepared_as_in_validation(timm_model: nn.Module, tmp_path: Path) -> None:
    """Flat images of another size than the model's: whatever resizes and crops them, each pixel is known."""
    colours = [(10, 200, 30), (0, 0, 255), (90, 91, 92)]
    # The order is that of the paths, and folders below are gone through.
    names = ["b/0.png", "a/1.PNG", "c.jpeg"]
    for name, colour in zip(names, colours, strict=True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (50, 37), colour).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    found = list(calibration_images(tmp_path, timm_model, batch_size=2))
    assert [len(batch) for batch in found] == [2, 1]
    stacked = torch.cat(found)
    size = timm_model.pretrained_cfg["input_size"][1]
    assert stacked.shape[0] == 3
    assert stacked.shape[2] == stacked.shape[3] <= size
    mean, std = (torch.tensor(timm_model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for image, place in zip(stacked, (1, 0, 2), strict=True):
        wanted = (torch.tensor(colours[place]).view(3, 1, 1) / 255 - mean) / std
        assert (image - wanted).abs().max() < 0.05 if place == 2 else 1e-5  # jpeg
    new = cs.convert(timm_model, "conv[name=conv1.0]->kerv-poly")
    other = copy.deepcopy(new)
    one = cs.calibrate(new, str(tmp_path), teacher=timm_model)
    two = cs.calibrate(other, stacked, teacher=timm_model)
    assert one == two
    assert_same(state(new), state(other))


def test_folder_for_a_model_of_one_channel_is_read_in_grey(tmp_path: Path) -> None:
    model = cs.create_model("resnet10t", num_classes=5, in_chans=1, img_size=32).eval()
    Image.new("RGB", (40, 40), (100, 100, 100)).save(tmp_path / "x.png")
    (found,) = calibration_images(tmp_path, model)
    assert found.shape[:2] == (1, 1)


def test_images_take_the_models_dtype() -> None:
    x = images(6)
    for dtype in (torch.float64, torch.bfloat16):
        (found,) = calibration_images(x, net().to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found, x.to(dtype))


def batches(*, of: Tensor) -> Iterator[Tensor]:
    yield of


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: [], "the calibration data is empty"),
        (lambda x: x[:0], "the calibration data is empty"),
        (lambda x: [x[:0], x[:0]], "the calibration data is empty"),
        (lambda x: DataLoader(TensorDataset(x), 64, drop_last=True), "the calibration data is empty"),
        (lambda x: batches(of=x), r"a generator can be gone through once only: pass a list of batches, a loader or a"),
        (lambda x: iter([x]), "a list_iterator can be gone through once only"),
        (lambda x: map(abs, [x]), "a map can be gone through once only"),
        (lambda x: 64, "takes a tensor, a data set, a loader, a list of batches or a folder, not a int"),
        (lambda x: TensorDataset(x[:0]), "the calibration data is empty"),
        (lambda x: x[0], r"images come as \(N, C, H, W\), not \(3, 12, 12\)"),
        (lambda x: list(x), r"images come as \(N, C, H, W\), not \(3, 12, 12\)"),
        (lambda x: [x.flatten(1)], r"images come as \(N, C, H, W\), not \(8, 432\)"),
        (lambda x: [x, (x[0], 3)], r"images come as \(N, C, H, W\)"),
        (lambda x: [{"image": x}], "a batch must be a tensor of images, or a tuple that begins with one, not a"),
        (lambda x: [(None, x)], "or a tuple that begins with one, not a NoneType"),
        (lambda x: x.numpy(), "a batch must be a tensor of images"),
        (lambda x: [x.numpy()], "a batch must be a tensor of images"),
        (lambda x: (x * 50).to(torch.uint8), "images of uint8: scale them to 0..1 and normalise them as in training$"),
        (lambda x: [x.long()], "images of int64: scale them to 0..1"),
        (lambda x: x > 0, "images of bool: scale them to 0..1"),
        (lambda x: torch.cat([x, x / 0]), "an image holds NaN or infinity"),
        (lambda x: [x, x * torch.nan], "an image holds NaN or infinity"),
        (lambda x: "/nowhere/at/all", "there is no folder /nowhere/at/all"),
        (lambda x: Path(__file__), "there is no folder"),
    ],
)
def test_images_that_are_none(make: Any, message: str) -> None:
    model = net()
    new = to_fit(model)
    with pytest.raises(DataError, match=message):
        cs.calibrate(new, make(images(8)), teacher=model)
    in_place = net()
    with pytest.raises(DataError, match=message):
        cs.convert_(in_place, RULE, example_inputs=images(2), calibration=make(images(8)))
    assert_same(state(in_place), state(model))
    assert type(in_place.one) is nn.Conv2d


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: [()], "a batch must be a tensor of images, or a tuple that begins with one"),
        (lambda x: [{"image": x}], "not a dict"),
        (lambda x: x.numpy(), "not a ndarray"),
    ],
)
def test_batches_that_are_none(make: Any, message: str) -> None:
    model = net()
    with pytest.raises(DataError, match=message):
        cs.calibrate(to_fit(model), make(images(8)), teacher=model)


@pytest.mark.parametrize(
    "options", [{"images": -1}, {"target": 0.0}, {"target": -1.0}, {"target": float("nan")}, {"steps": -1}]
)
def test_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    model = net()
    new = to_fit(model, "conv[name=one]->kerv-poly")
    with pytest.raises(ConvSurgeryError, match=f"{next(iter(options))} must be"):
        cs.calibrate(new, images(8), teacher=model, **options)


class Augmented(Dataset[Any]):
    """Another picture each time it is asked."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return images(1, index)[0] + torch.rand(()), index


@pytest.mark.parametrize("kind", ["augmented", "replacement"])
def test_what_is_drawn_late_is_the_same_in_every_pass(kind: str) -> None:
    data = TensorDataset(images(80))
    sampler = RandomSampler(data, replacement=True, num_samples=80, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(Augmented(), 8) if kind == "augmented" else DataLoader(data, 8, sampler=sampler)
    source = calibration_images(loader, net())
    assert torch.equal(torch.cat(list(source)), torch.cat(list(source)))


def test_integer_images_are_told_how_to_normalise(timm_model: nn.Module) -> None:
    new = cs.convert(timm_model, "conv[name=conv1.0]->kerv-poly")
    raw = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"in training: mean \(0.485, 0.456, 0.406\), std \(0.229, 0.224, 0.225\)$"):
        cs.calibrate(new, raw, teacher=timm_model)


def test_folders_that_cannot_be_read(timm_model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in .*; looked for \.bmp, \.jpeg, \.jpg"):
        calibration_images(tmp_path, timm_model)
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png is not an image that can be read"):
        list(calibration_images(tmp_path, timm_model))


@pytest.mark.parametrize("first", ["one", "two"])
@pytest.mark.parametrize("channels", [1, 5])
def test_images_that_do_not_fit_the_model(first: str, channels: int) -> None:
    model = net()
    new = to_fit(model, {"one": "conv[name=one]->kerv-l1 by fit", "two": "conv[name=two]->kerv-poly"}[first])
    with pytest.raises(
        DataError, match=rf"the model cannot run images of shape \(4, {channels}, 12, 12\): Given groups"
    ):
        cs.calibrate(new, pictures(4, channels, 12), teacher=model)


def test_images_that_do_not_fit_a_first_layer_by_neutral() -> None:
    model = net()
    new = to_fit(model, "conv[name=one]->kerv-poly")
    with pytest.raises(DataError, match="the model cannot run images of shape"):
        cs.calibrate(new, pictures(4, 5, 12), teacher=model)


def test_images_too_small_for_the_model() -> None:
    model = net()
    new = to_fit(model, "conv[name=four]->linear-mix(extend=true) by fit")
    with pytest.raises(DataError, match=r"the model cannot run images of shape \(4, 3, 2, 2\)"):
        cs.calibrate(new, pictures(4, 3, 2), teacher=model)


# --- images that look un-normalised


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: x.sigmoid(),
            r"images lie between 0\.\d+ and \d[.\d]*: they look un-normalised.*mean \(0.485, 0.456",
        ),
        (lambda x: x.sigmoid() * 255, r"images go up to 2\d\d\.?\d*: they look like 0\.\.255, not normalised: mean \("),
        (lambda x: [x, x.sigmoid()], "they look un-normalised"),
    ],
)
def test_images_as_a_camera_gives_them_are_warned_of(timm_model: nn.Module, make: Any, message: str) -> None:
    new = cs.convert(timm_model, "conv[name=conv1.0]->kerv-poly")
    with pytest.warns(UserWarning, match=message) as caught:
        cs.calibrate(new, make(pictures(4, 3, 32)), teacher=timm_model)
    assert len(caught) == 1  # in however many passes and batches


@pytest.mark.filterwarnings("error")
def test_normalised_images_are_not_warned_of(timm_model: nn.Module) -> None:
    new = cs.convert(timm_model, "conv[name=conv1.0]->kerv-poly")
    mean, std = (torch.tensor(timm_model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    raw = pictures(4, 3, 32).sigmoid()
    cs.calibrate(new, (raw - mean) / std, teacher=timm_model)
    cs.calibrate(new, torch.full((2, 3, 32, 32), 0.5), teacher=timm_model)  # says nothing of its range
    # A model that was trained on values from 0 to 1, or of which nothing is known.
    new.pretrained_cfg = {**timm_model.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    cs.calibrate(new, raw, teacher=timm_model)
    calibrated(images(4).sigmoid())


# --- teachers


def test_teacher_must_be_the_model_before_conversion() -> None:
    model, x = net(), images(4)
    new = to_fit(model)
    for other in (new, nn.Sequential(nn.Conv2d(3, 6, 3)), to_fit(model, "conv[name=one]->lbc")):
        with pytest.raises(ConversionError, match="the teacher has no convolution 'one': it must be the model before"):
            cs.calibrate(new, x, teacher=other)


@pytest.mark.parametrize("operator", ["kerv-poly", "lbc by fit"])
def test_teacher_of_another_width_is_another_model(operator: str) -> None:
    model = net()
    new = to_fit(model, f"conv[name=three]->{operator}")
    model.three = nn.Conv2d(6, 9, 3, padding=1)
    with pytest.raises(ConversionError, match="three"):
        cs.calibrate(new, images(4), teacher=model)


def test_teacher_that_calls_its_convolution_more_often() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.two(self.one(x))
            return super().forward(x)

    model = net()
    new = to_fit(model, "conv[name=three]->lbc by fit")
    other = Twice()
    other.load_state_dict(model.state_dict())
    assert cs.calibrate(new, images(4), teacher=other.eval())["three"] > 0
    once = type("Once", (Net,), {"forward": lambda self, x: self.two(self.one(x))})()
    once.load_state_dict(model.state_dict())
    with pytest.raises(ConversionError, match="three is called 1 times, its convolution in the teacher 0 times"):
        cs.calibrate(new, images(4), teacher=once.eval())


@pytest.mark.parametrize("rule", ["all-conv->conv", "all-conv->kerv-linear", "all-conv->kerv-poly by random"])
def test_nothing_to_fit(rule: str) -> None:
    model = net()
    new = cs.convert(model, rule, example_inputs=images(2))
    for other in (new, model):
        with pytest.raises(ConversionError, match="no operator of this model starts by neutral, fit, copy or blend"):
            cs.calibrate(other, images(4), teacher=model)
    same = cs.convert(model, rule, example_inputs=images(2), calibration=images(4))
    assert_same(state(same), state(new))


@pytest.mark.parametrize("operator", ["linear-mix", "pnn", "lbc"])
def test_what_began_without_data_is_fitted_when_there_are_some(operator: str) -> None:
    model, x = net(), images(64)
    new = cs.convert(model, f"conv[k=3]->{operator}", example_inputs=x)
    assert {str(start) for start in cs.record(new).starts.values()} == {"project"}
    found = cs.calibrate(new, x, teacher=model)
    assert set(found) == {entry.site.name for entry in cs.record(new).edits}
    assert all(layer.after < layer.before for layer in found.layers)
    fitted = cs.convert(model, f"conv[k=3]->{operator} by fit", example_inputs=x, calibration=x)
    assert_same(state(new), state(fitted))


def test_layer_that_has_no_closed_form_is_named() -> None:
    model = net()
    new = to_fit(model, "conv[name=two]->lbc by fit")
    new.two = nn.Conv2d(6, 6, 3, padding=1)
    with pytest.raises(ConversionError, match="two, a Conv2d, has no closed-form fit"):
        cs.calibrate(new, images(4), teacher=model)


# --- what it costs, and what it leaves alone


def test_nothing_behind_the_layer_is_run() -> None:
    model, x = net(), images(16)
    new = to_fit(model, "conv[name=two]->lbc by fit; conv[name=four]->linear-mix(extend=true) by fit")
    calls: list[tuple[str, str]] = []
    stage = ["two"]
    for owner in (model, new):
        for name, module in owner.named_children():
            if name != "act":
                module.register_forward_hook(lambda m, args, out, name=name: calls.append((stage[0], name)))

    def next_stage(layer: LayerFit) -> None:
        stage[0] = {"two": "four", "four": "end"}[layer.name]

    cs.calibrate(new, [x[:8], x[8:]], teacher=model, on_layer=next_stage)
    during = {name: {called for when, called in calls if when == name} for name in ("two", "four")}
    assert during["two"] == {"one", "norm1", "two"}
    assert during["four"] == {"one", "norm1", "two", "norm2", "three", "four"}


def test_work_is_cut_into_parts_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live tensors do not add up over batches, and no part is larger than the chunk."""
    x, model = images(40), net()
    sizes: list[int] = []
    refs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    add = NeutralFit.add

    def spied(self: NeutralFit, input: Tensor, output: Tensor, target: Tensor) -> None:
        sizes.append(input.numel() + target.numel())
        alive.append(sum(ref() is not None for ref in refs))
        refs.extend(weakref.ref(tensor) for tensor in (input, output, target))
        add(self, input, output, target)

    monkeypatch.setattr(NeutralFit, "add", spied)
    rule = "conv[name=two]->kerv-poly"
    whole = to_fit(model, rule)
    cs.calibrate(whole, [x[:20], x[20:]], teacher=model)
    assert sizes == [20 * (6 * 100 + 6 * 100)] * 2
    sizes.clear(), refs.clear(), alive.clear()
    monkeypatch.setattr("convsurgery.adapt.fitting._CHUNK", 5 * 1200 + 7)
    parts = to_fit(model, rule)
    cs.calibrate(parts, [x[:20], x[20:]], teacher=model)
    assert sizes == [5 * 1200] * 8
    # Of earlier parts only those of the batch at hand, and the last one's output.
    assert max(alive) <= 3 * 4
    assert alive[4] <= 3
    assert cs.nonlinearity(parts) == cs.nonlinearity(whole)
    assert torch.allclose(parts.two.gain, whole.two.gain, rtol=1e-6, atol=0)
    sizes.clear()
    monkeypatch.setattr("convsurgery.adapt.fitting._CHUNK", 1)  # never less than one image
    cs.calibrate(parts, x[:3], teacher=model)
    assert sizes == [1200] * 3


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def flags(model: nn.Module) -> list[object]:
    return [m.training for m in model.modules()] + [(p.requires_grad, p.grad) for p in model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("steps", [0, 4])
def test_teacher_flags_and_hooks_are_as_before(fails: bool, steps: int) -> None:
    model, x = net(), images(12)
    new = to_fit(model)
    for owner in (model, new):
        owner.train()
        owner.norm2.eval()
        owner.norm4.weight.requires_grad_(False)
    new.two.weight.requires_grad_(False)
    untouched = [name for name, _ in new.named_parameters() if name.startswith(("norm", "one."))]
    before, given = state(model), x.clone()
    shown = flags(model), flags(new)
    kept = {name: new.get_parameter(name).detach().clone() for name in untouched}
    data = [x[:6], x[6:] * torch.nan] if fails else [x[:6], x[6:]]
    if fails:
        with pytest.raises(DataError, match="NaN"):
            cs.calibrate(new, data, teacher=model, steps=steps)
    else:
        cs.calibrate(new, data, teacher=model, steps=steps)
    assert_same(state(model), before)
    assert (flags(model), flags(new)) == shown
    assert hooks(model) == hooks(new) == 0
    assert torch.equal(x, given)
    assert all(torch.equal(new.get_parameter(name), value) for name, value in kept.items())
    assert torch.is_grad_enabled()


def test_hooks_are_gone_after_an_error_in_the_model() -> None:
    model = net()
    new = to_fit(model, "conv[name=three]->lbc by fit")
    with pytest.raises(DataError, match="cannot run"):
        cs.calibrate(new, pictures(2, 7, 12), teacher=model)
    assert hooks(model) == hooks(new) == 0

    def interrupt(layer: LayerFit) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cs.calibrate(new.train(), images(2), teacher=model.train(), on_layer=interrupt)
    assert hooks(model) == hooks(new) == 0
    assert new.training
    assert model.norm1.training


# --- too few pixels


@pytest.mark.parametrize(
    ("operator", "where", "unknowns"),
    [("lbc(filters=30)", ridge, 30), ("pnn(fanout=4)", ridge, 24), ("linear-mix", sparsefit, 14)],
)
def test_fits_with_too_few_pixels_are_damped_and_say_so(
    operator: str, where: Any, unknowns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    x, held_out = pictures(2, 3, 5, seed=3), pictures(64, 3, 5, seed=4)  # maps of 3x3
    found = {}
    for damped in (True, False):
        if not damped:
            monkeypatch.setattr(where, "enough", lambda ridge, rows, unknowns: ridge)
        new = cs.apply(model, cs.plan(model, f"conv[name=two]->{operator} by fit", example_inputs=x))
        (layer,) = cs.calibrate(new, x, teacher=model).layers
        error = relative_error(outputs(new, "norm2", held_out), outputs(model, "norm2", held_out))
        found[damped] = (layer.note, error)
    assert found[True][0] == f"ridge raised to 1e-02: 18 pixels for {unknowns} unknowns"
    assert found[False][0] == ""
    assert found[True][1] < found[False][1]
    enough = cs.apply(model, cs.plan(model, f"conv[name=two]->{operator} by fit", example_inputs=held_out))
    assert cs.calibrate(enough, held_out, teacher=model).layers[0].note == ""


@pytest.mark.parametrize(("operator", "where"), [("lbc(filters=8)", ridge), ("linear-mix", sparsefit)])
def test_features_that_depend_on_each_other_are_damped_and_say_so(operator: str, where: Any) -> None:
    """Behind a dead layer: Cholesky fails at the smallest penalty."""
    model = net()
    with torch.no_grad():
        model.norm1.weight.fill_(0)
        model.norm1.bias.fill_(-1)
    new = to_fit(model, f"conv[name=two]->{operator} by fit(1e-30)")
    (layer,) = cs.calibrate(new, images(8), teacher=model).layers
    assert layer.note.startswith("ridge raised to 1e-")
    assert layer.note.endswith(": features depend on each other")
    assert all(torch.isfinite(value).all() for value in state(new).values())


# --- further choices


MATCHED = {
    "norm1": "conv[name=one]->kerv-l1 by fit",
    "norm2": "conv[name=two]->lbc by fit",
    "norm4": "conv[name=four]->linear-mix(extend=true) by fit",
}


@pytest.mark.parametrize("norm", MATCHED)
def test_batch_norm_meets_the_mean_and_variance_it_is_used_to(norm: str) -> None:
    model = net()
    x = images(64, seed=9)  # those of its statistics
    wanted = outputs(model, norm, x)
    spread = {}
    for option in (False, True):
        new = to_fit(model, MATCHED[norm])
        cs.calibrate(new, x, teacher=model, batchnorm=option)
        got = outputs(new, norm, x)
        spread[option] = (got.var((0, 2, 3)) / wanted.var((0, 2, 3)) - 1).abs().max()
        others = {k: v for k, v in state(model).items() if k.startswith("norm") and k.split(".")[0] != norm}
        assert all(torch.equal(new.state_dict()[k], v) for k, v in others.items())
    assert spread[True] < 0.02
    assert spread[False] > 0.02
    assert (got.mean((0, 2, 3)) - wanted.mean((0, 2, 3))).abs().max() < 2e-3


def test_batch_norm_is_matched_beside_other_images_too() -> None:
    """(mean − μ)/σ of the images at hand stays what it was, whatever they are."""
    model, x = net(), images(24) + 0.5
    new = to_fit(model, MATCHED["norm2"])
    cs.calibrate(new, x, teacher=model, batchnorm=True)
    wanted, got = outputs(model, "norm2", x), outputs(new, "norm2", x)
    assert (got.var((0, 2, 3)) / wanted.var((0, 2, 3)) - 1).abs().max() < 0.02
    assert (got.mean((0, 2, 3)) - wanted.mean((0, 2, 3))).abs().max() < 2e-3


def test_batch_norm_is_that_of_the_teacher_however_often_it_is_matched() -> None:
    model, x = net(), images(24)
    new = to_fit(model, "conv[name=two]->lbc by fit")
    cs.calibrate(new, x, teacher=model, batchnorm=True)
    once = state(new)
    cs.calibrate(new, x, teacher=model, batchnorm=True)
    for name, tensor in state(new).items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "helps"),
    [
        ("lbc(filters=12) by fit", False),  # whose best values the closed form has
        ("linear-mix by fit", False),
        ("pnn(trainable=true) by fit", True),
        ("kerv-l1 by fit", True),
        ("kerv-gauss by copy", True),
    ],
)
def test_steps_are_never_worse_and_say_what_they_did(operator: str, helps: bool) -> None:
    model, x = net(), images(16)
    rule = f"conv[name=two]->{operator}"
    plain, stepped = (to_fit(model, rule) for _ in range(2))
    (before,) = cs.calibrate(plain, x, teacher=model).layers
    (after,) = cs.calibrate(stepped, x, teacher=model, steps=30).layers
    assert after.before == before.before
    name = "norm2" if "kerv" not in operator else "two"
    wanted = outputs(model, name, x)
    errors = [relative_error(outputs(new, name, x), wanted) for new in (plain, stepped)]
    assert errors[1] == pytest.approx(after.after, rel=1e-3)
    if helps:
        assert errors[1] < errors[0]
        assert after.note.split("; ")[-1] == f"30 steps: {before.after:.2g} → {after.after:.2g}"
    else:
        assert after.note == "30 steps did not help"
        assert_same(state(stepped), state(plain))
    again = to_fit(model, rule)
    cs.calibrate(again, x, teacher=model, steps=30)
    assert_same(state(again), state(stepped))


def test_steps_that_do_not_help_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), images(16)
    rule = "conv[name=two]->lbc(filters=12) by fit"
    plain, stepped = (to_fit(model, rule) for _ in range(2))
    (before,) = cs.calibrate(plain, x, teacher=model).layers
    monkeypatch.setattr("convsurgery.adapt.fitting.FitOptions.lr", 1e6)
    defaults = (None, False, 0, 1e6)
    monkeypatch.setattr("convsurgery.adapt.fitting.FitOptions.__init__.__defaults__", defaults)
    (after,) = cs.calibrate(stepped, x, teacher=model, steps=5).layers
    assert after.note == "5 steps did not help"
    assert after.after == pytest.approx(before.after, rel=1e-6)
    assert_same(state(stepped), state(plain))


def test_steps_leave_neutral_layers_alone() -> None:
    one, first = calibrated(images(8), "conv[name=one]->kerv-poly")
    two, second = calibrated(images(8), "conv[name=one]->kerv-poly", steps=5, batchnorm=True)
    assert first == second
    assert_same(state(one), state(two))


@pytest.mark.parametrize("kernel", ["kerv-sigmoid", "kerv-gauss"])
def test_saturation_is_told_with_a_remedy_that_helps(kernel: str) -> None:
    model, x = net(), images(8)
    with torch.no_grad():
        model.one.weight.mul_(20)
    found = []
    by = "neutral(1)"
    for _ in range(2):
        new = to_fit(model, f"conv[name=one]->{kernel} by {by}")
        found += cs.calibrate(new, x, teacher=model).layers
        by = found[0].note.rsplit(" by ", 1)[1].split()[0]
        assert by.startswith("neutral(")
    assert "; saturated: " in found[0].note
    assert "saturated" not in found[1].note
    assert found[1].after < found[0].after
