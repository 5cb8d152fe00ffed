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
    """``diffused`` = KᵀK X by two depthwise convolutions."""
    channels, _, *kernel = form.shapes["W"]
    rows, columns = kernel[0] // 2, kernel[1] // 2
    periodic = form.words["boundary"] == "periodic"
    pads = [0, 0, 0, 0] if periodic else [rows, columns, rows, columns]
    options = f"<dilations = [1, 1], group = {channels}, pads = {pads}, strides = [1, 1]>"
    lines = _turned("adjoint", "W")
    for source, result, weight in (("X", "once", "W"), ("once", "diffused", "adjoint")):
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


def _pair(name: str, size: int) -> list[str]:
    """``name_forth`` and ``name_back``, (2 size, 2 size): a transform of stacked real and imaginary parts, and back."""
    return [
        *_waves(name, size, size),
        f"{name}_minus = Neg ({name}_sin)",
        f"{name}_upper = Concat <axis = 1> ({name}_cos, {name}_sin)",
        f"{name}_lower = Concat <axis = 1> ({name}_minus, {name}_cos)",
        f"{name}_forth = Concat <axis = 0> ({name}_upper, {name}_lower)",
        f"{name}_turned = Transpose <perm = [1, 0]> ({name}_forth)",
        f"{name}_scale = Constant <value_float = {float(size)}> ()",
        f"{name}_back = Div ({name}_turned, {name}_scale)",
    ]


def _products(result: str, cos: str, sin: str, real: str, imaginary: str) -> list[str]:
    """(cos + i sin)(real + i imaginary) as matrix products."""
    return [
        f"{result}_rr = MatMul ({cos}, {real})",
        f"{result}_ii = MatMul ({sin}, {imaginary})",
        f"{result}_ri = MatMul ({cos}, {imaginary})",
        f"{result}_ir = MatMul ({sin}, {real})",
        f"{result}_real = Sub ({result}_rr, {result}_ii)",
        f"{result}_imaginary = Add ({result}_ri, {result}_ir)",
    ]


