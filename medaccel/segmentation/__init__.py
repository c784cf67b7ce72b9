# SPDX-License-Identifier: Apache-2.0
"""Segmentation of CT in the Medical Segmentation Decathlon's layout, and what pretraining is worth for it.

`msd` reads a task, `phantom_task` makes one; `protocol` splits it and lists the cells of the study, `cell` runs one,
`grid` many, `pipeline` the whole study to its report; `apply` is for a user's own scan.
"""
