"""Gradient surgery: the alignment gradient, changed where it works against the utility gradient (Section 4.2, PCGrad).

`g` is the gradient of the alignment loss, `u` that of the utility loss, both as lists of tensors. Every method gives
`w_g g + w_u u` with weights that depend on the three inner products `g.g`, `g.u` and `u.u` alone. Those are sums over
tensors, so methods work on the whole gradient, tensor by tensor, or head by head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from castune.artifacts import HeadSelection
from castune.config import SurgeryGranularity, TuneConfig
from castune.core.losses import RowBatch, reply_nll
from castune.core.units import UnitLayout
from castune.data.rows import Row
from castune.errors import CastuneError, TrainingError
from castune.names import SurgeryMethod
from castune.tuning.adapter_files import ADAPTER_NAME
from castune.tuning.targets import selected_units, targets

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Weights = tuple[float, float]
"""What `g` and `u` are multiplied with."""
Group = list[tuple[Any, Any]]
"""Parameters, each with the index of what of it belongs to the group, a view."""

TORCHJD = "torchjd==0.18.0"
# Of each method in torchjd: its class and arguments, torchjd's extra, and the modules that the extra brings.
_TORCHJD_METHODS: dict[str, tuple[str, dict[str, float], str | None, tuple[str, ...]]] = {
    # Half way between the mean of both gradients (c = 0) and the end of CAGrad's convergence guarantee (c = 1).
    "cagrad": ("CAGradWeighting", {"c": 0.5}, "cagrad", ("cvxpy", "clarabel")),
    "upgrad": ("UPGradWeighting", {}, "quadprog_projector", ("qpsolvers", "quadprog")),
    "mgda": ("MGDAWeighting", {}, None, ()),
    "gradvac": ("GradVacWeighting", {}, None, ()),
    "alignedmtl": ("AlignedMTLWeighting", {}, None, ()),
    "imtlg": ("IMTLGWeighting", {}, None, ()),
}
_UNCHANGED: Weights = (1.0, 0.0)


@dataclass(frozen=True)
class Gramian:
    """Inner products of the alignment gradient g and the utility gradient u, summed in float64."""

    gg: float
    gu: float
    uu: float

    @classmethod
    def of(cls, g: Sequence[Tensor], u: Sequence[Tensor]) -> Gramian:
        """The inner products of two lists of tensors of equal shapes.

        Squares of float32 numbers neither overflow nor vanish in float64.
        """
        sums = []
        for one, other in zip(g, u, strict=True):
            g_64, u_64 = one.reshape(-1).double(), other.reshape(-1).double()
            sums.append(torch.stack([g_64 @ g_64, g_64 @ u_64, u_64 @ u_64]))
        return cls(*torch.stack(sums).sum(0).tolist())

    def __add__(self, other: Gramian) -> Gramian:
        return Gramian(self.gg + other.gg, self.gu + other.gu, self.uu + other.uu)

    @property
    def is_conflict(self) -> bool:
        """Whether a small step along -g would raise the utility loss: g.u < 0."""
        return self.gu < 0

    @property
    def cosine(self) -> float | None:
        """Cosine of g and u; None where one of them is zero and has no direction."""
        length = sqrt(self.gg) * sqrt(self.uu)
        return max(-1.0, min(1.0, self.gu / length)) if length > 0 else None


class Surgery:
    """One method of gradient surgery on one group of parameters.

    - `pcgrad`: g - min(0, g.u / |u|^2) u. D_util is the reference and is not trained on (Section 4.2). A g that does
      not conflict is returned as it is, bit for bit.
    - `pcgrad-symmetric`: both gradients projected on one another and added: PCGrad of two losses (Yu et al. 2020,
      Algorithm 1), which trains on D_util too.
    - the others: by torchjd, each on its own scale; they train on D_util too.

    Whatever the method: a zero u leaves g as it is.

    Args:
        method: the method. GradVac keeps a running mean of the cosine, so every group needs a `Surgery` of its own.

    Raises:
        CastuneError: torchjd, or what it needs for the method, is not installed.
    """

    def __init__(self, method: SurgeryMethod) -> None:
        self.method = method
        self._weighting = _torchjd_weighting(method) if method in _TORCHJD_METHODS else None

    def __call__(self, g: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
        """What g becomes, in its dtypes; computed in float64 and rounded once."""
        return combined(g, u, self.weights(Gramian.of(g, u)))

    @property
    def memory(self) -> list[list[float]] | None:
        """What the method keeps from step to step: GradVac's running mean of the cosine. None: nothing."""
        mean = getattr(self._weighting, "_phi_t", None)
        return None if mean is None else mean.tolist()

    def remember(self, memory: list[list[float]] | None) -> None:
        """Go on with the `memory` of an earlier training."""
        if memory is not None and self._weighting is not None:
            self._weighting._ensure_state(len(memory), torch.float64)
            self._weighting._phi_t.copy_(torch.tensor(memory, dtype=torch.float64))

    def weights(self, gram: Gramian) -> Weights:
        """Weights of g and u."""
        if gram.uu == 0:
            return _UNCHANGED
        if self._weighting is not None:
            return _weights_of(self._weighting, gram)
        if self.method == "pcgrad-symmetric":
            return (1 - gram.gu / gram.gg, 1 - gram.gu / gram.uu) if gram.is_conflict else (1.0, 1.0)
        return (1.0, -gram.gu / gram.uu) if gram.is_conflict else _UNCHANGED


