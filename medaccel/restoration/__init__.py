# SPDX-License-Identifier: Apache-2.0
"""PET restoration: short exposures made to look like long ones; simulator, phantoms, methods, report."""
