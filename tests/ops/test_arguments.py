# SPDX-License-Identifier: Apache-2.0
"""Every argument of every public op, with what it takes and what it doesn't: op × argument × value.

A value works, as the plain Python number that it stands for, or is refused in a sentence that names op and argument.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medaccel import ops
from medaccel.losses import ContrastiveLoss, PixelConsistencyLoss, PixelContrastiveLoss


class _Thing:
    """An object of no type that any argument takes; its name is the same in every process."""

    def __repr__(self) -> str:
        return "thing"


OBJECT = _Thing()


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


INDEX = torch.randint(0, 27, (8, 8), generator=torch.Generator().manual_seed(0))
AT = rand(2, 9, 3)

# op: (tensors, other arguments); those that may be None in OPTIONAL.
OPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gaussian_filter": ({"input": rand(1, 2, 4, 5, 6)}, {"sigma": 2.0, "truncated": 2.0, "normalize": False}),
    "instance_norm_act": (
        {"input": rand(1, 3, 4, 5, 6), "weight": rand(3), "bias": rand(3), "residual": rand(1, 3, 4, 5, 6, seed=1)},
        {"eps": 0.5, "negative_slope": 2.0},
    ),
    "shifted_window_attention": (
        {"qkv": rand(1, 3, 4, 5, 24), "bias_table": rand(27, 2), "bias_index": INDEX, "pad_qkv": rand(24),
         "dropout_seed": torch.tensor(3)},
        {"window_size": [2, 2, 2], "shift_size": [1, 0, 1], "scale": 0.5, "dropout_p": 0.25},
    ),
    "pixel_contrastive_loss": (
        {"query": rand(2, 9, 5), "key": rand(2, 9, 5, seed=1), "query_coords": AT, "key_coords": AT},
        {"radius": 2.0, "temperature": 0.5, "return_valid": False},
    ),
    "pixel_consistency_loss": (
        {"query": rand(2, 9, 5), "key": rand(2, 9, 5, seed=1), "query_coords": AT, "key_coords": AT},
        {"radius": 2.0},
    ),
    "pixel_propagation": ({"features": rand(2, 9, 5), "values": rand(2, 9, 4)}, {"power": 2.0}),
    "nt_xent_loss": ({"z1": rand(6, 5), "z2": rand(6, 5, seed=1)}, {"temperature": 0.5}),
    "info_nce_loss": ({"query": rand(6, 5), "key": rand(6, 5, seed=1)}, {"temperature": 0.5, "return_bound": False}),
    "diffusion_step": (
        {"sample": rand(2, 3, 4), "model_output": rand(2, 3, 4, seed=1), "previous": rand(2, 3, 4, seed=2),
         "guide": rand(2, 3, 4, seed=4), "mask": rand(2, 3, 4, seed=5) > 0},
        {"a": 2.0, "b": 0.5, "c": 0.25, "d": 0.5, "e": 0.125, "f": 0.5, "s": 0.5, "guide_scale": 2.0,
         "guide_std": 0.5, "clip": [-1.0, 1.0], "seed": 3, "offset": 2, "sample_offset": 4},
    ),
}  # fmt: skip
OPTIONAL = {"weight", "bias", "residual", "pad_qkv", "dropout_seed", "previous", "noise", "guide", "mask"}
OPTIONAL |= {"negative_slope", "scale", "clip", "seed", "guide_scale", "guide_std", "out"}
NOT_FLOATING = {"bias_index", "dropout_seed", "mask"}
COEFFICIENTS = {"a", "b", "c", "d", "e", "f", "s", "guide_scale", "guide_std"}
WHOLE = {"seed", "offset", "sample_offset"}
WHOLE_LISTS = {"window_size", "shift_size"}
FLAGS = {"normalize", "return_valid", "return_bound"}


def call(op: str, **changes: Any) -> Any:
    tensors, settings = OPS[op]
    return getattr(ops, op)(**{**tensors, **settings, **changes})


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def refused(op: str, argument: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{op}: {argument}\b.*; expected ") as caught:
        call(op, **{argument: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# --- tensors ----------------------------------------------------------------------------------------------------
TENSORS = [(op, argument) for op, (tensors, _) in OPS.items() for argument in tensors]
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
    "number": lambda t: 2.0,
    "text": lambda t: "tensor",
    "None": lambda t: None,
    "module": lambda t: torch.nn.ReLU(),
    "complex": lambda t: t.to(torch.complex64),
    "complex half": lambda t: t.to(torch.complex32),
    "integers": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "float8 e4m3": lambda t: t.float().to(torch.float8_e4m3fn),
    "float8 e5m2": lambda t: t.float().to(torch.float8_e5m2),
    "COO": lambda t: t.to_sparse(),
    "CSR": lambda t: t.reshape(max(1, len(t)) if t.dim() else 1, -1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    "jagged": lambda t: torch.nested.nested_tensor([t.float().reshape(-1)] * 2, layout=torch.jagged),
    "mkldnn": lambda t: torch.atleast_1d(t).float().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
}
TAKEN = {
    ("mask", "integers"),
    ("mask", "bool"),
    ("bias_index", "integers"),
    *((argument, "None") for argument in OPTIONAL),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_what_is_no_tensor_of_the_right_kind_is_refused(op: str, argument: str, kind: str, path: None):
    if (argument, kind) in TAKEN:
        pytest.skip("is taken")
    refused(op, argument, KINDS[kind](OPS[op][0][argument]))


# --- numbers ----------------------------------------------------------------------------------------------------
NUMBERS = [
    (op, argument)
    for op, (_, settings) in OPS.items()
    for argument in settings
    if argument not in WHOLE | WHOLE_LISTS | FLAGS | {"clip"}
]
FORMS: dict[str, Callable[[float], Any]] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "longdouble": np.longdouble,
    "array": np.array,
    "array of one": lambda v: np.array([v]),
    "tensor": torch.tensor,
    "tensor of one": lambda v: torch.tensor([v]),
    "double tensor": lambda v: torch.tensor(v, dtype=torch.float64),
    "fraction": Fraction,
    "int": int,
    "int64": np.int64,
    "uint8": np.uint8,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("op", "argument"), NUMBERS)
def test_a_number_may_be_pythons_numpys_or_torchs(op: str, argument: str, form: str, path: None):
    value = OPS[op][1][argument]
    if form in ("int", "int64", "uint8") and value != int(value):
        value = 2.0
        if argument == "dropout_p":
            pytest.skip("has no whole value but 0")
    expected = outputs(call(op, **{argument: value}))
    for a, b in zip(outputs(call(op, **{argument: FORMS[form](value)})), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


NO_NUMBERS: dict[str, Any] = {
    "text": "2",
    "bytes": b"2",
    "True": True,
    "NumPy's True": np.bool_(True),
    "torch's True": torch.tensor(True),
    "complex": 2 + 1j,
    "NumPy's complex": np.complex64(2 + 1j),
    "torch's complex": torch.tensor(2 + 1j),
    "dict": {"value": 2.0},
    "set": {2.0},
    "type": float,
    "object": object(),
    "seven": [2.0] * 7,
    "tensor of seven": torch.full((7,), 2.0),
    "array of seven": np.full(7, 2.0),
    "array of text": np.array("2"),
    "sparse": torch.tensor([2.0]).to_sparse(),
    "nothing": torch.zeros(0),
    "None": None,
    "nested list": [[2.0]],
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize(("op", "argument"), NUMBERS)
def test_what_is_no_number_is_refused(op: str, argument: str, kind: str, path: None):
    if kind == "None" and argument in OPTIONAL:
        pytest.skip("is taken")
    refused(op, argument, NO_NUMBERS[kind])


NO_VALUES: dict[str, tuple[float, ...]] = {
    "sigma": (-1.0, math.nan, math.inf, -1e-9, 1e30, 1e-310),
    "truncated": (0.0, -1.0, math.nan, math.inf, 1e300),
    "eps": (0.0, -1.0, math.nan, math.inf, 1e-320, 1e-40, 1e300),
    "negative_slope": (math.nan, math.inf, -math.inf, 1e300),
    "scale": (math.nan, math.inf, 1e300),
    "dropout_p": (-0.1, 1.0, 1.5, math.nan, math.inf),
    "radius": (0.0, -1.0, math.nan, math.inf, 1e-30, 1e-320),
    "temperature": (0.0, -1.0, math.nan, math.inf, 1e-320, 1e-40, 1e-30),
    "power": (0.0, 0.5, -1.0, math.nan, math.inf, 1e300),
}


@pytest.mark.parametrize("form", ["float", "float64", "tensor"])
@pytest.mark.parametrize(
    ("op", "argument", "value"),
    [(op, a, v) for op, a in NUMBERS if a not in COEFFICIENTS for v in NO_VALUES[a]],
)
def test_a_value_that_makes_no_sense_is_refused(op: str, argument: str, value: float, form: str, path: None):
    refused(
        op,
        argument,
        {"float": float, "float64": np.float64, "tensor": lambda v: torch.tensor(v, dtype=torch.float64)}[form](
            value
        ),
    )


@pytest.mark.parametrize("exponent", range(-30, 0, 2))
@pytest.mark.parametrize("argument", ["sigma", "eps", "radius", "temperature"])
def test_the_smallest_values_are_refused_or_give_numbers(argument: str, exponent: int, path: None):
    """Gradients included, in float32."""
    for op, (tensors, settings) in OPS.items():
        if argument not in settings or op == "diffusion_step":
            continue
        inputs = {name: t.clone().requires_grad_() for name, t in tensors.items() if name not in NOT_FLOATING}
        more: list[dict[str, Any]] = [{"approx": a} for a in ("erf", "sampled", "scalespace")]
        for options in more if op == "gaussian_filter" else [{}]:
            try:
                result = call(op, **inputs, **options, **{argument: 10.0**exponent})
            except ValueError as error:
                text = str(error)
                assert text.startswith(f"{op}: {argument}")
                continue
            result.sum().backward()
            assert result.isfinite().all()
            assert all(t.grad is None or t.grad.isfinite().all() for t in inputs.values()), (op, options)


# --- whole numbers, lists of them, flags, limits ----------------------------------------------------------------
@pytest.mark.parametrize("form", [np.int64, np.int32, np.uint8, np.array, torch.tensor])
@pytest.mark.parametrize("argument", sorted(WHOLE - {"seed"}))
def test_a_whole_number_may_be_pythons_numpys_or_torchs(argument: str, form: Any, path: None):
    expected = call("diffusion_step", **{argument: 5})
    for a, b in zip(call("diffusion_step", **{argument: form(5)}), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", [np.int64, np.int32, np.uint8, np.array, torch.tensor])
def test_a_seed_may_be_pythons_numpys_or_torchs(form: Any, path: None):
    for a, b in zip(call("diffusion_step", seed=form(5)), call("diffusion_step", seed=5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "value",
    [1.5, 2.0, "2", True, np.float32(2), np.bool_(True), 2j, [2], torch.tensor(2.0), torch.tensor(True), OBJECT],
    ids=repr,
)
@pytest.mark.parametrize("argument", sorted(WHOLE))
def test_what_is_no_whole_number_is_refused(argument: str, value: Any, path: None):
    refused("diffusion_step", argument, value)


@pytest.mark.parametrize("value", [-1, 2**64, -(2**70), None], ids=repr)
@pytest.mark.parametrize("argument", ["offset", "sample_offset"])
def test_an_offset_out_of_range_is_refused(argument: str, value: Any, path: None):
    refused("diffusion_step", argument, value)


@pytest.mark.parametrize("argument", sorted(WHOLE_LISTS))
def test_window_and_shift_may_be_of_any_sequence(argument: str, path: None):
    expected = call("shifted_window_attention")
    values = OPS["shifted_window_attention"][1][argument]
    for form in (tuple, np.array, torch.tensor, torch.Size, lambda v: [np.int32(n) for n in v]):
        assert torch.equal(call("shifted_window_attention", **{argument: form(values)}), expected)


@pytest.mark.parametrize(
    "value",
    [
        [2.5, 2, 2], [2, 2, 2.0], [2, 2], [2, 2, 2, 2], [], 2, 2.5, "222", None, ["2", "2", "2"], [True, 1, 1],
        [None, 2, 2], [[2, 2, 2]], np.array([2.0, 2.0, 2.0]), torch.tensor([2.5, 2, 2]), [-1, 2, 2],
        {2, 3, 4}, {"z": 2}, [1j, 2, 2],
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("argument", sorted(WHOLE_LISTS))
def test_a_window_or_shift_that_makes_no_sense_is_refused(argument: str, value: Any, path: None):
    refused("shifted_window_attention", argument, value)


@pytest.mark.parametrize("value", ["no", 1, 0, None, 1.0, torch.tensor(True), []], ids=repr)
@pytest.mark.parametrize(("op", "argument"), [(op, a) for op, (_, s) in OPS.items() for a in s if a in FLAGS])
def test_a_flag_is_true_or_false(op: str, argument: str, value: Any, path: None):
    refused(op, argument, value)
    assert outputs(call(op, **{argument: np.bool_(True)}))[0].shape == outputs(call(op, **{argument: True}))[0].shape


@pytest.mark.parametrize("value", ["gauss", "", None, 1, ["erf"], {"erf": 1}], ids=repr)
@pytest.mark.parametrize(
    ("op", "argument"),
    [("gaussian_filter", "approx"), ("gaussian_filter", "mode"), ("pixel_contrastive_loss", "reduction")],
)
def test_a_choice_is_one_of_the_words(op: str, argument: str, value: Any, path: None):
    refused(op, argument, value)


@pytest.mark.parametrize(
    "value",
    [
        1.0,
        "ab",
        [1.0],
        [0, 1, 2],
        [1.0, -1.0],
        [math.nan, 1.0],
        [None, 1.0],
        ["a", "b"],
        [1j, 2],
        [True, 2.0],
        {0, 1},
    ],
    ids=repr,
)
def test_a_clip_that_makes_no_sense_is_refused(value: Any, path: None):
    refused("diffusion_step", "clip", value)


def test_a_clip_may_be_of_any_sequence(path: None):
    expected = call("diffusion_step")
    for clip in ((-1, 1), np.array([-1, 1]), torch.tensor([-1.0, 1.0]), (np.float32(-1), np.int64(1))):
        assert all(torch.equal(a, b) for a, b in zip(call("diffusion_step", clip=clip), expected, strict=True))


@pytest.mark.parametrize(
    "value", [[1.0, 2.0], [1.0] * 4, ["a"] * 3, [1.0, None, 1.0], [1.0, True, 1.0], "222", {1, 2, 3}]
)
def test_sigmas_that_make_no_sense_are_refused(value: Any, path: None):
    refused("gaussian_filter", "sigma", value)


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor, lambda v: np.array(v, dtype=np.float32)])
def test_sigmas_may_be_of_any_sequence(form: Any, path: None):
    values = [1.0, 0.5, 2.0]
    torch.testing.assert_close(call("gaussian_filter", sigma=form(values)), call("gaussian_filter", sigma=values))


@pytest.mark.parametrize("argument", sorted(COEFFICIENTS))
def test_a_coefficient_may_be_an_array_of_one_per_sample(argument: str, path: None):
    values = [0.5, 0.25]
    expected = call("diffusion_step", **{argument: torch.tensor(values)})
    for a, b in zip(call("diffusion_step", **{argument: np.array(values)}), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [1, "all", OBJECT, [0, 1]], ids=repr)
@pytest.mark.parametrize("op", ["nt_xent_loss", "info_nce_loss"])
def test_a_group_is_a_process_group(op: str, value: Any):
    refused(op, "group", value)


# --- constructors of losses -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value", [0.0, -1.0, math.nan, math.inf, "a", True, 1j, [1.0], np.array([1.0, 2.0])], ids=repr
)
@pytest.mark.parametrize(
    ("loss", "argument"),
    [(PixelContrastiveLoss, "temperature"), (PixelContrastiveLoss, "radius"), (PixelConsistencyLoss, "radius")],
)
def test_losses_refuse_numbers_that_make_no_sense(loss: Any, argument: str, value: Any):
    with pytest.raises((TypeError, ValueError), match=rf"^{loss.__name__}: {argument} is .*; expected "):
        loss(**{argument: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "a", 1j], ids=repr)
def test_the_contrastive_loss_refuses_temperatures_that_make_no_sense(value: Any):
    with pytest.raises((TypeError, ValueError)):
        ContrastiveLoss(temperature=value)(rand(4, 5), rand(4, 5, seed=1))


@pytest.mark.parametrize("form", [np.float32, np.array, torch.tensor])
def test_losses_take_numpys_and_torchs_numbers(form: Any):
    features, affine = rand(1, 4, 3, 3, 3), torch.eye(4)[None]
    arguments = (features, features.flip(1), affine, affine)
    expected = PixelContrastiveLoss(temperature=0.5, radius=1.5)(*arguments)
    mine = PixelContrastiveLoss(temperature=form(0.5), radius=form(1.5))(*arguments)
    torch.testing.assert_close(mine, expected)
