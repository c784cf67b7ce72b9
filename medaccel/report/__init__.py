# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML reports: sections of text, tables and figures (`html`), figure helpers (`figures`)."""
