"""`python -m tests.golden`: print the rows that differ from Linux 6.18, for who is mending them.

Under `guestmem run --abi v6.18` by default; `--native` asks the /dev/kvm of this machine, and `--under COMMAND` puts
any other command before the probe, such as `env LD_PRELOAD=...`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from tests.golden import runner
from tests.golden.rows import ROWS, SECTIONS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--native", action="store_true", help="ask this machine's /dev/kvm")
    where.add_argument("--guestmem", action="store_true", help="ask `guestmem run --abi v6.18` (the default)")
    where.add_argument("--under", metavar="COMMAND", help="put this command before the probe")
    parser.add_argument("--section", action="append", default=[], choices=SECTIONS, help="only these sections")
    parser.add_argument("--slow", action="store_true", help="ask row R42 natively too: 50 s, 16 GiB of kernel memory")
    parser.add_argument("--all", action="store_true", help="print the rows that agree as well")
    return parser


def _prefix(options: argparse.Namespace) -> list[str]:
    if options.native:
        return []
    return shlex.split(options.under) if options.under else runner.guestmem_command()


def main() -> int:
    options = _parser().parse_args()
    slow = options.slow or not options.native
    rows = runner.asked(options.section, slow=slow)
    with tempfile.TemporaryDirectory() as directory:
        program = runner.build(Path(directory))
        answers = runner.run(program, runner.selection(options.section, slow=slow), _prefix(options))
    if options.all:
        for row_id in rows:
            print(
                f"{row_id:5} {ROWS[row_id].call}: {ROWS[row_id].arguments}: {answers.rows.get(row_id, '(no answer)')}"
            )
    found = runner.differences(answers, rows, excuses=not options.native)
    print(runner.report(found, answers, rows))
    stale = runner.stale(answers, rows) if not options.native else []
    for row_id in stale:
        print(f"{row_id} is listed as unimitable but agrees")
    return 1 if stale or any(not difference.excuse for difference in found) else 0


if __name__ == "__main__":
    sys.exit(main())
