# SPDX-License-Identifier: Apache-2.0
"""Turns PET values into SUV by what the header says; docs/suv.md has the rules."""

from medaccel.data.suv.rule import Kind, SuvRule, suv_factors, suv_rule

__all__ = ["Kind", "SuvRule", "suv_factors", "suv_rule"]
