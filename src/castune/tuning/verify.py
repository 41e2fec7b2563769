"""The certificate: an adapter, merged, changes the rows and columns of the selected units and nothing else."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from castune.artifacts import Certificate, HeadSelection
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_hash
from castune.core.heads import HeadLayout
from castune.core.quantisation import dense_weight
from castune.core.units import UnitLayout
from castune.errors import CertificateError
from castune.tuning.targets import targets, units_for

PREFIX = "base_model.model."
_COMPILED = "_orig_mod."

# Settings of an adapter under which more than the selected rows would change, with what castune accepts.
_REFUSED = {
    "use_dora": "DoRA rescales every row",
    "use_rslora": "rank-stabilised LoRA scales by another factor",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it trains embeddings",
    "rank_pattern": "ranks must be equal",
    "alpha_pattern": "alphas must be equal",
    "target_parameters": "it adapts parameters outside the query projections",
    "lora_bias": "it trains biases",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "it pools the inputs",
    "use_bdlora": "its matrices are block diagonal",
    "arrow_config": "it routes between adapters",
}
_PLAIN_INITS = (True, False, "gaussian")


def certify(base: nn.Module, adapter: str | Path, selection: HeadSelection) -> Certificate:
    """Compare the merged model with its base, bit by bit.

    Args:
        base: the base model, without an adapter. Of a quantised one the dequantised weights are compared.
        adapter: directory of a PEFT LoRA adapter (`adapter_config.json`, `adapter_model.safetensors`).
        selection: the heads, and units of other kinds, that may have changed.

    Returns:
        The certificate.

    Raises:
        CertificateError: the adapter is no plain LoRA adapter, addresses another tensor, or changes an unselected
            row or column; the message names it.
    """
    layout = units_for(base, HeadLayout.of(base), selection)
    return certificate_of(
        {path: dense_weight(base.get_submodule(path)) for path in targets(layout, selection)},
        layout,
        Path(adapter),
        selection,
        n_tensors=sum(1 for _ in base.named_parameters()),
        modules=[name for name, _ in base.named_modules()],
    )


def certificate_of(
    projections: Mapping[str, Tensor],
    layout: UnitLayout,
    adapter: Path,
    selection: HeadSelection,
    *,
    n_tensors: int,
    modules: Collection[str],
) -> Certificate:
    """The certificate of an adapter from the weights of the base it could change: see `certify`.

    Args:
        projections: weights of the projections that hold a part of a selected unit, by module path.
        layout: where the selected units are.
        adapter: directory of a PEFT LoRA adapter.
        selection: the heads that may have changed, all of this base.
        n_tensors: number of the base's tensors.
        modules: paths of all modules of the base.
    """
    config, wanted = plain_lora_config(adapter), targets(layout, selection)
    names = set() if selection.units else {layout.heads.at(layer).query_name for layer in selection.layers}
    addressed = config["target_modules"]
    # A model with other modules of the same name is trained by paths.
    if selection.units or (isinstance(addressed, list) and set(addressed) == wanted.keys() != names):
        _check_paths(adapter, config, wanted.keys(), modules)
    else:
        _check_scope(adapter, config, names, selection.layers)
    rank, scaling = int(config["r"]), config["lora_alpha"] / config["r"]
    weights = adapter / ADAPTER_WEIGHTS
    missing = dict(wanted)
    counts = Counter[str]()
    largest = 0.0
    for path, a, b in lora_pairs(weights):
        if path not in missing:
            raise CertificateError(f"{weights}: the adapter changes {PREFIX}{path}, which holds no selected head")
        target = missing.pop(path)
        rows = target.rows_of(projections[path].cpu())
        if a.shape != (rank, rows.shape[1]) or b.shape != (rows.shape[0], rank):
            raise CertificateError(
                f"{weights}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected "
                f"{(rank, rows.shape[1])} and {(rows.shape[0], rank)} for r = {rank}"
            )
        merged = merged_rows(rows, a, b, scaling)
        # Adding the zero delta of an unselected row turns -0.0 into +0.0: the same number.
        changed = ((merged != rows) & (bits(merged) != bits(rows.contiguous()))).any(1 - target.axis)
        outside = (changed & ~target.mask).nonzero().flatten().tolist()
        if outside:
            matrix = "B" if target.axis == 0 else "A"
            raise CertificateError(
                f"{weights}: {path} changes {len(outside)} unselected {target.what}, the first is {outside[0]}: its "
                f"{matrix} did not start at zero there, or was trained without the mask; castune mask keeps the "
                "selected rows alone"
            )
        if not torch.isfinite(merged).all():
            raise CertificateError(f"{weights}: {path} has values that are not finite after merging")
        counts[f"checked_{target.what}"] += int((~target.mask).sum())
        counts[f"selected_{target.what}"] += int(target.mask.sum())
        counts[f"changed_{target.what}"] += int((changed & target.mask).sum())
        largest = max(largest, (merged.float() - rows.float()).abs().max().item())
    if missing:
        raise CertificateError(
            f"{weights}: the adapter lacks the selected layers {sorted({t.layer for t in missing.values()})}"
        )
    return Certificate(
        model_fingerprint=selection.model_fingerprint,
        selection=selection.heads,
        adapter_hash=adapter_hash(adapter),
        checked_rows=counts["checked_rows"],
        checked_tensors=n_tensors,
        changed_rows=counts["changed_rows"],
        selected_rows=counts["selected_rows"],
        largest_change=largest,
        units=selection.units,
        mlp_groups=selection.mlp_groups,
        checked_columns=counts["checked_columns"],
        changed_columns=counts["changed_columns"],
        selected_columns=counts["selected_columns"],
    )


def plain_lora_config(adapter: Path) -> dict[str, Any]:
    """The settings of a plain LoRA adapter, `r` an int and `lora_alpha` a float; updates are scaled by alpha / r.

    Args:
        adapter: directory of a PEFT adapter.

    Raises:
        CertificateError: missing, damaged, or an adapter that changes more than its tensors A and B say.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        peft_type = config["peft_type"]
        rank, alpha = int(config.get("r", 0)), float(config.get("lora_alpha", 0))
        layers = config.get("layers_to_transform")
        if isinstance(layers, list) and not all(type(layer) is int for layer in layers):
            raise ValueError(f"layers_to_transform is {layers!r}")
        targets = config["target_modules"]
        if isinstance(targets, list) and not all(isinstance(name, str) for name in targets):
            raise ValueError(f"target_modules is {targets!r}")
        if not math.isfinite(alpha):
            raise ValueError(f"lora_alpha is {alpha}")
    except (FileNotFoundError, NotADirectoryError):
        raise CertificateError(f"{path}: no such file; give the directory of a PEFT adapter") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CertificateError(f"{path}: damaged: {error!r}") from None
    if peft_type != "LORA":
        raise CertificateError(f"{path}: peft_type is {peft_type}, accepted: LORA")
    if rank < 1:
        raise CertificateError(f"{path}: r is {rank}, accepted: at least 1")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise CertificateError(f"{path}: {key} is set: {reason}; accepted: plain LoRA")
    if config.get("bias", "none") != "none":
        raise CertificateError(f"{path}: bias is {config['bias']!r}, accepted: none")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise CertificateError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}: it changes the base weights; "
            f"accepted: {', '.join(map(str, _PLAIN_INITS))}"
        )
    return {**config, "r": rank, "lora_alpha": alpha}


