"""Models by name from timm and torchvision, with errors that say what to do."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from convsurgery.errors import ModelError
from convsurgery.plain import declared
from convsurgery.zoo.checkpoint import copy_weights, read_weights
from convsurgery.zoo.names import TORCHVISION, Base, canonical_name, check_name
from convsurgery.zoo.origin import Origin, note_origin
from convsurgery.zoo.sizes import first_channels, image_pair, input_size

__all__ = ["create_model"]

# Only matters while a model is built: it has no place in the record of what the model is.
_TRANSIENT = ("cache_dir", "init_weights", "progress", "weights", "weights_backbone")
# Their initialisation takes seconds, for nothing where weights follow.
_SLOW_START = ("googlenet", "inception_v3")
# torchvision's models that are bound to an image size, and how they call it.
_SIZE_ARGUMENT = {"vision_transformer": "image_size", "maxvit": "input_size"}
_CLIENTS = ("huggingface_hub", "requests", "httpx", "httpcore", "urllib3")


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    new_head: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by its timm or torchvision name, in eval mode.

    The result carries a :class:`Base` (``_convsurgery_base``) from which its structure can be built again, unless a
    keyword argument is none that a base can hold (a class, a function, a configuration) or torchvision builds the
    pretrained model in a way that its arguments cannot express (detection models with frozen normalisation).

    Args:
        name: as timm has it (``resnet18``, ``resnet18.a1_in1k``, ``timm/resnet18``, ``hf-hub:org/name``,
            ``local-dir:path``), or ``torchvision/resnet18``.
        pretrained: download the library's weights. With another ``num_classes`` the classifier starts afresh.
        checkpoint: a weights file, see :func:`load_checkpoint`. With ``pretrained`` it stands in for the download.
        num_classes: number of classes, the library's default when absent.
        img_size: height and width in pixels, one number when they are equal. Handed to models bound to one size,
            recorded for :func:`input_size` otherwise.
        device: where to; "meta" builds without allocating any weights.
        new_head: whether a classifier may start afresh where ``checkpoint`` has another number of classes.
        kwargs: handed to timm's ``create_model`` or torchvision's builder.

    Raises:
        ModelError: an unknown name, arguments the builder refuses, weights that do not exist, cannot be downloaded or
            do not fit.

    Example::

        create_model("resnet18.a1_in1k", pretrained=True, num_classes=10)
        create_model("torchvision/resnet50", checkpoint="resnet50-11ad3fa6.pth")
    """
    name = canonical_name(name)
    check_name(name)
    asked = {**kwargs, "num_classes": num_classes, "img_size": img_size}
    asked = {key: value for key, value in asked.items() if value is not None}
    if "checkpoint_path" in asked:
        raise ModelError("checkpoint_path is timm's word; write checkpoint=FILE")
    if img_size is not None and (image_pair(img_size) is None or min(image_pair(img_size) or (0,)) < 1):
        raise ModelError(f"img_size must be a positive number of pixels or (height, width), not {img_size!r}")
    meta = device is not None and torch.device(device).type == "meta"
    if meta and (pretrained or checkpoint is not None):
        raise ModelError(
            "a model on the meta device holds no weights: leave out pretrained and checkpoint, or the device"
        )
    state = None if checkpoint is None else read_weights(checkpoint)

    build = _build_torchvision if name.startswith(TORCHVISION) else _build_timm
    try:
        # Detection models calculate their anchors when they are built.
        with _weights_on_meta(name) if meta else contextlib.nullcontext():
            model, base, origin = build(name, asked, pretrained, state is not None)
    except ModelError as error:
        if not meta or "meta tensor" not in str(error):
            raise
        with _WeightsOnMeta():
            model, base, origin = build(name, asked, pretrained, False)
        model.to("meta")
    if state is not None:
        own_head = copy_weights(model, state, str(checkpoint), new_head=pretrained or new_head)
        origin = Origin(f"checkpoint {Path(str(checkpoint)).name}", new_head=own_head)
    note_origin(model, origin)
    if base is not None:
        object.__setattr__(model, "_convsurgery_base", base)
    size = image_pair(img_size)
    if size and input_size(model)[1:] != size:
        object.__setattr__(model, "_convsurgery_input_size", (first_channels(model), *size))
    return model.eval() if device is None or meta else model.to(device).eval()


