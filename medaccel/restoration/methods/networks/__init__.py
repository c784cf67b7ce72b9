# SPDX-License-Identifier: Apache-2.0
"""The parts that the methods with a network share: training data, losses, nets, and how a volume is restored."""
