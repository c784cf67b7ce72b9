# SPDX-License-Identifier: Apache-2.0
"""torch.compile takes every op's choice of a GPU's kernel, and the call, as one graph."""

from typing import Any

import pytest
import torch

from medaccel.ops._registry import OPS, Kernel
from tests.fake_cuda.calls import calls_of
from tests.fake_cuda.device import fake_gpu, on_gpu

pytestmark = [pytest.mark.fake_cuda, pytest.mark.slow]

# A case with all the op's tensors.
CASES = {"diffusion_step": "masked", "instance_norm_act": "residual", "shifted_window_attention": "swin_unetr"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_an_op_on_a_gpu_is_one_graph_with_its_kernel(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch):
    calls = list(calls_of(name, torch.float32))
    call = next((c for c in calls if c.name == CASES.get(name)), calls[1])
    called: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with fake_gpu(monkeypatch, watched=False):
        torch.compile(call.run, fullgraph=True, backend=backend, dynamic=dynamic)(on_gpu(call.tensors))
    registered = f"medaccel.{OPS[name].registered}"
    by_kernel = isinstance(OPS[name].kernels["cuda"], Kernel)
    assert any(target.startswith(registered) for target in called) == by_kernel
