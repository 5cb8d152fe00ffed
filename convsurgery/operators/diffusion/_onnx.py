"""The step as an ONNX function body: shifted slices for periodic edges, and Fourier transforms as matrix products.

ONNX Runtime's DFT is many times slower than products with constant matrices, along the columns and then the rows; those
run everywhere. The matrices come from constants and weights alone, so that a runtime folds them when it loads the file.
"""

from __future__ import annotations

import math

from convsurgery.operators.onnx import NodeForm, OnnxFunction

__all__ = ["REACTION_DIFFUSION"]

_END = 2**31 - 1


def _ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> ()"


def _wrapped(result: str, x: str, rows: int, columns: int) -> list[str]:
    """``x`` with its opposite edges around it; Pad has a mode for this from opset 19 on only."""
    lines = []
    for name, axis, amount in (("rows", 2, rows), ("columns", 3, columns)):
        made = result if name == "columns" else f"{result}_rows"
        if amount == 0:
            lines.append(f"{made} = Identity ({x})")
        else:
            p = f"{result}_{name}"
            lines += [
                _ints(f"{p}_axis", axis),
                _ints(f"{p}_from", -amount),
                _ints(f"{p}_end", _END),
                _ints(f"{p}_first", 0),
                _ints(f"{p}_count", amount),
                f"{p}_before = Slice ({x}, {p}_from, {p}_end, {p}_axis)",
                f"{p}_after = Slice ({x}, {p}_first, {p}_count, {p}_axis)",
                f"{made} = Concat <axis = {axis}> ({p}_before, {x}, {p}_after)",
            ]
        x = made
    return lines


def _turned(result: str, kernel: str) -> list[str]:
    """A kernel turned by 180 degrees."""
    return [
        _ints("turn_from", -1, -1),
        _ints("turn_to", -_END, -_END),
        _ints("turn_axes", 2, 3),
        _ints("turn_steps", -1, -1),
        f"{result} = Slice ({kernel}, turn_from, turn_to, turn_axes, turn_steps)",
    ]


def _squared(form: NodeForm) -> list[str]:
    """``diffused`` = KᵀK X by two convolutions."""
    channels, _, *kernel = form.shapes["W"]
    rows, columns = kernel[0] // 2, kernel[1] // 2
    dense = form.words["form"] == "circulant"
    group = 1 if dense else channels
    lines: list[str] = []
    if dense:
        # Block (i, j) is stencil (j − i) mod C.
        lines += [
            "zero = Constant <value_int = 0> ()",
            "one = Constant <value_int = 1> ()",
            f"count = Constant <value_int = {channels}> ()",
            "places = Range (zero, count, one)",
            _ints("as_column", -1, 1),
            "outputs = Reshape (places, as_column)",
            "ahead = Sub (places, outputs)",
            "stencils = Mod (ahead, count)",
            _ints("channel_axis", 1),
            "plain = Squeeze (W, channel_axis)",
            "kernel = Gather <axis = 0> (plain, stencils)",
            "mirrored = Transpose <perm = [1, 0, 2, 3]> (kernel)",
            *_turned("adjoint", "mirrored"),
        ]
    else:
        lines += ["kernel = Identity (W)", *_turned("adjoint", "kernel")]
    periodic = form.words["boundary"] == "periodic"
    pads = [0, 0, 0, 0] if periodic else [rows, columns, rows, columns]
    options = f"<dilations = [1, 1], group = {group}, pads = {pads}, strides = [1, 1]>"
    for source, result, weight in (("X", "once", "kernel"), ("once", "diffused", "adjoint")):
        seen = source
        if periodic:
            lines += _wrapped(f"{source}_around", source, rows, columns)
            seen = f"{source}_around"
        lines.append(f"{result} = Conv {options} ({seen}, {weight})")
    return lines


def _waves(name: str, size: int, frequencies: int) -> list[str]:
    """``name_cos`` and ``name_sin``, (size, frequencies): of 2π n k / size, the product taken exactly in integers."""
    return [
        f"{name}_zero = Constant <value_int = 0> ()",
        f"{name}_one = Constant <value_int = 1> ()",
        f"{name}_size = Constant <value_int = {size}> ()",
        f"{name}_count = Constant <value_int = {frequencies}> ()",
        f"{name}_n = Range ({name}_zero, {name}_size, {name}_one)",
        f"{name}_k = Range ({name}_zero, {name}_count, {name}_one)",
        _ints(f"{name}_column", -1, 1),
        f"{name}_rows = Reshape ({name}_n, {name}_column)",
        f"{name}_products = Mul ({name}_rows, {name}_k)",
        f"{name}_turns = Mod ({name}_products, {name}_size)",
        f"{name}_float = Cast <to = 1> ({name}_turns)",
        f"{name}_unit = Constant <value_float = {2 * math.pi / size!r}> ()",
        f"{name}_angle = Mul ({name}_float, {name}_unit)",
        f"{name}_cos = Cos ({name}_angle)",
        f"{name}_sin = Sin ({name}_angle)",
    ]


