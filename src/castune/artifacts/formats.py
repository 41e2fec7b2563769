"""How artifacts are written: JSON and Parquet with kind, schema version and digest, checked when they are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from castune.artifacts.files import replacing, write_text
from castune.errors import ArtifactError

if TYPE_CHECKING:
    import pyarrow as pa
    from pydantic import TypeAdapter


SCHEMA_VERSION = 1

# Key of a JSON artifact's digest of everything else in it.
DIGEST = "digest"
_IS_DIGEST = re.compile(r"[0-9a-f]{16}")

T = TypeVar("T")


def write_json(path: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Write a JSON artifact and the digest of its content, atomically.

    NaN and infinity are refused: they are no JSON and no result.
    """
    record = {"kind": kind, "schema_version": SCHEMA_VERSION, **content}
    record[DIGEST] = json_digest(record)
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def json_digest(record: object) -> str:
    """Digest of plain JSON, however it is laid out (first 16 hex digits of SHA-256)."""
    # As it is when it has been read again: keys are text, tuples are lists.
    plain = json.loads(json.dumps(record, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: str | Path, kind: str, made_by: str) -> dict[str, Any]:
    """Read a JSON artifact.

    Args:
        path: the file.
        kind: what it must be.
        made_by: the command that makes it, for the message when it is missing.

    Raises:
        ArtifactError: missing, damaged (also by a single changed digit), of another kind or schema version.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such {kind}; make it with: {made_by}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read as a {kind}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ArtifactError(f"{path}: damaged {kind}: {error}; remove it and run: {made_by}") from None
    check_schema(record, path, kind)
    check_digest(record, path, kind, made_by)
    found: dict[str, Any] = record
    return found


def check_digest(record: dict[str, Any], path: Path, kind: str, made_by: str) -> None:
    """Take the digest out of a record, and refuse one whose content is not what was written.

    Records from before there were digests, and those made by hand, have none. One whose key is damaged has one still.
    """
    noted = record.pop(DIGEST, None)
    if noted is None:
        if (misnamed := _misnamed_digest(record)) is not None:
            raise ArtifactError(
                f"{path}: damaged {kind}: the key of its digest reads {misnamed!r}; remove it and run: {made_by}"
            )
        return
    try:
        found = json_digest(record)
    except ValueError as error:  # NaN, which Python's reader takes
        raise ArtifactError(f"{path}: damaged {kind}: {error}; remove it and run: {made_by}") from None
    if noted != found:
        raise ArtifactError(
            f"{path}: damaged {kind}: its content has digest {found}, recorded: {noted}; remove it and run: {made_by}. "
            f"If it was edited on purpose, remove the key {DIGEST!r}"
        )


def _misnamed_digest(record: dict[str, Any]) -> str | None:
    """The key of what is the digest of everything else in a record; None without one."""
    for key, value in record.items():
        if isinstance(value, str) and _IS_DIGEST.fullmatch(value):
            with suppress(ValueError):  # NaN has no digest
                if json_digest({name: other for name, other in record.items() if name != key}) == value:
                    return key
    return None


def check_schema(record: object, path: Path, kind: str) -> None:
    """Refuse a record of another kind or schema version, naming both sides."""
    if not isinstance(record, dict) or record.get("kind") != kind:
        found = record.get("kind") if isinstance(record, dict) else type(record).__name__
        raise ArtifactError(f"{path}: expected a {kind}, found {found}")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema version {record.get('schema_version')}, this castune reads {SCHEMA_VERSION}; "
            "make it again with this version"
        )


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """Write a Parquet file atomically, with a checksum of every page."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_parquet(path: str | Path) -> pa.Table:
    """Read a Parquet file of castune's and compare the checksums of its pages.

    Raises:
        OSError, pyarrow.ArrowException: it is damaged.
    """
    import pyarrow.parquet as pq

    # One thread: which error is told must not depend on which came first.
    return pq.read_table(path, page_checksum_verification=True, use_threads=False)


def typed(path: Path, kind: str, cls: type[T], record: Mapping[str, Any]) -> T:
    """An artifact's dataclass from plain JSON: every field there, and of its type; others are left out.

    Raises:
        ArtifactError: the message names the field.
    """
    from pydantic import ValidationError

    fields = {name: record[name] for name in cls.__dataclass_fields__ if name in record}  # type: ignore[attr-defined]
    try:
        # Strict as JSON is: a list may be a tuple, a text is no number.
        found: T = _adapter(cls).validate_json(json.dumps(fields), strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise ArtifactError(f"{path}: damaged {kind}: {where}: {first['msg']}") from None
    return found


@lru_cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def parsed(path: Path, kind: str, build: Callable[[], T]) -> T:
    """`build()`, with missing or ill-typed fields reported as a damaged artifact."""
    try:
        return build()
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged {kind}: {error!r}") from None
