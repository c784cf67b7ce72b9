# SPDX-License-Identifier: Apache-2.0
"""Simulated PET exposures of an activity volume."""