def _solved(form: NodeForm) -> list[str]:
    """``Y`` = (I + h KᵀK)⁻¹ ``wanted``: real and imaginary parts stand below each other while rows are transformed."""
    height, width = form.shapes["X"][-2:]
    rows, columns = form.shapes["W"][-2:]
    half = width // 2 + 1
    weights = [1.0] + [2.0] * (half - 1)
    if width % 2 == 0:
        weights[-1] = 1.0
    return [
        *_waves("w", width, half),
        *_waves("h", height, height),
        "h_minus = Neg (h_sin)",
        "upper = Concat <axis = 1> (h_cos, h_sin)",
        "lower = Concat <axis = 1> (h_minus, h_cos)",
        "forth = Concat <axis = 0> (upper, lower)",
        "back_whole = Transpose <perm = [1, 0]> (forth)",
        f"height = Constant <value_float = {float(height)}> ()",
        "back = Div (back_whole, height)",
        # |F(K)|²: the kernel stands in the corner of the image, and only those rows and columns count
        _ints("channel_axis", 1),
        "plain = Squeeze (W, channel_axis)",
        _ints("first", 0),
        _ints("row_axis", 0),
        _ints("kernel_rows", rows),
        _ints("kernel_columns", columns),
        "k_cos = Slice (w_cos, first, kernel_columns, row_axis)",
        "k_sin = Slice (w_sin, first, kernel_columns, row_axis)",
        "k_real = MatMul (plain, k_cos)",
        "k_imaginary = MatMul (plain, k_sin)",
        _ints("column_axis", 1),
        "g_cos = Slice (h_cos, first, kernel_rows, column_axis)",
        "g_sin = Slice (h_sin, first, kernel_rows, column_axis)",
        "rr = MatMul (g_cos, k_real)",
        "ii = MatMul (g_sin, k_imaginary)",
        "ri = MatMul (g_cos, k_imaginary)",
        "ir = MatMul (g_sin, k_real)",
        "real = Sub (rr, ii)",
        "imaginary = Add (ri, ir)",
        "real_squared = Mul (real, real)",
        "imaginary_squared = Mul (imaginary, imaginary)",
        "power = Add (real_squared, imaginary_squared)",
        "strength = Mul (power, step)",
        "unit = Constant <value_float = 1.0> ()",
        "denominator = Add (strength, unit)",
        "factor = Div (unit, denominator)",
        "factors_twice = Concat <axis = 1> (factor, factor)",
        # the image: columns, rows, the factors, and back
        "w_minus = Neg (w_sin)",
        "v_real = MatMul (wanted, w_cos)",
        "v_imaginary = MatMul (wanted, w_minus)",
        "stacked = Concat <axis = 2> (v_real, v_imaginary)",
        "coefficients = MatMul (forth, stacked)",
        "damped = Mul (coefficients, factors_twice)",
        "returned = MatMul (back, damped)",
        _ints("stack_axis", 2),
        _ints("middle", height),
        _ints("end", 2 * height),
        "u_real = Slice (returned, first, middle, stack_axis)",
        "u_imaginary = Slice (returned, middle, end, stack_axis)",
        f"doubling = Constant <value_floats = [{', '.join(repr(weight / width) for weight in weights)}]> ()",
        "out_cos = Mul (w_cos, doubling)",
        "out_sin = Mul (w_minus, doubling)",
        "cos_back = Transpose <perm = [1, 0]> (out_cos)",
        "sin_back = Transpose <perm = [1, 0]> (out_sin)",
        "y_real = MatMul (u_real, cos_back)",
        "y_imaginary = MatMul (u_imaginary, sin_back)",
        "Y = Add (y_real, y_imaginary)",
    ]


def _body(form: NodeForm) -> list[str]:
    residual = bool(form.attributes["residual"])
    if form.words["form"] == "implicit":
        lines = ["pushed = Mul (reaction, step)"]
        lines.append("wanted = Add (X, pushed)" if residual else "wanted = Identity (pushed)")
        return [*lines, *_solved(form)]
    lines = [*_squared(form), "change = Sub (reaction, diffused)", "scaled = Mul (change, step)"]
    return [*lines, "Y = Add (X, scaled)" if residual else "Y = Identity (scaled)"]


def _overload(form: NodeForm) -> str:
    channels, _, rows, columns = form.shapes["W"]
    words = [form.words["form"], *(["zeros"] if form.words["boundary"] == "zeros" else [])]
    words += [] if form.attributes["residual"] else ["alone"]
    words.append(f"k{rows}x{columns}")
    if form.words["form"] == "implicit":
        return "_".join([*words, "x".join(map(str, form.shapes["X"][-2:]))])
    return "_".join([*words, f"c{channels}"])


REACTION_DIFFUSION = OnnxFunction(
    "ReactionDiffusion2d",
    "reaction_diffusion2d",
    ("input", "weight", "reaction", "step"),
    ("residual",),
    _overload,
    _body,
    strings=("form", "boundary"),
    window={},
)
