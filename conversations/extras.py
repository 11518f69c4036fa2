"""Packages that only some commands need, imported where they are used; an extra brings each."""

from __future__ import annotations

import importlib
from typing import Any

from conversations.errors import MissingPackageError


def pyarrow() -> Any:
    """pyarrow. Raises MissingPackageError, as all functions here."""
    return _module("pyarrow", "tables and Parquet files", "turntrace[parquet]")


def parquet() -> Any:
    """pyarrow's Parquet module."""
    return _module("pyarrow.parquet", "Parquet files", "turntrace[parquet]")


def pandas() -> Any:
    """pandas, which pyarrow makes its data frames with."""
    return _module("pandas", "data frames", "turntrace[parquet]", "pandas")


def pillow() -> Any:
    """Pillow's module `Image`."""
    return _module("PIL.Image", "images", "turntrace[images]")


def safetensors() -> Any:
    """safetensors for numpy arrays."""
    return _module("safetensors.numpy", "evidence files", "turntrace[evidence]")


def _module(name: str, purpose: str, *install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        command = " ".join(f"'{package}'" for package in install)
        raise MissingPackageError(
            f"{purpose} need {error.name or name}, which is not installed: pip install {command}"
        ) from error
