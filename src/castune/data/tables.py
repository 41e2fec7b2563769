"""Rows of files: .jsonl, .json, .csv, .tsv and .parquet of the same rows are the same rows.

Cells of .csv and .tsv are the text that stands there: `NA`, `None` and `007` are no missing values and no numbers.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from castune.errors import DataError

Row = dict[str, Any]
FILE_FORMATS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}

# Columns whose cells are lists, which a table of text holds as JSON or as Python writes them; and those that may hold
# a text or a list of turns.
_LISTS = ("choices", "messages", "history")
_TEXTS_OR_TURNS = ("prompt", "completion", "chosen", "rejected")
# csv's own limit of a cell, 128 KiB, is less than some prompts have.
_LARGEST_CELL = 1 << 30


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file with where each stands, for error messages.

    Raises:
        DataError: no such file, of another kind, or malformed; file and line are named.
    """
    if not is_file(path):
        raise DataError(f"{path}: no such file")
    file_format = FILE_FORMATS.get(path.suffix)
    if file_format is None:
        raise DataError(f"{path}: unknown file type; accepted: {', '.join(FILE_FORMATS)}")
    return {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}[file_format](path)


def is_file(path: Path) -> bool:
    """Whether it is a file; False for what no file system takes as a name."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_table_of_text(path: Path) -> bool:
    """Whether cells of the file are text, in which an empty one cannot be told from a missing one."""
    return FILE_FORMATS.get(path.suffix) == "csv"


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    # Iterating over the file splits at newlines only; str.splitlines would also split inside strings at U+2028.
    with _opened(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _row(_parsed(line.rstrip("\r\n"), where), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """A list of rows; or rows line by line, as some tools name such files too."""
    with _opened(path) as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines):
        yield from _read_jsonl(path)
        return
    found = _parsed(text, str(path))
    if isinstance(found, dict) and len(found) == 1 and not found.keys() & {*_LISTS, *_TEXTS_OR_TURNS}:
        [rows] = found.values()  # {"data": [...]}
        found = rows if isinstance(rows, list) else found
    if not isinstance(found, list):
        found = [found]
    for number, row in enumerate(found, start=1):
        where = f"{path} row {number}"
        yield where, _row(row, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: malformed JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list in lists
        raise DataError(f"{where}: malformed JSON: {one_line(error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object; Python would keep the last of two values with one name, without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_LARGEST_CELL)
    with _opened(path, newline="") as file:
        table = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        line = 1
        try:
            columns = next(table, [])
            if twice := next((name for name in columns if columns.count(name) > 1), None):
                raise DataError(f"{path} line 1: column {twice!r} is there twice")
            while True:
                line = table.line_num + 1
                cells = next(table, None)
                if cells is None:
                    return
                if not cells:
                    continue
                where = f"{path} line {line}"
                if len(cells) != len(columns):
                    raise DataError(
                        f"{where}: {len(cells)} cells for {len(columns)} columns; a cell with the separator in it "
                        'needs quotes (")'
                    )
                yield where, _with_lists(dict(zip(columns, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{path} line {line}: malformed table: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _with_lists(row: Mapping[str, str]) -> Row:
    """The row with the lists that its cells write out; of a question the answer, which is a number."""
    found: Row = dict(row)
    for name in _LISTS:
        text = str(row.get(name, "")).strip()
        if text[:1] in ("[", "{"):
            found[name] = _list(text)
    for name in _TEXTS_OR_TURNS:
        turns = _list(row[name]) if row.get(name, "").lstrip()[:1] == "[" else None
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
            found[name] = turns
    answer = row.get("answer", "")
    if row.get("choices") and answer.isascii() and answer.isdecimal():
        found["answer"] = int(answer)
    return found


def _list(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if twice := next((name for name in columns if columns.count(name) > 1), None):
                raise DataError(f"{path}: column {twice!r} is there twice")
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # also a time beyond the calendar
        raise DataError(f"{path}: not readable as parquet: {one_line(error)}") from error


def _opened(path: Path, newline: str | None = None) -> TextIO:
    # Editors of some systems begin a file with a byte order mark.
    try:
        return path.open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def one_line(error: Exception) -> str:
    """The first line of an error's message, else what kind of error it is."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
