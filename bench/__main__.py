"""`python -m bench [NAME...]`: run the benchmarks, or those that are named."""

from __future__ import annotations

import importlib
import sys

ALL = (
    "conversions",
    "faults",
    "fallocate",
    "memory",
    "attributes",
    "simulate",
    "guest",
    "iommu",
    "explorer",
    "untouched",
    "serve",
    "transports",
)


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    unknown = set(names) - set(ALL)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    for name in names:
        importlib.import_module(f"bench.{name}").run()


if __name__ == "__main__":
    main()
