# SPDX-License-Identifier: Apache-2.0
"""Tests what public calls would launch on GPUs that are not there, held against the gates of `tests.gpu_gates`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled here")

from tests.gpu_gates import CONTRASTS, GATES, NETWORKS, OTHERS, QUICK, SELECTED, Gate, problems, table
from tests.triton_interpretation.launches import Compiled, Launches, compile_calls, launches
from tests.triton_interpretation.machine_code import MachineCode, parse

DOCS = Path(__file__).parents[1] / "docs" / "gpu.md"
BLOCKS = 8  # Swin UNETR has so many


@pytest.fixture(scope="module")
def quick(triton_cache: Path) -> Launches:
    """A training step of the network that most people train, on an H100."""
    return launches(QUICK, 90, triton_cache)


def test_a_training_step_on_an_h100_holds_every_gate(quick: Launches):
    assert problems(quick.kernels) == []
    seen = {gate for gate in GATES for c in quick.kernels if gate.holds_for(c)}
    assert seen == {gate for gate in GATES if gate.call in QUICK}


def test_a_block_has_at_most_two_launches_beyond_the_passes(quick: Launches):
    counts: dict[str, int] = {}
    for c in quick.kernels:
        counts[c.kernel] = counts.get(c.kernel, 0) + c.launches
    assert quick.torch == {QUICK[0]: {}}
    # Forward and backward each compute their layout; maps that need padding, six blocks', sum up its gradient.
    passes = dict.fromkeys(("forward_kernel", "query_kernel", "key_kernel", "bias_kernel", "table_kernel"), BLOCKS)
    assert counts == {**passes, "layout_kernel": 2 * BLOCKS, "pad_kernel": 6}


def test_a_network_shares_kernels_between_its_stages(quick: Launches):
    """Sizes are no variants: a user waits for one compilation of each kernel, not for one per stage."""
    variants: dict[str, int] = {}
    for c in quick.kernels:
        variants[c.kernel] = variants.get(c.kernel, 0) + 1
    for kernel in ("forward_kernel", "query_kernel", "key_kernel", "bias_kernel"):
        assert variants[kernel] == 3  # windows of 7³ tokens with and without a shift, one window of 6³


@pytest.mark.slow
def test_calls_on_every_architecture_hold_their_gates(quick: Launches, triton_cache: Path):
    kernels = quick.kernels + compile_calls(SELECTED, triton_cache)
    assert {c.call for c in kernels} == {*NETWORKS, *OTHERS, *CONTRASTS}
    assert problems(kernels) == []
    assert all(any(gate.holds_for(c) for c in kernels) for gate in GATES)
    for c in kernels:
        if "PRECISION" in c.constants:
            exact = "float32" in c.call and c.constants["PRECISION"] == "ieee"
            assert bool(c.code.matrix_products) != exact, c


# --- the gates themselves ------------------------------------------------------------------------------------
LOOP = """
 Function kernel:
  REG:40 STACK:0 SHARED:0 LOCAL:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   MUFU.EX2 R3, R3 ;
        /*0030*/                   HMMA.16816.F32 R4, R4, R8, R12 ;
        /*0040*/                   FADD R3, R3, R4 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/                   NOP;
        /*0070*/             @P0   BRA 0x30 ;
        /*0080*/                   RED.E.ADD.F32 [R2], R3 ;
        /*0090*/             @P1   BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_machine_code_is_read():
    code = parse(LOOP)
    assert code == MachineCode(registers=40, local_accesses=1, atomics=1, matrix_products=1, loop=4, exponentials=1)
    with pytest.raises(ValueError, match="nothing that is understood"):
        parse("cuobjdump info: no code")


def sound() -> Compiled:
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "SHIFTED": True}
    code = MachineCode(registers=80, local_accesses=0, atomics=0, matrix_products=3, loop=352, exponentials=34)
    return Compiled(QUICK[0], "forward_kernel", 90, tile, code, 20 << 10, 100, 1)


def test_instructions_of_an_unrolled_loop_are_counted_once():
    assert sound().instructions_per_score() == 11.0
    twice = replace(sound(), code=replace(sound().code, loop=704, exponentials=68))
    assert twice.instructions_per_score() == 11.0
    contrast = replace(sound(), code=replace(sound().code, loop=704, exponentials=66))
    assert contrast.instructions_per_score(exponentials=2) == 22.0


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({}, {"local_accesses": 2}, "2 instructions access local memory"),
        ({}, {"atomics": 1}, "1 atomic instructions"),
        ({"shared": 228 << 10}, {}, "233472 bytes of shared memory (allowed 232448)"),
        ({"arch": 80, "shared": 100 << 10}, {}, "102400 bytes of shared memory (allowed 101376)"),
        ({}, {"loop": 416}, "13.0 instructions per score (allowed 12.5)"),
        ({}, {"registers": 168}, "3 blocks fit on a multiprocessor (at least 4)"),
    ],
)
def test_each_gate_fires(change: dict[str, int], code: dict[str, int], words: str):
    assert problems([sound()]) == []
    (found, *_) = problems([replace(sound(), code=replace(sound().code, **code), **change)])
    assert words in found


def test_gates_are_as_strict_as_the_promise():
    """Instructions a score: the attention of Swin UNETR in bf16, at most so many forward and for each gradient."""
    promise = {True: (22, 22, 26, 36), False: (15, 15, 18, 29)}
    gates: dict[tuple[str, bool | None], Gate] = {(g.kernel, g.shifted): g for g in GATES if g.call == QUICK[0]}
    for shifted, counts in promise.items():
        for name, count in zip(("forward", "query", "key", "bias"), counts, strict=True):
            gate = gates[f"{name}_kernel", shifted]
            assert gate.instructions <= count
            assert gate.blocks >= 2


def test_the_documentation_quotes_the_gates():
    assert table() in DOCS.read_text(encoding="utf-8")
