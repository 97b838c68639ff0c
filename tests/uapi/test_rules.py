"""The table of rules against the places that raise: neither may have what the other lacks."""

from __future__ import annotations

import ast
import errno
import pathlib
from collections import defaultdict

from guestmem.trace import errno_name
from guestmem.uapi.rules import RULES

SOURCE = pathlib.Path(__file__).parents[2] / "src" / "guestmem"


def raised() -> dict[str, set[str]]:
    """Rule to the errnos with which the source raises it, read from the syntax trees."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "Refusal":
                continue
            number, rule = node.args[:2]
            if not isinstance(rule, ast.Constant):
                assert path.name == "refusal.py", f"{path}: a rule that is not a plain string"
                continue
            found[str(rule.value)].add(errno_of(number))
    return found


def errno_of(node: ast.expr) -> str:
    """`errno.EINVAL` and `EHWPOISON` by name; anything computed is "?"."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "errno":
        return errno_name(getattr(errno, node.attr))
    if isinstance(node, ast.Name):
        return node.id
    return "?"


def test_every_rule_that_is_raised_is_in_the_table_and_the_other_way_round() -> None:
    assert set(raised()) == set(RULES)


def test_the_errnos_agree() -> None:
    for rule, errnos in raised().items():
        if "?" in errnos:
            assert len(RULES[rule].errnos) > 1, f"{rule} is raised with a computed errno and listed with one"
        else:
            assert errnos == set(RULES[rule].errnos), rule


def test_every_rule_says_something_and_where_it_comes_from() -> None:
    for rule in RULES.values():
        assert rule.text, rule.name
        assert rule.source, rule.name
        assert rule.name.count(".") == 1, rule.name


def test_a_call_has_no_two_checks_in_one_place_unless_they_exclude_each_other() -> None:
    """region.* at 7 to 9 are three conditions of one check in uapi.md, create.* at 2 and 3 are about one word, so are
    the two of any ioctl at 2 and at 3; what begins with split. is about conversions to shared, and the rest of 9 and
    10 about those to private; attributes2.owner is a check of our own."""
    places = defaultdict(list)
    for rule in RULES.values():
        places[rule.call, rule.order].append(rule.name)
    shared = {place: names for place, names in places.items() if len(names) > 1}
    assert set(shared) == {
        ("any", 2),
        ("any", 3),
        ("KVM_SET_USER_MEMORY_REGION2", 7),
        ("KVM_SET_USER_MEMORY_REGION2", 9),
        ("KVM_CREATE_GUEST_MEMFD", 2),
        ("KVM_CREATE_GUEST_MEMFD", 3),
        ("KVM_SET_MEMORY_ATTRIBUTES2", 9),
        ("KVM_SET_MEMORY_ATTRIBUTES2", 10),
        ("KVM_SET_MEMORY_ATTRIBUTES2", 4),
        ("fallocate", 8),
        ("KVM_PRE_FAULT_MEMORY", 6),
    }
