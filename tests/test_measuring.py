"""What is measured is meant: which images, on which weights, against which answers, and how much they say."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import convsurgery as cs
from convsurgery.adapt import load_data
from convsurgery.adapt.bounds import clopper_pearson, images_needed
from convsurgery.adapt.choose import Point
from convsurgery.adapt.footing import chance, one_class
from convsurgery.adapt.holdout import hold_out, sources_of
from convsurgery.adapt.images import calibration_images
from convsurgery.adapt.scan import Scan
from convsurgery.adapt.spread import classes_of, spread
from convsurgery.cli import run
from convsurgery.errors import ConversionError, ConvSurgeryError, ConvSurgeryWarning, DataError, SettingsError
from convsurgery.surgery import weights_of

RANDOM = r"the weights of the \w+( and the \w+)? are random"


class Small(nn.Module):
    """Four classes; trained enough to answer with all of them, by the mean of the image's quarters."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.norm(self.conv(x)).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def quarters(count: int, seed: int = 0) -> TensorDataset:
    """Images whose bright quarter is their class, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(count // 4)
    x = 0.3 * torch.randn(len(labels), 3, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        x[index, :, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1.5
    return TensorDataset(x, labels)


@pytest.fixture(scope="module")
def trained() -> Small:
    torch.manual_seed(0)
    model = Small()
    settings: dict[str, Any] = {"epochs": 12, "batch_size": 32, "lr": 1e-2, "warmup_epochs": 0, "device": "cpu"}
    cs.finetune(model, (quarters(256), quarters(64, 1)), progress=False, **settings)
    assert cs.evaluate(model, quarters(64, 1)).top1 > 95
    return model.eval()


def write_images(folder: Path, names: list[str], value: Callable[[int], int]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value(number),) * 3).save(path)


# --- a part that stands for the whole


@pytest.mark.parametrize("count", [1, 3, 4, 7, 12, 40, 59, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_part_is_spread_evenly_as_far_as_groups_reach(count: int, seed: int) -> None:
    groups = ["a"] * 40 + ["b"] * 5 + ["c"] * 15
    taken = spread(60, count, seed, groups, "classes")
    assert len(set(taken.indices)) == len(taken.indices) == count
    found = Counter(groups[index] for index in taken.indices)
    least, most = min(found.get(name, 0) for name in "abc"), max(found.values())
    full = {name for name in "abc" if found.get(name, 0) == groups.count(name)}
    # Only a group that has no more may lag behind.
    assert most - least <= 1 or all(found.get(name, 0) >= most - 1 for name in set("abc") - full)
    assert spread(60, count, seed, groups, "classes").indices == taken.indices


def test_seeds_draw_differently_and_all_is_in_order() -> None:
    assert sorted(spread(100, 10, 0).indices) != sorted(spread(100, 10, 1).indices)
    assert list(spread(5, 5, 3).indices) == list(spread(5, None, 3).indices) == [0, 1, 2, 3, 4]
    assert str(spread(1347, 256, 0, [i % 10 for i in range(1347)], "classes")) == (
        "256 of 1,347 images, seed 0, spread over 10 classes"
    )
    assert str(spread(1347, None, 0)) == "all 1,347 images"


class Plain(Dataset[tuple[Tensor, int]]):
    """Somebody's own set, with a list of targets."""

    def __init__(self, data: TensorDataset, targets: Any) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data[index][0], int(self.data[index][1])


class Awkward(Plain):
    """Whose attribute raises."""

    targets = property(lambda self: 1 / 0, lambda self, value: None)  # type: ignore[assignment]


def sets(data: TensorDataset) -> dict[str, Any]:
    labels = data.tensors[1]
    return {
        "tensors": data,
        "part": Subset(data, range(len(data))),
        "parts": ConcatDataset([Subset(data, range(30)), Subset(data, range(30, len(data)))]),
        "list": Plain(data, labels.tolist()),
        "array": Plain(data, labels.numpy()),
        "pair": (data, quarters(16)),
        "split": load_data((data, quarters(16)), batch_size=16),
    }


