# SPDX-License-Identifier: Apache-2.0
"""Provides the parts that every study has: a run folder, digests, statistics and tables."""
