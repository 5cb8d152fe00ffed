"""ONNX text shared by the kernels' function bodies."""

from __future__ import annotations

from collections.abc import Sequence

from convsurgery.operators.onnx import NodeForm

_WINDOW = "strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group"

#: a constant (C_out,) or () as (C_out or 1, 1, 1)
CHANNEL_SHAPE = "channel_shape = Constant <value_ints = [-1, 1, 1]> ()"


def conv(result: str, x: str, w: str) -> str:
    """Every attribute is written: an older runtime trips over defaults inside functions."""
    return f"{result} = Conv <{_WINDOW}> ({x}, {w})"


def expanded(result: str, source: str) -> list[str]:
    """A constant, one or per channel, as (C_out, 1, 1): a shape that runtimes fold into a convolution's bias."""
    return [
        f"{result}_count = Shape <start = 0, end = 1> (W)",
        f"{result}_full = Expand ({source}, {result}_count)",
        channel(result, f"{result}_full"),
    ]


def number(result: str, value: float) -> str:
    return f"{result} = Constant <value_float = {value!r}> ()"


def channel(result: str, source: str) -> str:
    return f"{result} = Reshape ({source}, channel_shape)"


def squared_norms() -> list[str]:
    """``ww``: ‖w_o‖² as (C_out, 1, 1)."""
    return [
        "filter_axes = Constant <value_ints = [1, 2, 3]> ()",
        "ww_flat = ReduceSumSquare <keepdims = 0> (W, filter_axes)",
        channel("ww", "ww_flat"),
    ]


def window_squares(form: NodeForm) -> list[str]:
    """``xx``: ‖x‖² under every window, (N, groups, H, W)."""
    lines = ["channel_axis = Constant <value_ints = [1]> ()", "one = Constant <value_float = 1.0> ()"]
    if form.grouped:
        lines += [
            "x_shape = Shape (X)",
            "group_count = Constant <value_int: int = @group> ()",
            "group_row = Reshape (group_count, channel_axis)",
            "x_outer = Constant <value_ints = [0]> ()",
            "x_inner = Constant <value_ints = [-1]> ()",
            "x_space = Shape <start = 2> (X)",
            "x_split = Concat <axis = 0> (x_outer, group_row, x_inner, x_space)",
            "x_groups = Reshape (X, x_split)",
            "group_axis = Constant <value_ints = [2]> ()",
            "squares = ReduceSumSquare <keepdims = 0> (x_groups, group_axis)",
            "w_space = Shape <start = 2> (W)",
            "ones_shape = Concat <axis = 0> (group_row, channel_axis, w_space)",
        ]
    else:
        lines += [
            "squares = ReduceSumSquare <keepdims = 1> (X, channel_axis)",
            "w_space = Shape <start = 2> (W)",
            "ones_shape = Concat <axis = 0> (channel_axis, channel_axis, w_space)",
        ]
    return [*lines, "ones = Expand (one, ones_shape)", conv("xx", "squares", "ones")]


def add_window_map(result: str, s: str, factor: str, form: NodeForm) -> list[str]:
    """``result = s + factor · xx``: each group's map to its own output channels; ``factor`` is () or (C_out,)."""
    if not form.grouped:
        return [
            channel("map_factor", factor),
            "map_scaled = Mul (xx, map_factor)",
            f"{result} = Add ({s}, map_scaled)",
        ]
    return [
        "channels = Shape <start = 0, end = 1> (W)",
        f"factor_full = Expand ({factor}, channels)",
        "spatial_ones = Constant <value_ints = [1, 1]> ()",
        "factor_split = Concat <axis = 0> (channel_axis, group_row, x_inner, spatial_ones)",
        "map_factor = Reshape (factor_full, factor_split)",
        f"s_shape = Shape ({s})",
        f"s_space = Shape <start = 2> ({s})",
        "s_split = Concat <axis = 0> (x_outer, group_row, x_inner, s_space)",
        f"s_groups = Reshape ({s}, s_split)",
        "xx_groups = Unsqueeze (xx, group_axis)",
        "map_scaled = Mul (xx_groups, map_factor)",
        "sum_groups = Add (s_groups, map_scaled)",
        f"{result} = Reshape (sum_groups, s_shape)",
    ]


def affine(y: str, form: NodeForm) -> list[str]:
    """``Y = gain · y + bias`` with whichever is present.

    Both at once are a BatchNormalization with mean 0 and variance 1: one pass per channel, where a runtime's broadcast
    of (C, 1, 1) over small images is slow, and runtimes fold it into a convolution that stands directly before it.
    """
    if "gain" not in form and "bias" not in form:
        return [f"Y = Identity ({y})"]
    lines = ["affine_count = Shape <start = 0, end = 1> (W)"]
    lines += [number("affine_one", 1.0), number("affine_nil", 0.0), "unit_var = Expand (affine_one, affine_count)"]
    lines.append("zero_mean = Expand (affine_nil, affine_count)")
    lines.append(f"affine_gain = Expand ({'gain' if 'gain' in form else 'affine_one'}, affine_count)")
    lines.append(f"affine_bias = Expand ({'bias' if 'bias' in form else 'affine_nil'}, affine_count)")
    inputs = f"{y}, affine_gain, affine_bias, zero_mean, unit_var"
    return [*lines, f"Y = BatchNormalization <epsilon = 0.0> ({inputs})"]