def combined(g: Sequence[Tensor], u: Sequence[Tensor], weights: Weights) -> list[Tensor]:
    """`w_g g + w_u u`; the tensors of g themselves where that is g."""
    if weights == _UNCHANGED:
        return list(g)
    weight_g, weight_u = weights
    return [
        (weight_g * one.double() + weight_u * other.double()).to(one.dtype) for one, other in zip(g, u, strict=True)
    ]


def _weights_of(weighting: Any, gram: Gramian) -> Weights:
    # The methods are blind to the scale of the Gramian, but their small constants are made for numbers near 1.
    scale = max(gram.gg, gram.uu)
    matrix = torch.tensor([[gram.gg, gram.gu], [gram.gu, gram.uu]], dtype=torch.float64) / scale
    # Random orders of two gradients are all the same; drawing them must not move the random state of the training.
    with torch.random.fork_rng(devices=[]):
        weight_g, weight_u = weighting(matrix).tolist()
    return weight_g, weight_u


def require_method(method: SurgeryMethod) -> None:
    """Refuse a method that cannot run here: before a model is loaded, not hours later.

    Raises:
        CastuneError: torchjd, or what it needs for the method, is not installed.
    """
    if method in _TORCHJD_METHODS:
        _torchjd_weighting(method)


def _torchjd_weighting(method: str) -> Any:
    name, arguments, extra, modules = _TORCHJD_METHODS[method]
    # torchjd itself hides a solver that is there but cannot be imported, and fails later with a NameError.
    for module in ("torchjd.aggregation", *modules):
        try:
            import_module(module)
        except ImportError as error:
            wanted = TORCHJD.replace("==", f"[{extra}]==") if extra else TORCHJD
            raise CastuneError(
                f'surgery "{method}" needs the module {module.partition(".")[0]}, which cannot be imported ({error}): '
                f'python -m pip install "{wanted}"; "pcgrad" and "pcgrad-symmetric" need nothing more'
            ) from None
    return getattr(import_module("torchjd.aggregation"), name)(**arguments)


