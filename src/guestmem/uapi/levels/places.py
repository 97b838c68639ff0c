"""Where the keys of a level file stand. tomllib says it for syntax only, so keys are found by their own line."""

from __future__ import annotations

import re

_TABLE = re.compile(r"\s*\[\s*([\w.\-]+)\s*\]")
_KEY = re.compile(r"""\s*["']?([\w.\-]+)["']?\s*=""")


class Places:
    """`file:line` of each key of a file that tomllib could read; of a key inside an inline table, its table's."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.last_line = text.count("\n") + (not text.endswith("\n"))
        self._at: dict[tuple[str, ...], str] = {}
        table: tuple[str, ...] = ()
        for number, line in enumerate(text.splitlines(), 1):
            if found := _TABLE.match(line):
                table = tuple(found.group(1).split("."))
                self._at.setdefault(table, self.at_line(number))
            elif found := _KEY.match(line):
                self._at.setdefault((*table, *found.group(1).split(".")), self.at_line(number))

    def at_line(self, number: int) -> str:
        return f"{self.file}:{number}"

    def of(self, path: tuple[str, ...]) -> str:
        """The place of a key, or of the nearest table around it that has one; the file if none has."""
        for length in range(len(path), 0, -1):
            if (at := self._at.get(path[:length])) is not None:
                return at
        return self.file

    def take(self, path: tuple[str, ...], other: Places) -> None:
        """From now on the key stands where the other file has it."""
        self._at[path] = other.of(path)
        self.file = other.file

    def copy(self) -> Places:
        copy = Places("", self.file)
        copy._at = dict(self._at)
        return copy
