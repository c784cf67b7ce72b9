# SPDX-License-Identifier: Apache-2.0
"""The registry of ops: every cell of every row is there, a missing one is named, what is made of it is up to date."""

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from medaccel import ops
from medaccel.ops._registry import OPS, NoKernel, Op, table
from tests.native.test_sanitizers import CHECKED
from tests.ops import malformed, test_arguments, test_scales, transform_cases
from tests.ops.checks import EMULATED, IMPLEMENTATIONS, implementation, poisoned_memory
from tests.ops.column import ROOT, lacking

ROWS = list(OPS.values())
FOLDERS = {op.folder for op in ROWS}


# --- the rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_no_cell_of_a_row_is_lacking(op: Op):
    assert lacking(op) == []


@pytest.mark.parametrize("cell", [field.name for field in fields(Op)])
@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_a_row_without_one_of_its_cells_is_told_which(op: Op, cell: str):
    if cell == "kernels":
        for device in op.kernels:
            others = {name: kernel for name, kernel in op.kernels.items() if name != device}
            assert f"kernels: says nothing of {device}" in lacking(replace(op, kernels=others))
            without_reason = {**op.kernels, device: NoKernel("")}
            assert any(
                line.startswith(f"kernels: {device} has neither")
                for line in lacking(replace(op, kernels=without_reason))
            )
        return
    assert any(line.startswith(f"{cell}: ") for line in lacking(replace(op, **{cell: ""})))


@pytest.mark.parametrize("cell", ["function", "reference", "predicate", "cases", "verifier", "benchmark"])
@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_a_path_to_what_is_not_there_is_named(op: Op, cell: str):
    gone = getattr(op, cell) + "_that_is_gone"
    assert any(line.startswith(f"{cell}: ") for line in lacking(replace(op, **{cell: gone})))


def test_a_row_that_claims_a_kernel_or_denies_one_is_found_out():
    has, has_not = OPS["gaussian_filter"], OPS["nt_xent_loss"]
    claimed = replace(has_not, kernels={**has_not.kernels, "cuda": has.kernels["cuda"]})
    denied = replace(has, kernels={**has.kernels, "cuda": has_not.kernels["cuda"]})
    assert "kernels: similarity_lse has none registered for cuda" in lacking(claimed)
    assert "kernels: gaussian_filter has one for cuda, where the row has none" in lacking(denied)


def test_every_public_op_and_every_folder_has_a_row():
    assert set(OPS) == set(ops.__all__) - {"use_reference"}
    package = Path(ops.__file__).parent
    assert {folder.parent.name for folder in package.glob("*/__init__.py")} == FOLDERS
    assert {source.parent.name for source in (ROOT / "csrc").glob("*/cpu.cpp")} == FOLDERS


# --- what is made of it ------------------------------------------------------------------------------------------
def test_the_readme_has_the_table_that_the_registry_makes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- ops: made by tools/ops_table -->\n(.*?)<!-- /ops -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == table(), "run tools/ops_table --write"


@pytest.mark.parametrize(
    ("file", "pattern", "folders"),
    [
        ("CMakeLists.txt", r"set\(OPS ([^)]*)\)", FOLDERS),
        ("module.cpp", r"X\((\w+)\)(?= |$)", FOLDERS),
        ("cmake/cuda.cmake", r"set\(CUDA_FOLDERS ([^)]*)\)", None),
        ("cuda_module.cpp", r"X\((\w+)\)(?= |$)", None),
    ],
)
def test_the_build_lists_the_folders(file: str, pattern: str, folders: set[str] | None):
    text = (ROOT / "csrc" / file).read_text(encoding="utf-8")
    with_cuda = {source.parent.name for source in (ROOT / "csrc").glob("*/cuda.cu")}
    listed = " ".join(re.findall(pattern, text, re.MULTILINE)).split()
    assert sorted(listed) == sorted(folders or with_cuda)


def test_the_tables_of_the_suite_have_every_op():
    named = lambda entries: {entry.split(",")[0].split(" ")[0] for entry in entries}  # noqa: E731
    assert named(test_arguments.OPS) == set(OPS)
    assert named(test_scales.OPS) >= set(OPS)
    assert named(transform_cases.CASES) == set(OPS)
    registered = {op.registered for op in ROWS}
    assert set(transform_cases.REGISTERED) == registered
    assert {name.removesuffix("_backward") for name in malformed.OPS} == registered
    assert set(CHECKED) == FOLDERS


def test_an_address_is_taken_in_native_files_alone():
    users = {
        path.name for path in (ROOT / "medaccel").rglob("*.py") if "data_ptr(" in path.read_text(encoding="utf-8")
    }
    assert users == {"native.py", "_native.py"}


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    command = [sys.executable, "-m", "benchmarks", "gausian"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "op is 'gausian'; expected some of diffusion_step, gaussian_filter" in result.stderr


# --- what every op must hold -------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", [name for name in IMPLEMENTATIONS if name not in EMULATED])
@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
@pytest.mark.slow
def test_every_case_of_verify_holds_on_every_implementation(op: Op, where: str):
    verifier = op.load("verifier")
    with implementation(where), poisoned_memory():
        checks = list(verifier.checks(torch.device("cpu")))
    assert {check.op for check in checks} == {op.name}
    assert [check for check in checks if not check.passed] == []