def parameter_groups(
    peft_model: PeftModel, layout: UnitLayout, selection: HeadSelection, granularity: SurgeryGranularity
) -> list[Group]:
    """The trained parameters in the groups that surgery works on.

    `global`: one group. `tensor`: every A and every B. `head`: the rows of B of one selected head, and A of a layer,
    which its heads share. Rows of B that are masked have zero gradients and belong to no group of `head`. Units of
    other kinds have all their rows of B and columns of A in one group; B of a projection whose columns they own is
    shared.

    Raises:
        CastuneError: `head`, with whole MLPs and groups of neurons of the same layer selected.
    """
    everything = slice(None)
    matrices = {}
    for path in targets(layout, selection):
        module = peft_model.base_model.model.get_submodule(path)
        matrices[path] = (module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight)
    if granularity != "head":
        groups: list[Group] = [[(m, everything)] for pair in matrices.values() for m in pair if m.requires_grad]
        return [[member for group in groups for member in group]] if granularity == "global" else groups
    if {"mlp_block", "mlp_group"} <= set(selection.kinds):
        raise CastuneError(
            'surgery_granularity = "head" needs units that share no neurons, and whole MLPs and groups of neurons are '
            'selected: train one of them, or use "tensor" or "global"'
        )
    # The matrix that units share comes at its projection, a unit at the first of its projections.
    at_path: dict[str, list[Group]] = {path: [] for path in matrices}
    for one in selected_units(selection):
        parts = layout.parts(one)
        for part in parts:
            shared = matrices[part.path][part.axis]
            if shared.requires_grad and not at_path[part.path]:
                at_path[part.path].append([(shared, everything)])
        own: Group = []
        for part in parts:
            matrix = matrices[part.path][1 - part.axis]
            if matrix.requires_grad:
                own.append((matrix, part.at if part.axis == 0 else (everything, part.at)))
        at_path[parts[0].path].append(own)
    return [group for groups in at_path.values() for group in groups if group]


def utility_batches(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of `size` indices below `n`, in a new random order each time all were seen.

    Batches never hold an index twice within one order; with `size` above `n` they are the whole set.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, n)
    waiting: list[int] = []
    while True:
        if len(waiting) < size:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


