"""Training in the null space of the utility activations: updates that leave alone what utility inputs come to.

With the inputs x of a trained projection over all tokens of D_util, K = sum x x^T is their second moment, U the fewest
leading eigenvectors of K that hold a share s of its trace, and P = I - U U^T. LoRA's A acts as A P, so that for the
update dW = scaling B A P

    sum over D_util of ||dW x||^2  <=  ||dW||_2^2 (1 - s) trace K.

The share of K's trace is GPM's criterion (Saha et al. 2021), the uncentred second moment that of Adam-NSCL (Wang
et al. 2021), and the update that is projected, instead of its gradient, that of AlphaEdit (Fang et al. 2025):
here it holds under every optimiser, weight decay and FSDP2. The saved adapter holds A P and is an ordinary one.

Shape letters: B batch row, S sequence position, D inputs of a projection, R LoRA rank, U direction left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from castune.artifacts.records import NullSpaceRecord
from castune.core.ablation import record_sites
from castune.core.losses import RowBatch
from castune.core.modes import evaluation_mode
from castune.core.shards import Shard
from castune.core.units import Site
from castune.data.rows import Row
from castune.errors import CastuneError, TrainingError
from castune.tuning.adapter_files import ADAPTER_NAME, PREFIX, adapter_weights
from castune.tuning.row_lora import MaskedLinear, lora_layers
from castune.tuning.targets import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ProjectedLinear(MaskedLinear):
    """A LoRA A, `[R, D]`, whose rows have no component along some directions in forward and gradient."""

    directions_DU: Tensor

    def applied(self, weight: Tensor) -> Tensor:
        """What a weight of this shape acts as: masked, then projected."""
        directions_DU = self.directions_DU.to(weight.device)
        # Products in 16 bits, as autocast would have them, would leave a part of every direction.
        with torch.autocast(weight.device.type, enabled=False):
            masked = super().applied(weight).float()
            return (masked - (masked @ directions_DU) @ directions_DU.T).to(weight.dtype)


@dataclass(frozen=True)
class NullSpace:
    """What a training leaves alone.

    Attributes:
        directions: orthonormal columns `[D, U]` that A is kept free of, of every adapted projection by module path.
        record: for `TuneResult.null_space`.
    """

    directions: Mapping[str, Tensor]
    record: NullSpaceRecord

    @classmethod
    def of(
        cls, model: PreTrainedModel, wanted: Mapping[str, Target], rows: Sequence[Row], share: float, *, batch_size: int
    ) -> NullSpace:
        """The null space of the activations of D_util, the same on every process.

        It takes one forward over the rows. K is held on the model's device in float32, D x D numbers for every tensor
        that projections read (of an 8B model 64 MB a layer for the query projection, 800 MB for the down projection).
        Eigenvectors are computed in float64, of one K after the other. Of a projection whose columns units own, D are
        the chosen columns only, and directions are zero elsewhere.

        Args:
            model: the base model, without adapters; it is left as it was.
            wanted: the projections, by module path, and what of each is trained.
            rows: of the utility examples.
            share: of the trace of K that the directions hold, between 0 and 1.
            batch_size: rows of a forward.

        Raises:
            CastuneError: a share that leaves no direction to train.
            TrainingError: activations that are not finite.
        """
        moments, holders = second_moments(model, wanted, rows, batch_size=batch_size)
        found = {}
        for path in list(moments):
            moment = moments.pop(path)
            if not torch.isfinite(moment).all():
                raise TrainingError(f"the activations of D_util at {path} are not finite; try dtype float32")
            found[path] = leading_eigenvectors(moment, share).float()
        found = _of_first_process(found, next(model.parameters()).device)
        for path, leading in found.items():
            if leading.shape[0] == leading.shape[1]:
                raise CastuneError(
                    f"null_space = {share:g}: the activations of D_util at {path} have this share in no fewer than all "
                    f"{len(leading)} directions, which leaves none to train; take a smaller share"
                )
        counts = {path: (found[holder].shape[1], found[holder].shape[0]) for path, holder in holders.items()}
        tokens = sum(len(row.ids) for row in rows)
        directions = {path: _in_columns(found[holders[path]], target) for path, target in wanted.items()}
        return cls(directions, {"share": share, "tokens": tokens, "directions": counts})

    def keep(self, peft_model: nn.Module) -> None:
        """Let A of every adapted projection act without its directions, and be saved so (`applied_weights`)."""
        for path, module in lora_layers(peft_model):
            a = module.lora_A[ADAPTER_NAME]
            if not isinstance(a, MaskedLinear):  # of units that own rows all columns are chosen
                a.register_buffer("unit_mask", torch.ones_like(a.weight[:1]), persistent=False)
            a.__class__ = ProjectedLinear
            a.register_buffer("directions_DU", self.directions[path].to(a.weight.device), persistent=False)


@torch.no_grad()
def second_moments(
    model: PreTrainedModel, wanted: Mapping[str, Target], rows: Sequence[Row], *, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """K of the inputs of some projections over all tokens of the rows, `[D, D]` float32, and which of them share one.

    Returns:
        K by module path, and for every path that whose K is its own too.
    """
    sites = {path: Site(path, is_output=False, spans=(), width=0) for path in wanted}
    device = next(model.parameters()).device
    inputs: dict[Site, Tensor] = {}
    moments: dict[str, Tensor] = {}
    holders: dict[str, str] = {}
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    with evaluation_mode(model), record_sites(model, sites.values(), inputs):
        for start in range(0, len(rows), batch_size):
            batch = RowBatch.of([rows[i] for i in order[start : start + batch_size]], device)
            model(input_ids=batch.ids_BS, use_cache=False, logits_to_keep=1)
            # Which projections read the same tensor is a matter of the model, and the same in every forward.
            holders = holders or _holders({path: inputs[site] for path, site in sites.items()}, wanted)
            for path in dict.fromkeys(holders.values()):
                tokens_D = inputs[sites[path]].reshape(*batch.real_BS.shape, -1)[batch.real_BS].float()
                if wanted[path].axis == 1:
                    tokens_D = tokens_D[:, wanted[path].mask.to(device)]
                moment = tokens_D.T @ tokens_D
                moments[path] = moments[path].add_(moment) if path in moments else moment
    return moments, holders


def leading_eigenvectors(moment_DD: Tensor, share: float) -> Tensor:
    """The fewest leading eigenvectors of a second moment that hold a share of its trace, `[D, U]` float64.

    None of a moment that is zero.
    """
    # Other accelerators than CUDA's have no float64.
    moment_DD = moment_DD if moment_DD.device.type == "cuda" else moment_DD.cpu()
    values_D, vectors_DD = torch.linalg.eigh(moment_DD.double())
    held_D = values_D.clamp_min(0).flip(0).cumsum(0)
    n = int((held_D < share * held_D[-1]).sum()) + 1 if held_D[-1] > 0 else 0
    leading_DU: Tensor = vectors_DD.flip(1)[:, :n]
    return leading_DU


def applied_weights(peft_model: nn.Module) -> dict[str, Tensor]:
    """`adapter_weights` as forward applies them: what an ordinary adapter has to hold."""
    weights = adapter_weights(peft_model)
    for path, module in lora_layers(peft_model):
        a = module.lora_A[ADAPTER_NAME]
        if isinstance(a, ProjectedLinear):
            name = f"{PREFIX}{path}.lora_A.{ADAPTER_NAME}.weight"
            weights[name] = a.applied(weights[name])
    return weights


def _holders(inputs: Mapping[str, Tensor], wanted: Mapping[str, Target]) -> dict[str, str]:
    """For every projection the first one that reads the same tensor; of chosen columns everyone reads its own."""
    first: dict[object, str] = {}
    return {
        path: first.setdefault(path if wanted[path].axis == 1 else (z.data_ptr(), z.shape), path)
        for path, z in inputs.items()
    }


def _in_columns(leading: Tensor, target: Target) -> Tensor:
    """Directions among the chosen columns as directions of the projection's whole input."""
    if target.axis == 0:
        return leading
    whole = leading.new_zeros(len(target.mask), leading.shape[1])
    whole[target.mask.to(leading.device)] = leading
    return whole


def _of_first_process(found: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What the first process found: others may have rounded differently."""
    if Shard.n_processes() == 1:
        return found
    numbers = torch.tensor([leading.shape[1] for leading in found.values()], device=device)
    distributed.broadcast(numbers, 0)
    agreed = {}
    for (path, leading), n in zip(found.items(), numbers.tolist(), strict=True):
        sent = torch.zeros(len(leading), n, device=device)
        if leading.shape[1] == n:
            sent.copy_(leading)
        distributed.broadcast(sent, 0)
        agreed[path] = sent
    return agreed
