"""Whether processes of this machine can meet on localhost, as the ranks of torchrun do."""

from __future__ import annotations

import socket

import pytest


def _has_loopback() -> bool:
    try:
        with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()[:2], 5):
            return True
    except OSError:
        return False


needs_loopback = pytest.mark.skipif(
    not _has_loopback(), reason="torchrun's ranks meet on localhost, which this machine cannot reach"
)