@dataclass
class Operation:
    """Surgery on the gradients of a training: call it when they are complete and not yet clipped.

    Attributes:
        rows: the utility examples, all of them on every process.
        config: the training's settings.
        groups: parameters by group (`parameter_groups`).
        cosines: of every step so far the cosine of g and u over all parameters; None where one of them is zero.
        conflicts: steps so far at which g.u < 0 over all parameters.
    """

    rows: Sequence[Row]
    config: TuneConfig
    groups: list[Group]
    cosines: list[float | None] = field(default_factory=list)
    conflicts: int = 0

    def __post_init__(self) -> None:
        assert self.config.surgery != "none"
        self._surgeries = [Surgery(self.config.surgery) for _ in self.groups]
        self._batches: Iterator[list[int]] | None = None
        self._parameters = list({id(p): p for group in self.groups for p, _ in group}.values())

    @property
    def record(self) -> dict[str, Any]:
        """What happened, for `TuneResult.surgery`."""
        known = [cosine for cosine in self.cosines if cosine is not None]
        return {
            "steps": len(self.cosines),
            "conflicting_steps": self.conflicts,
            "mean_cosine": sum(known) / len(known) if known else None,
        }

    def logs(self) -> dict[str, float]:
        """Of the last step the cosine of g and u, if it has one, and how many of the steps so far had a conflict."""
        cosine = self.cosines[-1]
        found = {} if cosine is None else {"surgery/cosine": cosine}
        return {**found, "surgery/conflicting_share": self.conflicts / len(self.cosines)}

    def state(self) -> dict[str, Any]:
        """Plain JSON from which `restore` continues."""
        memories = [surgery.memory for surgery in self._surgeries]
        return {"cosines": self.cosines, "conflicts": self.conflicts, "memories": memories}

    def restore(self, state: dict[str, Any], *, memories: bool = True) -> None:
        """Continue after the steps of an earlier training: with its record, and the batches that come then.

        Args:
            state: of the earlier one.
            memories: what methods remember too; not where other parameters are trained now.
        """
        self.cosines, self.conflicts = list(state["cosines"]), state["conflicts"]
        if not memories:
            return
        for surgery, memory in zip(self._surgeries, state["memories"], strict=True):
            surgery.remember(memory)

    def check(self, accelerator: Any) -> None:
        """Refuse ways of training whose gradients are not complete, unscaled and in `.grad`.

        Raises:
            TrainingError: DeepSpeed, FSDP and the like, or float16 with a gradient scaler.
        """
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind != "NO" and kind not in ("MULTI_CPU", "MULTI_GPU"):
            raise TrainingError(
                f"gradient surgery needs whole gradients in .grad, which {kind} does not leave there; "
                'train on one device or with torchrun (DDP), or with surgery = "none"'
            )
        if getattr(accelerator, "scaler", None) is not None:
            raise TrainingError(
                "gradient surgery needs gradients as they are, and mixed precision with float16 scales them; "
                'use bfloat16 or float32, or surgery = "none"'
            )

    def __call__(self, model: PreTrainedModel, accelerator: object, precision: object) -> None:
        """Replace the gradients of the parameters by what surgery makes of them.

        Args:
            model: the model without wrappers for several processes.
            accelerator: of the Trainer.
            precision: makes the context manager in which the Trainer computes its loss.

        Raises:
            TrainingError: the utility loss or its gradient is not finite.
        """
        self.check(accelerator)
        utility = dict(zip(map(id, self._parameters), self._gradient(model, accelerator, precision), strict=True))
        pairs = [
            ([p.grad[rows] for p, rows in group], [utility[id(p)][rows] for p, rows in group]) for group in self.groups
        ]
        grams = [Gramian.of(g, u) for g, u in pairs]
        total = sum(grams, Gramian(0.0, 0.0, 0.0))
        if not isfinite(total.uu):
            raise TrainingError(self._not_finite("gradient of the utility loss", total.uu))
        self.conflicts += total.is_conflict
        self.cosines.append(total.cosine)
        for surgery, gram, (g, u) in zip(self._surgeries, grams, pairs, strict=True):
            for old, new in zip(g, combined(g, u, surgery.weights(gram)), strict=True):
                if new is not old:
                    old.copy_(new)  # a view of .grad

    def _gradient(self, model: PreTrainedModel, accelerator: Any, precision: Any) -> list[Tensor]:
        """Gradient of the mean utility loss of the next batch, the same on every process."""
        n_processes = accelerator.num_processes
        if self._batches is None:
            size = self.config.surgery_batch_size or self.config.batch_size * self.config.accumulation * n_processes
            # Those of steps before an interruption are over.
            self._batches = islice(utility_batches(len(self.rows), size, self.config.seed), len(self.cosines), None)
        batch = next(self._batches)
        share = batch[accelerator.process_index :: n_processes]
        total = [torch.zeros_like(p) for p in self._parameters]
        for start in range(0, len(share), self.config.batch_size):
            rows = [self.rows[i] for i in share[start : start + self.config.batch_size]]
            with precision():
                loss = reply_nll(model, RowBatch.of(rows, accelerator.device)).sum() / len(batch)
            if not torch.isfinite(loss):
                raise TrainingError(self._not_finite("utility loss", loss.item()))
            # Leaves .grad alone, and reaches no hook of DDP: processes are added up below.
            for part, sum_so_far in zip(torch.autograd.grad(loss, self._parameters), total, strict=True):
                sum_so_far += part
        return total if n_processes == 1 else accelerator.reduce(total, reduction="sum")

    def _not_finite(self, what: str, value: float) -> str:
        return (
            f"the {what} is {value} at step {len(self.cosines) + 1}; try a learning_rate below "
            f"{self.config.learning_rate:g}, or dtype float32. No adapter was written"
        )
