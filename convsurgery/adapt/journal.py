"""The rows of a scan that is under way, in a file that a killed process leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convsurgery.errors import StorageError
from convsurgery.files import member, output_folder, read_text, write_text
from convsurgery.plain import parse_json

__all__ = ["ROWS", "Journal"]

#: finished rows of a scan that is under way, in its folder
ROWS = "rows.jsonl"


class Journal:
    """Finished rows of a scan that is under way, a line each, behind a line that says of what scan.

    Args:
        directory: made when absent.
        header: what the scan is of.
        resume: whether rows may be there already.
        overwrite: whether rows that are there go.

    Raises:
        StorageError: for rows that are there without ``resume``, rows of another scan, a file that is none of ours,
            and a folder that cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike[str], header: Mapping[str, Any], *, resume: bool, overwrite: bool = False
    ) -> None:
        self.path = Path(directory).expanduser() / ROWS
        self.rows: list[dict[str, Any]] = []
        try:
            output_folder(self.path.parent)
            found = [] if overwrite else self._found()
            if found and not resume:
                raise StorageError(
                    f"{self.path} holds rows of an earlier scan: resume=True (--resume) goes on with it, "
                    "overwrite=True (--overwrite) replaces it, another folder begins anew"
                )
            if found:
                self._compare(found[0], header)
                self.rows = found[1:]
            write_text(self.path, "".join(map(_line, (dict(header), *self.rows))), named=False)
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error}") from error

    def _found(self) -> list[dict[str, Any]]:
        """What an earlier scan left: its header and rows; nothing where it finished no row."""
        if not self.path.exists():
            return []
        lines = read_text(member(self.path.parent, ROWS)).split("\n")
        # Behind the last line break stands what was cut off.
        found = []
        for number, line in enumerate(lines[:-1], start=1):
            item = parse_json(line, f"{self.path}, line {number}")
            if not isinstance(item, dict):
                raise StorageError(f"{self.path}, line {number}: not what a scan writes; take another folder")
            found.append(item)
        return found if len(found) > 1 else []

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        different = []
        for name in dict.fromkeys([*wanted, *found]):
            old, new = found.get(name), wanted.get(name)
            if old != new:
                told = name in ("weights", "images") or old is None or new is None
                different.append(f"other {name}" if told else f"{name} {_brief(old)}, now {_brief(new)}")
        if different:
            raise StorageError(
                f"{self.path} is of another scan: {'; '.join(different)}. Give what was given then, or another folder"
            )

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one finished row."""
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(_line(row))
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error}") from error


def _line(item: Mapping[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n"


def _brief(value: Any) -> str:
    return " | ".join(map(str, value)) if isinstance(value, list) else repr(value)
