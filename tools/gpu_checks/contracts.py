# SPDX-License-Identifier: Apache-2.0
"""Stage 4: what torch and its users rely on: graphs, no waiting, torch.compile, autocast, checkpointing, opcheck."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gpu_checks.context import NO_GPU, Context, Item, check
from gpu_checks.numbers import smallest
from medaccel.ops import _checks, _conditions
from medaccel.ops._registry import OPS

# Each compilation takes seconds: so many cases an op, the smallest ones.
COMPILED = 2


def _works(context: Context, dtype: torch.dtype, count: int | None = None) -> Iterator[_checks.Work]:
    """Yields the works of the op that its kernel serves."""
    verifier = OPS[context.argument].load("verifier")
    names = verifier.cases if count is None else smallest(context.argument, count)
    for name in names:
        work = verifier.work(torch.device(context.device), dtype, name)
        if work.reason is None:
            yield work


def _replay(context: Context, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    name = f"{context.argument}, {_checks.dtype_name(dtype)}, captured, replayed, and without waiting"
    if context.dry:
        yield check(name, None, NO_GPU)
        return
    for work in _works(context, dtype):
        faults = _conditions.faults(work, work.run(), ("no waiting", "graph replay"))
        yield check(f"{name}, {work.case}", not faults, "; ".join(faults))


def _new_seed(context: Context) -> Iterator[dict[str, Any]]:
    """Replays a step that draws its own noise: each replay must have another."""
    name = f"{context.argument}, a new seed each replay"
    if context.dry:
        yield check(name, None, NO_GPU)
        return
    call = SEEDED[context.argument](torch.device(context.device))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append(result.clone())
    same = [i for i in range(2) if torch.equal(seen[i], seen[i + 1])]
    yield check(name, not same, f"replay {same[0] + 1} repeats the one before" if same else "")


def _step(device: torch.device) -> Callable[[], Tensor]:
    from medaccel.ops import diffusion_step

    x = torch.zeros(1, 1, 8, 8, 8, device=device)
    return lambda: diffusion_step(x, x, a=1.0, b=0.0, c=1.0, d=0.0, e=0.0, s=1.0)[0]


def _dropout(device: torch.device) -> Callable[[], Tensor]:
    """The seed is drawn on the device, as the layer does."""
    from medaccel.ops import shifted_window_attention
    from medaccel.ops.window_attention.cases import named

    case = named("dropout")
    qkv, table, index, pad = (None if t is None else t.to(device) for t in case.tensors())
    options = case.options()

    def call() -> Tensor:
        options["dropout_seed"] = torch.randint(2**62, (1,), device=device)
        return shifted_window_attention(qkv, table, index, pad_qkv=pad, **options)  # type: ignore[arg-type]

    return call


SEEDED: dict[str, Callable[[torch.device], Callable[[], Tensor]]] = {
    "diffusion_step": _step,
    "shifted_window_attention": _dropout,
}


def _compiled(context: Context, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Compiles without graph breaks; results must be as exact as eager ones are."""
    backend = "aot_eager" if context.dry else "inductor"
    for work in _works(context, dtype, COMPILED):
        torch.compiler.reset()
        compiled = torch.compile(work.forward, fullgraph=True, backend=backend)
        name = f"{context.argument}, {_checks.dtype_name(dtype)}, torch.compile(fullgraph=True), {work.case}"
        one = _checks.compare(work, (), results=replace(work, forward=compiled).run())
        yield check(name, one.passed, "" if one.passed else f"error is {one.share:.3g} of the allowed one")


def _autocast(context: Context) -> Iterator[dict[str, Any]]:
    """Runs fp32 inputs under bf16 autocast: finite, of one of the two dtypes, near the fp64 truth."""
    device = torch.device(context.device)
    for work in _works(context, torch.float32, COMPILED):

        def forward(*tensors: Tensor, work: _checks.Work = work) -> Any:
            if tensors[0].dtype == torch.float64:
                return work.forward(*tensors)
            with torch.autocast(device.type, torch.bfloat16):
                return work.forward(*tensors)

        cast = replace(work, forward=forward)
        truth, ours = cast.to(torch.device("cpu"), torch.float64).run(), cast.run()
        share, dtypes = 0.0, {y.dtype for y in ours[:1]}
        for actual, exact, size in zip(ours, truth, work.sizes, strict=True):
            if exact.numel():
                allowed = 4 * _checks.FLOOR[torch.bfloat16] * max(float(exact.abs().max()), size)
                share = max(share, _checks.max_error(actual, exact.to(actual.device)) / allowed)
        held = share <= 1 and dtypes <= {torch.float32, torch.bfloat16}
        yield check(
            f"{context.argument}, autocast, {work.case}", held, "" if held else f"error {share:.3g}, {dtypes}"
        )


def _checkpointed(context: Context) -> Iterator[dict[str, Any]]:
    for work in _works(context, torch.float32, COMPILED):

        def forward(*tensors: Tensor, work: _checks.Work = work) -> Any:
            return checkpoint(work.forward, *tensors, use_reentrant=False)

        again = replace(work, forward=forward).run()
        changed = [
            i for i, (a, b) in enumerate(zip(work.run(), again, strict=True)) if not _conditions.same_bits(a, b)
        ]
        note = f"other bits in result {changed}" if changed else ""
        yield check(f"{context.argument}, checkpointing, {work.case}", not changed, note)


class _Calls(TorchDispatchMode):
    """Keeps the arguments of each of medaccel's registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "medaccel":
            self.seen.setdefault(str(function), (function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def _opcheck(context: Context, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Holds each registered op that a call reaches, backward ones too, to torch's own checks."""
    for work in _works(context, dtype, 1):
        with _Calls() as calls:
            work.run()
        for name, (function, args, kwargs) in calls.seen.items():
            kinds = ["test_schema", "test_faketensor"]
            kinds += [] if name.endswith("_backward.default") else ["test_autograd_registration"]
            found = torch.library.opcheck(function, args, kwargs, test_utils=kinds, raise_exception=False)
            failed = {kind: str(result) for kind, result in found.items() if result != "SUCCESS"}
            note = "; ".join(f"{kind}: {result.splitlines()[0]}" for kind, result in failed.items())
            yield check(f"{name}, {_checks.dtype_name(dtype)}, opcheck", not failed, note)


def items(context: Context) -> list[Item]:
    """Returns the contracts of one op."""
    found = [Item("checkpointing", lambda: _checkpointed(context)), Item("autocast", lambda: _autocast(context))]
    for dtype in (torch.float32, torch.bfloat16):
        name = _checks.dtype_name(dtype)
        found += [
            Item(f"graph, {name}", lambda d=dtype: _replay(context, d)),  # type: ignore[misc]
            Item(f"opcheck, {name}", lambda d=dtype: _opcheck(context, d)),  # type: ignore[misc]
            Item(f"compile, {name}", lambda d=dtype: _compiled(context, d)),  # type: ignore[misc]
        ]
    if context.argument in SEEDED:
        found.append(Item("a new seed each replay", lambda: _new_seed(context)))
    return found
