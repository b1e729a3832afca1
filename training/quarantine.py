"""Rows and the place they came from; bad rows put aside with a reason, or stopping the run."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RAW_LIMIT_CHARS = 2000


@dataclass(frozen=True)
class Row:
    """One row and its place, `reviews.jsonl:12`: a line of the file, or a row number for Parquet and the hub."""

    source: str
    values: dict[str, Any]


@dataclass
class Quarantine:
    """Rows left out, with reasons. `policy` says what a bad row does: stop the run, or be put aside."""

    policy: Literal["stop", "quarantine"]
    entries: list[dict[str, str]] = field(default_factory=list)
    outside: int = 0

    def refuse(self, source: str, reason: str, raw: Any = "") -> None:
        """Raise ValueError `source: reason` under policy stop, put the row aside otherwise."""
        if self.policy == "stop":
            raise ValueError(f"{source}: {reason}")
        self.put(source, reason, raw)

    def put(self, source: str, reason: str, raw: Any) -> None:
        """Put a row aside whatever the policy."""
        text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
        self.entries.append({"source": source, "reason": reason, "raw": text[:RAW_LIMIT_CHARS]})

    def write(self, path: Path) -> Path | None:
        """Write the rows put aside as JSONL (source, reason, raw), whole or not at all; None if there are none.

        Every rank of a job writes the same file, so it is renamed into place. A file of an earlier run is removed."""
        if not self.entries:
            path.unlink(missing_ok=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        lines = (json.dumps(entry, ensure_ascii=False) for entry in self.entries)
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
        draft.replace(path)
        return path
