# SPDX-License-Identifier: Apache-2.0
"""Pretrains without labels: tasks that a Swin UNETR learns on unlabelled CT, and measures of how well it learnt them.

`config` holds the options, `pipeline.run` runs them; `tasks` holds the tasks, `network` the backbone with their
heads, `data` the volumes, `items` the inputs of a step, `evaluation` the figures on held-out scans.
"""
