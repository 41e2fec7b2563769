"""Ablating units and resuming from recorded residuals, without touching weights or model code.

Hook sites, all context managers: `ablate` changes the input of an output projection (`ablate_at`: a slice of the
input or output of any module, for units of other kinds), `record_sites` reads the input or output of any module,
`record_residuals` and `resume_from` read and replace the residual stream at the input of a decoder layer, `project_out`
takes a direction out of the residual stream everywhere.

`resume_from` lets the model's *own* forward run: layers below the ablated one become the identity and the
recorded residual is put in. Masks, rotary embeddings, sliding windows, final norm and soft-capping stay the
model's, so the result equals a full forward bit for bit (verified again at start by `can_resume`).

Shape letters: B batch row, S sequence position, D model width, L layer, H query head, K head width, W channel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from castune.core.heads import HeadLayout
from castune.core.units import Site, UnitLayout

logger = logging.getLogger(__name__)


@contextmanager
def ablate(
    model: nn.Module,
    layout: HeadLayout,
    layer: int,
    heads: int | Tensor,
    replacement_HK: Tensor | None = None,
) -> Iterator[None]:
    """Replace a head's contribution inside the `with` block: `f_θ\\h` of Eqs. 3-4 of the paper.

    The head's slice of the o_proj *input* is set to zero (or to `replacement_HK[head]`); keys and values, which
    other heads of the KV group share, stay.

    Args:
        model: the model `layout` was taken from.
        layout: its head layout.
        layer: the layer of the ablated heads.
        heads: one head for all batch rows, or an integer tensor `[B]` with one head a row (-1: none).
        replacement_HK: values to put in instead of zero, `[H, K]` (mean ablation).
    """
    filling_W = None if replacement_HK is None else replacement_HK.flatten()
    with ablate_at(model, UnitLayout(layout).site("q_head", layer), heads, filling_W):
        yield


@contextmanager
def ablate_at(model: nn.Module, site: Site, units: int | Tensor, replacement_W: Tensor | None = None) -> Iterator[None]:
    """Replace what the units at a site contribute inside the `with` block.

    Args:
        model: the model the site was taken from.
        site: a module's input or output, cut into the slices of units.
        units: one unit for all batch rows, or an integer tensor `[B]` with one unit a row (-1: none).
        replacement_W: values to put in instead of zero, for all channels of the site (mean ablation).
    """

    def ablated(z: Tensor) -> Tensor:
        owner_W = site.owner_W.to(z.device)
        filling = z.new_zeros(()) if replacement_W is None else replacement_W.to(z)
        if not isinstance(units, Tensor):
            return torch.where(owner_W == units, filling, z)
        ablated_BW = owner_W == units.to(z.device)[:, None]
        # Some layers (opt) flatten batch and positions before their MLP.
        rows = z.unflatten(0, (len(units), -1)) if z.dim() == 2 else z
        return torch.where(ablated_BW[:, None], filling, rows).view(z.shape)

    module = model.get_submodule(site.path)
    if site.is_output:
        handle = module.register_forward_hook(lambda _module, _args, output: ablated(output))
    else:
        handle = module.register_forward_pre_hook(lambda _module, args: (ablated(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def record_residuals(model: nn.Module, layout: HeadLayout, residuals: dict[int, Tensor]) -> Iterator[None]:
    """Fill `residuals[layer]` with the residual stream `[B, S, D]` at the input of every decoder layer."""

    def record(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            residuals[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    handles = [
        module.register_forward_pre_hook(record(layer), with_kwargs=True)
        for layer, module in enumerate(layout.decoder_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resume_from(model: nn.Module, layout: HeadLayout, layer: int, residual_BSD: Tensor) -> Iterator[None]:
    """Let forwards inside the block start at `layer` with a recorded residual; layers below are skipped."""
    layers = layout.decoder_layers(model)

    def put_in(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (residual_BSD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": residual_BSD}

    def identity(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if layout.layers_return_tuples else hidden_states

    skipped = list(layers[:layer])
    # accelerate may have put an instance attribute `forward` on a layer; it is restored, not lost.
    previous = [module.__dict__.get("forward") for module in skipped]
    handle = layers[layer].register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        for module in skipped:
            module.__dict__["forward"] = identity
        yield
    finally:
        handle.remove()
        for module, forward in zip(skipped, previous, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def project_out(model: nn.Module, layout: HeadLayout, direction_D: Tensor) -> Iterator[None]:
    """Take a direction out of the residual stream inside the `with` block: x - r r^T x.

    This is the directional ablation of Arditi et al. (2024, Section 2.4).
    It is taken out of whatever a part of a layer writes to the stream, and of the stream wherever it is read. Where
    nothing but linear maps write to it, the model computes what it would with r projected out of every matrix that
    writes to the stream (Appendix E there); a norm behind such a matrix (gemma2) would bring r back, and does not here.

    Args:
        model: the model `layout` was taken from, also with adapters injected.
        layout: its head layout.
        direction_D: r, of any length but 0; it is not trained through.
    """
    layers = layout.decoder_layers(model)
    # Computed at least in float32: in 16 bits what is left of r would be the rounding of x.
    unit_D = direction_D.detach().double() / direction_D.detach().double().norm()

    def without(stream: Tensor) -> Tensor:
        exact = stream.double() if stream.dtype is torch.float64 else stream.float()
        r_D = unit_D.to(exact)
        left: Tensor = exact - (exact @ r_D)[..., None] * r_D
        return left.to(stream.dtype)

    # What the parts of the current layer returned. A part that is given anything else reads the stream.
    returned: list[object] = []

    def of_stream(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = args[0] if args else kwargs.get("hidden_states")
        if not _has_width(given, unit_D) or any(given is one for one in returned):
            return args, kwargs
        return ((without(given), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": without(given)})

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        returned.clear()
        return of_stream(module, args, kwargs)

    def written(module: nn.Module, _args: object, output: Any) -> Any:
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if _has_width(first, unit_D) and "Norm" not in type(module).__name__:
            first = without(first)
        returned.append(first)
        return first if rest is None else (first, *rest)

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(begin, with_kwargs=True))
            for part in layer.children():
                handles.append(part.register_forward_pre_hook(of_stream, with_kwargs=True))
                handles.append(part.register_forward_hook(written))
        handles.append(layers[-1].register_forward_hook(written))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_width(given: object, direction_D: Tensor) -> TypeGuard[Tensor]:
    return isinstance(given, Tensor) and given.shape[-1:] == direction_D.shape


@torch.no_grad()
def can_resume(model: nn.Module, layout: HeadLayout) -> bool:
    """Whether resuming reproduces an ordinary forward of this model bit for bit at its first, middle and last layer.

    Families whose layers share keys and values (gemma3n, gemma4) cannot resume; the diagnosis then runs full
    forwards, which is slower and equally exact.
    """
    ids = torch.arange(5, 17, device=next(model.parameters()).device).reshape(2, 6)
    residuals: dict[int, Tensor] = {}
    with record_residuals(model, layout, residuals):
        expected = model(input_ids=ids, use_cache=False).logits
    for layer in sorted({0, layout.n_layers // 2, layout.n_layers - 1}):
        try:
            with resume_from(model, layout, layer, residuals[layer]):
                resumed = model(input_ids=ids, use_cache=False).logits
        except (KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            logger.warning("resuming at layer %d raised %r: every ablation runs the full forward", layer, error)
            return False
        if not torch.equal(resumed, expected):
            logger.warning("resuming at layer %d differs from a full forward: running full forwards", layer)
            return False
    return True


@contextmanager
def record_sites(model: nn.Module, sites: Iterable[Site], found: dict[Site, Tensor]) -> Iterator[None]:
    """Fill `found[site]` with what passes through every site in the latest forward, as the module has it."""

    def record(site: Site) -> Any:
        module = model.get_submodule(site.path)
        if site.is_output:
            return module.register_forward_hook(lambda _module, _args, output: keep(site, output))
        return module.register_forward_pre_hook(lambda _module, args: keep(site, args[0]))

    def keep(site: Site, z: Tensor) -> None:
        found[site] = z.detach()

    handles = [record(site) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def site_means(model: nn.Module, sites: Iterable[Site], forwards: Callable[[], Iterator[Tensor]]) -> dict[Site, Tensor]:
    """Mean of every channel of some sites over all real tokens, `[W]` each, for mean ablation.

    Args:
        model: the model.
        sites: the sites.
        forwards: runs the calibration forwards one by one and yields, *after* each, the boolean mask `[B, S]` of
            its real (not padded) tokens.
    """
    latest: dict[Site, Tensor] = {}
    total: dict[Site, Tensor] = {}
    n_tokens = 0
    with record_sites(model, sites, latest):
        for mask_BS in forwards():
            n_tokens += int(mask_BS.sum())
            for site, z in latest.items():
                tokens = z.reshape(*mask_BS.shape, -1)[mask_BS].double().sum(0)
                total[site] = total.get(site, torch.zeros_like(tokens)) + tokens
    return {site: (total_W / n_tokens).float() for site, total_W in total.items()}