@pytest.mark.parametrize("kind", ["tensors", "part", "parts", "list", "array", "pair", "split"])
def test_of_a_data_set_every_class_is_seen(kind: str, trained: Small) -> None:
    source = calibration_images(sets(quarters(80))[kind], trained, images=12)
    labels = torch.cat([labels for _, labels in source.labelled() if labels is not None])
    assert labels.bincount().tolist() == [3, 3, 3, 3]
    assert str(source) == "12 of 80 images, seed 0, spread over 4 classes"
    first = [torch.cat(list(source)) for _ in range(2)]
    assert torch.equal(*first)
    other = calibration_images(sets(quarters(80))[kind], trained, images=12, seed=1)
    assert not torch.equal(torch.cat(list(other)), first[0])


def test_sets_whose_classes_are_not_known_are_drawn_from_the_whole(trained: Small) -> None:
    data = quarters(80)
    for made in (Awkward(data, None), Plain(data, ["a"] * 80), Plain(data, [0.5] * 80), Plain(data, [1, 2])):
        assert classes_of(made) is None
        source = calibration_images(made, trained, images=20)
        assert len({int(label) for _, labels in source.labelled() for label in labels}) == 4
        assert str(source) == "20 of 80 images, seed 0"
    whole = calibration_images(data.tensors[0], trained, images=20)
    brightest = torch.cat(list(whole)).unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((1, 3, 5)).flatten(1).argmax(1)
    assert len(brightest.unique()) == 4
    assert str(whole) == "20 of 80 images, seed 0"


def test_loaders_are_used_as_they_are_given_and_it_is_said(trained: Small) -> None:
    data = quarters(80)
    for given in (DataLoader(data, 16), [data.tensors[0]], [(data.tensors[0], data.tensors[1])]):
        source = calibration_images(given, trained, images=12)
        assert torch.equal(torch.cat(list(source)), data.tensors[0][:12])
        assert str(source) == "the first 12 images, as they were given"

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(zip(*data.tensors, strict=True))

    source = calibration_images(Stream(), trained)
    assert sum(map(len, source)) == 80
    assert str(source) == "80 images, as they were given"


@pytest.mark.parametrize("kind", ["flat classes", "train and val", "loose"])
def test_of_a_folder_every_folder_is_seen(kind: str, tmp_path: Path, trained: Small) -> None:
    names = {
        "flat classes": [f"{label}/{number}.png" for label in "abcd" for number in range(20)],
        "train and val": [f"{part}/{label}/{n}.png" for part in ("train", "val") for label in "ab" for n in range(20)],
        "loose": [f"{number:03d}.png" for number in range(80)],
    }[kind]
    write_images(tmp_path, names, lambda number: 3 * number)
    source = calibration_images(tmp_path, trained, images=8)
    values = torch.cat(list(source)).mean((1, 2, 3))
    order = torch.cat(list(calibration_images(tmp_path, trained))).mean((1, 2, 3)).tolist()
    places = sorted(min(range(80), key=lambda i, v=v: abs(order[i] - v)) for v in values.tolist())  # type: ignore[misc]
    if kind == "loose":
        assert places != list(range(8))
        assert str(source) == "8 of 80 images, seed 0"
    else:
        assert [place // 20 for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert str(source) == "8 of 80 images, seed 0, spread over 4 folders"


def test_folders_of_torchvision_and_timm_tell_their_classes(tmp_path: Path, trained: Small) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, [f"{c}/{n}.png" for c in "abcd" for n in range(10)], lambda number: number)
    folder = torchvision.datasets.ImageFolder(tmp_path / "train", torchvision.transforms.ToTensor())
    named = load_data(tmp_path, img_size=8, augment=False)
    for data in (folder, named, (named.train.dataset, named.val.dataset)):
        source = calibration_images(data, trained, images=8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvSurgeryWarning)
            labels = torch.cat([labels for _, labels in source.labelled() if labels is not None])
        assert labels.bincount().tolist() == [2, 2, 2, 2]
        assert str(source) == "8 of 40 images, seed 0, spread over 4 classes"


def test_spread_images_fit_better_than_those_of_the_first_classes(digits: Any, digits_model: nn.Module) -> None:
    """The fault as it was met: sorted by class, the first 32 images are of one class or two."""
    data = digits.train.dataset
    order = torch.argsort(data.targets, stable=True).tolist()
    rule = "all-conv->linear-mix(extend=true)"
    kept = []
    for images in (
        [torch.stack([data[index][0] for index in order[:32]])],
        calibration_images(Subset(data, order), digits_model, images=32),
    ):
        new = cs.convert(digits_model, rule, calibration=images)
        kept.append(cs.evaluate(new, digits, teacher=digits_model).kept)
    assert kept[1] > kept[0] + 100


