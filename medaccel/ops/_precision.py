# SPDX-License-Identifier: Apache-2.0
"""Chooses how exactly a GPU's kernels multiply fp32 matrices, by the setting that torch's own products follow."""

import torch

# The names are Triton's (3.5 to 3.9), for `input_precision` of tl.dot. "ieee" runs on the ordinary cores, the others
# on tensor cores: "tf32" rounds the factors to 11 bits; "tf32x3" splits each in two such parts and adds three
# products, which leaves an error near that of fp32.
IEEE, TF32X3, TF32 = "ieee", "tf32x3", "tf32"


def dot_precision(dtype: torch.dtype) -> str:
    """Returns the precision of products of matrices of `dtype`, as a name that Triton's `tl.dot` takes.

    fp32 is multiplied in fp32 at torch.set_float32_matmul_precision's default, "highest", in three products of TF32
    at "high" (which ``torch.backends.cuda.matmul.allow_tf32 = True`` sets too), and in one at "medium". A bare
    ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` counts as "high". Products of bf16 and fp16 are exact.
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return IEEE
    try:
        return TF32 if torch.get_float32_matmul_precision() == "medium" else TF32X3
    except RuntimeError:  # torch's older and newer settings disagree
        return TF32X3
