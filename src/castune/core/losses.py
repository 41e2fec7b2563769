"""The one loss of castune, for diagnosis and training: NLL of the reply tokens.

`NLL of an example = mean over its reply tokens (end-of-turn included)`, `loss = mean over examples`. Only the
scored positions pass the output head: over all positions it would cost more than a small model's transformer.

Shape letters: B batch row, S sequence position, T scored token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from castune.data.rows import Row
from castune.errors import CastuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

# Scored positions of a row are padded to this multiple. For a few rows not a multiple of 8, CPU matrix products sum the
# vocabulary one after the other: the gradient through the output head then loses two of float32's seven digits.
SCORED_MULTIPLE = 8
# Rows of the output head that `float32_head` converts at a time.
_HEAD_ROWS = 8192


@dataclass(frozen=True)
class RowBatch:
    """Rows padded on the right; `scored_BT` masks the padding of positions and tokens.

    Plain rows need no attention mask: with causal attention the padding comes after everything that is scored.
    Rows that are trees bring `places_BS` (position ids) and `visible_BSS`.
    """

    ids_BS: Tensor
    positions_BT: Tensor
    tokens_BT: Tensor
    scored_BT: Tensor
    places_BS: Tensor | None = None
    visible_BSS: Tensor | None = None
    float32_logits: bool = False

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> RowBatch:
        """Pad rows to their longest. Padding ids are 0; they are never attended to by a scored position."""
        ids_BS, positions_BT, tokens_BT, scored_BT = (
            _padded([row.ids for row in rows], 0, device),
            _padded([row.positions for row in rows], 0, device, multiple=SCORED_MULTIPLE),
            _padded([row.tokens for row in rows], 0, device, multiple=SCORED_MULTIPLE),
            _padded([[True] * len(row.tokens) for row in rows], False, device, multiple=SCORED_MULTIPLE),
        )
        float32_logits = any(row.float32_logits for row in rows)
        if not any(row.branches for row in rows):
            return cls(ids_BS, positions_BT, tokens_BT, scored_BT, float32_logits=float32_logits)
        places_BS = _padded([row.places for row in rows], 0, device)
        # Padding is a branch of its own, which nothing else sees.
        n_branches = max(len(row.parents) for row in rows) + 1
        sees_BGG = torch.eye(n_branches, dtype=torch.bool).repeat(len(rows), 1, 1)
        for row, sees_GG in zip(rows, sees_BGG, strict=True):
            if row.branches:
                sees_GG[: len(row.parents), : len(row.parents)] = torch.tensor(row.sees())
        branches_BS = _padded([row.branches or [0] * len(row.ids) for row in rows], n_branches - 1, device)
        row_B = torch.arange(len(rows), device=branches_BS.device)[:, None, None]
        visible_BSS = sees_BGG.to(branches_BS.device)[row_B, branches_BS[:, :, None], branches_BS[:, None, :]].tril()
        return cls(ids_BS, positions_BT, tokens_BT, scored_BT, places_BS, visible_BSS, float32_logits)

    def rows(self, index: Tensor) -> RowBatch:
        """The rows at `index` `[B']`, which may name a row several times."""
        places_BS = None if self.places_BS is None else self.places_BS[index]
        visible_BSS = None if self.visible_BSS is None else self.visible_BSS[index]
        return RowBatch(
            self.ids_BS[index],
            self.positions_BT[index],
            self.tokens_BT[index],
            self.scored_BT[index],
            places_BS,
            visible_BSS,
            self.float32_logits,
        )

    @property
    def real_BS(self) -> Tensor:
        """True where a position holds a token that some scored position can see."""
        last_B = torch.where(self.scored_BT, self.positions_BT, -1).amax(1)
        return torch.arange(self.ids_BS.shape[1], device=self.ids_BS.device) <= last_B[:, None]


def _padded(values: Sequence[Sequence[int]], filling: int, device: torch.device | str, *, multiple: int = 1) -> Tensor:
    longest = -(-max(map(len, values)) // multiple) * multiple
    return torch.tensor([[*row, *[filling] * (longest - len(row))] for row in values], device=device)


def scored_logits(model: nn.Module, batch: RowBatch, cache: Any = None) -> Tensor:
    """Logits that predict every scored token, `[B, T, V]` float32. Differentiable.

    Args:
        model: the model.
        batch: the rows.
        cache: an empty cache that takes the keys and values.
    """
    options: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    if batch.visible_BSS is not None:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        mask = torch.zeros(batch.visible_BSS.shape, dtype=dtype, device=batch.ids_BS.device)
        options["attention_mask"] = mask.masked_fill_(~batch.visible_BSS, torch.finfo(dtype).min)[:, None]
        options["position_ids"] = batch.places_BS
    with float32_head(model) if batch.float32_logits else nullcontext():
        output: Any = model(input_ids=batch.ids_BS, logits_to_keep=batch.positions_BT, **options)
    logits_BTV: Tensor = output.logits.float()
    return logits_BTV


@contextmanager
def float32_head(model: PreTrainedModel) -> Iterator[None]:
    """Let the output head of a 16-bit model give float32 logits inside the `with` block.

    The 16-bit weights and inputs stay what they are; only sums and logits are no longer rounded. Heads without plain
    weights in memory (quantized or offloaded ones) are left as they are.
    """

    def widened(head: Any, args: tuple[Tensor, ...], rounded: Tensor) -> Tensor:
        weight_VD: Tensor = head.weight
        is_half = rounded.dtype in (torch.bfloat16, torch.float16) and weight_VD.dtype == rounded.dtype
        if not is_half or weight_VD.is_meta:
            return rounded
        hidden = args[0].float()
        # Part by part: a float32 copy of a large vocabulary's head would take gigabytes.
        logits = torch.cat([hidden @ part_VD.float().T for part_VD in weight_VD.split(_HEAD_ROWS)], dim=-1)
        return logits if head.bias is None else logits + head.bias.float()

    head = model.get_output_embeddings()
    handle = head.register_forward_hook(widened) if isinstance(head, nn.Linear) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def token_log_probs(model: nn.Module, batch: RowBatch) -> Tensor:
    """Log-probability of every scored token, `[B, T]` float32; 0 where `scored_BT` is False. Differentiable."""
    logits_BTV = scored_logits(model, batch)
    chosen_BT = logits_BTV.gather(-1, batch.tokens_BT[..., None])[..., 0]
    return (chosen_BT - logits_BTV.logsumexp(-1)) * batch.scored_BT


def reply_nll(model: nn.Module, batch: RowBatch, *, fused: bool = False) -> Tensor:
    """Mean NLL of the scored tokens of each row, `[B]` float32; its mean over rows is the loss.

    Args:
        model: the model.
        batch: the rows.
        fused: by one kernel, whose backward pass makes one tensor of the size of the logits instead of three. For
            training; in float32 its gradients are rounded enough to move O(h) by 3e-5.
    """
    if not fused:
        return -token_log_probs(model, batch).sum(1) / batch.scored_BT.sum(1)
    logits_BTV = scored_logits(model, batch)
    nll_BT = functional.cross_entropy(logits_BTV.flatten(0, 1), batch.tokens_BT.flatten(), reduction="none")
    return (nll_BT.view_as(batch.tokens_BT) * batch.scored_BT).sum(1) / batch.scored_BT.sum(1)


def run_batches(batches: Iterable[list[int]], run: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
    """Each batch with what `run` returns for it; batches for which memory does not suffice are halved.

    Raises:
        CastuneError: a single example does not fit.
    """
    todo = list(batches)
    while todo:
        batch = todo.pop(0)
        try:
            result = run(batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                raise CastuneError(
                    "out of memory on a single example; lower max_length or use a smaller dtype"
                ) from None
            middle = (len(batch) + 1) // 2
            todo[:0] = [batch[:middle], batch[middle:]]
            continue
        yield batch, result


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped so that rows x longest row stays within `batch_tokens`, longest rows first.

    A row longer than `batch_tokens` is a batch of its own. Longest first: what does not fit in memory fails at
    once, and similar lengths waste no padding. Ties keep the input order, so the grouping is deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def room_with_gradients(row: Row) -> int:
    """What a row counts for in a batch whose outcome is differentiated: its tokens, or twice those that are scored.

    Scored tokens have logits and their gradients, which a large vocabulary makes larger than all activations together.
    Without a limit of their own the largest batch of a thousand examples has half as many again as that of a hundred.
    """
    return max(len(row.ids), 2 * len(row.tokens))


def loss_batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """`batches_by_length` of rows whose loss is differentiated (`room_with_gradients`)."""
    return batches_by_length([room_with_gradients(row) for row in rows], batch_tokens)
