"""Scans: the short way against the naive one, reasons, files, and going on after an interruption."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from timm.layers import register_notrace_module
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.adapt.scan import Scan, ScanRow, scan
from convsurgery.adapt.scan_report import draw
from convsurgery.errors import (
    ArgumentError,
    ConversionError,
    ConvSurgeryError,
    DataError,
    ModelError,
    NoMatchError,
    RuleError,
    SettingsError,
    StorageError,
)
from convsurgery.geometry import Site
from convsurgery.graph import observe
from convsurgery.operators import KervPoly, LinearMix, OperatorLayer, Start, bind
from convsurgery.operators.moments import Moments
from convsurgery.rules import parse_target


@register_notrace_module
class Hidden(nn.Module):
    """A convolution FX does not see: the module stays whole, for its control flow depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().sum()) > 0:
            x = self.conv(x) + x.mul_(0.5)
        return x


class Hazards(nn.Module):
    """In-place operations on values that wait for a site, views of them, a shared convolution, a hidden one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.inner, self.inner_norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.again = self.shared
        self.hidden = Hidden()
        self.last, self.head = nn.Conv2d(6, 8, 1), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.9)
        x = self.act(self.norm(self.stem(x)))
        view = x.flatten(2)
        y = self.act(self.inner_norm(self.inner(x)))
        x.add_(y)  # seen through the view, and by what waits for the next site
        x = self.act(self.again(self.shared(x))) + x
        x = self.hidden(x)
        return self.head(torch.cat([self.last(x).relu_().mean((2, 3)), view.mean(2)], 1))


class Untraced(nn.Module):
    """The same behind control flow that FX cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Hazards()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if float(x.sum()) == float(x.sum()) else x


