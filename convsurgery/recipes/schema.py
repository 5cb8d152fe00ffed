"""What a recipe file may hold, and reading one with errors that name the line."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convsurgery.adapt.config import FinetuneConfig
from convsurgery.adapt.data import list_datasets
from convsurgery.errors import ModelError, RecipeError, SettingsError, StorageError, nearest
from convsurgery.files import read_text
from convsurgery.plain import control_characters
from convsurgery.surgery import named_folder
from convsurgery.zoo import check_arguments, is_plain_name

__all__ = [
    "CalibrateStep",
    "ConvertStep",
    "DataStep",
    "ExportStep",
    "FinetuneStep",
    "ModelStep",
    "Recipe",
    "read_recipe",
]


def _key(help: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelStep:
    name: str = _key("timm's name, torchvision/NAME, or a folder that convsurgery wrote")
    pretrained: bool = _key("load the published weights", False)
    checkpoint: str | None = _key("load weights from a file", None)
    num_classes: int | None = _key("classes of the model's head", None)
    img_size: int | None = _key("height and width of the input in pixels", None)
    kwargs: Any = field(default=None, metadata={"help": "a mapping of further arguments, such as in_chans"})


@dataclass(frozen=True)
class DataStep:
    dataset: str | None = _key("digits, torch/cifar10, ...; a folder needs none", None)
    dir: str | None = _key("folder of images with train/ and val/, or root of the dataset", None)
    download: bool = _key("let torchvision fetch the dataset", False)


@dataclass(frozen=True)
class ConvertStep:
    rule: str = _key("which convolutions become what")
    start: str | None = _key("how new operators begin; each one's own default when absent", None)


@dataclass(frozen=True)
class CalibrateStep:
    images: int = _key("training images that closed-form fits see, drawn evenly from all classes", 256)
    target: float | None = _key("relative error that a neutral start may have in each layer; 1e-3 when absent", None)
    batchnorm: bool = _key("give BatchNorms behind fitted layers the statistics they now meet", False)
    steps: int = _key("of gradient descent on each fitted layer afterwards", 0)


@dataclass(frozen=True)
class FinetuneStep:
    """Settings of :class:`FinetuneConfig`, and the teacher."""

    settings: FinetuneConfig
    teacher: str = "none"


@dataclass(frozen=True)
class ExportStep:
    file: str = _key("name of the ONNX file in the output folder", "model.onnx")
    inline: bool = _key("standard ONNX operators only", False)
    opset: int | None = _key("of the standard operators, 18 to 23", None)
    tolerance: float = _key("largest error allowed, relative to the largest output", 1e-4)
    verify: bool = _key("compare the file with PyTorch before it appears", True)
    dynamic_batch: bool = _key("whether the file takes any batch size", True)
    images: int = _key("validation images to compare on too, drawn evenly from all classes", 0)


@dataclass(frozen=True)
class Recipe:
    """Everything from a model's name to an ONNX file.

    Attributes:
        model, data: what to start from, and what to train and measure on.
        output: folder to write.
        seed: of training, data order and weights.
        pretrain: training of the model before conversion, for one that has no weights; skipped when absent.
        convert: the conversion; without it the model is trained and exported as it is.
        calibrate: closed-form fits on data; skipped when absent.
        finetune: training after conversion; skipped when absent.
        export: the ONNX file; skipped when absent.
    """

    model: ModelStep
    data: DataStep
    output: str
    convert: ConvertStep | None = None
    seed: int = 42
    pretrain: FinetuneConfig | None = None
    calibrate: CalibrateStep | None = None
    finetune: FinetuneStep | None = None
    export: ExportStep | None = None


_STEPS: dict[str, type] = {
    "model": ModelStep,
    "data": DataStep,
    "convert": ConvertStep,
    "calibrate": CalibrateStep,
    "export": ExportStep,
}
_TEACHERS = ("original", "start", "none")
#: a recipe's bytes, values and depth
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1 << 20, 10_000, 16
_DATE = "tag:yaml.org,2002:timestamp"
#: kinds of values: words, numbers, truth values, nothing, lists, mappings; a date is taken as the word it is
_TAGS = {_DATE, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML file as a recipe.

    The file may be a stranger's, so it cannot do what a command line can: its model is a plain name of timm's or
    torchvision's with architecture arguments, or a folder; its paths lie in the working directory or beside the recipe.
    ``changes`` are the user's own words and may name any path and any model.

    Args:
        path: of the file.
        changes: ``KEY=VALUE`` with a dotted key, put over what the file says: ``finetune.epochs=1``.

    Raises:
        RecipeError: for a file that is no YAML, and every key or value that has no place; names the line, and the
            nearest key that has one.
    """
    import yaml

    try:
        root = yaml.compose(read_text(Path(path), _MAX_BYTES), yaml.SafeLoader)
    except StorageError as error:
        raise RecipeError(f"cannot read {path}: {str(error).partition('cannot be read: ')[2] or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: no YAML: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: no recipe: nested too deep") from error
    reader = _Reader(str(path))
    data = {} if root is None else reader.plain(root, "")
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(_fields(Recipe))}")
    for change in changes:
        reader.put(data, change)
    return reader.recipe(data)


