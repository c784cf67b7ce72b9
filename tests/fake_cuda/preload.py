# SPDX-License-Identifier: Apache-2.0
"""Loads the fake GPU as a plugin of pytest, which is before any conftest.py, and so before torch, is imported."""

import ctypes
import os

ctypes.CDLL(os.environ["MEDACCEL_FAKE_CUDA"])
