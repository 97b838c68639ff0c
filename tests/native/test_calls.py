"""ioctls of one thread: arguments, results, descriptors; and files that are none of ours."""

from __future__ import annotations

import pytest

from tests.native.conftest import Run
from tests.native.fake_server import FakeServer


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "efault",
        "upcalls",
        "full_table",
        "lowest_number",
        "close_is_release",
        "hidden",
        "threads",
        "none_of_ours",
    ],
)
def test_calls(run: Run, name: str) -> None:
    run("calls", name)


def test_no_server_is_no_device(run: Run, server: FakeServer) -> None:
    server.close()
    run("calls", "gone")


@pytest.mark.parametrize("name", ["identity", "transfer", "change", "requests", "copies"])
def test_files(run: Run, name: str) -> None:
    run("files", name)