def _power(form: NodeForm) -> list[str]:
    """``power`` = |F(K)|²: the kernel stands in the corner of the image, and only those rows and columns count."""
    rows, columns = form.shapes["W"][-2:]
    lines = [
        _ints("channel_axis", 1),
        "plain = Squeeze (W, channel_axis)",
        _ints("first", 0),
        _ints("row_axis", 0),
        _ints("column_axis", 1),
        _ints("kernel_rows", rows),
        _ints("kernel_columns", columns),
        "k_cos = Slice (w_cos, first, kernel_columns, row_axis)",
        "k_sin = Slice (w_sin, first, kernel_columns, row_axis)",
        "k_real = MatMul (plain, k_cos)",
        "k_imaginary = MatMul (plain, k_sin)",
        "g_cos = Slice (h_cos, first, kernel_rows, column_axis)",
        "g_sin = Slice (h_sin, first, kernel_rows, column_axis)",
        *_products("plane", "g_cos", "g_sin", "k_real", "k_imaginary"),
    ]
    real, imaginary = "plane_real", "plane_imaginary"
    if form.words["form"] == "circulant":
        channels, (height, width) = form.shapes["W"][0], form.shapes["X"][-2:]
        lines += [
            _ints("as_rows", channels, -1),
            "plane_real_rows = Reshape (plane_real, as_rows)",
            "plane_imaginary_rows = Reshape (plane_imaginary, as_rows)",
            *_products("all", "c_cos", "c_sin", "plane_real_rows", "plane_imaginary_rows"),
            _ints("as_maps", channels, height, width // 2 + 1),
            "all_real_maps = Reshape (all_real, as_maps)",
            "all_imaginary_maps = Reshape (all_imaginary, as_maps)",
        ]
        real, imaginary = "all_real_maps", "all_imaginary_maps"
    return [
        *lines,
        f"real_squared = Mul ({real}, {real})",
        f"imaginary_squared = Mul ({imaginary}, {imaginary})",
        "power = Add (real_squared, imaginary_squared)",
    ]


def _filtered(form: NodeForm, source: str, result: str) -> list[str]:
    """``result``: ``source``, its Fourier coefficients times 1 / (1 + h·power), or times power in the circulant form.

    Columns are transformed first, to half of the coefficients. Real and imaginary parts then stand below each other
    while rows are transformed, and beside each other as channels while those are.
    """
    height, width = form.shapes["X"][-2:]
    channels, half = form.shapes["W"][0], width // 2 + 1
    circulant = form.words["form"] == "circulant"
    weights = [1.0] + [2.0] * (half - 1)
    if width % 2 == 0:
        weights[-1] = 1.0
    lines = [*_waves("w", width, half), *_pair("h", height), *(_pair("c", channels) if circulant else [])]
    lines += [
        *_power(form),
        "w_minus = Neg (w_sin)",
        f"v_real = MatMul ({source}, w_cos)",
        f"v_imaginary = MatMul ({source}, w_minus)",
        "stacked = Concat <axis = 2> (v_real, v_imaginary)",
        "coefficients = MatMul (h_forth, stacked)",
        _ints("stack_axis", 2),
        _ints("middle", height),
        _ints("end", 2 * height),
    ]
    if circulant:
        lines += [
            "q_real = Slice (coefficients, first, middle, stack_axis)",
            "q_imaginary = Slice (coefficients, middle, end, stack_axis)",
            "q_both = Concat <axis = 1> (q_real, q_imaginary)",
            _ints("q_rows", 0, 2 * channels, -1),
            "q_flat = Reshape (q_both, q_rows)",
            "q_forth = MatMul (c_forth, q_flat)",
            "power_flat = Reshape (power, as_rows)",
            "power_twice = Concat <axis = 0> (power_flat, power_flat)",
            "q_times = Mul (q_forth, power_twice)",
            "q_back = MatMul (c_back, q_times)",
            _ints("q_maps", 0, 2 * channels, height, half),
            "q_both_back = Reshape (q_back, q_maps)",
            _ints("channel_count", channels),
            _ints("channel_end", 2 * channels),
            "d_real = Slice (q_both_back, first, channel_count, channel_axis)",
            "d_imaginary = Slice (q_both_back, channel_count, channel_end, channel_axis)",
            "damped = Concat <axis = 2> (d_real, d_imaginary)",
        ]
    else:
        lines += [
            "strength = Mul (power, step)",
            "unit = Constant <value_float = 1.0> ()",
            "denominator = Add (strength, unit)",
            "factor = Div (unit, denominator)",
            "factors_twice = Concat <axis = 1> (factor, factor)",
            "damped = Mul (coefficients, factors_twice)",
        ]
    return [
        *lines,
        "returned = MatMul (h_back, damped)",
        "u_real = Slice (returned, first, middle, stack_axis)",
        "u_imaginary = Slice (returned, middle, end, stack_axis)",
        f"doubling = Constant <value_floats = [{', '.join(repr(weight / width) for weight in weights)}]> ()",
        "out_cos = Mul (w_cos, doubling)",
        "out_sin = Mul (w_minus, doubling)",
        "cos_back = Transpose <perm = [1, 0]> (out_cos)",
        "sin_back = Transpose <perm = [1, 0]> (out_sin)",
        "y_real = MatMul (u_real, cos_back)",
        "y_imaginary = MatMul (u_imaginary, sin_back)",
        f"{result} = Add (y_real, y_imaginary)",
    ]


def _body(form: NodeForm) -> list[str]:
    residual = bool(form.attributes["residual"])
    if form.words["form"] == "implicit":
        lines = ["pushed = Mul (reaction, step)"]
        lines.append("wanted = Add (X, pushed)" if residual else "wanted = Identity (pushed)")
        return [*lines, *_filtered(form, "wanted", "Y")]
    lines = _filtered(form, "X", "diffused") if form.words["form"] == "circulant" else _squared(form)
    lines += ["change = Sub (reaction, diffused)", "scaled = Mul (change, step)"]
    return [*lines, "Y = Add (X, scaled)" if residual else "Y = Identity (scaled)"]


def _overload(form: NodeForm) -> str:
    channels, _, rows, columns = form.shapes["W"]
    words = [form.words["form"], *(["zeros"] if form.words["boundary"] == "zeros" else [])]
    words += [] if form.attributes["residual"] else ["alone"]
    words.append(f"k{rows}x{columns}")
    words += [f"c{channels}"] if form.words["form"] != "implicit" else []
    words += ["x".join(map(str, form.shapes["X"][-2:]))] if form.words["form"] != "explicit" else []
    return "_".join(words)


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
