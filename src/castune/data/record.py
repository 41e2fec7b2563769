"""What an artifact notes of the data it was made from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from castune.artifacts.records import DataRecord
from castune.data.example import Example, content_hash
from castune.data.rows import Row

logger = logging.getLogger(__name__)


def data_record(what: str, source: str | None, examples: Sequence[Example], rows: Sequence[Row]) -> DataRecord:
    """Source, size, digest, and how many prompts and replies were cut to the length limit; a warning tells of these.

    Args:
        what: what the data are for, for the warning.
        source: the data source by name; None where the examples were given as they are.
        examples: the examples.
        rows: their tokens.
    """
    cut, replies_cut = sum(row.cut for row in rows), sum(row.reply_cut for row in rows)
    if replies_cut:
        logger.warning(
            "%s data: %d of %d replies are longer than max_length allows and lost their ends",
            what,
            replies_cut,
            len(rows),
        )
    return {
        "source": source,
        "n": len(examples),
        "hash": content_hash(examples),
        "cut": cut,
        "replies_cut": replies_cut,
    }
