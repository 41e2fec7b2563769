"""What a training is made on, as tokens, and what must be there for it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from castune.artifacts.records import DataRecord
from castune.config import TuneConfig
from castune.core.quantisation import require_bitsandbytes
from castune.core.shards import Shard
from castune.data.chat import ChatFormat
from castune.data.example import Example, require_replies
from castune.data.record import data_record
from castune.data.rows import Row
from castune.errors import CastuneError, DataError
from castune.tuning.preferences import Pair, preference_pairs, require_trl
from castune.tuning.surgery import require_method
from castune.tuning.trackers import require_trackers


@dataclass(frozen=True)
class TrainingRows:
    """What is trained on, as tokens.

    Attributes:
        rows: the alignment examples; of pairs the chosen replies.
        pairs: the alignment examples of DPO.
        utility_rows: the utility examples, where they take part.
        replayed: those of them that are mixed into the training.
    """

    rows: list[Row]
    pairs: list[Pair]
    utility_rows: list[Row]
    replayed: list[Row]

    @classmethod
    def of(
        cls, config: TuneConfig, chat: ChatFormat, data: Sequence[Example], utility: Sequence[Example] | None
    ) -> TrainingRows:
        """Tokens of the examples, checked for what the training needs."""
        if not data:
            raise DataError("no training examples")
        require_extras(config)
        pairs = preference_pairs(chat, data) if config.method == "dpo" else []
        require_replies(data, "training data", "prompt, completion")
        rows = [chat.loss_row(example) for example in data]
        if not config.needs_utility:
            return cls(rows, pairs, [], [])
        require_utility(config, utility)
        utility_rows = [chat.loss_row(example) for example in utility or ()]
        return cls(rows, pairs, utility_rows, replayed_rows(utility_rows, len(rows), config.replay, config.seed))

    def data_record(
        self,
        data: Sequence[Example],
        source: str | None,
        *,
        balance: str | None,
        shares: Mapping[str, float] | None,
        left_out: Sequence[str],
    ) -> DataRecord:
        """What is recorded of the alignment examples."""
        record = data_record("training", source, data, self.rows)
        record |= {"balance": balance} if balance else {}
        record |= {"shares": dict(shares)} if shares else {}
        record |= {"left_out": list(left_out)} if left_out else {}
        return record

    def utility_record(self, utility: Sequence[Example] | None, source: str | None) -> DataRecord | None:
        """What is recorded of the utility examples; None where they take no part."""
        if not self.utility_rows or not utility:
            return None
        return {**data_record("utility", source, utility, self.utility_rows), "replayed": len(self.replayed)}


def replayed_rows(utility_rows: Sequence[Row], n_aligned: int, share: float, seed: int) -> list[Row]:
    """Utility rows to mix with `n_aligned` others, so that they are `share` of all; none twice before all came once."""
    n = round(share / (1 - share) * n_aligned)
    generator = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < n:
        rows += generator.sample(utility_rows, min(len(utility_rows), n - len(rows)))
    return rows


def require_extras(config: TuneConfig) -> None:
    """Refuse a training that cannot run here: before a model is loaded, not hours later.

    Raises:
        CastuneError: the message says what to install or to leave out.
    """
    if config.reselect_steps is not None and Shard.n_processes() > 1:
        raise CastuneError(
            f"reselect_steps = {config.reselect_steps} works in one process, and there are {Shard.n_processes()}: "
            "leave out torchrun, or reselect_steps"
        )
    require_method(config.surgery)
    require_trackers(config.report_to)
    if config.method == "dpo":
        require_trl()
    if config.quantization != "none":
        require_bitsandbytes()


def require_utility(config: TuneConfig, utility: Sequence[Any] | None) -> None:
    """Refuse a training that compares with utility data, mixes it in or leaves its activations alone, and has none.

    Raises:
        CastuneError: the message names the setting that needs it.
    """
    if utility or not config.needs_utility:
        return
    if config.surgery != "none":
        what, why = f'surgery = "{config.surgery}"', "whose gradient it compares with"
    elif config.replay:
        what, why = f"replay = {config.replay:g}", "which it mixes in"
    else:
        what, why = f"null_space = {config.null_space:g}", "whose activations it leaves alone"
    raise CastuneError(f"{what} needs utility data, {why}; give utility examples (castune tune: --utility SOURCE)")
