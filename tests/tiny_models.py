"""Tiny random models of every supported family, and a byte tokenizer. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(SPECIAL)

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.2,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "smollm3": {},
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon_multi_query": {"model_type": "falcon", "new_decoder_architecture": False, "multi_query": True},
    # One layer of each kind at least: chunked and rotary, full and without positions; dense and experts.
    "llama4_text": {
        **_MOE, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2,
        "attention_chunk_size": 16,
    },
    "gpt_oss": {**_MOE, "sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    # The first layer has no heads.
    "qwen3_next": {
        **_MOE, "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "shared_expert_intermediate_size": 24, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    # Queries of 16, of which 8 are rotary, and values of 12.
    "deepseek_v3": {
        **_MOE, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "opt": {"num_key_value_heads": 4, "ffn_dim": 48, "init_std": 0.2},
    "bloom": {"num_key_value_heads": 4},
    "granite": {
        "embedding_multiplier": 2.0, "attention_multiplier": 0.35, "residual_multiplier": 0.8, "logits_scaling": 1.5,
    },
    "cohere2": {**_SLIDING, "logit_scale": 1.0},
    "glm4": {},
    "starcoder2": {"sliding_window": 16, "tie_word_embeddings": False},
    "exaone4": _SLIDING,
}  # fmt: skip


def make_tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of a family, or of a variant named in the table; weights large enough that heads matter."""
    changes = {**TINY_CONFIGS.get(model_type, {}), **changes}
    model_type = changes.pop("model_type", model_type)
    # Falcon computes its head width and refuses to be told.
    sizes = {k: v for k, v in _SIZES.items() if (model_type, k) != ("falcon", "head_dim")}
    sizes = {k: v for k, v in sizes.items() if model_type != "gpt2" or not k.startswith(("hidden", "num_", "head"))}
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_tiny_tokenizer() -> Any:
    """Bytes as tokens, ChatML turns; the padding token is the end of turn, as in the default model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        chat_template=CHATML,
    )


def query_rows_mask(layout: Any, selection: Any, layer: int, n_rows: int) -> torch.Tensor:
    """True for the rows of the selected heads of a layer, over all rows of its query projection."""
    mask = torch.zeros(n_rows, dtype=torch.bool)
    for head in selection.heads_of(layer):
        mask[layout.query_rows(layer, head)] = True
    return mask
