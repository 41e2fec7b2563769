"""Plain values from and as TOML, and the changes to them that `--set` asks for."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castune.config.data import plain_source
from castune.errors import CastuneError


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """The plain values of a TOML file.

    Args:
        path: the file.
        kind: what it is, for messages.

    Raises:
        CastuneError: no such file, or malformed TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CastuneError(f"{path}: no such {kind}") from None
    except OSError as error:
        raise CastuneError(f"{path}: cannot be read as a {kind}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CastuneError(f"{path}: malformed TOML: {error}") from None
    except RecursionError:
        raise CastuneError(f"{path}: malformed TOML: nested too deeply") from None


def to_toml(values: Mapping[str, Any], path: str = "") -> str:
    """TOML text of plain values and nested tables; absent values (None) are left out.

    `path` is the table that `values` are, with a dot at its end.
    """
    values = {_quoted(key): value for key, value in values.items()}
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping) and value is not None}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    text = "".join(f"{key} = {_value(value)}\n" for key, value in plain.items())
    for name, table in tables.items():
        content = to_toml(table, f"{path}{name}.")
        # A table that holds nothing but tables is named by theirs.
        text += content if content.startswith("\n[") else f"\n[{path}{name}]\n{content}"
    return text


def _value(value: object) -> str:
    # JSON's strings, numbers, booleans and arrays are TOML's too, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what `key.sub=value` names in the values of a recipe (values in TOML; bare words are strings).

    Raises:
        CastuneError: no key, no value, or a key below something that is no table.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise CastuneError(f"--set {override}: expected key=value, for example tune.learning_rate=2e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    *path, last = key.strip().split(".")
    table = values
    for part in path:
        if not isinstance(table.setdefault(part, {}), dict):
            table[part] = plain_source(table[part])
        table = table[part]
        if not isinstance(table, dict):
            raise CastuneError(f"--set {override}: {part} is not a table")
    table[last] = value
