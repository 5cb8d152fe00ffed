"""What a model was built from: a guess by its marks, believed only when building it again gives the same structure."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from convsurgery.errors import ModelError
from convsurgery.plain import declared
from convsurgery.zoo.allowed import allowed_arguments
from convsurgery.zoo.names import TORCHVISION, Base
from convsurgery.zoo.sizes import first_channels, own_size, torchvision_builders

__all__ = ["identify", "identify_torchvision"]

# Attributes that do not shape the model: switches set after building, and counts its layers tell better.
_STATE = frozenset({"training", "grad_checkpointing", "num_classes"})


def identify(model: nn.Module, *, ignore: Collection[str] = ()) -> Base | None:
    """The base a timm or torchvision model was built from, or None when there is none that gives the same structure.

    A base attached by :func:`create_model` is trusted. Otherwise the model's marks (timm's ``pretrained_cfg``, the file
    of its class in torchvision) give candidates, each is built without memory, and every module's class, options and
    plain attributes and every weight's name and shape must agree.

    Args:
        ignore: names of modules that may differ, as those a conversion has replaced; neither they nor what is below
            them is compared.

    >>> import timm
    >>> identify(timm.create_model("resnet18", num_classes=10))
    Base(name='resnet18.a1_in1k', kwargs={'num_classes': 10})
    """
    attached = getattr(model, "_convsurgery_base", None)
    if isinstance(attached, Base):
        return attached
    cfg = declared(model)
    if cfg.get("architecture"):
        return _identify_timm(model, cfg, ignore)
    return identify_torchvision(model, torchvision_builders(model), ignore)


def identify_torchvision(model: nn.Module, builders: Iterable[str], ignore: Collection[str] = ()) -> Base | None:
    """As :func:`identify`, among the named torchvision builders alone."""
    from torchvision.models import get_model_builder

    heads = [module for module in model.modules() if _outputs(module)]
    head = heads[-1] if heads else None
    classes = _outputs(head)
    for name in _by_size(model, head, builders):
        candidates: list[dict[str, Any]] = [{}]
        parameters = inspect.signature(get_model_builder(name)).parameters
        for count in dict.fromkeys((classes, *_detected(model))):
            if count is not None and count != _known_classes(name):
                candidates.append({"num_classes": count})
        if "aux_loss" in parameters:
            candidates += [{**kwargs, "aux_loss": True} for kwargs in candidates]
        for kwargs in candidates:
            found = _confirm(model, TORCHVISION + name, kwargs, ignore)
            if found is not None:
                return found
    return None


def _detected(model: nn.Module) -> list[int]:
    """Numbers of classes that the parts of a detector speak of: its last layer may put out boxes, or masks."""
    found = []
    for module in model.modules():
        scores = getattr(module, "cls_score", None)
        found += [getattr(module, "num_classes", None), getattr(module, "num_columns", None), _outputs(scores)]
    return [count for count in dict.fromkeys(found) if isinstance(count, int)]


def _by_size(model: nn.Module, head: nn.Module | None, builders: Iterable[str]) -> list[str]:
    """The builders documented with about the model's parameter count, nearest first: building all takes long."""
    of_head = _count(head)
    of_body = _count(model) - of_head
    distances: dict[str, float] = {}
    for name in builders:
        documented, classes = _documented(name, "num_params"), _known_classes(name)
        if documented is None:
            distances[name] = 1.0
            continue
        expected = documented - of_head * (classes or 1) / (_outputs(head) or classes or 1)
        distances[name] = max(of_body, 1) / max(expected, 1)
    # Conversions and auxiliary heads change the count, but hardly that much.
    near = {name: max(ratio, 1 / ratio) for name, ratio in distances.items() if 1 / 3 < ratio < 3}
    return sorted(near, key=lambda name: near[name])


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def _known_classes(name: str) -> int | None:
    categories = _documented(name, "categories")
    return None if categories is None else len(categories)


def _documented(name: str, key: str) -> Any:
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(name).DEFAULT.meta.get(key)
    except (AttributeError, ValueError):  # a builder without weights
        return None


