"""The work of a diagnosis, from the model's config and the data alone: nothing is run but to make batches.

The batches are made by the diagnosis' own code, so forwards and tokens are those it will run. Unknown beforehand are
the model's own replies: the data's safe replies stand in for them, and a share of them is taken to change under
ablation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from castune.artifacts import Unit
from castune.config import DiagnoseConfig
from castune.core.batching import ExampleBatch
from castune.core.continuation import can_continue
from castune.core.flops import ForwardFlops
from castune.core.generation import ROUND, Reply
from castune.core.losses import loss_batches
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.diagnosis.ablator import Ablator, part_size
from castune.diagnosis.checking import spread
from castune.diagnosis.decode import DECODED_TOKENS
from castune.diagnosis.domains import UtilitySet
from castune.diagnosis.fidelity import units_to_check
from castune.diagnosis.gradients import gradient_passes
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.sweep import units_of
from castune.plan.speed import Sample
from castune.plan.work import Size, Work, backward, forward
from castune.stats.ranking import equal_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the replies that are still the whole model's, the share that changes at the next token once a head is gone. Of the
# default model's, which is small and unsure, 89 % had changed after 48 tokens, 43 % after the 15 or so that the prefix
# judge needs: 4.6 and 3.7 % a token. Larger models should change fewer, and their plans are then too high.
_CHANGED_A_TOKEN = 0.04


@dataclass(frozen=True)
class GradientPass:
    """One run over all examples for the gradients of some projections.

    Attributes:
        first_layer: the lowest layer that has one of them.
        n_weights: of all of them.
    """

    first_layer: int
    n_weights: int

    @classmethod
    def all_of(
        cls, model: PreTrainedModel, units: UnitLayout, heads: Sequence[Unit], config: DiagnoseConfig
    ) -> list[GradientPass]:
        """The passes of a diagnosis, within its memory for gradients."""
        layer_of = {part.path: one.layer for one in heads for part in units.parts(one)}
        limit = config.gradient_memory * 1e9
        passes = gradient_passes(model, units, heads, n_chunks=_n_chunks(config), limit=limit)
        return [
            cls(min(layer_of[path] for path in one), sum(units.weight(model, path).numel() for path in one))
            for one in passes
        ]


@dataclass(frozen=True)
class DiagnosisWork:
    """What a diagnosis has to run: batches made on a slice of the model, FLOPs of the whole.

    Attributes:
        config: settings.
        chat: the model's tokenizer and template.
        safety: D_safe.
        utility: the sets of D_util.
        heads: the units that are ablated.
        passes: of the gradients.
        flops: of a forward of the whole model, by part.
        ablator: the slice.
        decoded_share: share of replies that change when a unit is ablated; the longer they are the more when absent.
    """

    config: DiagnoseConfig
    chat: ChatFormat
    safety: Sequence[Example]
    utility: Sequence[UtilitySet]
    heads: Sequence[Unit]
    passes: Sequence[GradientPass]
    flops: ForwardFlops
    ablator: Ablator
    decoded_share: float | None

    def parts(self) -> dict[str, Work]:
        """The work of every part of a diagnosis by either measure; see `DiagnosisCost.costs`."""
        replies = self._own_replies(self.safety)
        of_replies = [one.examples for one in self.utility if one.is_of_replies]
        harmless = [self._own_replies(examples) for examples in of_replies]
        scored = [one.examples for one in self.utility if not one.is_of_replies]
        parts = {
            "gradients": self._gradients(),
            "attribution": self._attributed(),
            "checked": sum(harmless, self._checked() + replies),
            "utility": self._swept(self._scored_batches(scored)),
            "margins": self._swept(self._margin_batches) + replies,
            "decisions": replies + self._decided(self._refusal_batches),
        }
        if any(one.is_of_problems for one in self.utility):
            parts["solutions"] = self._solutions()
        if of_replies:
            decided = [self._decided(self._answered_batches(examples)) for examples in of_replies]
            parts["reply_margins"] = sum(harmless, self._swept(self._scored_batches(of_replies)))
            parts["reply_decisions"] = sum(harmless, sum(decided, Work()))
        return parts

    def _own_replies(self, examples: Sequence[Example]) -> Work:
        """The whole model's replies to the prompts."""
        n_tokens = self.config.max_new_tokens
        return self._decoding(len(examples), n_tokens, n_tokens, self.most_decoded)

    def _decided(self, batches: Sequence[ExampleBatch]) -> Work:
        """Replies verified without every unit, and decoded where they change."""
        return self._swept(batches) + self._decoded(batches)

    def _solutions(self) -> Work:
        """Utility by decisions: questions are scored, worked answers to problems decoded to their end."""
        found, n_tokens = Work(), self.config.solution_tokens
        for one in self.utility:
            if one.is_of_problems:
                stand_ins = self._stand_ins_of(one.examples, n_tokens)
                batches = self.objectives.solution_measure(one.examples, stand_ins).batches
                found += self._decoding(len(one.examples), n_tokens, n_tokens, self.most_decoded)
                found += self._decided(batches)
            elif not one.is_of_replies:
                found += self._swept(self._scored_batches([one.examples]))
        return found

    @property
    def sweep_sample(self) -> Sample:
        """What the sweeps and their decoding are timed on, the largest batch first."""
        return Sample(
            batch_tokens=self.batch_tokens,
            batches=sorted(self.utility_batches, key=lambda batch: -batch.n_tokens),
            prompt=self.prompt,
            n_replies=self.most_continued,
            continues=self.continues,
        )

    @property
    def gradient_sample(self) -> Sample:
        """What gradients are timed on, and their memory is measured with: the largest batch of the largest chunk."""
        chunk = max(self.loss_chunks, key=lambda rows: sum(len(row.ids) for row in rows))

        def room(indices: list[int]) -> int:
            size = Size.of([chunk[i] for i in indices])
            return size.n_tokens + size.n_scored

        largest = max(loss_batches(chunk, self.batch_tokens), key=room)
        return Sample(batch_tokens=self.batch_tokens, rows=[chunk[i] for i in largest])

    @property
    def gradient_bytes(self) -> int:
        """Bytes of partial gradients that are held at once, in the memory of the CPU."""
        return max(4 * _n_chunks(self.config) * one.n_weights for one in self.passes)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose keys and values are held by decisions: of a forward, of replies that wait and are decoded."""
        return self.batch_tokens * (2 + 2 * DECODED_TOKENS) if self.continues else 0

    @cached_property
    def continues(self) -> bool:
        """Whether decoding goes on from recorded keys and values."""
        return can_continue(self.ablator.model, self.ablator.layout)

    @cached_property
    def objectives(self) -> Objectives:
        """The diagnosis' own measures, on the slice."""
        return Objectives(self.ablator, self.chat.tokenizer, self.chat, self.config)

    @cached_property
    def utility_batches(self) -> Sequence[ExampleBatch]:
        """Batches of the utility sweeps of all domains, where they are scored."""
        return self._scored_batches([one.examples for one in self.utility])

    @cached_property
    def loss_chunks(self) -> list[list[Row]]:
        """Rows of every gradient chunk of all sets."""
        examples_of = (self.safety, *(one.examples for one in self.utility))
        sets = ([self.chat.loss_row(example) for example in examples] for examples in examples_of)
        return [chunk for rows in sets for chunk in equal_parts(rows, min(self.config.gradient_chunks, len(rows)))]

    @cached_property
    def prompt(self) -> list[int]:
        """The harmful prompt of middle length."""
        prompts = sorted((self.chat.prompt_ids(example)[0] for example in self.safety), key=len)
        return prompts[len(prompts) // 2]

    @property
    def batch_tokens(self) -> int:
        """Rows x tokens of a forward."""
        assert self.config.batch_tokens != "auto"
        return self.config.batch_tokens

    @property
    def most_decoded(self) -> int:
        """Replies that fit into one batch of decoding."""
        return max(1, self.batch_tokens // (len(self.prompt) + self.config.max_new_tokens))

    @property
    def most_continued(self) -> int:
        """Replies that were verified and fit into one batch of decoding."""
        return self.most_decoded * self._decoded_batches

    @property
    def _decoded_batches(self) -> int:
        """How many times the tokens of a forward one batch of decoding takes."""
        return DECODED_TOKENS if self.continues else 1

    @cached_property
    def _stand_ins(self) -> list[Reply]:
        """The data's safe replies in place of the model's own, repeated to the length limit."""
        return self._stand_ins_of(self.safety, self.config.max_new_tokens)

    def _stand_ins_of(self, examples: Sequence[Example], n_tokens: int) -> list[Reply]:
        replies = []
        for example in examples:
            assert example.reply is not None
            _, [ids] = self.chat.continuations(example, [example.reply], end_of_turn=False)
            tokens = (ids * n_tokens)[:n_tokens]
            replies.append(Reply(str(self.chat.tokenizer.decode(tokens)), tuple(tokens), finished=False))
        return replies

    @cached_property
    def _margin_batches(self) -> Sequence[ExampleBatch]:
        return self.objectives.margin_measure(self.safety, self._stand_ins).batches

    @cached_property
    def _refusal_batches(self) -> Sequence[ExampleBatch]:
        return self.objectives.refusal_measure(self.safety, self._stand_ins).batches

    def _answered_batches(self, examples: Sequence[Example]) -> Sequence[ExampleBatch]:
        stand_ins = self._stand_ins_of(examples, self.config.max_new_tokens)
        return self.objectives.answered_measure(examples, stand_ins).batches

    def _scored_batches(self, sets: Sequence[Sequence[Example]]) -> Sequence[ExampleBatch]:
        return [batch for examples in sets for batch in self.objectives.utility_measure(examples).batches]

    def _gradients(self) -> Work:
        found = Work()
        for one in self.passes:
            for size in self._gradient_sizes():
                found += forward(self.flops, size)
                found += backward(self.flops, size, first_layer=one.first_layer, n_weights=one.n_weights)
        return found

    def _gradient_sizes(self) -> Iterator[Size]:
        """Of all batches of a pass."""
        for chunk in self.loss_chunks:
            for indices in loss_batches(chunk, self.batch_tokens):
                yield Size.of([chunk[i] for i in indices])

    def _attributed(self) -> Work:
        """Every batch forwards, and backwards down to the lowest unit."""
        outcomes = [self.objectives.utility_outcome(one.examples) for one in self.utility]
        found, lowest = Work(), min(one.layer for one in self.heads)
        for outcome in (*outcomes, self.objectives.refusal_outcome(self.safety, self._stand_ins)):
            for batch in self.objectives.attributed_measure(outcome).batches:
                size = Size(len(batch.rows), batch.length, batch.n_scored)
                found += forward(self.flops, size) + backward(self.flops, size, first_layer=lowest)
        return found

    def _checked(self) -> Work:
        """Some units on some of the examples, exactly."""
        n_units, n_examples = self.config.check_units, self.config.check_examples
        heads = [
            of_kind[i]
            for kind in dict.fromkeys(one.kind for one in self.heads)
            if (of_kind := [one for one in self.heads if one.kind == kind])
            for i in units_to_check(of_kind, np.zeros(len(of_kind)), n_units)
        ]
        found = Work()
        for one in self.utility:
            picked = [one.examples[i] for i in spread(len(one.examples), n_examples)]
            found += self._swept(self.objectives.utility_measure(picked).batches, heads)
        numbers = spread(len(self.safety), n_examples)
        measure = self.objectives.margin_measure(
            [self.safety[i] for i in numbers], [self._stand_ins[i] for i in numbers]
        )
        return found + self._swept(measure.batches, heads)

    def _swept(self, batches: Sequence[ExampleBatch], heads: Sequence[Unit] | None = None) -> Work:
        """Every batch once for the whole model, and once for each head; all heads when absent."""
        found = Work()
        for batch in batches:
            found += self._repeated(batch, 1, 0)
            for (_, layer), n_units in Counter(one.place for one in heads or self.heads).items():
                first = layer if self.ablator.resumable else 0
                found += self._repeated(batch, n_units, first)
        return found

    def _decoded(self, batches: Sequence[ExampleBatch]) -> Work:
        """Replies that change: decoded until the judge's answer is settled, and run again first where they must be."""
        found = Work()
        for batch in batches:
            n_tokens = [n for parts in batch.parts for _, n in parts]
            share = self.decoded_share
            if share is None:
                share = 1 - math.exp(-_CHANGED_A_TOKEN * sum(n_tokens) / len(n_tokens))
            # A reply changes at half of its length in the mean, and leaves its batch half a round too late.
            mean = min(max(n_tokens), round(sum(n_tokens) / len(n_tokens) / 2 + ROUND / 2))
            for unit in units_of(self.heads, [batch], self.batch_tokens * self._decoded_batches):
                n_replies = round(share * len(batch.examples) * len(unit.heads))
                work = self._decoding(n_replies, max(n_tokens), mean, self.most_continued)
                # Keys and values of what comes before are there.
                found += Work(steps=work.steps, step_tokens=work.step_tokens) if self.continues else work
        return found

    def _decoding(self, n_replies: int, n_steps: int, n_tokens: int, most: int) -> Work:
        """So many replies of so many tokens in the mean; the longest of a batch takes `n_steps`."""
        if not n_replies:
            return Work()
        n_batches = -(-n_replies // most)
        prefill = forward(self.flops, Size(n_replies, len(self.prompt), n_replies), forwards=n_batches)
        return replace(prefill, steps=n_batches * n_steps, step_tokens=n_replies * n_tokens)

    def _repeated(self, batch: ExampleBatch, times: int, first_layer: int) -> Work:
        size = Size(times * len(batch.rows), batch.length, times * batch.n_scored)
        forwards = -(-size.n_rows // part_size(size.n_rows, batch.length, self.batch_tokens))
        return forward(self.flops, size, forwards=forwards, first_layer=first_layer)


def _n_chunks(config: DiagnoseConfig) -> int:
    """Partial gradients of a weight that are held at once: those of the chunks of both losses."""
    return 2 * config.gradient_chunks
