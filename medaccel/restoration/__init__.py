# SPDX-License-Identifier: Apache-2.0
"""Restores PET: makes short exposures look like long ones; with simulator, phantoms, methods and report."""
