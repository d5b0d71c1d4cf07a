"""Golden data computed by the published LTX-2, where a copy of it lies at hand."""

import os
from pathlib import Path

import pytest

from aiprod_core.parity.__main__ import run_case

REPOSITORY = Path(__file__).resolve().parents[3]
GOLDEN = Path(os.environ.get("AIPROD_PARITY", REPOSITORY.parent / "shared" / "parity"))
FOLDERS = sorted(path.parent for path in GOLDEN.rglob("case.json")) if GOLDEN.is_dir() else []


@pytest.mark.skipif(
    not FOLDERS, reason="no golden set beside the checkout; set AIPROD_PARITY to its folder"
)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: str(f.relative_to(GOLDEN)))
def test_agrees_with_the_published_model(folder):
    result = run_case(folder)
    assert result.passed, result.reason
