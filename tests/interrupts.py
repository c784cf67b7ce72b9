# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in tests: a shell starts jobs in the background with SIGINT ignored, and their children inherit that."""

import signal


def heed_sigint() -> None:
    """Lets a child heed Ctrl-C; for `subprocess.Popen(preexec_fn=heed_sigint)`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