def lively(model: nn.Module) -> nn.Module:
    """With BatchNorms that do something: random gains, offsets and statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
def decided(model: nn.Module, images: Tensor) -> nn.Module:
    """With answers of several classes: agreement with a model that knows one class only is refused."""
    head = next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))
    head.bias.sub_(model(images.clone()).mean(0))
    assert len(model(images.clone()).argmax(1).unique()) > 1
    return model


@pytest.fixture
def model(images: Tensor) -> nn.Module:
    return decided(lively(Hazards()), images)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(70, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def sites_of(model: nn.Module, images: Tensor) -> dict[str, Site]:
    return {site.name: site for site in observe(model, (images[:1].clone(),)).sites}


@torch.no_grad()
def naive(model: nn.Module, row: ScanRow, site: Site, images: Tensor) -> tuple[float, float, float]:
    """Error, KL and agreement by whole forwards of whole models."""
    original, new = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    conv = original.get_submodule(row.site)
    assert isinstance(conv, nn.Conv2d)
    pairs: list[tuple[Tensor, Tensor]] = []
    handle = conv.register_forward_hook(lambda _, args, out: pairs.append((args[0].clone(), out.clone())))
    before = original(images.clone()).double()
    handle.remove()
    config, start = bind(parse_target(row.operator)), Start.parse(row.start)
    source = new.get_submodule(row.site)
    assert isinstance(source, nn.Conv2d)
    layer = config.build(source, start, absorb=False, site=site).module.eval()
    norm: Any = None
    if start.name != "neutral" and site.batchnorm is not None and conv.bias is None:
        norm = new.get_submodule(site.batchnorm)
    shift: Tensor | None = None
    if isinstance(layer, OperatorLayer) and start.name in ("fit", "neutral", "copy") and row.operator != "kerv-linear":
        fitter = layer.fitter(conv, start.value if start.name == "fit" else None, shift=norm is not None)
        while fitter is not None:
            for x, y in pairs:
                fitter.add(layer.prepared(x), layer(x), y)  # without padding of its own it prepares nothing
            if fitter.finish() is not None:
                shift = fitter.shift
                break
    moments = Moments()
    for x, y in pairs:
        moments.add(layer(x), y)
    if norm is not None and shift is not None:
        norm.running_mean.sub_(shift)
    for name in site.names:
        new.set_submodule(name, layer)
    after = new(images.clone()).double()
    p, q = before.log_softmax(1), after.log_softmax(1)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    return (
        moments.error(offset=0.0 if shift is None else shift),
        kl,
        float((p.argmax(1) == q.argmax(1)).double().mean()),
    )


def check(model: nn.Module, found: Scan, images: Tensor) -> None:
    sites = sites_of(model, images)
    for row in found.rows:
        assert row.reason is None, row
        assert row.agreement is not None
        error, kl, agreement = naive(model, row, sites[row.site], images)
        assert row.error == pytest.approx(error, rel=1e-5, abs=2e-6), row
        assert row.kl == pytest.approx(kl, rel=1e-5, abs=1e-6), row
        assert row.agreement == agreement, row


OPERATORS = "linear-mix(extend=true) | kerv-poly(degree=2) | kerv-l1 by copy | pnn by project | conv by random(3)"


@pytest.mark.parametrize("kind", [Hazards, Untraced])
def test_what_is_measured_is_what_whole_models_give(kind: type[nn.Module], images: Tensor) -> None:
    model = decided(lively(kind()), images)
    found = scan(model, OPERATORS, images, latency=False)
    names = ["stem", "inner", "shared", "hidden.conv", "last"]
    prefix = "net." if kind is Untraced else ""
    assert list(dict.fromkeys(row.site for row in found.rows)) == [prefix + name for name in names]
    assert len(found.rows) == 25
    assert found.seen.startswith("whole forwards" if kind is Untraced else "FX:")
    assert found.images == len(images)
    # The operators do damage at every site: otherwise nothing would be compared.
    assert min(row.kl or 0 for row in found.rows if row.operator == "conv") > 1e-5
    check(model, found, images)


def test_a_resnet_at_every_site() -> None:
    images = torch.randn(2, 3, 64, 64)
    model = decided(lively(cs.create_model("resnet18", num_classes=10)), images)
    found = scan(model, "kerv-gauss by copy", images)
    assert len(found.rows) == 20
    assert found.seen.startswith("FX:")
    check(model, dataclasses.replace(found, rows=found.rows[::3]), images)
    assert all(row.latency_saved is not None for row in found.rows)
    assert found.forward_ms is not None
    assert 0 < found.forward_ms < 10_000


def test_it_is_what_convert_does_with_the_same_images(images: Tensor) -> None:
    """Of a convolution without bias the BatchNorm takes the offset."""
    layers: list[nn.Module] = []
    for channels in (3, 6):
        layers += [nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    model = lively(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)))
    for row in scan(model, "pnn | kerv-gauss | kerv-l1", images, latency=False).rows:
        rule = f"conv[name={row.site}]->{row.operator} by {row.start}"
        new = cs.convert(model, rule, example_inputs=images[:1], calibration=[*images.split(64)]).eval()
        with torch.no_grad():
            p, q = (net(images).double().log_softmax(1) for net in (model, new))
        kl = float(F.kl_div(q, p, reduction="batchmean", log_target=True))
        assert row.kl == pytest.approx(kl, rel=1e-4, abs=1e-9), row
        assert kl > (1e-7 if row.operator == "kerv-l1" else 1e-5) or row.operator == "kerv-gauss"


def test_only_what_comes_behind_is_computed_again() -> None:
    count = 8
    layers = itertools.chain.from_iterable((nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(count))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    calls = 0

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal calls
        calls += isinstance(module, nn.Conv2d) and type(out) is Tensor and len(out) == 6

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        found = scan(model, "conv", torch.randn(6, 3, 8, 8), latency=False)
    finally:
        handle.remove()
    assert len(found.rows) == count
    # The model's own answers, every convolution once on the way, and what comes behind each site.
    assert calls == 2 * count + count * (count + 1) // 2


def test_a_graph_that_computes_something_else_is_found_out(images: Tensor) -> None:
    """FX takes ``x += y`` for ``x = x + y``, which a view of x does not see."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            view = x.flatten(2)
            x += self.second(x)
            return view.mean(2)

    found = scan(Viewed().eval(), "conv by random(3)", images, latency=False)
    assert found.seen.startswith("whole forwards")
    assert "something else" in found.seen
    assert all(row.kl is not None and row.kl > 0 for row in found.rows)