def _check_scope(adapter: Path, config: dict[str, Any], names: set[str], layers: tuple[int, ...]) -> None:
    """Refuse an adapter that addresses more than the query projections `names` of `layers`."""
    path, targets = adapter / ADAPTER_CONFIG, config["target_modules"]
    for key in ("layers_pattern", "exclude_modules"):
        if config.get(key):
            raise CertificateError(f"{path}: {key} is {config[key]!r}, accepted here: none")
    if not isinstance(targets, list) or set(targets) != names:
        raise CertificateError(f"{path}: target_modules is {targets!r}, accepted for this model: {sorted(names)}")
    adapted = config.get("layers_to_transform")
    if not isinstance(adapted, list) or sorted(adapted) != list(layers):
        # Layers the file has no weights for would be initialised when it is loaded, B at random if so configured.
        raise CertificateError(f"{path}: layers_to_transform is {adapted!r}, accepted here: {list(layers)}")


def _check_paths(adapter: Path, config: dict[str, Any], wanted: Collection[str], modules: Collection[str]) -> None:
    """Refuse an adapter whose settings address other modules of the base than `wanted`, as PEFT would match them."""
    path, names = adapter / ADAPTER_CONFIG, config["target_modules"]
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if config.get(key):
            raise CertificateError(f"{path}: {key} is {config[key]!r}, accepted here: none, target_modules alone")
    if not isinstance(names, list):
        raise CertificateError(f"{path}: target_modules is {names!r}, accepted: a list of module paths")
    addressed = {module for module in modules if any(module == n or module.endswith(f".{n}") for n in names)}
    if addressed != set(wanted):
        different = sorted(addressed ^ set(wanted))
        raise CertificateError(
            f"{path}: target_modules addresses {different[0]}, which holds no selected unit"
            if different[0] in addressed
            else f"{path}: target_modules does not address {different[0]}, which holds a selected unit"
        )