@pytest.mark.parametrize(("value", "text"), [(0, "at least 1"), (2.5, "whole number"), (True, "whole number")])
def test_numbers_that_are_none(value: Any, text: str, trained: Small) -> None:
    for call in (
        lambda: cs.evaluate(trained, quarters(16), images=value),
        lambda: cs.scan(trained, "conv", quarters(16), images=value),
    ):
        with pytest.raises(SettingsError, match=f"images must be .*{text}"):
            call()
    with pytest.raises(SettingsError, match="seed must be a whole number, not 'x'"):
        cs.evaluate(trained, quarters(16), seed="x")


# --- it is said where it was measured


def test_scans_and_calibrations_and_evaluations_say_which_images_and_weights(trained: Small, tmp_path: Path) -> None:
    data = quarters(80)
    found = cs.scan(trained, "linear-mix", data, images=40, latency=False, output=tmp_path / "scan")
    said = "40 of 80 images, seed 0, spread over 4 classes"
    assert found.data == said
    assert found.weights == "unknown (not as initialised)"
    assert f"images: {said}" in str(found)
    assert "weights: unknown (not as initialised)" in str(found)
    assert Scan.load(tmp_path / "scan") == found
    new = cs.convert(trained, "conv->linear-mix", example_inputs=data.tensors[0][:1])
    done = cs.calibrate(new, data, teacher=trained, images=40, seed=3)
    assert done.data == said.replace("seed 0", "seed 3")
    assert f"images: {done.data}\nweights: unknown (not as initialised)" in str(done)
    result = cs.evaluate(trained, (data, quarters(40, 1)), images=20)
    assert result.data == "20 of 40 images, seed 0, spread over 4 classes"
    assert result.samples == 20
    assert f"images: {result.data}\nweights: unknown (not as initialised)" in str(result)


def test_scans_of_earlier_versions_are_read(trained: Small) -> None:
    found = cs.scan(trained, "conv", quarters(16), latency=False)
    old = json.loads(found.to_json())
    for name in ("data", "weights", "notes"):
        del old[name]
    for row in old["rows"]:
        del row["top1"]
    read = Scan.from_json(json.dumps(old))
    assert (read.data, read.weights, read.notes) == ("", "", ())
    assert [row.kl for row in read.rows] == [row.kl for row in found.rows]


# --- where weights come from


def test_plans_say_where_weights_come_from(tmp_path: Path) -> None:
    model = cs.create_model("resnet10t", num_classes=4, img_size=32)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    loaded = cs.create_model("resnet10t", num_classes=4, img_size=32, checkpoint=tmp_path / "mine.pth")
    later = timm.create_model("resnet10t", num_classes=4).eval()
    plain = timm.create_model("resnet10t", num_classes=4)
    cs.load_checkpoint(later, tmp_path / "mine.pth")
    for part, text in (
        (model, "random"),
        (loaded, "checkpoint mine.pth"),
        (later, "checkpoint mine.pth"),
        (plain, "random"),
        (torchvision.models.resnet18(), "random"),
        (timm.create_model("convnext_atto"), "random"),
        (timm.create_model("repvgg_a0"), "random"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "unknown"),
        ("resnet10t", "not loaded"),
    ):
        plan = cs.plan(part, "first-conv->kerv-poly")
        assert plan.weights == text
        assert f"\nweights: {text}\n" in str(plan)
        assert f"weights: {text}" in plan._repr_html_()
        assert cs.Plan.from_json(plan.to_json()) == plan
    old = plan.to_dict()
    del old["weights"]
    assert cs.Plan.from_dict(old).weights == ""
    assert "weights" not in str(cs.Plan.from_dict(old))


