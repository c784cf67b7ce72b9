# SPDX-License-Identifier: Apache-2.0
"""Calls every registered op, past the public functions, with operands that are wrong in one thing each.

``python -m tests.ops.malformed`` prints a line of JSON before each call and one after it, so that a call that ends
the process is the last one named. Run by test_operands.py.
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# import registers the ops
import medaccel.ops  # noqa: F401

F32 = torch.float32


def _random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.medaccel, op)(*arguments.values())


def _gaussian() -> dict[str, Any]:
    return {
        "input": _random(2, 1, 4, 5, 6), "sigma": torch.tensor([1.0, 0.5, 2.0]), "truncated": 4.0, "approx": "erf",
        "mode": "constant", "normalize": False,
    }  # fmt: skip


def _gaussian_backward() -> dict[str, Any]:
    forward = _gaussian()
    return {"grad": _random(2, 1, 4, 5, 6), **forward, "need_input": True, "need_sigma": True}


def _norm() -> dict[str, Any]:
    return {
        "input": _random(2, 3, 4, 5, 6), "weight": _random(3), "bias": _random(3), "residual": _random(2, 3, 4, 5, 6),
        "eps": 1e-5, "negative_slope": 0.1,
    }  # fmt: skip


def _norm_backward() -> dict[str, Any]:
    forward = _norm()
    output, mean, rstd = _call("instance_norm_act", forward)
    return {
        "grad": _random(2, 3, 4, 5, 6), "input": forward["input"], "weight": forward["weight"],
        "bias": forward["bias"], "signs": output, "mean": mean, "rstd": rstd, "negative_slope": 0.1,
        "need_affine": True, "need_residual": True,
    }  # fmt: skip


def _attention() -> dict[str, Any]:
    index = torch.randint(0, 27, (8, 8), generator=torch.Generator().manual_seed(0))
    return {
        "qkv": _random(2, 3, 4, 5, 24), "bias_table": _random(27, 2), "bias_index": index, "pad_qkv": _random(24),
        "dropout_seed": torch.tensor([7]), "window_size": [2, 2, 2], "shift_size": [1, 0, 1], "scale": 0.5,
        "dropout_p": 0.25,
    }  # fmt: skip


def _attention_backward() -> dict[str, Any]:
    forward = _attention()
    output, lse = _call("shifted_window_attention", forward)
    tensors = {name: forward.pop(name) for name in list(forward)[:5]}
    wanted = {"need_qkv": True, "need_table": True, "need_pad": True}
    return {"grad": _random(2, 3, 4, 5, 8), **tensors, "output": output, "lse": lse, **forward, **wanted}


def _pixels() -> dict[str, Any]:
    return {
        "query": _random(2, 9, 5), "key": _random(2, 8, 5), "query_coords": _random(2, 9, 3),
        "key_coords": _random(2, 8, 3), "radius": torch.tensor([1.0, 2.0]),
    }  # fmt: skip


def _contrast_backward() -> dict[str, Any]:
    forward = {**_pixels(), "temperature": 0.3}
    loss, lse, positive_lse = _call("pixel_contrastive_loss", forward)
    kept = {"lse": lse, "positive_lse": positive_lse, "temperature": 0.3}
    return {"grad": torch.ones_like(loss), **_pixels(), **kept, "need_query": True, "need_key": True}


def _similarity() -> dict[str, Any]:
    return {"query": _random(2, 6, 5), "key": _random(2, 9, 5), "temperature": 0.3, "self_offset": 1}


def _similarity_backward() -> dict[str, Any]:
    forward = _similarity()
    _, lse = _call("similarity_lse", forward)
    wanted = {"need_query": True, "need_key": True}
    return {
        "grad": _random(2, 6), "query": forward["query"], "key": forward["key"], "lse": lse, "temperature": 0.3,
        "self_offset": 1, **wanted,
    }  # fmt: skip


def _propagation() -> dict[str, Any]:
    return {"features": _random(2, 7, 5), "values": _random(2, 7, 3), "power": 2.0}


def _step() -> dict[str, Any]:
    shape = (2, 3, 5)
    return {
        "sample": _random(*shape), "model_output": _random(*shape), "previous": _random(*shape),
        "noise": _random(*shape), "guide": _random(*shape), "mask": _random(*shape) > 0,
        "coefficients": _random(9, 2, dtype=torch.float64), "key": torch.tensor([3, 5, 7]), "low": -1.0, "high": 1.0,
        "need_x0": True,
    }  # fmt: skip


def _step_backward() -> dict[str, Any]:
    forward = _step()
    kept = {name: forward[name] for name in ("sample", "model_output", "mask", "coefficients", "low", "high")}
    grads = {"grad_next": _random(2, 3, 5), "grad_x0": _random(2, 3, 5)}
    return {**grads, **kept, "need_sample": True, "need_model_output": True}


OPS: dict[str, Callable[[], dict[str, Any]]] = {
    "gaussian_filter": _gaussian,
    "gaussian_filter_backward": _gaussian_backward,
    "instance_norm_act": _norm,
    "instance_norm_act_backward": _norm_backward,
    "shifted_window_attention": _attention,
    "shifted_window_attention_backward": _attention_backward,
    "pixel_contrastive_loss": lambda: {**_pixels(), "temperature": 0.3},
    "pixel_contrastive_loss_backward": _contrast_backward,
    "pixel_pair_similarity": _pixels,
    "pixel_pair_similarity_backward": lambda: {
        "grad": _random(2, 9),
        **_pixels(),
        "need_query": True,
        "need_key": True,
    },
    "similarity_lse": _similarity,
    "similarity_lse_backward": _similarity_backward,
    "pixel_propagation": _propagation,
    "pixel_propagation_backward": lambda: {
        "grad": _random(2, 7, 3),
        **_propagation(),
        "need_features": True,
        "need_values": True,
    },
    "diffusion_step": _step,
    "diffusion_step_backward": _step_backward,
}

# (op, argument, axis): sizes that nothing else fixes; axis -1: one element of any rank.
FREE = {
    *((op, "dropout_seed", -1) for op in ("shifted_window_attention", "shifted_window_attention_backward")),
    ("shifted_window_attention", "bias_table", 1),
    ("diffusion_step", "coefficients", 1),
    ("diffusion_step_backward", "coefficients", 1),
    ("similarity_lse", "query", 1),
    ("similarity_lse", "key", 1),
    ("similarity_lse_backward", "key", 1),
    ("pixel_propagation", "features", 2),
    ("pixel_propagation", "values", 2),
    ("pixel_propagation_backward", "features", 2),
    ("shifted_window_attention", "bias_table", 0),
    ("shifted_window_attention_backward", "bias_table", 0),
    ("shifted_window_attention", "qkv", 0),
    ("shifted_window_attention", "qkv", 1),
    ("shifted_window_attention", "qkv", 2),
    ("shifted_window_attention", "qkv", 3),
    *(("gaussian_filter", "input", axis) for axis in range(5)),
}


def _shapes(op: str, argument: str, t: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    for axis in range(t.dim()):
        free = (op, argument, axis) in FREE
        yield f"axis {axis} longer", torch.cat([t, t.narrow(axis, 0, 1)], axis), free
        yield f"axis {axis} shorter", t.narrow(axis, 1, t.shape[axis] - 1), free
        yield f"axis {axis} empty", t.narrow(axis, 0, 0), free
        yield f"axis {axis} huge", t.narrow(axis, 0, 1).expand(*t.shape[:axis], 2**40, *t.shape[axis + 1 :]), False
    single = (op, argument, -1) in FREE
    yield "one axis more", t[None], single
    yield "flat", t.flatten() if t.dim() != 1 else t[0], single
    yield "no axis", t.flatten()[0], single
    yield "no axis at all, empty", t.new_empty(0), False


def _kinds(op: str, argument: str, t: Tensor) -> Iterator[tuple[str, Any, bool]]:
    """Other dtypes, layouts and devices; the third: whether the op may take them."""
    takes_int = argument == "bias_index"
    half = t.dtype in (torch.float32, torch.float64) and argument not in (
        *("mean", "rstd", "lse", "positive_lse", "coefficients", "query_coords", "key_coords"),
        *(("radius",) if op.startswith("pixel") else ()),
    )
    yield "complex", t.to(torch.complex64), False
    yield "float8", t.float().to(torch.float8_e4m3fn), False
    yield "bool", t.bool(), argument == "mask"
    yield "uint8", t.to(torch.uint8), takes_int or argument == "mask"
    yield "int32", t.int(), takes_int
    yield "int64", t.long(), takes_int or t.dtype == torch.int64
    yield "half", t.half(), half
    yield (
        "double",
        t.double(),
        (t.dtype.is_floating_point and not op.startswith("diffusion")) or argument == "coefficients",
    )
    yield "sparse", t.to_sparse(), False
    if t.dtype == torch.float32:
        yield "mkldnn", t.to_mkldnn(), False
        yield "quantised", torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), False
        yield "nested", torch.nested.nested_tensor([t, t]), False
    yield "meta", t.to("meta"), True  # all on meta: a result there
    yield "a list", t.tolist(), False
    yield "a number", 1.0, False
    yield "a word", "tensor", False


def _served(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, or zeros, in tensors whose memory doesn't say so."""
    if t.dtype.is_floating_point:
        yield "negated view", torch._neg_view(-t)
        yield "imaginary part of a conjugate", torch.complex(torch.zeros_like(t), -t).conj().imag
    yield "backwards strides", t.flip(0).clone().flip(0)
    yield "steps of two", torch.stack([t, t], dim=-1)[..., 0]
    if t.dtype.is_floating_point:
        yield "zero tensor", torch._efficientzerotensor(t.shape, dtype=t.dtype)


NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-320, 1e300, 2.0)
INTS = (-(2**63), -(2**40), -2, -1, 0, 2**31, 2**40, 2**63 - 1, 2**64, 2**70)


def _others(argument: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Settings that make no sense; a result is all right where nothing is read or written elsewhere."""
    if isinstance(value, bool):
        yield "the other", not value
    elif isinstance(value, str):
        yield "an unknown word", "gauss"
        yield "empty", ""
    elif isinstance(value, float):
        for other in NUMBERS:
            yield f"{other}", other
    elif isinstance(value, int):
        for number in INTS:
            yield f"{number}", number
    elif isinstance(value, list):
        yield "empty", []
        yield "too short", value[1:]
        yield "too long", [*value, 1]
        for number in INTS:
            yield f"{number} among them", [number, *value[1:]]
            yield f"{number} everywhere", [number] * len(value)


def _edits(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Values that an index, key or coefficient must not have, or that arithmetic must bear."""
    values: tuple[Any, ...] = (math.nan, math.inf, -1.0, 0.0, 1e30) if t.dtype.is_floating_point else INTS[:-2]
    for value in values:
        if t.dtype != torch.bool:
            yield (
                f"first is {value}",
                torch.cat([torch.full((1,), value, dtype=t.dtype), t.flatten()[1:]]).reshape(t.shape),
            )
            yield f"all are {value}", torch.full_like(t, value)


def calls(op: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Returns (the fault, arguments, "refused" | "equal" | "any": the expected outcome)."""
    good = OPS[op]()
    for argument, value in good.items():
        if isinstance(value, Tensor):
            variants = [
                *((what, t, "any" if ok else "refused") for what, t, ok in _shapes(op, argument, value)),
                *((what, t, "any" if ok else "refused") for what, t, ok in _kinds(op, argument, value)),
                *((what, t, "any" if what == "zero tensor" else "equal") for what, t in _served(value)),
                *((what, t, "any") for what, t in _edits(value)),
                ("None", None, "any"),
            ]
        else:
            variants = [(what, other, "any") for what, other in _others(argument, value)]
        for what, other, outcome in variants:
            yield f"{argument}: {what}", {**good, argument: other}, outcome


def run(op: str) -> None:
    """Every call of an op, one after the other."""
    expected = [t.clone() for t in _outputs(_call(op, OPS[op]()))]
    for what, arguments, outcome in calls(op):
        print(json.dumps({"op": op, "what": what}), flush=True)
        try:
            outputs = _outputs(_call(op, arguments))
            same = len(outputs) == len(expected) and all(
                a.device.type == "cpu"
                and (a.shape, a.dtype) == (b.shape, b.dtype)
                and torch.allclose(a, b, 1e-5, 1e-6, equal_nan=True)
                for a, b in zip(outputs, expected, strict=True)
            )
            result, text = "equal" if same else "a result", ""
        except Exception as error:
            result, text = type(error).__name__, str(error)
        print(json.dumps({"op": op, "what": what, "outcome": outcome, "result": result, "text": text}), flush=True)


class Wrapped(Tensor):
    """A subclass without a behaviour of its own."""


def disguises(t: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, tensor, the same values as an ordinary one): the memory doesn't say what the tensor does."""
    if t.dtype.is_floating_point:
        yield "negated view", torch._neg_view(-t), t
        yield "imaginary part of a conjugate", torch.complex(torch.zeros_like(t), -t).conj().imag, t
        yield "zero tensor", torch._efficientzerotensor(t.shape, dtype=t.dtype), torch.zeros_like(t)
    yield "functional tensor", torch._to_functional_tensor(t), t
    yield "subclass", t.as_subclass(Wrapped), t
    with torch.inference_mode():
        yield "inference tensor", t.clone(), t
    yield "steps of two", torch.stack([t, t], dim=-1)[..., 0], t


def run_public() -> None:
    """Every public function with each of its tensors in disguise; what it gives must be the ordinary one's."""
    from tests.ops.test_arguments import OPS as PUBLIC
    from tests.ops.test_arguments import call

    for op, (tensors, _) in PUBLIC.items():
        for argument, t in tensors.items():
            for what, disguised, plain in disguises(t):
                head = {"op": "public", "what": f"{op}, {argument}: {what}"}
                print(json.dumps(head), flush=True)
                try:
                    pairs = [_outputs(call(op, **{argument: v})) for v in (disguised, plain)]
                    functional = [[_ordinary(y) for y in outputs] for outputs in pairs]
                    same = all(torch.allclose(a, b, 1e-5, 1e-6) for a, b in zip(*functional, strict=True))
                    result, text = "equal" if same else "a result", ""
                except Exception as error:
                    result, text = type(error).__name__, str(error)
                outcome = "any" if what == "functional tensor" and result == "RuntimeError" else "equal"
                print(json.dumps({**head, "outcome": outcome, "result": result, "text": text}), flush=True)


def _ordinary(t: Tensor) -> Tensor:
    if torch._is_functional_tensor(t):
        torch._sync(t)
        t = torch._from_functional_tensor(t)
    return t.as_subclass(Tensor)


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in OPS:
        run(name)
    run_public()
    print(json.dumps({"op": None}))
