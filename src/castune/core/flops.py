"""How much arithmetic a forward takes, from shapes alone: for batching, progress and plans. Works on meta tensors.

A multiplication and an addition count as two FLOPs. Counted are matrix products; norms, activations and softmax are
left out, as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from castune.core.heads import HeadLayout


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward by part.

    Attributes:
        token_L: of each decoder layer, a token: twice the weights it meets (of experts, those that a token is sent to).
        pair_L: of each decoder layer, a query and a key position: 2 H (query width + value width).
        scored: of the output head, a scored position.
    """

    token_L: tuple[float, ...]
    pair_L: tuple[float, ...]
    scored: float

    @classmethod
    def of(cls, model: nn.Module, layout: HeadLayout) -> ForwardFlops:
        """Counts of a model, which may lie on the meta device."""
        expert_share = _expert_share(model)
        token_L, pair_L = [], []
        for layer, module in enumerate(layout.decoder_layers(model)):
            weights = sum(
                parameter.numel() * (expert_share if "experts" in name.split(".") else 1)
                for name, parameter in module.named_parameters()
                if parameter.dim() > 1
            )
            token_L.append(2 * weights)
            attention = layout.attention[layer]
            pair_L.append(0.0 if attention is None else 2 * attention.n_heads * (attention.q_dim + attention.o_dim))
        head = model.get_output_embeddings()  # type: ignore[operator]
        return cls(tuple(token_L), tuple(pair_L), 2 * head.weight.numel())

    def forward(self, *, n_rows: int, length: int, n_scored: int, first_layer: int = 0) -> float:
        """FLOPs of a forward of `n_rows` rows of `length` tokens through the layers from `first_layer` on.

        Attention is counted over all pairs: a causal or tree mask hides half of them, and most kernels compute them
        all the same.
        """
        tokens = n_rows * length
        layers = sum(self.token_L[first_layer:]) * tokens + sum(self.pair_L[first_layer:]) * tokens * length
        return layers + self.scored * n_scored


def _expert_share(model: nn.Module) -> float:
    """Share of a layer's experts that a token is sent to; 1 without experts."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    totals = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    total = next((n for n in totals if n), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / total if total and chosen else 1.0