class _Reader:
    """Values of a file, and where each of them stands."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[str, str] = {}
        self.left = _MAX_VALUES
        self.typed: set[str] = set()

    def error(self, path: str, message: str) -> RecipeError:
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return RecipeError(f"{self.places.get(path, self.file)}: {message}")

    def plain(self, node: Any, path: str, depth: int = 0) -> Any:
        """A YAML node as plain data; notes the line of every key.

        Aliases are followed, but counted: eight lines of them can stand for a billion values.
        """
        import yaml

        place = f"{self.file}, line {node.start_mark.line + 1}"
        self.left -= 1
        if self.left < 0 or depth > _MAX_DEPTH:
            raise RecipeError(f"{place}: more than {_MAX_VALUES} values, or nested too deep (aliases count each time)")
        if node.tag not in _TAGS:
            raise RecipeError(f"{place}: a recipe has no values of the kind {node.tag[:60]!r}")
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                place = f"{self.file}, line {key_node.start_mark.line + 1}"
                if not isinstance(key_node, yaml.ScalarNode):
                    raise RecipeError(f"{place}: a key is a word")
                key = key_node.value
                inner = f"{path}.{key}" if path else key
                if key in result:
                    raise RecipeError(f"{place}: {inner} is given twice")
                self.places[inner] = place
                result[key] = self.plain(value_node, inner, depth + 1)
            return result
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, path, depth + 1) for item in node.value]
        if control_characters(node.value):
            raise RecipeError(f"{place}: a value holds control characters: {node.value[:40]!r}")
        if node.tag == _DATE:
            return node.value
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, KeyError, OverflowError) as error:
            raise RecipeError(f"{place}: {node.value[:40]!r} is no value of its kind") from error
        # YAML 1.1 takes 1e-3 for a word, as it has no point.
        plain = isinstance(value, str) and node.style is None
        return float(value) if plain and _NUMBER.fullmatch(value) else value

    def put(self, data: dict[str, Any], change: str) -> None:
        import yaml

        key, equals, text = change.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {change}: write KEY=VALUE, such as finetune.epochs=1")
        self.typed.add(key)
        try:
            value = self.plain(yaml.compose(text or "''", yaml.SafeLoader), key)
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"--set {change}: {text!r} is no YAML value") from error
        *outer, last = key.split(".")
        holder = data
        for part in outer:
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
            if not isinstance(holder, dict):
                raise RecipeError(f"--set {change}: {part} holds no keys")
        holder[last] = value
        self.places[key] = f"--set {change}"

    def recipe(self, data: Mapping[str, Any]) -> Recipe:
        self._known(data, _fields(Recipe), "")
        for key in ("model", "data", "output"):
            if data.get(key) is None:
                raise RecipeError(f"{self.file}: a recipe needs {key!r}")
        values: dict[str, Any] = {"output": self._value(data["output"], "str", "output")}
        values["seed"] = seed = self._value(data.get("seed", 42), "int", "seed")
        for key, kind in _STEPS.items():
            if data.get(key) is not None:
                values[key] = self._step(data[key], kind, key)
        if data.get("pretrain") is not None:
            values["pretrain"] = self._settings(dict(self._mapping(data["pretrain"], "pretrain")), seed, "pretrain")
        if data.get("finetune") is not None:
            settings = dict(self._mapping(data["finetune"], "finetune"))
            teacher = settings.pop("teacher", "none")
            if teacher not in _TEACHERS:
                raise self.error(
                    "finetune.teacher", f"teacher cannot be {teacher!r}; {nearest(str(teacher), _TEACHERS)}"
                )
            values["finetune"] = FinetuneStep(self._settings(settings, seed, "finetune", "teacher"), teacher)
        self._check_origin(values)
        if "calibrate" in values and "convert" not in values:
            raise self.error("calibrate", "calibrate fits what a conversion put in place: there is no convert")
        if values["data"].dataset is None and values["data"].dir is None:
            raise self.error("data", "data needs a dataset (digits, torch/cifar10, ...) or dir, a folder of images")
        return Recipe(**values)

    def _is_typed(self, path: str) -> bool:
        """Whether the user gave a value, or a mapping around it, on the command line."""
        parts = path.split(".")
        return any(".".join(parts[:count]) in self.typed for count in range(1, len(parts) + 1))

    def _check_origin(self, values: Mapping[str, Any]) -> None:
        """What a file may not say, and a user may."""
        model, data, export = values["model"], values["data"], values.get("export")
        name, plain = model.name, model.name.removeprefix("timm/")
        if not self._is_typed("model.name") and not is_plain_name(plain):
            if ":" in name:
                raise self.error(
                    "model.name",
                    f"model.name: {name!r} leads to the network or to a folder; type it: --set model.name={name}",
                )
            if named_folder(name)[0] is not None:
                self._inside(name, "model.name")
            elif "/" in name and not name.startswith("torchvision/"):
                raise self.error(
                    "model.name", f"model.name: {name!r} is no model's name, and no folder with a saved model"
                )
        kwargs = model.kwargs or {}
        theirs = {key: value for key, value in kwargs.items() if not self._is_typed(f"model.kwargs.{key}")}
        if theirs and is_plain_name(plain):
            try:
                check_arguments(plain, theirs, "model.kwargs")
            except ModelError as error:
                raise self.error("model.kwargs", str(error)) from error
        elif theirs:
            raise self.error(
                "model.kwargs", "model.kwargs go with a model's plain name: type them, --set model.kwargs..."
            )
        for path, value in (
            ("model.checkpoint", model.checkpoint),
            ("data.dir", data.dir),
            ("data.dataset", data.dataset if data.dataset not in list_datasets() else None),
            ("output", values["output"]),
        ):
            if value is not None:
                self._inside(value, path)
        if export is not None and (Path(export.file).name != export.file or export.file.startswith(".")):
            raise self.error("export.file", f"export.file is a name in the output folder, not {export.file!r}")

    def _inside(self, value: str, path: str) -> None:
        """Refuse a path of the file's that leads out of the working directory and out of the recipe's folder."""
        if self._is_typed(path):
            return
        try:
            real = Path(os.path.realpath(Path(value).expanduser()))
            homes = (os.path.realpath("."), os.path.realpath(Path(self.file).parent))
            inside = any(real.is_relative_to(home) for home in homes)
        except (OSError, ValueError, RuntimeError) as error:
            raise self.error(path, f"{path}: {value[:80]!r} is no path: {error}") from error
        if not inside:
            raise self.error(
                path,
                f"{path}: {value} leads out of this directory and of the recipe's, and a file does not decide that; "
                f"type it: --set {path}={value}",
            )

    def _mapping(self, value: Any, path: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.error(path, f"{path} must be a mapping of keys to values, not {value!r}")
        return value

    def _known(self, data: Mapping[str, Any], known: Sequence[str], path: str) -> None:
        for key in data:
            if key not in known:
                inner = f"{path}.{key}" if path else key
                where = f"{path} has no key" if path else "a recipe has no key"
                raise self.error(inner, f"{where} {key!r}; {nearest(key, known)}")

    def _step(self, value: Any, kind: type, path: str) -> Any:
        data = self._mapping(value, path)
        known = _fields(kind)
        self._known(data, known, path)
        values = {}
        for item in dataclasses.fields(kind):
            if item.name in data:
                values[item.name] = self._value(data[item.name], str(item.type), f"{path}.{item.name}")
            elif item.default is dataclasses.MISSING:
                raise self.error(path, f"{path} needs {item.name!r}: {item.metadata['help']}")
        return kind(**values)

    def _settings(self, data: dict[str, Any], seed: int, path: str, *more: str) -> FinetuneConfig:
        self._known(data, [*_fields(FinetuneConfig), *more], path)
        kinds = {item.name: str(item.type) for item in dataclasses.fields(FinetuneConfig)}
        settings: dict[str, Any] = {"seed": seed}
        for key, value in data.items():
            whole = kinds[key].startswith("int") and isinstance(value, float) and value.is_integer()
            settings[key] = int(value) if whole else value
        try:
            return FinetuneConfig(**settings)
        except SettingsError as error:
            name = str(error).split()[0].rstrip(":")
            raise self.error(f"{path}.{name}", f"{path}: {error}") from error

    def _value(self, value: Any, kind: str, path: str) -> Any:
        kinds = kind.split(" | ")
        if value is None and kinds[-1] in ("None", "Any"):
            return None
        wanted, word = {
            "str": (str, "a word"),
            "int": (int, "a whole number"),
            "float": ((int, float), "a number"),
            "bool": (bool, "true or false"),
            "Any": (dict, "a mapping"),
        }[kinds[0]]
        if kinds[0] == "int" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and kinds[0] != "bool"):  # type: ignore[arg-type]
            raise self.error(path, f"{path} must be {word}, not {value!r}")
        return value


def _fields(kind: type) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]
