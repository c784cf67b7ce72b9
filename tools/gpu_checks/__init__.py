# SPDX-License-Identifier: Apache-2.0
"""Holds the stages of tools/gpu_check, and what runs them.

`command` reads the options, `plan` lists the stages, `runner` gives each a process with a time limit, `child` is that
process, `records` the file that all write to, `summary` the tables and the page. The other modules are stages: each
has `items(context)`.
"""
