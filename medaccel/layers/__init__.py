# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for MONAI's layers: same constructors, attributes and state_dict, faster forward and backward."""

from medaccel.layers.gaussian import GaussianFilter

__all__ = ["GaussianFilter"]
