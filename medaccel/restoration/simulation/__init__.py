# SPDX-License-Identifier: Apache-2.0
"""Simulates PET exposures of an activity volume."""
