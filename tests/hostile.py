"""Files that a stranger might send: each tries to make a reader run, fetch, open, write or allocate something."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from guard import CANARY
from safetensors.torch import load_file, save_file

from convsurgery.surgery.storage import CONFIG, WEIGHTS

__all__ = ["BASES", "CHECKPOINTS", "FOLDERS", "KWARGS", "ONNX", "PLANS", "RECIPES", "SCANS", "seal"]


class Bomb:
    """What runs when it is unpickled, and would leave a file behind."""

    def __init__(self, outside: Path) -> None:
        self.outside = outside

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.outside / CANARY}",))


def bomb(path: Path, outside: Path) -> Path:
    """A checkpoint that is a pickle with a command in it."""
    path.write_bytes(pickle.dumps({"state_dict": Bomb(outside)}))
    return path


def seal(folder: Path) -> None:
    """Make the digests right again: they tell damage, and no sender's word is proven by them."""
    config = json.loads((folder / CONFIG).read_text())
    described = config.pop("weights", None)
    if isinstance(described, dict):
        described["config"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        if (folder / WEIGHTS).is_file():
            described["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if described is not None:
        config["weights"] = described
    (folder / CONFIG).write_text(json.dumps(config))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    seal(folder)


def kwargs_case(key: str, value: Any) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        told = json.loads(json.dumps(value).replace("OUTSIDE", str(outside)).replace("FOLDER", str(folder)))
        bomb(folder / "evil.pth", outside)
        edit(folder, lambda config: config["base"]["kwargs"].update({key: told}))

    return make


#: keyword arguments of a base, none of which ``save`` writes
KWARGS: dict[str, tuple[str, Any]] = {
    "pretrained": ("pretrained", True),
    "pretrained false": ("pretrained", False),
    "cfg with a url": ("pretrained_cfg", {"url": "file://FOLDER/evil.pth"}),
    "cfg with a web address": ("pretrained_cfg", {"url": "http://127.0.0.1:9/evil.pth"}),
    "cfg with a file": ("pretrained_cfg", {"file": "FOLDER/evil.pth"}),
    "cfg with a hub id": ("pretrained_cfg", {"hf_hub_id": "evil/evil"}),
    "cfg with weights": ("pretrained_cfg", {"state_dict": {"conv1.weight": [1.0]}}),
    "cfg with a loader": ("pretrained_cfg", {"custom_load": True, "file": "FOLDER/evil.pth"}),
    "cfg by name": ("pretrained_cfg", "a1_in1k"),
    "overlay": ("pretrained_cfg_overlay", {"file": "FOLDER/evil.pth"}),
    "checkpoint path": ("checkpoint_path", "FOLDER/evil.pth"),
    "checkpoint": ("checkpoint", "FOLDER/evil.pth"),
    "cache": ("cache_dir", "OUTSIDE/cache"),
    "script": ("scriptable", True),
    "export": ("exportable", True),
    "jit": ("no_jit", True),
    "device": ("device", "cuda"),
    "dtype": ("dtype", "float64"),
    "torchvision weights": ("weights", "DEFAULT"),
    "torchvision backbone": ("weights_backbone", "DEFAULT"),
    "progress": ("progress", True),
    "strict": ("pretrained_strict", False),
    "filter": ("pretrained_filter_fn", "os.system"),
    "source arguments": ("pretrained_model_args", {"a": 1}),
    "model cfg": ("model_cfg", {"a": 1}),
    "feature cfg": ("feature_cfg", {"feature_cls": "hook"}),
    "kwargs filter": ("kwargs_filter", ["num_classes"]),
    "name": ("name", "resnet18"),
    "img_size twice": ("model_name", "resnet18"),
    "unknown": ("no_such_argument", 1),
    "dunder": ("__class__", "os"),
    "empty key": ("", 1),
    "key with a path": ("../x", 1),
    "key of a thousand": ("a" * 1000, 1),
    "billion classes": ("num_classes", 10**9),
    "many classes": ("num_classes", 16_000_000),
    "negative classes": ("num_classes", -3),
    "fraction of classes": ("num_classes", 2.5),
    "million layers": ("layers", [1_000_000, 1, 1, 1]),
    "many layers": ("layers", [30_000, 1, 1, 1]),
    "wide stem": ("stem_width", 1_000_000),
    "many channels": ("in_chans", 10_000_000),
    "wide base": ("base_width", 1_000_000),
    "layer by path": ("act_layer", "os.system"),
    "layer by file": ("norm_layer", "../../evil"),
    "layer by url": ("act_layer", "http://127.0.0.1:9/"),
    "block by name": ("block", "Bottleneck"),
    "block arguments": ("block_args", {"pretrained_cfg": {"file": "FOLDER/evil.pth"}}),
    "deep": ("block_args", {"a": [[[[[[[[[[1]]]]]]]]]]}),
    "long": ("block_args", {"a": [0] * 100_000}),
    "long word": ("act_layer", "a" * 100_000),
    "nul": ("act_layer", "relu\x00"),
    "feature class": ("feature_cls", "builtins.exec"),
}


def name_case(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        bomb(folder / "pytorch_model.bin", outside)
        (folder / "config.json").write_text(
            json.dumps({"architecture": "resnet18", "pretrained_cfg": {"num_classes": 3}})
        )
        told = name.replace("OUTSIDE", str(outside)).replace("FOLDER", str(folder))
        edit(folder, lambda config: config.update(base={"name": told, "kwargs": {}}))

    return make


BASES: dict[str, Callable[[Path, Path], None]] = {
    **{
        f"name {number}": name_case(name)
        for number, name in enumerate(
            (
                "hf-hub:evil/evil",
                "hf_hub:evil/evil",
                "timm/hf-hub:evil/evil",
                "local-dir:FOLDER",
                "timm/local-dir:FOLDER",
                "FOLDER",
                "../evil",
                "./evil",
                "/etc/passwd",
                "timm/../../evil",
                "torchvision/../evil",
                "torchvision/",
                "timm/",
                "",
                "resnet18.a1_in1k:evil",
                "resnet18.no_such_tag",
                "RESNET18",
                "resnet18 ",
                "resnet18\n",
                "r" * 100_000,
                "torchvision/torchvision/resnet18",
                "hf-hub:timm/resnet18.a1_in1k",
                "https://127.0.0.1:9/x",
                "resnet18@main",
                "timm/timm/resnet18",
                "..",
                "~",
                "torch.hub.load",
            )
        )
    },
    "no name": lambda folder, _: edit(folder, lambda c: c.update(base={"kwargs": {}})),
    "name as list": lambda folder, _: edit(folder, lambda c: c.update(base={"name": ["resnet18"], "kwargs": {}})),
    "kwargs as list": lambda folder, _: edit(folder, lambda c: c["base"].update(kwargs=[["pretrained", True]])),
    "more of a base": lambda folder, _: edit(folder, lambda c: c["base"].update(pretrained=True)),
    "torchvision weights": lambda folder, _: edit(
        folder, lambda c: c.update(base={"name": "torchvision/resnet18", "kwargs": {"weights": "IMAGENET1K_V1"}})
    ),
    "torchvision backbone": lambda folder, _: edit(
        folder,
        lambda c: c.update(
            base={"name": "torchvision/fcn_resnet50", "kwargs": {"weights_backbone": "ResNet50_Weights.DEFAULT"}}
        ),
    ),
    "another model": lambda folder, _: edit(folder, lambda c: c.update(base={"name": "vit_giant_patch14_dinov2"})),
}


def text_case(change: Callable[[str], str]) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        path = folder / CONFIG
        path.write_text(change(path.read_text().replace("OUTSIDE", str(outside))))

    return make


def first_edit(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in config["plans"][0]["entries"] if entry["operator"] is not None)
    return found


def operator_case(operator: str, start: str = "copy") -> Callable[[Path, Path], None]:
    return lambda folder, _: edit(folder, lambda c: first_edit(c).update(operator=operator, start=start))


def site_case(**fields: Any) -> Callable[[Path, Path], None]:
    return lambda folder, _: edit(folder, lambda c: first_edit(c)["site"].update(fields))


def geometry_case(**fields: Any) -> Callable[[Path, Path], None]:
    return lambda folder, _: edit(folder, lambda c: first_edit(c)["site"]["geometry"].update(fields))


def top(**fields: Any) -> Callable[[Path, Path], None]:
    return lambda folder, _: edit(folder, lambda c: c.update(fields))


def _outside_link(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)

    return make


def _pipe(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def _device(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return make


def _directory(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return make


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        save_file(change({k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}), folder / WEIGHTS)
        seal(folder)

    return make


def _first_float(state: dict[str, torch.Tensor]) -> str:
    return next(name for name, value in state.items() if value.is_floating_point() and value.ndim == 4)


def _with(state: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    name = _first_float(state)
    return {**state, name: change(state[name]).contiguous()}


def _nan(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[0] = float("nan")
    return value


def _raw(make_bytes: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def make(folder: Path, outside: Path) -> None:
        (folder / WEIGHTS).write_bytes(make_bytes((folder / WEIGHTS).read_bytes()))
        seal(folder)

    return make


def _header(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _pickled_weights(folder: Path, outside: Path) -> None:
    bomb(folder / WEIGHTS, outside)
    seal(folder)


def _sparse(folder: Path, outside: Path) -> None:
    with (folder / CONFIG).open("r+b") as file:
        file.truncate(1 << 40)


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    **{f"kwargs: {name}": kwargs_case(key, value) for name, (key, value) in KWARGS.items()},
    **{f"base: {name}": make for name, make in BASES.items()},
    "json: two bases": text_case(
        lambda text: text.replace('"base":', '"base": {"name": "hf-hub:evil/evil"}, "base":', 1)
    ),
    "json: two formats": text_case(lambda text: '{"format": 1,' + text[1:]),
    "json: deep": text_case(lambda text: "[" * 100_000),
    "json: deep mappings": text_case(lambda text: '{"a":' * 100_000),
    "json: constants": text_case(lambda text: text.replace('"fused": false', '"fused": NaN').replace("1e-05", "NaN")),
    "json: huge number": text_case(lambda text: text.replace('"format": 1', '"format": 1e999', 1)),
    "json: long number": text_case(lambda text: text.replace('"format": 1', '"format": ' + "9" * 10_000, 1)),
    "json: escapes": text_case(lambda text: text.replace('"class": "', '"class": "\\u001b[2J', 1)),
    "json: turned writing": text_case(lambda text: text.replace('"class": "', '"class": "\\u202e', 1)),
    "json: surrogate": text_case(lambda text: text.replace('"class": "', '"class": "\\ud800', 1)),
    "json: nothing": text_case(lambda text: ""),
    "json: a list": text_case(lambda text: "[]"),
    "json: a word": text_case(lambda text: f'"{CANARY}"'),
    "json: code": text_case(lambda text: f"__import__('os').system('touch OUTSIDE/{CANARY}')"),
    "json: a terabyte": _sparse,
    "json: link": _outside_link(CONFIG),
    "json: pipe": _pipe(CONFIG),
    "json: device": _device(CONFIG),
    "json: folder": _directory(CONFIG),
    "top: unknown key": top(hook="os.system"),
    "top: code": top(**{"class": CANARY, "exec": f"open('{CANARY}', 'w')"}),
    "top: size of a continent": top(input_size=[3, 60_000, 60_000]),
    "top: size of nothing": top(input_size=[3, 0, 8]),
    "top: size of words": top(input_size=["3", "8", "8"]),
    "top: truth as size": top(input_size=[True, 8, 8]),
    "top: infinite epsilon": top(norms={"bn1": 1e39}),
    "top: negative epsilon": top(norms={"bn1": -1.0}),
    "top: epsilon of a convolution": top(norms={"conv1": 1e-5}),
    "top: word as epsilon": top(norms={"bn1": "1e-5"}),
    "top: epsilon of dunder": top(norms={"__class__": 1e-5}),
    "top: frozen unknown": top(frozen=["no.such.parameter"]),
    "top: frozen numbers": top(frozen=[1]),
    "top: fused word": top(fused="yes"),
    "top: versions": top(versions={"torch": ["x"]}),
    "top: digest of nothing": top(weights={}),
    "top: digest as word": top(weights="none"),
    "top: digest of dots": lambda folder, _: edit(
        folder,
        lambda c: c.update(weights={"sha256": "../" * 21 + "x", "dtypes": {}, "infinite": [], "config": "0" * 64}),
    ),
    "top: preprocessing with a url": top(preprocessing={"url": "http://127.0.0.1:9/x"}),
    "top: preprocessing with a file": top(preprocessing={"file": "/etc/passwd"}),
    "top: preprocessing of words": top(preprocessing={"mean": ["a", "b", "c"]}),
    "top: preprocessing huge": top(preprocessing={"input_size": [3, 10**9, 10**9]}),
    "top: preprocessing zero": top(preprocessing={"std": [0.0, 0.0, 0.0]}),
    "top: preprocessing long": top(preprocessing={"mean": [0.5] * 100_000}),
    "top: preprocessing word": top(preprocessing={"interpolation": "../evil"}),
    "plan: no mapping": top(plans=[1]),
    "plan: ten thousand": lambda folder, _: edit(folder, lambda c: c.update(plans=c["plans"] * 10_000)),
    "plan: twice": lambda folder, _: edit(folder, lambda c: c.update(plans=c["plans"] * 2)),
    "plan: unknown key": lambda folder, _: edit(folder, lambda c: c["plans"][0].update(hook="os.system")),
    "plan: operator as code": operator_case(f"__import__('{CANARY}')"),
    "plan: operator unknown": operator_case("no-such-operator"),
    "plan: operator as path": operator_case("../../evil"),
    "plan: operator as list": lambda folder, _: edit(folder, lambda c: first_edit(c).update(operator=["conv"])),
    "plan: hundred million filters": operator_case("lbc(filters=100000000)", "random"),
    "plan: fan of a million": operator_case("pnn(fanout=1000000)", "random"),
    "plan: start unknown": operator_case("kerv-poly", "fetch"),
    "plan: start of another": operator_case("kerv-poly", "project"),
    "plan: no start": lambda folder, _: edit(folder, lambda c: first_edit(c).update(start=None)),
    "plan: form of before": lambda folder, _: edit(folder, lambda c: first_edit(c).update(scaled=True)),
    "plan: form of words": lambda folder, _: edit(folder, lambda c: first_edit(c).update(scaled="yes")),
    "plan: site unknown": site_case(names=["no.such.site"]),
    "plan: site dunder": site_case(names=["__class__"]),
    "plan: site without a name": site_case(names=[]),
    "plan: site path": site_case(names=["../../evil"]),
    "plan: site is the model": site_case(names=[""]),
    "plan: norm unknown": lambda folder, _: edit(
        folder, lambda c: (first_edit(c).update(absorb=True), first_edit(c)["site"].update(batchnorm="no.such"))
    ),
    "plan: geometry huge": geometry_case(out_channels=10**12),
    "plan: geometry of words": geometry_case(kernel_size=["3", "3"]),
    "plan: geometry too long": geometry_case(kernel_size=[3] * 1000),
    "plan: geometry unknown": geometry_case(hook=1),
    "plan: block of nothing": lambda folder, _: edit(folder, lambda c: first_edit(c).update(block={})),
    "plan: block empty": lambda folder, _: edit(
        folder,
        lambda c: first_edit(c).update(
            block={"pattern": "x", "owner": "", "sites": [], "members": [], "kinds": [], "own": [], "chain": True}
        ),
    ),
    "plan: block of dunders": lambda folder, _: edit(
        folder,
        lambda c: first_edit(c).update(
            block={
                "pattern": "x",
                "owner": "__class__",
                "sites": ["__init__"],
                "members": ["__dict__"],
                "kinds": ["x"],
                "own": ["__dict__"],
                "chain": False,
                "nodes": ["__import__"],
                "opened": ["__class__"],
            }
        ),
    ),
    "weights: pickle": _pickled_weights,
    "weights: link": _outside_link(WEIGHTS),
    "weights: pipe": _pipe(WEIGHTS),
    "weights: device": _device(WEIGHTS),
    "weights: folder": _directory(WEIGHTS),
    "weights: half": _raw(lambda data: data[: len(data) // 2]),
    "weights: nothing": _raw(lambda data: b""),
    "weights: long head": _raw(lambda data: struct.pack("<Q", 1 << 60) + data),
    "weights: huge shapes": _raw(
        lambda data: _header({"conv1.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"\0" * 4)
    ),
    "weights: shapes that overflow": _raw(
        lambda data: _header({"conv1.weight": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 0]}})
    ),
    "weights: no shape": _raw(lambda data: _header({"conv1.weight": {"dtype": "F32"}})),
    "weights: nan": _weights(lambda state: _with(state, _nan)),
    "weights: infinity": _weights(lambda state: _with(state, lambda value: value / 0)),
    "weights: negative variance": _weights(
        lambda state: {k: -v - 1 if k.endswith("running_var") else v for k, v in state.items()}
    ),
    "weights: whole numbers": _weights(lambda state: _with(state, lambda value: value.to(torch.int64))),
    "weights: double": _weights(lambda state: _with(state, lambda value: value.double())),
    "weights: half precision of one": _weights(lambda state: _with(state, lambda value: value.half())),
    "weights: other shape": _weights(lambda state: _with(state, lambda value: value[..., :1])),
    "weights: one too many": _weights(lambda state: {**state, "evil": torch.zeros(3)}),
    "weights: one too few": _weights(lambda state: {k: v for k, v in state.items() if k != _first_float(state)}),
}


_LINES = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
_ALIASES = "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *_LINES])
_PLAN = '{"format": 1, "entries": [], "rule": "x", "seen": "x", "total_params": 0, '

RECIPES: dict[str, str] = {
    "pretrained cfg": "model: {name: test_resnet, kwargs: {pretrained_cfg: {file: OUTSIDE/evil.pth}}}",
    "cache": "model: {name: test_resnet, kwargs: {cache_dir: OUTSIDE/cache, pretrained: true}}",
    "checkpoint path": "model: {name: test_resnet, kwargs: {checkpoint_path: OUTSIDE/evil.pth}}",
    "weights": "model: {name: torchvision/resnet18, kwargs: {weights: DEFAULT}}",
    "hub": "model: {name: 'hf-hub:evil/evil'}",
    "hub, the old way": "model: {name: 'hf_hub:evil/evil'}",
    "local": "model: {name: 'local-dir:OUTSIDE'}",
    "folder outside": "model: {name: OUTSIDE}",
    "folder above": "model: {name: ../outside}",
    "kwargs as list": "model: {name: test_resnet, kwargs: [pretrained]}",
    "huge": "model: {name: test_resnet, kwargs: {num_classes: 100000000000}}",
    "checkpoint outside": "model: {name: test_resnet, checkpoint: OUTSIDE/evil.pth}",
    "checkpoint above": "model: {name: test_resnet, checkpoint: ../outside/evil.pth}",
    "checkpoint at home": "model: {name: test_resnet, checkpoint: ~/evil.pth}",
    "checkpoint that is a pickle": "model: {name: test_resnet, checkpoint: evil.pth}",
    "data outside": "data: {dir: OUTSIDE}",
    "data of the system": "data: {dir: /}",
    "data by another word": "data: {dataset: OUTSIDE}",
    "data by a scheme": "data: {dataset: 'hfds/evil/evil'}",
    "data by wds": "data: {dataset: 'wds/pipe:touch OUTSIDE/x', dir: .}",
    "data of tfds": "data: {dataset: 'tfds/mnist', dir: ., download: true}",
    "output outside": "output: OUTSIDE/out",
    "output above": "output: ../outside/out",
    "output at home": "output: ~/out",
    "export above": "export: {file: ../../outside/x.onnx}",
    "export absolute": "export: {file: OUTSIDE/x.onnx}",
    "export hidden": "export: {file: .bashrc}",
    "python object": "convert: {rule: !!python/object/apply:os.system ['touch OUTSIDE/x']}",
    "python name": "seed: !!python/name:os.system ''",
    "python module": "output: !!python/module:evil ''",
    "own tag": "output: !evil x",
    "binary": "output: !!binary aGVsbG8=",
    "set": "data: !!set {digits}",
    "ordered": "data: !!omap [dataset: digits]",
    "date that is none": "seed: 2026-99-99",
    "wrong number": "seed: !!int x",
    "truth of nothing": "seed: !!bool maybe",
    "twice": "seed: 1\nseed: 2",
    "twice, deeper": "data: {dataset: digits, dataset: digits}",
    "key that is a list": "? [a, b]\n: 1",
    "key that is a mapping": "? {a: b}\n: 1",
    "merge": "data: {<<: {dir: OUTSIDE}, dataset: digits}",
    "aliases": _ALIASES,
    "alias of itself": "data: &a {dir: *a}",
    "alias of itself in a list": "data: &a [*a]",
    "deep": "data: " + "[" * 20_000,
    "wide": "data: [" + "1, " * 200_000 + "1]",
    "two documents": "seed: 1\n---\nseed: 2",
    "control": 'output: "a\\u001b[2J"',
    "nul": 'output: "a\\0b"',
    "no utf-8": "output: \udcff",
}


def _onnx(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path, Path], None]:
    def make(path: Path, outside: Path) -> None:
        proto = onnx.load(str(path))
        change(proto)
        data = proto.SerializeToString().replace(b"OUTSIDE", b"OUTSIDE")
        path.write_bytes(data)

    return make


def _external(location: str, where: str) -> Callable[[Path, Path], None]:
    def make(path: Path, outside: Path) -> None:
        proto = onnx.load(str(path))
        (outside / "secret.bin").write_bytes(b"\0" * 1_000_000)
        tensor = onnx.TensorProto(name="evil", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location.replace("OUTSIDE", str(outside)))
        if where == "initializer":
            proto.graph.initializer.append(tensor)
        else:
            node = proto.graph.node.add(op_type="Constant", output=["evil"])
            node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
            if where == "function":
                body = onnx.FunctionProto(name="evil", domain="evil", output=["evil"])
                body.opset_import.extend(proto.opset_import)
                body.node.append(node)
                del proto.graph.node[-1]
                proto.functions.append(body)
        path.write_bytes(proto.SerializeToString())

    return make


def _metadata(text: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        for prop in proto.metadata_props:
            if prop.key == "convsurgery.nodes":
                prop.value = text
        # Something has to differ, or nobody looks at the metadata.
        proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))

    return change


def _batch(size: int) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", size)


ONNX: dict[str, Callable[[Path, Path], None]] = {
    "weights outside": _external("OUTSIDE/secret.bin", "initializer"),
    "weights above": _external("../outside/secret.bin", "initializer"),
    "weights of a node": _external("OUTSIDE/secret.bin", "node"),
    "weights of a function": _external("OUTSIDE/secret.bin", "function"),
    "weights beside": _external("secret.bin", "initializer"),
    "metadata: no JSON": _onnx(_metadata("{")),
    "metadata: a list": _onnx(_metadata("[1]")),
    "metadata: another kind": _onnx(_metadata('{"a": 1}')),
    "metadata: unknown value": _onnx(_metadata('{"no such value": "conv1"}')),
    "metadata: deep": _onnx(_metadata("[" * 100_000)),
    "metadata: twice": _onnx(_metadata('{"a": "b", "a": "c"}')),
    "batch of a billion": _onnx(_batch(10**9)),
    "half": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
    "nothing": lambda path, _: path.write_bytes(b"") and None,
    "pickle": lambda path, outside: bomb(path, outside) and None,
    "no inputs": _onnx(lambda proto: proto.graph.ClearField("input")),
    "no outputs": _onnx(lambda proto: proto.graph.ClearField("output")),
    "unknown operator": _onnx(lambda proto: setattr(proto.graph.node[0], "op_type", "Evil")),
    "unknown domain": _onnx(lambda proto: setattr(proto.graph.node[0], "domain", "evil")),
}


def _zipped(path: Path, outside: Path) -> Path:
    """torch's own archive, its pickle exchanged for one with a command."""
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item.filename, pickle.dumps(Bomb(outside)) if item.filename.endswith("data.pkl") else data)
    return path


def _scripted(path: Path, outside: Path) -> Path:
    torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))).save(str(path))
    return path


def _looked_up(path: Path, outside: Path) -> Path:
    """Global names without a call, which the restricted reader has to refuse too."""
    path.write_bytes(b"\x80\x02}X\x0a\x00\x00\x00state_dictcos\nsystem\ns.")
    return path


def _safetensors(path: Path, outside: Path) -> Path:
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", 1 << 62))
    return path


def _link(path: Path, outside: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


CHECKPOINTS: dict[str, Callable[[Path, Path], Path]] = {
    "pickle": bomb,
    "archive": _zipped,
    "names": _looked_up,
    "script": _scripted,
    "head": _safetensors,
    "device": _link,
    "garbage": lambda path, _: (path.write_bytes(b"PK\x03\x04" + os.urandom(100)), path)[1],
    "numbers": lambda path, _: (torch.save({"conv1.weight": 3}, path), path)[1],
    "nan": lambda path, _: (torch.save({"conv1.weight": torch.full((1,), float("nan"))}, path), path)[1],
}

PLANS: dict[str, str] = {
    "nothing": "",
    "list": "[]",
    "format": '{"format": 1}',
    "entries": '{"format": 1, "entries": [{"site": {}}]}',
    "twice": '{"format": 1, "format": 1}',
    "deep": "[" * 100_000,
    "huge": _PLAN + '"model": "x", "input_shapes": [[1e400]]}',
    "more": _PLAN + '"model": "x", "input_shapes": [], "exec": "x"}',
    "escape": _PLAN + '"model": "\\u001b]0;x", "input_shapes": []}',
}

SCANS: dict[str, str] = {
    "nothing": "",
    "list": "[]",
    "rows": '{"format": 1, "rows": [{}]}',
    "rows as a word": '{"format": 1, "rows": "abc"}',
    "infinite": '{"format": 1, "rows": [], "images": 1e400}',
    "infinite by word": '{"format": 1, "rows": [], "images": Infinity}',
    "twice": '{"format": 1, "format": 1}',
    "deep": "[" * 100_000,
}
