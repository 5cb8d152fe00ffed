"""Writing a model as ONNX: one node per operator, its body inside the file, verified before the file appears."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import torch
from torch import Tensor, nn

from convsurgery import __version__, zoo
from convsurgery.errors import ExportError, StorageError
from convsurgery.export.diffusion import parse_diffusion, truncate
from convsurgery.export.nodes import attach_functions, custom_nodes, translation_table
from convsurgery.export.parity import BATCHES, NODES, TOLERANCE, Parity, check_parity
from convsurgery.files import output_file, refuse_existing, writing
from convsurgery.operators import OperatorLayer
from convsurgery.operators.onnx import DOMAIN
from convsurgery.surgery import Record, changed_names, fuse, record, unwrap

__all__ = ["DEFAULT_OPSET", "OPSETS", "export_onnx"]

DEFAULT_OPSET = 18
#: metadata: how implicit diffusion is written, and for every truncated layer its window and error bound
DIFFUSION = "convsurgery.diffusion"
OPSETS = range(18, 24)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    inline: bool = False,
    opset: int | None = None,
    verify: bool = True,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
    data: Iterable[Any] | None = None,
    diffusion: str = "matmul",
    overwrite: bool = True,
) -> Parity | None:
    """Write ``model`` to ``path`` as ONNX; nothing is left at ``path`` when anything fails.

    Every operator of ours is one node in domain ``ai.convsurgery``, version 1, and the file carries its meaning as a
    function of standard ops: any conforming runtime runs it, and a native kernel of that name takes over where one is
    loaded. Constants and following BatchNorms are folded first (:func:`convsurgery.fuse`). Input and output are named
    ``input`` and ``output``; the metadata hold the plan.

    Args:
        model: float32; exported in eval mode; not changed.
        path: of the file to write.
        inline: write standard ops only, for runtimes that ignore functions.
        opset: of the standard ops, 18 to 23; 18 when not given.
        verify: compare with PyTorch in ONNX Runtime (batches of 1, 2 and 5) before the file appears.
        example_inputs: what the forward takes, with a batch of 2 or more where the batch is dynamic; by default one
            image batch of the model's own input size.
        dynamic_batch: leave the batch size open.
        tolerance: largest difference allowed, relative to the largest output of PyTorch.
        data: batches of real images to verify on besides random ones.
        diffusion: how implicit reaction-diffusion steps are solved: "matmul", Fourier transforms as products with
            constant matrices, exact up to rounding; or "truncate:1e-3", the smallest depthwise kernel whose output is
            off by no more than that share of the largest value. Raise ``tolerance`` accordingly.
        overwrite: whether a file that is there already may be replaced.

    Returns:
        What was measured, or None without ``verify``.

    Raises:
        ExportError: when the model cannot be exported or the file not be written.
        ParityError: when the file computes something else; names the first node that differs.
    """
    target = Path(path)
    wanted = DEFAULT_OPSET if opset is None else opset
    if wanted not in OPSETS:
        raise ExportError(f"opset must be from {OPSETS.start} to {OPSETS.stop - 1}, not {wanted}")
    try:
        # Before anything takes time.
        if not overwrite:
            refuse_existing(target, folder=False)
        if not os.access(output_file(target).parent, os.W_OK):
            raise ExportError(f"cannot write {target}: no such writable folder")
    except StorageError as error:
        raise ExportError(str(error)) from error
    original = unwrap(model)
    reduced = sorted(
        {str(p.dtype) for p in original.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    )
    if reduced:
        raise ExportError(
            f"export wants a float32 model, this one holds {', '.join(reduced)}: call model.float() first"
        )
    if zoo.input_kind(original) == "detection":
        raise ExportError(
            "detection models are not exported: how many boxes they return depends on values. Export the part that "
            "computes features: export_onnx(model.backbone, ..., example_inputs=images)"
        )
    bound = parse_diffusion(diffusion)
    inputs = _inputs(original, example_inputs, dynamic_batch)
    fused = fuse(original).cpu()
    for module in fused.modules():
        if isinstance(module, OperatorLayer):
            module.complete()
    windows = {} if bound is None else truncate(fused, inputs, bound)
    proto = _translate(fused, inputs, wanted, dynamic_batch)
    _finish(proto, original, inline)
    onnx.helper.set_model_props(proto, {**_props(proto), DIFFUSION: json.dumps({"by": diffusion, "layers": windows})})
    parity = None
    try:
        with writing(target) as written:
            try:
                onnx.save(proto, str(written))
            except (OSError, ValueError) as error:
                raise ExportError(f"cannot write {target}: {error}") from error
            if verify:
                batches = BATCHES if dynamic_batch else (int(inputs[0].shape[0]),)
                parity = check_parity(written, original, inputs, batches, tolerance, data)
    except StorageError as error:
        raise ExportError(str(error)) from error
    return parity


def _props(proto: onnx.ModelProto) -> dict[str, str]:
    return {prop.key: prop.value for prop in proto.metadata_props}


def _inputs(model: nn.Module, example: Tensor | Sequence[Tensor] | None, dynamic: bool) -> tuple[Tensor, ...]:
    if example is None:
        # A batch of 1 would be taken for a constant.
        return (torch.rand(2, *zoo.input_size(model), generator=torch.Generator().manual_seed(0)),)
    if isinstance(example, Mapping):
        raise ExportError(
            "a file's inputs are positional: wrap the model in a module whose forward(image) calls it by keyword"
        )
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if dynamic and inputs[0].shape[0] == 1:
        inputs = tuple(torch.cat([x, x]) for x in inputs)
    return tuple(x.detach().cpu() for x in inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own progress; ours is the result."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    # On a failure torch prints the whole graph.
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _translate(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, dynamic: bool) -> onnx.ModelProto:
    shapes = tuple({0: torch.export.Dim("batch")} if dynamic else None for _ in inputs)
    names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=names,
                output_names=["output"],
                dynamic_shapes=shapes if dynamic else None,
                custom_translation_table=translation_table(),
            )
            assert program is not None
            proto: onnx.ModelProto = program.model_proto
    except ExportError:
        raise
    except Exception as error:
        hint = "; dynamic_batch=False may help" if dynamic else ""
        raise ExportError(f"torch.onnx cannot export the model{hint}: {_last_line(error)}") from error
    got = next(o.version for o in proto.opset_import if o.domain == "")
    if got != opset:
        raise ExportError(f"torch.onnx cannot write this model in opset {opset}, only in {got}")
    return proto


def _last_line(error: BaseException) -> str:
    """The exporter wraps the cause in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _finish(proto: onnx.ModelProto, model: nn.Module, inline: bool) -> None:
    """Function bodies or their inlining, metadata, and no traces of the machine it was made on."""
    modules: dict[str, str] = {}
    calls: Counter[str] = Counter()
    for node in proto.graph.node:
        props = {prop.key: prop.value for prop in node.metadata_props}
        if node.domain == DOMAIN:
            scopes = json.loads(props.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"'))
            module = scopes[-2] if len(scopes) > 1 else ""
            modules[node.output[0]] = module
            calls[module] += 1
            # A module that is called twice is two nodes, and their names must differ.
            node.name = (module if calls[module] == 1 else f"{module} ({calls[module]})") if module else node.name
        del node.metadata_props[:]
    custom = list(custom_nodes(proto))
    if custom:
        attach_functions(proto)
    try:
        if custom and inline:
            proto.CopyFrom(onnx.inliner.inline_local_functions(proto))
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
    if inline or not custom:
        kept = [o for o in proto.opset_import if o.domain != DOMAIN]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)
    done = record(model) or Record(())
    base = zoo.identify(model, ignore=changed_names(done))
    plans = [plan.to_dict() for plan in done.plans]
    onnx.helper.set_model_props(
        proto,
        {
            "convsurgery.version": __version__,
            "convsurgery.base": json.dumps(None if base is None else base.to_json()),
            "convsurgery.plans": json.dumps(plans, ensure_ascii=False),
            NODES: json.dumps(modules),
        },
    )
    proto.producer_name = "convsurgery"
    proto.producer_version = __version__
