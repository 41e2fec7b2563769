"""Replies of servers already had, on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from castune.artifacts.files import write_text
from castune.errors import CastuneError
from castune.evaluation.responses import Completion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplyCache:
    """Replies already had, a file each, named by what was asked."""

    folder: Path | None

    def get(self, key: object) -> Completion | None:
        """The reply to `key` (plain JSON); None where there is none or its file is damaged."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            record = json.loads(path.read_bytes())
            text, finished, tokens = record["text"], record["finished"], record["tokens"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            text = finished = tokens = None
        if not (isinstance(text, str) and isinstance(finished, bool) and (tokens is None or type(tokens) is int)):
            logger.warning("%s: damaged; the model is asked again", path)
            return None
        return Completion(text, finished, tokens)

    def put(self, key: object, completion: Completion) -> None:
        """Keep the reply to `key`; whoever writes last is kept."""
        if self.folder is not None:
            try:
                write_text(self._path(key), json.dumps(asdict(completion)) + "\n", private=True)
            except OSError as error:
                raise CastuneError(f"{self.folder}: cannot keep replies here: {error}") from None

    def _path(self, key: object) -> Path:
        assert self.folder is not None
        return self.folder / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest() + ".json")
