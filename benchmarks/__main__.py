# SPDX-License-Identifier: Apache-2.0
"""Runs the ops' benchmarks, one after the other: `python -m benchmarks [op …] [--quick]`, by default every op's."""

import argparse
import subprocess
import sys

from medaccel.ops._registry import OPS


def main() -> int:
    """Runs the benchmarks of the named ops; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"some of {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="a few seconds each")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.ops if name not in OPS]
    if unknown:
        parser.error(f"op is {unknown[0]!r}; expected some of {', '.join(OPS)}")
    failed = []
    for module in dict.fromkeys(OPS[name].benchmark for name in arguments.ops or OPS):
        print(f"== {module}", flush=True)
        options = ["--quick"] if arguments.quick else []
        if subprocess.run([sys.executable, "-m", module, *options], check=False).returncode != 0:
            failed.append(module)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
