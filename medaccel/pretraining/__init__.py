# SPDX-License-Identifier: Apache-2.0
"""Pretraining without labels: tasks that a Swin UNETR learns on unlabelled CT, and how well it learnt them.

`config` says what, `pipeline.run` does it; `tasks` holds the tasks, `network` the backbone with their heads, `data`
the volumes, `items` what a step sees, `evaluation` the figures on held-out scans.
"""
