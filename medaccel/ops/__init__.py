# SPDX-License-Identifier: Apache-2.0
"""The ops: one folder each, with the public function, its plain PyTorch reference and its registration."""

from medaccel.ops._dispatch import use_reference
from medaccel.ops.gaussian import gaussian_filter

__all__ = ["gaussian_filter", "use_reference"]
