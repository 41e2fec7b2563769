"""Where a model behind a server is, and with which key it is asked."""

from __future__ import annotations

import importlib.util
import os
import re
from urllib.parse import urlsplit

from castune.errors import CastuneError

_HOSTED = "https://api.openai.com/v1"


def server_address(given: str | None = None) -> str:
    """The base URL of a server: the one given, else OPENAI_BASE_URL, else OpenAI's.

    Raises:
        CastuneError: it is no URL, or holds a key or password.
    """
    return _checked_url(given or os.environ.get("OPENAI_BASE_URL", "").strip() or _HOSTED)


def require_openai() -> None:
    """Refuse to ask a server where the library for it is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise CastuneError("a model behind a server needs the package openai: pip install 'castune[openai]'")


def _checked_url(url: str) -> str:
    """A base URL that can be shown, without a slash at its end."""
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        ok = False
    if not ok:
        raise CastuneError("the base URL of a server looks like http://localhost:8000/v1; the one given does not")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise CastuneError(
            f"{parts.scheme}://{parts.hostname}: a base URL is shown and stored, so it has no user, password, query or "
            "fragment; a key goes into OPENAI_API_KEY"
        )
    return url.rstrip("/")


def checked_key(key: str) -> str:
    """A key that fits in a header: what does not would be shown by the error of the library."""
    key = key.strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise CastuneError("OPENAI_API_KEY: a key has only visible ASCII characters and no spaces; is it complete?")
    return key
