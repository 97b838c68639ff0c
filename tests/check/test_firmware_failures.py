"""Every call of hardware or firmware that may fail is made to fail by some scenario."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import guestmem.arch
from guestmem.check.explore import EXHAUSTED, explore
from guestmem.check.scenario import built_in
from guestmem.check.strategies.states import States

ARCH = Path(guestmem.arch.__file__).parent

NOBODY_CALLS = {
    "RMI_REC_ENTER": "scripts of guests run without the monitor",
    "TD exit": "no call: the return of TDH.VP.ENTER",
    "TDH.MEM.PAGE.DEMOTE": "2M leaves: the explorer's huge pages are four pages",
    "TDH.MEM.PAGE.PROMOTE": "2M leaves",
    "TDH.MEM.SEPT.REMOVE": "tables stay to the end of the TD",
    "TDH.VP.ENTER": "scripts of guests run without the module",
}
"""Calls that the models have, with rows of their own in tests/arch, and no explored machine makes."""


def _functions(folder: Path) -> Iterator[ast.FunctionDef]:
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield node


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def labels_of(architecture: str) -> set[str]:
    """What `fails` may be asked in the models of an architecture, read from their source: the literal, or the `call` of
    the function, that is handed to it, or to a helper that hands its own `call` on."""
    functions = list(_functions(ARCH / architecture))
    asking = {"_fails"}
    found: set[str] = set()
    size = -1
    while size != len(asking):
        size = len(asking)
        for function in functions:
            names = {argument.arg for argument in function.args.args}
            own = {
                str(node.value.value)
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Constant)
                and any(isinstance(target, ast.Name) and target.id == "call" for target in node.targets)
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and _name(node) in asking and node.args:
                    first = node.args[0]
                    if isinstance(first, ast.Constant):
                        found.add(str(first.value))
                    elif isinstance(first, ast.Name) and first.id in names:
                        asking.add(function.name)
                    else:
                        found |= own
    return found


@pytest.mark.parametrize(
    ("architecture", "some", "prefixes"),
    [
        (
            "snp",
            {"snp: RMPUPDATE", "snp: PSMASH", "snp: PAGE_RECLAIM", "snp: DF_FLUSH"},
            ("snp_life", "snp_launch_against", "snp_huge_conv"),
        ),
        ("tdx", {"TDH.MEM.TRACK", "TDH.MNG.KEY.FREEID"}, ("td_life", "td_conversion_refused")),
        ("cca", {"RMI_GRANULE_DELEGATE", "RMI_RTT_CREATE"}, ("realm_life",)),
        ("pkvm", {"__pkvm_host_donate_guest"}, ("pkvm_life",)),
    ],
)
def test_each_is_injected(architecture: str, some: set[str], prefixes: tuple[str, ...]) -> None:
    labels = labels_of(architecture)
    assert labels >= some, "the source is not read as it should be"
    injected: set[str] = set()
    for name, scenario in built_in().items():
        if name.startswith(prefixes):
            result = explore(scenario, States(scenario.preemptions))
            assert result.verdict == EXHAUSTED
            injected |= result.failed
    assert labels - injected == {label for label in NOBODY_CALLS if label in labels}
