"""What ablating every unit would change, to first order, from one backward pass.

Ablation puts r in the place of what a unit contributes, z. To first order that changes an outcome m by the sum over
positions and channels of (r - z) dm/dz, at the sites where `ablate_at` would act: for all units of a model from one
gradient (Michel et al. 2019, arXiv:1905.10650, Eq. 2; as attribution patching: Syed et al. 2023, arXiv:2310.10348).

Shape letters: B batch row, S sequence position, T scored token, W channel, U unit of a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from castune.core.units import Site

Tape = dict[Site, list[Tensor]]
"""What passed every site, one entry a call of its module."""


@contextmanager
def taped(model: nn.Module, sites: Iterable[Site]) -> Iterator[Tape]:
    """Record what passes some sites in forwards inside the `with` block, so that gradients reach it.

    No weight needs a gradient for it: the graph begins at the lowest site.
    """
    tape: Tape = {site: [] for site in sites}

    def kept(site: Site, z: Tensor) -> Tensor:
        if z.requires_grad:
            tape[site].append(z)
            return z
        z = z.detach().requires_grad_()
        tape[site].append(z)
        return z.clone()  # the model may write into it

    def hooked(site: Site) -> torch.utils.hooks.RemovableHandle:
        module = model.get_submodule(site.path)
        if site.is_output:
            return module.register_forward_hook(lambda _module, _args, output: kept(site, output))
        return module.register_forward_pre_hook(lambda _module, args: (kept(site, args[0]), *args[1:]))

    handles = [hooked(site) for site in tape]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def attributed(
    tape: Mapping[Site, list[Tensor]], outcomes_B: Tensor, replacements: Mapping[Site, Tensor] | None = None
) -> dict[Site, Tensor]:
    """First-order changes of every row's outcome when a unit is ablated, `[B, U]` float32 by site.

    Args:
        tape: of the forward that gave the outcomes.
        outcomes_B: the outcomes, which follow from their own rows alone.
        replacements: what is put in the place of units, `[W]` by site (mean ablation); None: zero.
    """
    passed = [(site, z) for site, calls in tape.items() for z in calls]
    # Rows do not mix: the gradient of the sum is, at a row, that of its own outcome.
    gradients = torch.autograd.grad(outcomes_B.sum(), [z for _, z in passed], allow_unused=True)
    n_rows = len(outcomes_B)
    found: dict[Site, Tensor] = {}
    for (site, z), gradient in zip(passed, gradients, strict=True):
        n_units = len(site.spans)
        effect_BU = torch.zeros(n_rows, n_units + 1, device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))
        if gradient is not None:
            filling = 0 if replacements is None else replacements[site].to(effect_BU)
            change = (filling - z.detach().to(effect_BU)) * gradient.to(effect_BU)
            # Some layers (opt) flatten batch and positions before their MLP.
            change_BW = change.reshape(n_rows, -1, site.width).sum(1)
            owner_W = site.owner_W.to(z.device)
            effect_BU.index_add_(1, torch.where(owner_W < 0, n_units, owner_W), change_BW)
        found[site] = found[site] + effect_BU[:, :n_units] if site in found else effect_BU[:, :n_units]
    return found
