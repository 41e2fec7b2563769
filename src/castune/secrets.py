"""Keys and passwords, which must not get into files that travel: recipes, provenance, messages."""

from __future__ import annotations

import os
import re

_SHOWN = "<secret>"
# Tokens of services by their form, credentials in a URL, and values that are called a secret.
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[\w-]*"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?:(?<=[?&\s-])|\b)(?:api[_-]?key|access[_-]?token|auth[_-]?token|password|passwd|secret)[=:]\s*[^\s&\"']+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(?:^|_)KEY(?:$|_)|API_?KEY", re.IGNORECASE)
# Shorter values are switches (`TOKENIZERS_PARALLELISM=false`), and would be found in innocent words.
_SHORTEST = 8


def redacted(text: str) -> str:
    """The text without what looks like a secret, and without the values of variables that hold one."""
    for value in sorted(_of_environment(), key=len, reverse=True):
        text = text.replace(value, _SHOWN)
    return _FORMS.sub(_SHOWN, text)


def has_secret(text: str) -> bool:
    """Whether there is something to redact."""
    return redacted(text) != text


def _of_environment() -> set[str]:
    return {
        value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value.strip()) >= _SHORTEST
    }
