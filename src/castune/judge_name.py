"""Names of judges of replies: `prefix`, `opening`, `wildguard`, `openai=MODEL`, and several joined by `+`, a panel."""

from __future__ import annotations

from dataclasses import dataclass

from castune.errors import CastuneError

# The kinds, and what stands after the equals sign where none is given; "" needs none, None needs one.
RULES = ("prefix", "opening")
_KINDS: dict[str, str | None] = {"prefix": "", "opening": "", "wildguard": "allenai/wildguard", "openai": None}

ACCEPTED = (
    "prefix, opening, wildguard (or wildguard=MODEL_OR_DIRECTORY), openai=MODEL (any compatible server; address and "
    "key from OPENAI_BASE_URL and OPENAI_API_KEY), or several joined by +, for example prefix+opening"
)


@dataclass(frozen=True)
class JudgeName:
    """One judge.

    Attributes:
        kind: `prefix` and `opening`: rules, on the first 64 or 300 characters of a reply; `wildguard`: a classifier
            that runs here; `openai`: a model behind an OpenAI-compatible server.
        model: the model that judges; empty for rules.
    """

    kind: str
    model: str = ""

    @classmethod
    def parse(cls, text: str) -> list[JudgeName]:
        """The judges that a name stands for: one, or the members of a panel.

        Raises:
            CastuneError: not the name of a judge; the message says what is accepted.
        """
        members = [cls._one(part.strip(), text) for part in text.split("+")]
        if len(set(members)) != len(members):
            raise CastuneError(f"judge {text!r}: a panel has a judge twice")
        return members

    @classmethod
    def _one(cls, part: str, whole: str) -> JudgeName:
        kind, equals, model = part.partition("=")
        default = _KINDS.get(kind)
        if kind not in _KINDS or (equals and (default == "" or not model.strip())) or (default is None and not equals):
            raise CastuneError(f"unknown judge {whole!r}; accepted: {ACCEPTED}")
        return cls(kind, model.strip() or default or "")

    @property
    def is_rule(self) -> bool:
        """Whether it needs no model."""
        return self.kind in RULES

    def __str__(self) -> str:
        return self.kind if self.model == (_KINDS[self.kind] or "") else f"{self.kind}={self.model}"