def test_published_weights_are_named_by_their_tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The download is what is replaced here: by weights made on the spot."""
    from timm.models import _builder
    from torchvision.models import ResNet18_Weights

    monkeypatch.setattr(_builder, "load_pretrained", lambda model, **_: None)
    for name, classes, text in (
        ("resnet10t.c3_in1k", None, "c3_in1k"),
        ("resnet10t", None, "c3_in1k"),
        ("resnet10t", 7, "c3_in1k, random head"),
    ):
        model = cs.create_model(name, pretrained=True, num_classes=classes)
        assert cs.plan(model, "first-conv->kerv-poly").weights == text
        assert weights_of(model).new_head == (classes == 7)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(type(ResNet18_Weights.DEFAULT), "get_state_dict", lambda self, *_, **__: state)
    for classes, text in ((None, "torchvision's IMAGENET1K_V1"), (5, "torchvision's IMAGENET1K_V1, random head")):
        model = cs.create_model("torchvision/resnet18", pretrained=True, num_classes=classes)
        assert str(weights_of(model)) == text
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pth")
    model = cs.create_model("resnet10t", pretrained=True, checkpoint=tmp_path / "w.pth", num_classes=3)
    assert str(weights_of(model)) == "checkpoint w.pth, random head"


def test_the_origin_stays_with_the_weights_and_not_with_others(tmp_path: Path) -> None:
    model = cs.create_model("resnet10t", num_classes=4, img_size=32)
    x = torch.randn(2, 3, 32, 32)
    for same in (
        copy.deepcopy(model),
        copy.deepcopy(model).half(),
        copy.deepcopy(model).bfloat16().float(),
        cs.convert(model, "all-conv->kerv-poly"),
        cs.convert_(copy.deepcopy(model), "conv[k=3]->pnn"),
        cs.apply(model, cs.plan(model, "all-conv->linear-mix")),
        cs.load(cs.save(cs.convert(model, "first-conv->kerv-gauss"), tmp_path / "one")),
        cs.load(cs.save(model, tmp_path / "two")),
    ):
        assert str(weights_of(same)) == "random"
        assert weights_of(same).random
    moved = copy.deepcopy(model).train()
    moved(x)  # statistics alone are no training
    assert weights_of(moved).random
    changes: list[Callable[[nn.Module], object]] = [
        lambda m: m.load_state_dict(timm.create_model("resnet10t", num_classes=4).state_dict(), strict=False),
        lambda m: m.reset_classifier(9),
        lambda m: nn.init.normal_(m.fc.weight),
        lambda m: cs.finetune(
            m, (TensorDataset(x, torch.tensor([0, 1])), None), epochs=1, progress=False, device="cpu"
        ),
    ]
    for change in changes:
        for start in (model, cs.convert(model, "all-conv->kerv-poly")):
            other = copy.deepcopy(start)
            change(other)
            assert str(weights_of(other)) == "random at first, changed since"
            assert not weights_of(other).random
    back = cs.load(cs.save(other, tmp_path / "three"))
    assert str(weights_of(back)) == "random at first, changed since"
    torch.save(model.state_dict(), tmp_path / "w.pth")
    cs.load_checkpoint(model, tmp_path / "w.pth")
    model.reset_classifier(3)
    assert str(weights_of(model)) == "checkpoint w.pth, changed since"


def test_networks_of_convolutions_alone_are_known_again() -> None:
    model = cs.create_model("torchvision/squeezenet1_0", num_classes=3)
    assert weights_of(cs.convert(model, "conv[k=3]->kerv-poly")).random
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    assert str(weights_of(model)) == "random at first, changed since"


def measurements(model: nn.Module, data: Any) -> dict[str, Callable[[], object]]:
    x = data.tensors[0]
    return {
        "evaluate": lambda: cs.evaluate(model, data),
        "teacher": lambda: cs.evaluate(copy.deepcopy(model), data, teacher=model),
        "scan": lambda: cs.scan(model, "conv", data, latency=False),
        "calibrate": lambda: cs.calibrate(
            cs.convert(model, "conv->linear-mix", example_inputs=x[:1]), data, teacher=model, progress=False
        ),
        "auto": lambda: cs.auto(model, "conv->auto(linear-mix, params<=-10%)", data, example_inputs=x[:1]),
        "points": lambda: cs.measure_choices(model, [], data),
        "distil": lambda: cs.finetune(
            copy.deepcopy(model), data, teacher=model, epochs=1, warmup_epochs=0, progress=False, device="cpu"
        ),
    }


@pytest.mark.parametrize("kind", list(measurements(Small(), quarters(4))))
def test_measuring_on_random_weights_warns(kind: str, trained: Small) -> None:
    torch.manual_seed(0)
    model, data = Small().eval(), quarters(80)
    with torch.no_grad():  # answers of every class, so that nothing is refused
        model.head.weight.mul_(20)
        model.head.bias.sub_(model(data.tensors[0]).mean(0))
    match = "weights are random: what it answers is noise" if kind == "distil" else RANDOM
    with pytest.warns(ConvSurgeryWarning, match=match) as caught:
        measurements(model, data)[kind]()
    assert sum("random" in str(each.message) for each in caught) == 1
    assert {each.filename for each in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*random", ConvSurgeryWarning)
        measurements(trained, data)[kind]()


def test_the_command_line_warns_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scan", "resnet10t", "--num-classes", "10", "--img-size", "32", "--dataset", "digits", "--images", "8"]
    arguments += ["--operators", "conv", "--where", "first-conv", "--no-latency"]
    assert run([*arguments, "-o", str(tmp_path / "scan")]) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "random" in line]
    assert line.startswith("warning: the weights of the model are random: what is measured on them says nothing")
    assert "--pretrained" in line
    assert "weights: random" in captured.out
    assert "images: 8 of 1,347 images, seed 0, spread over 10 classes" in captured.out


# --- answers that say nothing


def constant(model: nn.Module) -> nn.Module:
    """Always the first class."""
    other = copy.deepcopy(model)
    other.head.bias.data[0] += 100
    return other


def test_agreement_with_one_class_is_no_agreement(trained: Small) -> None:
    data = quarters(80)
    lazy = constant(trained)
    result = cs.evaluate(constant(trained), data, teacher=lazy)
    assert (result.agreement, result.kept) == (None, None)
    told = "agreement n/a: the teacher answers all 80 images with class 0, and to agree with that says nothing"
    assert told in result.notes
    assert told in str(result)
    assert cs.evaluate(trained, data, teacher=trained).kept == 80
    found = cs.scan(lazy, "conv | linear-mix", data, latency=False)
    measured = [row for row in found.rows if row.reason is None]
    assert len(measured) == 3
    assert all(row.agreement is None and row.kl is not None for row in measured)
    assert "agreement n/a: the model answers all 80 images with class 0" in str(found)
    assert str(found).count(" n/a ") >= len(measured)
    assert Scan.from_json(found.to_json()) == found
    with pytest.raises(ConversionError, match=r"agreement>=0\.9 cannot be chosen for: .*\n.*says nothing"):
        cs.choose(found, "params<=-1%, agreement>=0.9")
    choice = cs.choose(found, "params<=-1%")
    assert choice.picks
    assert choice.predicted.agreement is None
    assert "n/a" in str(choice)
    with pytest.raises(ConvSurgeryError, match="no agreement to draw"):
        cs.draw_trade_off([Point(0.1, choice.predicted.agreement)], "x.svg")


def test_auto_promises_no_agreement_with_one_class(trained: Small) -> None:
    lazy, data = constant(trained), quarters(80)
    for call in (measurements(lazy, data)["auto"], measurements(lazy, data)["points"]):
        with pytest.raises(DataError, match=r"answers all \d+ images with class 0, .*weights: unknown.*Load trained"):
            call()
    fresh = cs.create_model("resnet18", num_classes=2)
    fresh.fc.bias.data[0] += 9
    with pytest.raises(DataError, match=r"\(weights: random at first, changed since\)"):
        cs.auto(fresh, "conv->auto(linear-mix, params<=-40%)", torch.randn(64, 3, 32, 32))


def test_training_says_it_and_takes_no_such_agreement_for_the_best(
    trained: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "device": "cpu", "log_interval": 0}
    data = (quarters(64), quarters(40, 1))
    lazy = constant(trained)
    result = cs.finetune(copy.deepcopy(trained), data, teacher=lazy, output=tmp_path / "run", **settings)
    assert [row.agreement for row in result.history] == [None, None]
    said = capsys.readouterr().err
    assert said.count("agreement n/a: the teacher answers all 40 images with class 0") == 1
    assert "the teacher is right on 25.00 % of the images, the most frequent class is 25.00 %" in said
    assert "--teacher none" in said
    with pytest.raises(SettingsError, match=r"eval_metric cannot be agreement.*n/a.*choose top1"):
        cs.finetune(copy.deepcopy(trained), data, teacher=lazy, eval_metric="agreement", **settings)


def test_who_is_no_better_than_the_most_frequent_class_is_told(
    trained: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    data, lazy = quarters(80), constant(trained)
    said = "is right on 25.00 % of 80 images, no better than always answering the most frequent class (25.00 %)"
    assert cs.evaluate(trained, data).notes == ()
    assert cs.evaluate(lazy, data).notes == (f"the model {said}",)
    assert cs.evaluate(lazy, data).majority == 25
    settings: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "device": "cpu", "log_interval": 0, "lr": 1e-9}
    result = cs.finetune(copy.deepcopy(lazy), (quarters(64), data), **settings)
    assert result.notes == (f"the model {said}",)
    assert f"in the end the model {said}" in capsys.readouterr().err
    assert cs.finetune(copy.deepcopy(trained), (quarters(64), data), **settings).notes == ()
    assert "in the end" not in capsys.readouterr().err
    # A conversion that loses the answers, and one that keeps them.
    for rule, notes in (("conv->kerv-poly", 0), ("conv[index=1]->kerv-l1", 1)):
        new = cs.convert(trained, rule, example_inputs=data.tensors[0][:1])
        if notes:
            new.head.weight.data.zero_()
        assert len(cs.calibrate(new, data, teacher=trained, progress=False).notes) == notes
    wrong = TensorDataset(data.tensors[0], data.tensors[1] + 4)  # labels of other classes are none of the model's
    assert cs.calibrate(new, wrong, teacher=trained, progress=False).notes == ()


def test_rows_of_a_scan_that_end_at_chance_are_named(trained: Small) -> None:
    data = quarters(80)
    broken = copy.deepcopy(trained)
    found = cs.scan(broken, "kerv-l1 by random(0) | conv", data, latency=False)
    right = {(row.site, row.operator): row.top1 for row in found.rows}
    assert right[("conv", "conv")] == cs.evaluate(trained, data).top1 / 100
    lost = [name for name, share in right.items() if share is not None and share < 0.3]
    assert lost
    (note,) = found.notes
    assert note.startswith("right answers no better than always the most frequent class (25.00 %) by one replacement")
    assert all(f"{operator} at {site}" in note for site, operator in lost)
    assert note.replace("\n", " ")[:60] in str(found).replace("\n", " ")
    assert cs.scan(trained, "conv", data.tensors[0], latency=False).rows[0].top1 is None


@pytest.mark.parametrize(
    ("correct", "labels", "text"),
    [
        (25, [25, 75], "no better than always answering the most frequent class (75.00 %)"),
        (75, [25, 75], "no better than"),
        (77, [25, 75], "may be no better than"),
        (95, [25, 75], None),
        (5, [0, 5], "all 5 images are of one class"),
        (0, [0, 0], None),
    ],
)
def test_chance(correct: int, labels: list[int], text: str | None) -> None:
    found = chance(correct, torch.tensor(labels))
    assert (found is None) == (text is None)
    assert text is None or (found is not None and text in found)


def test_one_class() -> None:
    assert one_class(torch.tensor([3, 1])) is None
    assert "all 3 images with class 1" in str(one_class(torch.tensor([0, 3])))
    assert "one image" in str(one_class(torch.tensor([0, 1])))
    assert "no finite scores" in str(one_class(torch.tensor([0, 0])))


# --- evaluate takes what finetune takes


def test_evaluate_takes_every_form_of_data(trained: Small) -> None:
    train, val = quarters(64), quarters(40, 1)
    result = cs.evaluate(trained, val, teacher=trained)
    assert result.samples == 40
    for data in (
        (train, val),
        [train, val],
        (DataLoader(train, 8), DataLoader(val, 8)),
        load_data((train, val), batch_size=8),
        DataLoader(val, 7),
        DataLoader(val, 7, shuffle=True),
        [tuple(part) for part in zip(*(t.split(9) for t in val.tensors), strict=True)],
        Subset(val, range(40)),
    ):
        other = cs.evaluate(trained, data, teacher=trained)
        assert (other.top1, other.samples, other.kept) == (result.top1, result.samples, result.kept)
        assert other.loss == pytest.approx(result.loss, rel=1e-6)
    assert cs.evaluate(trained, DataLoader(val, 7), images=9).data == "the first 9 images, as they were given"
    assert cs.evaluate(trained, DataLoader(val, 7, drop_last=True)).samples == 35
    with pytest.raises(DataError, match="no validation part"):
        cs.evaluate(trained, (train, None))
    with pytest.raises(DataError, match=r"data must be a name, a folder, a pair .* not int"):
        cs.evaluate(trained, 3)
    with pytest.raises(DataError, match="no data set 'nonsense'"):
        cs.evaluate(trained, "nonsense")


def test_evaluate_takes_names_and_folders(digits_model: nn.Module, digits: Any, tmp_path: Path, trained: Small) -> None:
    one, two = cs.evaluate(digits_model, "digits"), cs.evaluate(digits_model, digits)
    assert (one.top1, one.samples, one.data) == (two.top1, 450, "all 450 images")
    for part, count in (("train", 2), ("val", 3)):
        write_images(tmp_path / part, [f"{c}/{n}.png" for c in "abcd" for n in range(count)], lambda number: number)
    assert cs.evaluate(trained, tmp_path, workers=0).samples == 12


def test_data_in_memory_start_no_processes(trained: Small) -> None:
    data = quarters(16)
    for held in (data, Subset(data, range(8)), ConcatDataset([data, Subset(data, [1])])):
        split = load_data((held, held), workers=3)
        assert (split.train.num_workers, split.val.num_workers) == (0, 0)
    assert load_data((Plain(data, None), data), workers=3).train.num_workers == 3
    assert load_data("digits", img_size=8, workers=3).train.num_workers == 0


# --- auto: what is held out, and what it shows


@pytest.mark.parametrize(
    ("total", "count"), [(8, 2), (40, 10), (64, 16), (100, 36), (192, 128), (400, 128), (800, 200)]
)
def test_at_least_128_are_held_out_where_there_are_as_many(total: int, count: int) -> None:
    images = torch.arange(total).view(-1, 1, 1, 1).float()
    parts = hold_out(images.split(17))
    sides = [torch.cat(list(part)).flatten().tolist() for part in (parts.fit, parts.held_out)]
    assert parts.count == len(sides[1]) == count
    assert sorted(sides[0] + sides[1]) == list(range(total))
    # From the whole, not from one end.
    assert max(sides[1]) > total / 2 > min(sides[1])
    assert hold_out(images.split(17), least=183).count == max(count, min(183, max(total - 64, count)))


def test_what_is_of_one_file_stays_on_one_side() -> None:
    images = torch.arange(400).view(-1, 1, 1, 1).float()
    sources = [index // 5 for index in range(400)]
    parts = hold_out(images.split(64), sources)
    sides = [{sources[int(x)] for x in torch.cat(list(part)).flatten()} for part in (parts.fit, parts.held_out)]
    assert not sides[0] & sides[1]
    assert (parts.count, parts.files) == (130, 80)
    with pytest.raises(DataError, match="most of the 400 images come from one file"):
        hold_out(images.split(64), [0] * 400)
    with pytest.raises(DataError, match="groups must be one for each image: 3 for 400 images"):
        hold_out(images.split(64), [0, 1, 2])


@pytest.mark.parametrize(
    ("names", "files"),
    [
        ([f"p{p}_crop{i}.png" for p in range(4) for i in range(3)], 4),
        ([f"p{p}-tile-{i}x{j}.png" for p in range(4) for i in range(2) for j in range(2)], 4),
        ([f"holiday_{p}_{i}.png" for p in range(20) for i in range(5)], 20),
        ([f"p{p}{mark}.png" for p in range(9) for mark in ("", "_1", "_2")], 9),
        ([f"n0144_{i}.JPEG" for i in (10026, 29, 7)] + [f"n0145_{i}.JPEG" for i in (2, 22, 900)], 6),
        ([f"img_{i:04d}.png" for i in range(50)], 50),
        ([f"{c}/{c}_{i}.png" for c in ("ant", "bee") for i in range(20)], 40),
        ([f"{c}.{i}.jpg" for c in ("cat", "dog") for i in range(200)], 400),
        (["portrait.png", "partridge.png", "preview.png", "windows.png"], 4),
    ],
)
def test_files_are_told_by_their_names(names: list[str], files: int) -> None:
    assert len(set(sources_of([f"data/{name}" for name in names]))) == files


def test_crops_in_a_folder_are_split_by_picture(tmp_path: Path, trained: Small) -> None:
    write_images(tmp_path, [f"p{p:02d}_crop{i}.png" for p in range(60) for i in range(4)], lambda number: number)
    images = calibration_images(tmp_path, trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvSurgeryWarning)
        parts = hold_out(images, images.sources)
        values = [torch.cat(list(part)).mean((1, 2, 3)) for part in (parts.fit, parts.held_out)]
        whole = torch.cat(list(images)).mean((1, 2, 3))
    pictures = [{int((whole - v).abs().argmin()) // 4 for v in side.tolist()} for side in values]
    assert not pictures[0] & pictures[1]
    assert (parts.count, parts.files) == (128, 60)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # Clopper, Pearson 1934 and textbooks after them.
        (8, 10, 0.4439, 0.9748),
        (0, 10, 0.0, 0.3085),
        (10, 10, 0.6915, 1.0),
        (5, 50, 0.0333, 0.2181),
        (126, 128, 0.9447, 0.9981),
        (128, 128, 0.9716, 1.0),
    ],
)
def test_interval(hits: int, total: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """By the definition: whatever the true share, the hits whose interval misses it have 5 % at most together."""
    from math import comb

    for total in (10, 40):
        intervals = [clopper_pearson(hits, total) for hits in range(total + 1)]
        for share in (0.02, 0.3, 0.5, 0.77, 0.95, 0.99):
            missed = [hits for hits, (low, high) in enumerate(intervals) if not low <= share <= high]
            assert sum(comb(total, k) * share**k * (1 - share) ** (total - k) for k in missed) <= 0.05
    with pytest.raises(DataError, match="3 of 2 is no share"):
        clopper_pearson(3, 2)


def test_images_needed() -> None:
    for least, needed in ((0.5, 6), (0.9, 36), (0.98, 183), (0.99, 368)):
        assert images_needed(least) == needed
        assert clopper_pearson(needed, needed)[0] >= least > clopper_pearson(needed - 1, needed - 1)[0]
    assert images_needed(1.0) is None
    assert images_needed(0.98, 0.97) is None
    assert images_needed(0.98, 0.99) == 851


def test_a_promise_that_images_cannot_show_is_refused_with_the_number_they_would_need(trained: Small) -> None:
    rule = "conv->auto(linear-mix, params<=-10%, agreement>={})"
    x = quarters(1000, 3)
    told = (
        r"agreement>=0\.98 cannot be shown on 136 held-out images of 200: .* 0\.9732 by the 95 % bound .* "
        r"It takes 183 held-out images, so 247 in all; or ask for agreement>=0\.973"
    )
    with pytest.raises(DataError, match=told):
        cs.auto(trained, rule.format(0.98), Subset(x, range(0, 1000, 5)), example_inputs=x.tensors[0][:1])
    with pytest.raises(DataError, match="shown by no number of images"):
        cs.auto(trained, rule.format(1), x, example_inputs=x.tensors[0][:1])
    # With 247 it is enough, if every answer is kept.
    result = cs.auto(trained, rule.format(0.98), x, images=247, example_inputs=x.tensors[0][:1])
    last = result.attempts[-1]
    assert (result.held_out, last.images) == (183, 183)
    assert last.bounds[0] >= 0.98
    assert result.data == "247 of 1,000 images, seed 0, spread over 4 classes"
    assert "images: 247 of 1,000 images, seed 0, spread over 4 classes" in str(result)
    assert result.plan.weights == "unknown (not as initialised)"


def test_auto_uses_as_many_images_as_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--images of a command, above and below what auto takes by itself."""
    model = cs.create_model("resnet10t", num_classes=10, in_chans=3, img_size=32)
    cs.finetune(model, "digits", epochs=2, lr=3e-3, warmup_epochs=0, progress=False, device="cpu")
    cs.save(model, tmp_path / "trained")
    rule = "conv[name=layer4.*]->auto(linear-mix, params<=-5%)"
    for number in (64, 600):
        out = tmp_path / str(number)
        arguments = ["convert", str(tmp_path / "trained"), "-r", rule, "-o", str(out), "--dataset", "digits"]
        assert run([*arguments, "--images", str(number), "--seed", "3"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"images: {number} of 1,347 images, seed 3, spread over 10 classes" in said
        assert f"on {16 if number == 64 else 150} held-out images" in said
        assert "weights: random at first, changed since" in said
