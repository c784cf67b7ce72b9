# SPDX-License-Identifier: Apache-2.0
"""Segments CT in the Medical Segmentation Decathlon's layout, and measures how much pretraining improves it.

`medaccel.data.msd` reads a task, `medaccel.phantoms.ct_dataset` makes one; `protocol` splits it and lists the cells
of the study, `cell` runs one, `grid` many, `pipeline` the whole study to its report; `apply` segments a user's own
scan.
"""
