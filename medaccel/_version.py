# SPDX-License-Identifier: Apache-2.0
"""The version that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("medaccel")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