def _weights_on_meta(name: str) -> contextlib.AbstractContextManager[Any]:
    from torchvision.models import get_model_builder

    short = name.removeprefix(TORCHVISION)
    detection = short != name and ".detection." in get_model_builder(short).__module__
    return _WeightsOnMeta() if detection else torch.device("meta")


class _WeightsOnMeta(TorchFunctionMode):
    """As ``torch.device("meta")``, but what a constructor may calculate with (torchvision's RegNet) stays real."""

    _BULK = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._BULK and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build_timm(
    name: str, asked: dict[str, Any], pretrained: bool, by_hand: bool
) -> tuple[nn.Module, Base | None, Origin]:
    import timm

    hub = ":" in name
    own_cfg = "pretrained_cfg" in asked or "pretrained_cfg_overlay" in asked
    cfg = None if hub else timm.get_pretrained_cfg(name)
    download = pretrained and not by_hand
    if download and cfg is not None and not own_cfg and not cfg.has_weights:
        others = ", ".join(timm.list_pretrained(name.partition(".")[0] + ".*"))
        raise ModelError(
            f"timm has no pretrained weights for {name!r}" + (f"; with weights: {others}" if others else "")
        )
    arguments = dict(asked)
    if not hub and not (cfg is not None and cfg.fixed_input_size):
        arguments.pop("img_size", None)
    with _refusals(name, arguments, _wanted_timm(name, cfg) if (download or hub) and not own_cfg else None):
        try:
            model = timm.create_model(name, pretrained=download, **arguments)
        except TypeError as error:
            # What a hub repository holds is known only once it is read: a CNN takes no size.
            if not hub or "img_size" not in arguments or "img_size" not in str(error):
                raise
            del arguments["img_size"]
            model = timm.create_model(name, pretrained=download, **arguments)
    origin = _tagged(model, name if hub else "") if download else _RANDOM
    if hub:
        from convsurgery.zoo.identify import identify

        # Written out, so that a saved model can be rebuilt where the repository cannot be reached.
        return model, identify(model), origin
    return model, _base(name, asked), origin


_RANDOM = Origin("random", random=True)


def _tagged(model: nn.Module, name: str) -> Origin:
    """What timm loaded by itself: the tag, and whether the classifier is one of another size."""
    cfg = declared(model)
    classes, known = getattr(model, "num_classes", None), cfg.get("num_classes")
    return Origin(name or cfg.get("tag") or "pretrained", new_head=bool(classes) and classes != known)


