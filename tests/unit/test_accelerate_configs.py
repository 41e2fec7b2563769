"""The configs for `accelerate launch` that are shipped: accelerate reads them, and refuses keys it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    # castune trains in the dtype of the recipe.
    assert config.mixed_precision == "no"


def test_there_are_some_and_accelerate_refuses_others(tmp_path: Path) -> None:
    assert {path.stem for path in CONFIGS} == {"ddp-8gpu", "fsdp2-8gpu"}
    bad = tmp_path / "bad.yaml"
    bad.write_text(CONFIGS[0].read_text() + "nothing_of_the_kind: 1\n")
    with pytest.raises(ValueError, match="nothing_of_the_kind"):
        load_config_from_file(str(bad))