def powers(base: str, exponent: int) -> tuple[list[str], str]:
    """Statements for ``base ** exponent`` by repeated squaring, and the name of the result.

    ONNX Runtime's Pow is fast for exponents 2 and 3 only.
    """
    lines: list[str] = []
    result, square, step = "", base, 0
    while exponent:
        if exponent & 1:
            if result:
                lines.append(f"{base}_product{step} = Mul ({result}, {square})")
                result = f"{base}_product{step}"
            else:
                result = square
        exponent >>= 1
        if exponent:
            lines.append(f"{base}_square{step} = Mul ({square}, {square})")
            square = f"{base}_square{step}"
        step += 1
    return lines, result


def traits(form: NodeForm, *words: str) -> str:
    """The overload word of a node form: one part for everything that changes the body."""
    parts = [*words]
    parts += ["centered"] if form.centered else []
    parts += ["grouped"] if form.grouped else []
    parts += [name for name in ("gain", "bias") if name in form]
    return "_".join(parts) or "plain"


def statements(*groups: str | Sequence[str]) -> list[str]:
    """All lines in order, the shared constant first."""
    lines = [CHANNEL_SHAPE]
    for group in groups:
        lines += [group] if isinstance(group, str) else group
    return lines


def no_overload(form: NodeForm) -> str:
    """For nodes that have one body."""
    return ""


# -- bodies of the dialled kernels: one for each node, whatever its inputs, groups and ε


def dialled(*groups: str | Sequence[str]) -> list[str]:
    """A body that ends in a response ``f``: constants first, ``s = wᵀx``, then ``Y = gain · f + bias``."""
    lines = [
        number("one", 1.0),
        number("nil", 0.0),
        "count = Shape <start = 0, end = 1> (W)",
        "ones = Expand (one, count)",
        "nils = Expand (nil, count)",
        "eps = Expand (epsilon, count)",
        conv("s", "X", "W"),
    ]
    for group in groups:
        lines += [group] if isinstance(group, str) else group
    return [*lines, "gains = Expand (gain, count)", by_channel("Y", "f", "gains", "bias")]


def by_channel(result: str, x: str, factor: str, add: str) -> str:
    """``result = factor · x + add``, both (C_out,), as a BatchNormalization: runtimes keep their layout through it."""
    return f"{result} = BatchNormalization <epsilon = 0.0> ({x}, {factor}, {add}, nils, ones)"


def add_squares(result: str, factor: str) -> list[str]:
    """``result = s + factor · ‖x‖²``, ``factor`` (C_out,), for any number of groups and without a reshape of maps.

    x is multiplied by the largest factor before it is squared, and the mean of that takes the sum's place: in half
    precision squares and their sums are soon out of range, and a factor of 0 has to give 0 all the same.
    """
    flat = "strides = [1, 1], pads = [0, 0, 0, 0], dilations = [1, 1], group: int = @group"
    return [
        "first = Constant <value_ints = [1]> ()",
        "group_count = Constant <value_int: int = @group> ()",
        "group_row = Reshape (group_count, first)",
        "within = Shape <start = 1, end = 2> (W)",
        "window = Shape <start = 2> (W)",
        "patch_shape = Shape <start = 1> (W)",
        "patch_count = ReduceProd <keepdims = 0> (patch_shape)",
        "patch = CastLike (patch_count, W)",
        "share = Reciprocal (patch)",
        f"factor_sizes = Abs ({factor})",
        "largest = ReduceMax <keepdims = 0> (factor_sizes)",
        "any = Greater (largest, nil)",
        "divisor = Where (any, largest, one)",
        f"relative = Div ({factor}, divisor)",
        "whole = Mul (relative, patch)",
        "x_scaled = Mul (X, largest)",
        "squares = Mul (X, x_scaled)",
        "sum_shape = Concat <axis = 0> (group_row, within, first, first)",
        "sum_filters = Expand (share, sum_shape)",
        f"by_group = Conv <{flat}> (squares, sum_filters)",
        "window_shape = Concat <axis = 0> (group_row, first, window)",
        "window_filters = Expand (one, window_shape)",
        conv("means", "by_group", "window_filters"),
        "filters_shape = Concat <axis = 0> (count, first, first, first)",
        "factor_filters = Reshape (whole, filters_shape)",
        f"share_of_x = Conv <{flat}> (means, factor_filters)",
        f"{result} = Add (s, share_of_x)",
    ]


def tanh_ratio(result: str, z: str) -> list[str]:
    """``result = tanh(z) / z``, 1 at 0: it is even, and below 2⁻¹¹ the same as there but for a rounding."""
    return [
        number("small", 2.0**-11),
        f"size = Abs ({z})",
        "apart = Max (size, small)",
        "bent = Tanh (apart)",
        f"{result} = Div (bent, apart)",
    ]
