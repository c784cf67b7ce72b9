# SPDX-License-Identifier: Apache-2.0
"""What every study has: a run folder, digests, statistics and tables."""