def _build_torchvision(
    name: str, asked: dict[str, Any], pretrained: bool, by_hand: bool
) -> tuple[nn.Module, Base | None, Origin]:
    from torchvision.models import get_model_builder

    short = name.removeprefix(TORCHVISION)
    builder = get_model_builder(short)
    arguments = dict(asked)
    size = arguments.pop("img_size", None)
    argument = _SIZE_ARGUMENT.get(builder.__module__.rpartition(".")[2])
    if size is not None and argument:
        height, width = image_pair(size) or (0, 0)
        arguments.setdefault(argument, height if argument == "image_size" else (height, width))
    chosen = arguments.pop("weights", None)
    weights = _weights(short, chosen) if pretrained or chosen is not None else None
    if weights is None or by_hand:
        if by_hand and short.endswith(_SLOW_START):
            arguments.setdefault("init_weights", False)
            if pretrained:
                # These weights expect another input normalisation, which torchvision switches on when it downloads.
                arguments.setdefault("transform_input", True)
        if "weights_backbone" in inspect.signature(builder).parameters:
            arguments.setdefault("weights_backbone", None)
        if arguments.get("weights_backbone") is None:
            recorded = dict(arguments)
            if size is not None:
                recorded["img_size"] = size
            return _call(name, builder, arguments), _base(name, recorded), _RANDOM
        backbone = str(arguments["weights_backbone"])
        model = _call(name, builder, arguments, f"the backbone weights {backbone}")
        return model, _verified(model, short), Origin(f"random behind a backbone with {backbone}")

    classes = arguments.pop("num_classes", None)
    known = len(weights.meta.get("categories", ()))
    model = _call(name, builder, {**arguments, "weights": weights}, _wanted_torchvision(weights))
    base = _verified(model, short)
    tag = f"torchvision's {weights.name}"
    if classes in (None, known):
        return model, base, Origin(tag)
    if base is None:
        raise ModelError(
            f"pretrained {name} cannot be built with num_classes={classes}, torchvision ties it to {known}"
        )
    base = Base(name, {**base.kwargs, "num_classes": classes})
    unloaded: dict[str, Any] = {"init_weights": False} if short.endswith(_SLOW_START) else {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        unloaded["weights_backbone"] = None
    other = _call(name, builder, {**unloaded, **base.kwargs})
    copy_weights(other, model.state_dict(), f"the pretrained {name}", new_head=True)
    return other, base, Origin(tag, new_head=True)


def _verified(model: nn.Module, short: str) -> Base | None:
    from convsurgery.zoo.identify import identify_torchvision

    return identify_torchvision(model, [short])


def _weights(short: str, chosen: Any) -> Any:
    from torchvision.models import get_model_weights

    try:
        known = get_model_weights(short)
        return known.DEFAULT if chosen is None or chosen is True else known.verify(chosen)
    except KeyError:
        names = ", ".join(known.__members__)
        raise ModelError(f"torchvision's {short!r} has no weights {chosen!r}; known: {names}") from None
    except (AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"torchvision has no pretrained weights for {short!r}: {error}") from error


def _call(name: str, builder: Any, arguments: dict[str, Any], wanted: str | None = None) -> nn.Module:
    with _refusals(name, arguments, wanted), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # announces another initialisation, which weights replace
        model = builder(**arguments)
    assert isinstance(model, nn.Module)
    return model


def _base(name: str, asked: dict[str, Any]) -> Base | None:
    try:
        return Base(name, {key: value for key, value in asked.items() if key not in _TRANSIENT})
    except (TypeError, ModelError):
        # A class, a hub name, a configuration: what a record cannot hold is told by the structure, or not at all.
        return None


@contextlib.contextmanager
def _refusals(name: str, arguments: dict[str, Any], wanted: str | None) -> Iterator[None]:
    """The builders raise whatever they meet; say it with the name and, for a download, the file."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if wanted is not None and _is_download(error):
            raise ModelError(f"{name}: {wanted}\n({type(error).__name__}: {error})") from error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ModelError(f"{name} cannot be built{' with ' + given if given else ''}: {error}") from error


def _is_download(error: BaseException | None) -> bool:
    while error is not None:
        client = type(error).__module__.partition(".")[0] in _CLIENTS
        if client or isinstance(error, OSError | http.client.HTTPException) or "invalid hash value" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _wanted_timm(name: str, cfg: Any) -> str | None:
    if name.startswith(("hf-hub:", "hf_hub:")):
        repository = name.partition(":")[2]
        return (
            f"config.json and the weights of https://huggingface.co/{repository} could not be downloaded. Fetch the "
            "repository's files where there is a network, and name their folder: local-dir:FOLDER"
        )
    if cfg is None:
        return None
    if cfg.hf_hub_id:
        file = cfg.hf_hub_filename or "model.safetensors"
        place = f"{file} of the hub repository {cfg.hf_hub_id} (https://huggingface.co/{cfg.hf_hub_id})"
    else:
        place = str(cfg.url)
    return f"the weights {place} {_BY_HAND}"


def _wanted_torchvision(weights: Any) -> str:
    return f"the weights {weights.url} {_BY_HAND}"


_BY_HAND = (
    "could not be downloaded. Fetch the file where there is a network, and pass it by hand: "
    "--checkpoint FILE (checkpoint=FILE)"
)
