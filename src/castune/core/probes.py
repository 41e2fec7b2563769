"""Proof by perturbation: a module is called again on its own, with a change to some of its rows; what moves?

`heads.py`, `key_values.py` and `mlps.py` claim where units are, by names and shapes; probes prove it.

Shape letters: S sequence position, H query head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from castune.core.attention import SUPPORTED, AttentionLayer
from castune.core.modes import evaluation_mode
from castune.errors import UnsupportedArchitecture


class Call(NamedTuple):
    """How a module was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Change = Callable[[Tensor], Tensor]
BUT_THE_LAST = slice(None, -1)
"""Tokens whose queries or keys get noise. Those of the last one stay: where its output moves, it has read others."""

# What has no noise must not move by more than this share of what has: parts do not share arithmetic and should not move
# at all, but there are kernels whose rounding depends on neighbours.
QUIET = 1e-3


@torch.no_grad()
def recorded_calls(model: nn.Module, paths: Sequence[str]) -> dict[str, Call]:
    """How each of the modules at `paths` is called in a forward of eight tokens, to call it again alone."""
    calls: dict[str, Call] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path] = Call(args, kwargs)

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(record(path), with_kwargs=True) for path in set(paths)
    ]
    try:
        ids = torch.arange(5, 13, device=next(model.parameters()).device)[None]
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def probed_input(
    projection: nn.Module, module: nn.Module, call: Call, changed: tuple[nn.Module, Change] | None = None
) -> Tensor:
    """The input of a projection, in float32, when the module that it is part of is called again.

    Args:
        projection: whose input is wanted.
        module: what is called.
        call: how.
        changed: another projection of the module, and what is done to its output; None: nothing.
    """
    captured: list[Tensor] = []
    handles = [projection.register_forward_pre_hook(lambda _module, args: captured.append(args[0].detach().float()))]
    if changed is not None:
        other, change = changed
        handles.append(other.register_forward_hook(lambda _module, _args, output: change(output)))
    try:
        module(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return captured[0]


def with_noise(
    output: Tensor, rows: slice, generator: torch.Generator | None = None, *, tokens: slice = slice(None)
) -> Tensor:
    """The output of a projection with noise on some of its rows.

    Args:
        output: `[..., rows]`, left as it is.
        rows: where noise is added.
        generator: of the noise; a new one, seeded with 0, when absent.
        tokens: at which positions.
    """
    generator = generator or torch.Generator().manual_seed(0)
    noise = torch.randn(output[..., tokens, rows].shape, generator=generator).to(output)
    noisy = output.clone()
    # Ten standard deviations: enough to change where a head attends, whatever the scale of the weights, and to leave
    # where an activation is flat.
    noisy[..., tokens, rows] += 10 * (output.std() + 1) * noise
    return noisy


@torch.no_grad()
def probe_heads(model: nn.Module, first: nn.Module, layers: Sequence[AttentionLayer]) -> bool:
    """Prove the heads: noise on a head's queries moves that head's slice of the o_proj input, at the same tokens.

    One forward records how each attention module is called; each is then called again on its own with noise on
    one head, so the cost is three attention calls a layer whatever the depth.

    Args:
        model: the model.
        first: its first decoder layer.
        layers: the attention layers.

    Returns:
        Whether decoder layers return tuples.

    Raises:
        UnsupportedArchitecture: something else moved; the message names the layer.
    """
    outputs: list[Any] = []
    with evaluation_mode(model):
        seen = first.register_forward_hook(lambda _m, _a, output: outputs.append(output))
        try:
            calls = recorded_calls(model, [attention.path for attention in layers])
        finally:
            seen.remove()
        global_norms = [one.path for one in layers if _probe_layer(model, one, calls[one.path])]
    if global_norms:
        warnings.warn(
            f"{global_norms[0]} normalises queries across all heads: training one head's rows changes the scale of "
            "the others. Diagnosis is exact, but frozen heads do not stay functionally frozen.",
            stacklevel=4,  # the caller of HeadLayout.of; torch.no_grad is a frame of its own
        )
    return isinstance(outputs[0], tuple)


def _probe_layer(model: nn.Module, attention: AttentionLayer, call: Call) -> bool:
    """Probe the first two heads and the last; returns whether a query norm spans all heads of the layer."""
    module = model.get_submodule(attention.path)
    queries, output = module.get_submodule(attention.query_name), module.get_submodule(attention.output_name)
    global_norm = _normalises_across_heads(module, attention)
    before = probed_input(output, module, call)
    for head in sorted({0, 1, attention.n_heads - 1} & set(range(attention.n_heads))):
        rows = attention.query_rows(head)
        after = probed_input(output, module, call, (queries, partial(with_noise, rows=rows, tokens=BUT_THE_LAST)))
        moved_SH = (after - before).abs().flatten(0, -2).unflatten(-1, (attention.n_heads, attention.o_dim)).amax(-1)
        moved_H = moved_SH.amax(0)
        others = torch.cat([moved_H[:head], moved_H[head + 1 :]])
        limit = QUIET * moved_H[head]
        effect = None
        if others.numel() and others.max() > limit and not global_norm:
            effect = "also moved other heads"
        elif moved_H[head] == 0:
            effect = "did not move its output"
        elif moved_SH[-1].max() > limit:
            effect = "moved a token whose queries had no noise: the rows hold keys or values"
        if effect:
            raise UnsupportedArchitecture(
                f"layer {attention.layer} ({attention.path}): noise on the query rows of head {head} {effect}; "
                f"castune supports {SUPPORTED}"
            )
    return global_norm


def _normalises_across_heads(module: nn.Module, attention: AttentionLayer) -> bool:
    """Whether a query norm spans all heads (olmo2, olmoe) instead of each head's width.

    A weight `[H, K]` scales every head on its own and normalises each by itself (cohere).
    """
    norm = getattr(module, "q_norm", None)
    weight = getattr(norm, "weight", None)
    return attention.n_heads > 1 and weight is not None and weight.shape == (attention.n_heads * attention.q_dim,)