def _identify_timm(model: nn.Module, cfg: dict[str, Any], ignore: Collection[str]) -> Base | None:
    import timm

    name = cfg["architecture"]
    if not timm.is_model(name):
        return None
    tagged = f"{name}.{cfg.get('tag')}"
    if tagged in timm.list_models(f"{name}.*", include_tags=True):
        name = tagged
    # The base is built with the library's own settings, not with those of a hub, of a folder, or of the caller.
    own = timm.get_pretrained_cfg(name)
    guess = _guess(model, cfg if own is None else own.to_dict())
    # timm keeps the arguments a model was created with (from 1.0.31 on): the user's own words come before a guess.
    written = {
        key: value
        for key, value in (getattr(model, "_model_args", None) or {}).items()
        if key in allowed_arguments(name)
    }
    candidates = [{**written, **guess}] if written else []
    candidates.append(guess)
    for kwargs in candidates:
        found = _confirm(model, name, kwargs, ignore)
        if found is not None:
            return found
    return None


def _guess(model: nn.Module, cfg: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model that differ from what its pretrained_cfg says."""
    guess: dict[str, Any] = {}
    heads = cfg.get("classifier") or ()
    modules = dict(model.named_modules())
    head = next((modules.get(name) for name in ([heads] if isinstance(heads, str) else heads)), None)
    classes = _outputs(head) or getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != cfg.get("num_classes", classes):
        guess["num_classes"] = classes
    usual = cfg.get("input_size") or (3, 224, 224)
    channels = first_channels(model)
    if channels != usual[0]:
        guess["in_chans"] = channels
    size = own_size(model)
    if cfg.get("fixed_input_size") and size and size != tuple(usual[1:]):
        guess["img_size"] = size
    return guess


def _outputs(module: nn.Module | None) -> int | None:
    """Features a linear layer or a convolution (or what stands in its place) puts out."""
    count = getattr(module, "out_features", getattr(module, "out_channels", None))
    return count if isinstance(count, int) else None


def _confirm(model: nn.Module, name: str, kwargs: Mapping[str, Any], ignore: Collection[str]) -> Base | None:
    """The base if building it gives the model's structure, at the second try with the attributes that differed."""
    from convsurgery.zoo.build import create_model

    tried: Mapping[str, Any] = kwargs
    for _ in range(2):
        try:
            base = Base(name, tried)
            twin = create_model(name, device="meta", **base.kwargs)
        except (ModelError, TypeError):
            return None
        if type(twin) is not type(model):
            return None
        if _same(model, twin, ignore):
            return base
        options = inspect.signature(type(model).__init__).parameters
        ours, theirs = _attributes(model), _attributes(twin)
        differing = {key: value for key, value in ours.items() if key in options and theirs.get(key) != value}
        if not differing:
            return None
        tried = {**kwargs, **differing}
    return None


def _same(model: nn.Module, twin: nn.Module, ignore: Collection[str]) -> bool:
    ignored = tuple(f"{name}." for name in ignore)

    def compared(name: str) -> bool:
        return not f"{name}.".startswith(ignored)

    pair = [
        {name: module for name, module in one.named_modules(remove_duplicate=False) if compared(name)}
        for one in (model, twin)
    ]
    if pair[0].keys() != pair[1].keys():
        return False
    shapes = [
        {key: getattr(value, "shape", None) for key, value in one.state_dict(keep_vars=True).items() if compared(key)}
        for one in (model, twin)
    ]
    if shapes[0] != shapes[1]:
        return False
    return all(
        type(one) is type(other) and one.extra_repr() == other.extra_repr() and _attributes(one) == _attributes(other)
        for one, other in ((module, pair[1][name]) for name, module in pair[0].items())
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Options a module keeps as plain public attributes: numbers, words, functions; None counts as absent."""
    found = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key in _STATE or value is None:
            continue
        if inspect.isroutine(value) or inspect.isclass(value):
            found[key] = f"{value.__module__}.{value.__qualname__}"
        elif isinstance(value, bool | int | float | str | list | tuple):
            try:
                found[key] = json.loads(json.dumps(value))
            except (TypeError, ValueError):
                continue
    return found
