"""``auto(...)``: chosen by measurement, held to its promise on images held out; growth and saturation foreseen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import needs
from scipy.stats import binomtest
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.adapt import auto as engine
from convsurgery.adapt.auto import Attempt, AutoResult
from convsurgery.adapt.holdout import hold_out
from convsurgery.errors import ConversionError, DataError, RuleError


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    with torch.no_grad():  # statistics that belong to the images
        model.train()
        for _ in range(60):
            model(pictures(32))
    return model.eval()


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 12, 12)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def chosen(rule: str, images: Tensor, **options: object) -> AutoResult:
    return cs.auto(net(), rule, images, example_inputs=images[:1], **options)


def test_saving_is_reached_and_the_rule_does_the_same(images: Tensor) -> None:
    result = chosen("first-conv->keep; conv->auto(linear-mix | pnn, params<=-30%)", images)
    last = result.attempts[-1]
    assert last.params <= -0.3
    model = net()
    before, after = (sum(p.numel() for p in part.parameters()) for part in (model, result.model))
    assert last.params == pytest.approx(after / before - 1)
    assert type(result.model[0]) is nn.Conv2d
    again = cs.convert(model, result.rule, example_inputs=images[:1], calibration=_fit_part(images))
    assert torch.equal(again(images), result.model(images))


def _fit_part(images: Tensor) -> list[Tensor]:
    """What is not held out, in batches as ``auto`` makes them."""
    return list(hold_out(images.split(64)).fit)


def test_agreement_is_measured_on_images_held_out(images: Tensor) -> None:
    model = net()
    result = cs.auto(model, "conv->auto(linear-mix, params<=-20%)", images, example_inputs=images[:1])
    held_out = torch.cat(list(hold_out(images.split(64)).held_out))
    with torch.no_grad():
        same = (model(held_out).argmax(1) == result.model(held_out).argmax(1)).double().mean()
    assert result.held_out == len(held_out) == 96
    assert result.attempts[-1].agreement == pytest.approx(float(same))
    low, high = binomtest(round(96 * float(same)), 96).proportion_ci(0.95, "exact")
    assert result.attempts[-1].bounds == pytest.approx((low, high), rel=1e-9)
    assert f"({low:.4f} to {high:.4f}) on 96 held-out images".replace("(", "(95 % interval ") in str(result)


def test_it_backs_off_until_the_promise_holds_and_says_what_it_gave_up(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = engine._measure

    def worse(*arguments: object) -> Attempt:
        """Every replacement costs a tenth of the answers."""
        attempt = measure(*arguments)
        return dataclasses.replace(attempt, agreement=1 - 0.1 * len(attempt.choice.picks))

    monkeypatch.setattr(engine, "_measure", worse)
    seen: list[Attempt] = []
    with pytest.warns(UserWarning, match=r"gave up params<=-60%: params -\d"):
        result = chosen("conv->auto(linear-mix, params<=-60%, agreement>=0.7)", images, on_attempt=seen.append)
    assert [len(attempt.choice.picks) for attempt in seen] == [4, 3, 2]
    assert len(result.plan.edits) == 2
    notes = cs.record(result.model).plans[-1].notes
    assert any("gave up params<=-60%" in note for note in notes)
    # 0.7 itself would not do: what was measured could be luck.
    assert seen[1].agreement == 0.7
    assert seen[1].bounds[0] < 0.7 <= seen[2].bounds[0]
    wanted = "agreement 0.8000 (95 % interval 0.7083 to 0.8764) on 96 held-out images, after 3 attempts"
    assert any(wanted in note for note in notes), notes


def test_savings_out_of_reach_are_told_before_anything_is_converted(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "apply", lambda *_: pytest.fail("something was converted"))
    with pytest.raises(ConversionError, match=r"params: -\d+\.?\d* % is the most; wanted -99 %"):
        chosen("conv->auto(linear-mix, params<=-99%)", images)


def test_an_agreement_that_nothing_keeps(images: Tensor) -> None:
    with pytest.raises(ConversionError, match=r"no replacement meets params<=-60%, agreement>=0\.95"):
        chosen("conv->auto(linear-mix by random(0), params<=-60%, agreement>=0.95)", images)


def test_sites_that_rules_before_took_are_left(images: Tensor) -> None:
    result = chosen("conv[index=2]->kerv-poly; conv[index=3]->keep; conv->auto(linear-mix, params<=-20%)", images)
    replaced = {entry.site.index: entry.config.name for entry in result.plan.edits}
    assert replaced[2] == "kerv-poly"
    assert 3 not in replaced
    assert set(replaced.values()) == {"kerv-poly", "linear-mix"}


def test_convert_does_it_too_and_in_place_keeps_the_model_on_errors(images: Tensor, tmp_path: Path) -> None:
    model = net()
    rule = "conv->auto(linear-mix, params<=-20%)"
    new = cs.convert(model, rule, example_inputs=images[:1], calibration=images)
    assert torch.equal(new(images), chosen(rule, images).model(images))
    again = cs.load(cs.save(new, tmp_path / "out"), base=model)
    assert torch.equal(again(images), new(images))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConversionError):
        cs.convert_(model, "conv->auto(linear-mix, params<=-99%)", example_inputs=images[:1], calibration=images)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(cs.convert_(model, rule, example_inputs=images[:1], calibration=images)(images), new(images))


def test_what_it_refuses(images: Tensor) -> None:
    with pytest.raises(RuleError, match="no rule has the target auto"):
        chosen("conv->linear-mix", images)
    with pytest.raises(RuleError, match="one rule may say auto"):
        chosen("conv[k=3]->auto(linear-mix, params<=-5%); conv->auto(pnn, params<=-5%)", images)
    with pytest.raises(DataError, match="7 are too few"):
        chosen("conv->auto(linear-mix, params<=-5%)", images[:7])
    with pytest.raises(RuleError, match="auto chooses by measurement"):
        cs.convert(net(), "conv->auto(linear-mix, params<=-5%)", example_inputs=images[:1])
    with pytest.warns(UserWarning, match="only 10 held-out images") as caught:
        chosen("conv->auto(linear-mix, params<=-5%)", images[:40])
    assert {warning.filename for warning in caught} == {__file__}


def test_curve_of_measured_choices(images: Tensor, tmp_path: Path) -> None:
    needs("matplotlib", "docs")
    model = net()
    found = cs.scan(model, "linear-mix", images, latency=False)
    points = cs.measure_choices(model, cs.trade_off(found, points=4), images)
    assert [point.saving for point in points] == sorted(point.saving for point in points)
    assert all(0 <= point.measured <= 1 for point in points)
    cs.draw_trade_off(points, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_growth_is_foreseen_from_weights_and_from_images(images: Tensor) -> None:
    model = net()
    x = images[:8]

    def notes(rule: str, **options: object) -> str:
        return " ".join(cs.plan(model, rule, example_inputs=x, **options).notes)

    assert "growth: kerv-l1 at 0 gives" in notes("conv[index=0]->kerv-l1 by copy")
    assert "on random inputs" in notes("conv[index=0]->kerv-l1 by copy")
    assert "on these images" in notes("conv[index=0]->kerv-poly(degree=8) by copy", calibration=5 * x)
    assert "growth" not in notes("conv->kerv-poly")
    assert "growth" not in notes("conv->linear-mix by project")
    told = notes("all-conv->kerv-l1 by copy")
    assert "and at" in told
    assert "start by neutral, fit or blend" in told
    assert cs.plan("resnet18", "all-conv->kerv-l1 by copy").notes == ()


def test_saturation_is_told_with_what_helps(images: Tensor) -> None:
    model = net()
    for part in model:
        if isinstance(part, nn.Conv2d):
            part.weight.data.mul_(40)
    x = images[:8]
    (note,) = cs.plan(model, "conv[index=0]->kerv-sigmoid by copy", example_inputs=x, calibration=x).notes
    assert "% of tanh beyond" in note
    better = float(note.split("by neutral(")[1].split(")")[0])
    told: list = []
    cs.convert(
        model,
        f"conv[index=0]->kerv-sigmoid by neutral({better})",
        example_inputs=x,
        calibration=x,
        on_layer=told.append,
    )
    assert "saturated" not in told[0].note
    (note,) = cs.plan(model, "conv[index=0]->kerv-gauss(gamma=5)", example_inputs=x, calibration=x).notes[:1]
    gamma = float(note.split("gamma=")[-1].split()[0])
    assert 0 < gamma < 5
    quiet = cs.plan(model, f"conv[index=0]->kerv-gauss(gamma={gamma})", example_inputs=x, calibration=x).notes
    assert not any("saturated" in each for each in quiet)


def test_plan_says_how_each_site_starts_where_they_differ(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    text = str(cs.plan(model, "conv->pnn", example_inputs=images[:1]))
    assert "pnn by neutral" in text
    assert "pnn by project" in text