def test_savings_are_those_of_the_plan(model: nn.Module, images: Tensor) -> None:
    found = scan(model, [LinearMix(), KervPoly(learnable="channel")], images[:4], where="conv[name=inner]")
    mix, poly = found.rows
    assert (mix.params_saved, poly.params_saved) == (6 * 54 - 6 * (9 + 6), -6)
    assert mix.macs_saved == 100 * (6 * 54 - 6 * (9 + 6))
    assert found.params_total == sum(p.numel() for p in model.parameters())
    assert found.macs_total == sum(site.cost.macs for site in sites_of(model, images).values())


def test_starts(model: nn.Module, images: Tensor) -> None:
    operators = ["kerv-poly by copy | kerv-poly", "linear-mix", "kerv-poly by neutral(0.01)", "linear-mix by fit"]
    found = scan(model, operators, images[:4], where="conv[name=inner]", start="neutral", latency=False)
    assert [(row.operator, row.start, row.reason is None) for row in found.rows] == [
        ("kerv-poly", "copy", True),
        ("kerv-poly", "neutral", True),
        ("linear-mix", "neutral", False),
        ("kerv-poly", "neutral(eps=0.01)", True),
        ("linear-mix", "fit", True),
    ]
    assert "no start 'neutral'" in str(found.rows[2].reason)
    assert found.rows[2].params_saved is None
    assert "kerv-poly by copy" in str(found)
    row = scan(model, "kerv-poly by blend", images[:4], where="conv[name=inner]").rows[0]
    assert "begins as the convolution" in str(row.reason)


def test_reasons(model: nn.Module, images: Tensor) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_submodule("hidden.conv").weight[0, 0, 0, 0] = math.inf  # type: ignore[index, union-attr]
    with pytest.raises(ModelError, match="not finite"):
        scan(broken, "conv", images)
    rows = scan(model, "linear-mix | conv", images[:4], latency=False).rows
    kept = {(row.site, row.operator): row.reason for row in rows if row.reason is not None}
    assert set(kept) == {("stem", "linear-mix"), ("last", "linear-mix")}
    assert "3 to 6 channels" in str(kept["stem", "linear-mix"])
    assert [row.operator for row in rows] == ["linear-mix", "conv"] * 5
    # A convolution that the selector names alone is no error either, and other operators go on.
    rows = scan(model, "linear-mix | conv", images[:4], where="first-conv", latency=False).rows
    assert [row.reason is None for row in rows] == [False, True]
    hooked = copy.deepcopy(model)
    hooked.get_submodule("inner").register_forward_hook(lambda *_: None)
    rows = scan(hooked, "conv", images[:4], latency=False).rows
    assert [row.site for row in rows if row.reason and "hooks" in row.reason] == ["inner"]


def test_weights_that_are_not_finite_but_do_not_show(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Hardtanh()).eval()
    with torch.no_grad():
        model[0].bias[0] = math.inf  # type: ignore[index]
    row = scan(model, "conv", images[:4]).rows[0]
    assert row.reason == "its bias holds NaN or infinity"
    assert row.kl is None


