"""``python -m benchmarks [NAME…]``."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "epoch",
    "refault",
    "pager_memory",
    "pager_restart",
    "liars",
    "guest",
    "sizes",
    "false_loads",
    "idle",
    "policy",
    "phases",
    "density",
)


def main() -> int:
    """Run the named benchmarks, or all."""
    wanted = sys.argv[1:] or NAMES
    if unknown := [name for name in wanted if name not in NAMES]:
        sys.stderr.write(f"benchmarks: no benchmark {unknown[0]}; known: {', '.join(NAMES)}\n")
        return 2
    for name in wanted:
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
