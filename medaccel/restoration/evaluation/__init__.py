# SPDX-License-Identifier: Apache-2.0
"""Scores restored images: what each method gains, keeps and costs."""
