# SPDX-License-Identifier: Apache-2.0
"""Builds self-contained HTML reports: sections of text, tables and figures (`html`), and helpers for figures
(`figures`)."""
