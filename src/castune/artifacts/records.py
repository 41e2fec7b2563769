"""Records that several artifacts hold, as JSON has them: plain dictionaries whose keys are known here.

Keys that are not named here are kept: another version may have written them. Records of other hands may know less. Keys
stand in the order in which they are written: validation puts them into that of the class.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

Settings = dict[str, Any]
"""The resolved settings of a stage, as its pydantic model writes them; read back by that model."""


class AdapterRecord(TypedDict):
    """Which adapter was merged in while a map was measured.

    Attributes:
        arm: name of the arm.
        step: optimiser step it is of.
        hash: `adapter_hash`.
        base: fingerprint of the model without it.
    """

    arm: str
    step: int
    hash: str
    base: str


class ModelRecord(TypedDict, total=False):
    """Identity of a model.

    Attributes:
        name: hub id, or the last part of a path.
        type: transformers' model type.
        fingerprint: of its weights (`castune.core.provenance.fingerprint`).
        parameters: how many.
        quantised: whether linear layers are stored in 4 bits.
        dtype: of the first parameter; of a served model as it was asked for.
        device: of the first parameter; where it runs, of a model that is not loaded here.
        commit: of a hub id.
        chat_template: digest of the template that prompts go through.
        template_date: the day that a template which prints the date was told.
        remote_code: True where the model runs code that came with it.
        server: address of the server it runs behind.
        adapter: hash of the adapter that was measured with it, None without; of a map, the adapter merged in.
        strength: what the adapter's update was multiplied by; absent for 1.
        attack: what was done to it before it was measured (`castune attack`); absent for nothing.
    """

    name: str
    type: str
    fingerprint: str
    parameters: int
    quantised: bool
    dtype: str
    device: str
    commit: str | None
    chat_template: str
    template_date: str
    remote_code: bool
    server: str
    adapter: str | AdapterRecord | None
    strength: float
    attack: dict[str, Any]


class DataRecord(TypedDict, total=False):
    """The data that something was made from.

    Attributes:
        source: by name; None where examples were given as they are.
        n: how many examples.
        hash: `content_hash` of them.
        cut: prompts that lost their beginning to the length limit.
        replies_cut: replies that lost their end to it.
        balance: the column by whose values they were drawn in equal shares, or in `shares`.
        shares: of values of the column `balance`, or `kind`, by which they were drawn.
        left_out: ids of examples that were not used, because a suite holds their prompts.
        replayed: of utility data, how many of the training examples are from it.
    """

    source: str | None
    n: int
    hash: str
    cut: int
    replies_cut: int
    balance: str | None
    shares: dict[str, float] | None
    left_out: list[str]
    replayed: int


class CodeRecord(TypedDict):
    """State of castune's own checkout: commit, and whether files differ from it."""

    commit: str
    dirty: bool


class Provenance(TypedDict, total=False):
    """By what, where and when something was made.

    Attributes:
        rules: `castune.artifacts.rules.RULES`.
        date: UTC, ISO 8601.
        command: the command line, without secrets.
        seed: of the stage.
        versions: of Python, castune and the libraries that matter; None for those that are not installed.
        machine: system and processor.
        threads: of torch.
        accelerators: their names.
        code: None where castune is installed without its checkout.
    """

    rules: int
    date: str
    command: str
    seed: int | None
    versions: dict[str, str | None]
    machine: str
    threads: int
    accelerators: list[str]
    code: CodeRecord | None


class Phase(TypedDict):
    """A part of a training that selected again, with the units it trained.

    Attributes:
        step: optimiser step after which it began.
        units: the selected [kind, layer, index].
        map_hash: of the map they were chosen from.
    """

    step: int
    units: list[list[str | int]]
    map_hash: str | None


class NullSpaceRecord(TypedDict):
    """The directions that a training in the null space of the utility activations left out.

    Attributes:
        share: of the second moment that they hold at least, in every projection.
        tokens: of D_util that they were found on.
        directions: of every adapted projection, by module path: how many were left out, of how many.
    """

    share: float
    tokens: int
    directions: dict[str, tuple[int, int]]


# Validation keeps keys that are not named above (pydantic's configuration of a TypedDict).
for _record in (AdapterRecord, ModelRecord, DataRecord, CodeRecord, Provenance, NullSpaceRecord):
    setattr(_record, "__pydantic_config__", {"extra": "allow"})  # noqa: B010 (no key of the record)
