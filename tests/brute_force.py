"""The paper's Eqs. 2-6 computed the slow and obvious way, for comparison with castune.

Nothing of castune is used but `Example`: plain `model(input_ids)` on one sequence at a time, without padding,
batching, caching, resuming or `logits_to_keep`; the loss written out; heads cut by hand for each family; ranks from
their definition. Where castune is clever, this is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castune.data.example import Example

Head = tuple[int, int]
Judge = Callable[[Sequence[str], Sequence[str]], list[bool | None]]

# Table 4 of the paper.
INSTRUCTION = (
    "Read the multiple-choice question carefully and output only the capital letter (A, B, C, D, or E) that "
    "corresponds to the correct choice. Do not include any explanation or extra text."
)


@dataclass(frozen=True)
class Block:
    """The attention of one layer: where the query rows and the outputs of its heads lie.

    Attributes:
        query: weight of the projection that makes queries, [rows, D].
        begins: first row of each head's queries.
        width: rows of a head's queries.
        output: the output projection.
        out_width: inputs of it that belong to a head.
    """

    query: Tensor
    begins: list[int]
    width: int
    output: torch.nn.Module
    out_width: int
    transposed: bool = False


def blocks_by_hand(model: Any) -> dict[int, Block]:
    """The attention of every layer that has heads, written out from each family's modeling code."""
    config, family = model.config, model.config.model_type
    if family == "gpt2":
        n, width = config.n_head, config.n_embd // config.n_head
        return {
            i: Block(b.attn.c_attn.weight, [h * width for h in range(n)], width, b.attn.c_proj, width, transposed=True)
            for i, b in enumerate(model.transformer.h)
        }
    n = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // n
    if family in ("gpt_neox", "bloom", "falcon"):
        if family == "gpt_neox":  # q, k and v of a head, then those of the next
            found, begins = [block.attention for block in model.gpt_neox.layers], [3 * h * width for h in range(n)]
        else:
            found = [block.self_attention for block in model.transformer.h]
            if family == "bloom":
                begins = [3 * h * width for h in range(n)]
            elif config.new_decoder_architecture:  # the queries of a group of heads, its key, its value
                group = n // config.num_kv_heads
                begins = [(h // group * (group + 2) + h % group) * width for h in range(n)]
            else:  # all queries, one key, one value
                begins = [h * width for h in range(n)]
        return {i: Block(a.query_key_value.weight, begins, width, a.dense, width) for i, a in enumerate(found)}
    if family == "opt":
        found = [layer.self_attn for layer in model.model.decoder.layers]
        return {
            i: Block(a.q_proj.weight, [h * width for h in range(n)], width, a.out_proj, width)
            for i, a in enumerate(found)
        }
    blocks = {}
    for i, layer in enumerate(model.model.layers):
        if not hasattr(layer, "self_attn"):  # linear attention
            continue
        attention, rows, out_width = layer.self_attn, width, width
        if family == "phi3":  # all queries, all keys, all values
            query = attention.qkv_proj
        elif family == "deepseek_v3":
            query, rows, out_width = (
                attention.q_b_proj,
                config.qk_nope_head_dim + config.qk_rope_head_dim,
                config.v_head_dim,
            )
        else:
            query = attention.q_proj
            if family == "qwen3_next":  # the query of a head and its output gate
                rows = 2 * width
        blocks[i] = Block(query.weight, [h * rows for h in range(n)], rows, attention.o_proj, out_width)
    return blocks


class BruteForce:
    """One model and tokenizer, measured without any shortcut.

    Args:
        model: of a family that `blocks_by_hand` knows, in float32.
        tokenizer: its tokenizer; a turn ends with its eos token.
        max_new_tokens: length of generated replies.
        margin_tokens: tokens of two replies that refusal margins compare.
        layers: layers whose heads are measured; all by default.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        margin_tokens: int = 8,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.margin_tokens = max_new_tokens, min(margin_tokens, max_new_tokens)
        self.end: int = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.blocks = blocks_by_hand(model)
        self.heads: list[Head] = [
            (layer, head)
            for layer, block in self.blocks.items()
            if layers is None or layer in layers
            for head in range(len(block.begins))
        ]
        self.fillings: dict[int, Tensor] | None = None  # layer -> [heads * width]; None: zero

    # Text and tokens.

    def prompt(self, example: Example) -> list[int]:
        """Token ids of the conversation up to the assistant's turn."""
        text = example.prompt
        if example.scoring == "letter":
            text = "\n".join([INSTRUCTION, text, *(f"{'ABCDE'[i]}. {c}" for i, c in enumerate(example.choices))])
        turns = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])

    def text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def right_reply(self, example: Example) -> list[int]:
        """Ids of the reply whose loss counts: a letter alone, anything else with the end of the turn."""
        if example.scoring == "letter":
            return self.text_ids("ABCDE"[example.answer])
        reply = example.choices[example.answer] if example.choices else example.reply
        return [*self.text_ids(reply), self.end]

    # Eq. 2.

    def log_probs(self, prompt: list[int], reply: list[int]) -> Tensor:
        """Log-probability of every reply token, from logits at every position of the whole sequence."""
        logits = self.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float()
        shifted = logits - logits.max(-1, keepdim=True).values
        log_softmax = shifted - shifted.exp().sum(-1, keepdim=True).log()
        return torch.stack([log_softmax[t, token] for t, token in enumerate(reply)])

    def gradient(self, examples: Sequence[Example]) -> dict[Head, Tensor]:
        """Gradient of the mean loss on every head's query rows, flat, float64."""
        before = [parameter.requires_grad for parameter in self.model.parameters()]
        self.model.requires_grad_(True)
        self.model.zero_grad()
        for example in examples:
            loss = -self.log_probs(self.prompt(example), self.right_reply(example)).mean()
            (loss / len(examples)).backward()
        gradients = {}
        for layer, head in self.heads:
            block = self.blocks[layer]
            rows = slice(block.begins[head], block.begins[head] + block.width)
            rows = block.query.grad[:, rows] if block.transposed else block.query.grad[rows, :]
            gradients[layer, head] = rows.double().flatten().clone()
        self.model.zero_grad(set_to_none=True)
        for parameter, required in zip(self.model.parameters(), before, strict=True):
            parameter.requires_grad_(required)
        return gradients

    def optimization_conflict(self, safety: Sequence[Example], utility: Sequence[Example]) -> np.ndarray:
        safe, useful = self.gradient(safety), self.gradient(utility)
        return np.array(
            [(1 - float(safe[h] @ useful[h] / math.sqrt(safe[h] @ safe[h]) / math.sqrt(useful[h] @ useful[h]))) / 2 for h in self.heads]
        )  # fmt: skip

    # Eqs. 3-4.

    @contextmanager
    def without(self, head: Head | None) -> Iterator[None]:
        if head is None:
            yield
            return
        layer, number = head
        block = self.blocks[layer]
        columns = slice(number * block.out_width, (number + 1) * block.out_width)

        def cut(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[..., columns] = 0 if self.fillings is None else self.fillings[layer][columns]
            return (changed,)

        handle = block.output.register_forward_pre_hook(cut)
        try:
            yield
        finally:
            handle.remove()

    def use_mean_ablation(self, examples: Sequence[Example]) -> None:
        """From now on a head is replaced by its mean output over all tokens the loss of `examples` sees."""
        seen: dict[int, list[Tensor]] = {layer: [] for layer, _ in self.heads}
        handles = [
            self.blocks[layer].output.register_forward_pre_hook(
                lambda _m, args, layer=layer: seen[layer].append(args[0][0])
            )
            for layer in seen
        ]
        with torch.no_grad():
            for example in examples:
                self.model(torch.tensor([(self.prompt(example) + self.right_reply(example))[:-1]]))
        for handle in handles:
            handle.remove()
        self.fillings = {layer: torch.cat(tokens).double().mean(0).float() for layer, tokens in seen.items()}

    @torch.no_grad()
    def choice_scores(self, example: Example) -> list[float]:
        prompt = self.prompt(example)
        if example.scoring == "letter":
            return [
                float(self.log_probs(prompt, self.text_ids(letter))[0]) for letter in "ABCDE"[: len(example.choices)]
            ]
        return [float(self.log_probs(prompt, self.text_ids(choice)).double().mean()) for choice in example.choices]

    def utility(self, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """(decisions, margins), rows: the whole model, then each head ablated."""
        decisions, margins = [], []
        for head in (None, *self.heads):
            with self.without(head):
                scores = [self.choice_scores(example) for example in examples]
            decisions.append([float(s.index(max(s)) == e.answer) for s, e in zip(scores, examples, strict=True)])
            margins.append(
                [s[e.answer] - max(x for i, x in enumerate(s) if i != e.answer) for s, e in zip(scores, examples, strict=True)]
            )  # fmt: skip
        return np.array(decisions), np.array(margins)

    def generate(self, example: Example) -> list[int]:
        """The greedy reply, its end of turn included if it came."""
        prompt = torch.tensor([self.prompt(example)])
        output = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=self.max_new_tokens,
            eos_token_id=self.end, pad_token_id=self.end,
        )  # fmt: skip
        return output[0, prompt.shape[1] :].tolist()

    def refusals(self, examples: Sequence[Example], judge: Judge) -> np.ndarray:
        """1 refused, 0 not, NaN unscored; rows: the whole model, then each head ablated."""
        rows = []
        for head in (None, *self.heads):
            with self.without(head):
                texts = [self.tokenizer.decode(self.generate(e), skip_special_tokens=True) for e in examples]
            verdicts = [judge([e.prompt], [text])[0] for e, text in zip(examples, texts, strict=True)]
            rows.append([math.nan if verdict is None else float(verdict) for verdict in verdicts])
        return np.array(rows)

    @torch.no_grad()
    def refusal_margins(self, examples: Sequence[Example]) -> np.ndarray:
        """Log-prob a token of the safe reply minus that of the whole model's own; rows as in `utility`."""
        own = [self.generate(example)[: self.margin_tokens] for example in examples]
        rows = []
        for head in (None, *self.heads):
            with self.without(head):
                rows.append(
                    [
                        float(self.log_probs(self.prompt(e), self.right_reply(e)[: self.margin_tokens]).double().mean())
                        - float(self.log_probs(self.prompt(e), reply).double().mean())
                        for e, reply in zip(examples, own, strict=True)
                    ]
                )
        return np.array(rows)

    @torch.no_grad()
    def helpful_margins(self, examples: Sequence[Example], refusal: str) -> np.ndarray:
        """Log-prob a token of the reply to give minus that of the refusal; rows as in `utility`."""
        refused = [*self.text_ids(refusal), self.end][: self.margin_tokens]
        rows = []
        for head in (None, *self.heads):
            with self.without(head):
                rows.append(
                    [
                        float(self.log_probs(self.prompt(e), self.right_reply(e)[: self.margin_tokens]).double().mean())
                        - float(self.log_probs(self.prompt(e), refused).double().mean())
                        for e in examples
                    ]
                )
        return np.array(rows)


# Eqs. 3-6 on outcomes; first row: the whole model.


def decision_shift(outcomes: np.ndarray) -> np.ndarray:
    """|rate without the head - rate| over the examples scored both times."""
    whole, shifts = outcomes[0], []
    for ablated in outcomes[1:]:
        pairs = [(a, b) for a, b in zip(ablated, whole, strict=True) if not (math.isnan(a) or math.isnan(b))]
        shifts.append(abs(round(sum(a for a, _ in pairs)) - round(sum(b for _, b in pairs))) / len(pairs))
    return np.array(shifts)


def margin_shift(outcomes: np.ndarray) -> np.ndarray:
    return np.array([sum(abs(a - b) for a, b in zip(row, outcomes[0], strict=True)) / len(row) for row in outcomes[1:]])


def percentile_ranks(values: Sequence[float]) -> np.ndarray:
    """Share of the other values below, counting equal ones half."""
    return np.array(
        [(sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2) / (len(values) - 1) for v in values]
    )


def sensitivity(utility_shift: np.ndarray, safety_shift: np.ndarray) -> np.ndarray:
    return np.array(
        [math.exp(g - s) for g, s in zip(percentile_ranks(utility_shift), percentile_ranks(safety_shift), strict=True)]
    )
