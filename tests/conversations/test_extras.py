"""A package that is not installed is one line that names the extra."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conversations.errors import MissingPackageError
from conversations.export import job
from tests.conversations.exports import small_run


@pytest.mark.parametrize("to", ["parquet", "verl-sft", "verl-rl", "trl-sft"])
def test_an_export_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"turntrace\[parquet\]") as raised:
        job.export_run(small_run(), to, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_table_without_pandas_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pandas"):
        small_run().to_pandas()
