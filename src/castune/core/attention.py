"""One attention layer: which rows and columns of its projections belong to which query head.

`heads.py` finds it in a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from castune.errors import UnsupportedArchitecture

SUPPORTED = (
    "llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, smollm3, mixtral, qwen3_moe, falcon, llama4, "
    "gpt_oss, qwen3_next, deepseek_v3, opt, bloom, granite, cohere2, glm4, starcoder2, exaone4 and models with the "
    "same attention layout"
)


@dataclass(frozen=True)
class AttentionLayer:
    """The query and output projection of one decoder layer.

    `layout` says how the query rows of head h lie in the projection's output dimension:
    `separate` and `block` start at h * q_dim; `interleaved` at h * 3 * q_dim (`[q_h | k_h | v_h]` a head);
    `interleaved_gqa` at (h // g) * (g + 2) * q_dim + (h % g) * q_dim with g query heads in a KV group.
    q_dim and o_dim differ where a head's rows hold an output gate beside the query (qwen3_next) or where queries
    and values have different widths (deepseek_v3).
    """

    layer: int
    path: str
    query_name: str
    output_name: str
    n_heads: int
    n_kv_groups: int
    q_dim: int
    o_dim: int
    layout: str
    transposed: bool  # Conv1D stores its weight as (in, out)

    def query_rows(self, head: int) -> slice:
        """Rows of head `head` in the query projection's output dimension."""
        if self.layout == "interleaved":
            start = head * 3 * self.q_dim
        elif self.layout == "interleaved_gqa":
            group = self.n_heads // self.n_kv_groups
            start = (head // group) * (group + 2) * self.q_dim + (head % group) * self.q_dim
        else:
            start = head * self.q_dim
        return slice(start, start + self.q_dim)

    def output_columns(self, head: int) -> slice:
        """Columns of head `head` in the output projection's input dimension."""
        return slice(head * self.o_dim, (head + 1) * self.o_dim)

    @property
    def n_query_rows(self) -> int:
        """Rows of the whole query projection; of a fused one keys and values included."""
        n_heads = self.n_heads if self.layout == "separate" else self.n_heads + 2 * self.n_kv_groups
        return n_heads * self.q_dim

    @property
    def query_path(self) -> str:
        """Module path of the (possibly fused) query projection."""
        return f"{self.path}.{self.query_name}"

    @property
    def output_path(self) -> str:
        """Module path of the output projection."""
        return f"{self.path}.{self.output_name}"


def features(projection: Any) -> tuple[int, int]:
    """(inputs, outputs) of a Linear, a quantised Linear or a Conv1D."""
    if hasattr(projection, "in_features"):
        return int(projection.in_features), int(projection.out_features)
    if hasattr(projection, "nx"):
        return int(projection.nx), int(projection.nf)
    raise UnsupportedArchitecture(
        f"{type(projection).__name__} is not a linear projection; castune supports {SUPPORTED}"
    )
