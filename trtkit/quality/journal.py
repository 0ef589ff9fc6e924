"""Finished work on disk, one JSON line each, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from trtkit.spec.atomic import output_errors
from trtkit.spec.codec import digest


class Journal:
    """An append-only map from a request's digest to its result. `path` None keeps it in memory only.

    A line cut short by a crash is ignored; the same key written twice keeps the last value.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        self._file: TextIO | None = None
        if path is not None and path.is_file():
            self._read(path)
        self.resumed = len(self._entries)

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("key"), str) and "value" in entry:
                self._entries[entry["key"]] = entry["value"]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def key(request: Mapping[str, Any]) -> str:
        """The digest of everything that decides a result."""
        return digest(request)

    def get(self, key: str) -> Any:  # noqa: ANN401 - whatever JSON was stored
        """The stored result, or None."""
        return self._entries.get(key)

    def put(self, key: str, value: object) -> None:
        """Keep a finished result; it is on disk when this returns."""
        self._entries[key] = value
        if self._path is None:
            return
        with output_errors(self._path):
            if self._file is None:
                self._file = self._open(self._path)
            self._file.write(json.dumps({"key": key, "value": value}, separators=(",", ":")) + "\n")
            self._file.flush()

    @staticmethod
    def _open(path: Path) -> TextIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        file = path.open("a", encoding="utf-8")
        if torn:
            file.write("\n")
        return file