def check_loaded(adapter: Path, config: Mapping[str, Any], paths: Collection[str], modules: Collection[str]) -> None:
    """Refuse an adapter with tensors that PEFT leaves out without a word, by its own way of matching.

    Args:
        adapter: directory of a PEFT adapter.
        config: its settings.
        paths: of the modules that its weights file has tensors for.
        modules: of the base.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    settings = LoraConfig(**{key: config.get(key) for key in keys})
    for path in paths:
        if path not in modules:
            raise CertificateError(
                f"{adapter / ADAPTER_WEIGHTS}: adapts {PREFIX}{path}, which this model does not have: made "
                "for another model"
            )
        if config["target_modules"] != "all-linear" and not check_target_module_exists(settings, path):
            told = ", ".join(f"{key} = {config[key]!r}" for key in keys if config.get(key))
            raise CertificateError(
                f"{adapter / ADAPTER_CONFIG}: by {told} PEFT would not load the tensors of {PREFIX}{path}"
            )


def merged_rows(rows: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`rows + scaling * (b @ a)`, with the arithmetic of PEFT's `merge_and_unload`.

    PEFT reads 16-bit adapters as float32; only the sum is rounded to the dtype of the base.

    Args:
        rows: weight of the projection, `[rows, D]`.
        a: LoRA's A, `[R, D]`.
        b: LoRA's B, `[rows, R]`.
        scaling: alpha / r.
    """
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return (rows + (b @ a) * scaling).to(rows.dtype).contiguous()


def lora_pairs(weights: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module path, A, B) of every module an adapter's weights file adapts.

    Raises:
        CertificateError: no readable safetensors file, or it holds anything but pairs of A and B.
    """
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CertificateError(f"{weights}: no readable safetensors file ({error})") from None
    for key in tensors:
        if not key.startswith(PREFIX) or _COMPILED in key:
            found = (
                f"has the prefix {_COMPILED!r} of torch.compile"
                if _COMPILED in key
                else f"does not begin with {PREFIX!r}"
            )
            raise CertificateError(
                f"{weights}: {key} {found}: PEFT would not load it, and the model would stay as it is"
            )
    paths = sorted({key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for key in tensors})
    known = {f"{path}.lora_{part}.weight" for path in paths for part in "AB"}
    if known != tensors.keys():
        raise CertificateError(f"{weights}: {sorted(known ^ tensors.keys())[0]}: unexpected or missing tensor")
    for path in paths:
        yield path.removeprefix(PREFIX), tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers of the same shape, so that comparison sees the payload of NaN."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
