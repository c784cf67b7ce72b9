# SPDX-License-Identifier: Apache-2.0
"""Segmentation of CT in the Medical Segmentation Decathlon's layout: data, splits, measures.

What is here so far: `msd` reads a task, `phantom_ct` makes one, `protocol` splits it, `metrics` scores it.
"""