def test_scores_that_are_not_finite(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.mul_(1e25)  # type: ignore[operator, union-attr]
    found = scan(model.eval(), "kerv-poly(degree=3) by random(0) | kerv-poly(degree=3) by copy", images[:4])
    fine, overflow = found.rows
    assert fine.kl is not None
    assert math.isfinite(fine.kl)
    assert (overflow.kl, overflow.agreement, overflow.error) == (math.inf, 0.0, math.inf)
    assert Scan.from_json(found.to_json()) == found
    json.loads(found.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("operators", "options", "error", "text"),
    [
        ("nonsense", {}, RuleError, "unknown operator"),
        ([], {}, RuleError, "needs operators"),
        ("rd-implicit | conv", {}, ConversionError, "residual=false"),
        ("block", {}, ConversionError, "several layers"),
        ("conv", {"where": "conv[name=nowhere]"}, NoMatchError, "near misses"),
        ("conv", {"where": "conv["}, RuleError, "expected"),
        ("conv", {"resume": True}, ArgumentError, "output=folder"),
        ("conv", {"images": 0}, SettingsError, "images must be"),
    ],
)
def test_what_cannot_be_asked(
    model: nn.Module, images: Tensor, operators: Any, options: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        scan(model, operators, images[:4], **options)


def test_models_that_cannot_be_scanned(images: Tensor) -> None:
    with pytest.raises(ModelError, match="scan the model itself"):
        scan(torch.nn.DataParallel(Hazards()), "conv", images[:4])
    with pytest.raises(ModelError, match="a classifier must answer"):
        scan(nn.Conv2d(3, 3, 3), "conv", images[:4])
    with pytest.raises(DataError):
        scan(Hazards(), "conv", [])


def test_the_model_is_not_touched(model: nn.Module, images: Tensor) -> None:
    """Not even by a fit that writes on a bias it shares with the convolution."""
    model.train()
    model.get_submodule("norm").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    held, given = dict(model.named_parameters()), images.clone()
    scan(model, "lbc(act=tanh) | pnn | kerv-poly | linear-mix(extend=true)", images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(images, given)


class Interrupted(Exception):
    pass


def test_going_on_after_an_interruption(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": images, "latency": False}
    operators = "linear-mix | kerv-poly | conv by random"
    whole = scan(model, operators, output=tmp_path / "whole", **options)
    seen: list[ScanRow] = []

    def stop(row: ScanRow) -> None:
        seen.append(row)
        if len(seen) == 6:
            raise Interrupted

    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        scan(model, operators, output=folder, on_row=stop, **options)
    assert not (folder / "scan.json").exists()
    # As if the machine had stopped in the middle of a line.
    with (folder / "rows.jsonl").open("a") as stream:
        stream.write('{"site": "inn')
    with pytest.raises(StorageError, match="resume=True"):
        scan(model, operators, output=folder, **options)
    done = scan(model, operators, output=folder, resume=True, on_row=seen.append, **options)
    assert done == whole
    assert tuple(sorted(seen, key=whole.rows.index)) == whole.rows
    assert Scan.load(folder) == Scan.load(tmp_path / "whole") == whole
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 1 + len(whole.rows)
    # Complete, there is nothing left to do.
    assert scan(model, operators, output=folder, resume=True, on_row=pytest.fail, **options) == whole


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("weights", "other weights"),
        ("images", "other images"),
        ("operators", r"operators conv \| kerv-poly, now conv"),
        ("where", "where 'all-conv', now 'conv"),
        ("start", "start '', now 'copy'"),
    ],
)
def test_rows_of_another_scan(model: nn.Module, images: Tensor, tmp_path: Path, change: str, text: str) -> None:
    images = images[:4]
    scan(model, "conv | kerv-poly", images, where="all-conv", output=tmp_path, latency=False)
    options: dict[str, Any] = {"where": "conv[k=3]"} if change == "where" else {}
    options |= {"start": "copy"} if change == "start" else {}
    with torch.no_grad():
        if change == "weights":
            model.get_submodule("norm").running_var[0] += 1  # type: ignore[index, operator, union-attr]
        if change == "images":
            images = images.flip(0)
    operators = "conv" if change == "operators" else "conv | kerv-poly"
    with pytest.raises(StorageError, match=text):
        scan(model, operators, images, output=tmp_path, resume=True, latency=False, **options)


def test_a_file_that_is_none_of_ours(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\nnonsense\n{}\n")
    with pytest.raises(StorageError, match="line 2"):
        scan(model, "conv", images[:4], output=tmp_path, resume=True)


ROWS = (
    ScanRow("stem", 0, "linear-mix", "", reason="3 to 6 channels, and no more"),
    ScanRow("stem", 0, "kerv-poly(degree=2)", "neutral(eps=0.001)", 1 / 3, 1e-9, 1.0, 0, -10, -0.25),
    ScanRow("inner", 1, "linear-mix", "fit", 0.5, 0.1, 0.75, 123456, 7 * 10**9, 0.125),
    ScanRow("inner", 1, "kerv-poly(degree=2)", "neutral(eps=0.001)", math.inf, math.inf, 0.0, 0, -10, None),
)
FOUND = Scan("net", ROWS, 8, 200_000, 10**10, 1.5, "FX: only what comes behind")


def test_files(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the figure is left out where matplotlib is missing
        assert FOUND.save(tmp_path / "new") == tmp_path / "new"
    assert Scan.load(tmp_path / "new") == FOUND
    assert {path.name for path in (tmp_path / "new").iterdir()} - {"scan.svg"} == {"scan.json", "scan.csv"}
    lines = (tmp_path / "new" / "scan.csv").read_text().splitlines()
    assert lines[0] == ",".join(field.name for field in dataclasses.fields(ScanRow))
    assert lines[1] == 'stem,0,linear-mix,,,,,,,,"3 to 6 channels, and no more",'
    assert lines[3] == "inner,1,linear-mix,fit,0.5,0.1,0.75,123456,7000000000,0.125,,"
    assert len(lines) == 5


def test_figure(tmp_path: Path) -> None:
    needs("matplotlib", "docs")
    FOUND.save(tmp_path / "new")
    drawn = (tmp_path / "new" / "scan.svg").read_text()
    texts = [element.text for element in ElementTree.fromstring(drawn).iter() if element.text]
    assert {"stem", "inner", "linear-mix by fit", "answers lost, %"} <= set(texts)
    assert draw(FOUND) == drawn
    assert "mean KL, nats" in draw(FOUND, "kl")
    with pytest.raises(ConvSurgeryError, match="agreement or kl"):
        draw(FOUND, "speed")


def test_sixty_sites_are_drawn_one_below_the_other() -> None:
    needs("matplotlib", "docs")
    rows = tuple(ScanRow(f"site{i}", i, "conv", "copy", 0.0, 0.0, 0.5, 0, 0) for i in range(60))
    tree = ElementTree.fromstring(draw(dataclasses.replace(FOUND, rows=rows)))
    names = [element for element in tree.iter() if element.text and element.text.startswith("site")]
    assert len(names) == 60
    assert float(tree.attrib["height"].removesuffix("pt")) > 60 * 10


def test_no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConvSurgeryError, match="pip install matplotlib"):
        draw(FOUND)
    with pytest.warns(UserWarning, match="pip install matplotlib"):
        FOUND.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scan.json", "scan.csv"}


def _without(key: str) -> str:
    data = json.loads(FOUND.to_json())
    del data["rows"][1][key]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not what convsurgery writes"),
        ("{}", "no 'format'"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "rows": []}', "no 'images'"),
        ('{"format": 1, "rows": [{}]}', "no 'site'"),
        (_without("kl"), "no 'kl'"),
        (FOUND.to_json().replace("0.75", '"much"'), "not what convsurgery writes"),
        (FOUND.to_json().replace("0.75", "null"), "neither numbers nor a reason"),
    ],
)
def test_what_is_no_scan(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(StorageError, match=message):
        Scan.load(tmp_path)
    with pytest.raises(StorageError, match="cannot be read"):
        Scan.load(tmp_path / "nowhere")


def test_the_table() -> None:
    text = str(FOUND)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("123k", "7G", "75.0%", "-10", "0.33", "inf", "linear-mix not measured at stem: 3 to 6 channels"):
        assert part in text
    # Long names are folded, and no column is lost.
    long = dataclasses.replace(
        ROWS[2], site="stages.3.blocks.17.conv_dw_and_more", operator="rd-implicit(residual=false)"
    )
    text = str(dataclasses.replace(FOUND, rows=(long, dataclasses.replace(long, start="random"))))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("0.12") == 2
    refused = tuple(ScanRow(f"s{i}", i, "conv", "", reason=f"reason {i // 2}") for i in range(19))
    text = str(dataclasses.replace(FOUND, rows=refused))
    assert "conv not measured at s0, s1: reason 0" in text
    assert "other reasons: 3 more" in text
    untimed = dataclasses.replace(FOUND, rows=(ROWS[0], ROWS[3]), forward_ms=None)
    assert " ms" not in str(untimed).splitlines()[2]
