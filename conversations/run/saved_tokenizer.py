"""Loads the tokenizer of a run's `tokenizer/` as data: a run folder may come from anyone.

Invariant: nothing in the folder is run as code. `tokenizer.json` is read, whatever class the folder
names, so neither remote code nor a slow tokenizer's pickles are; the chat template runs in jinja2's
sandbox.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from conversations.errors import RunFolderError
from conversations.tokenizer import TOKENIZER_FILE, FileTokenizer, read_tokenizer

T = TypeVar("T")


def load_tokenizer(folder: Path) -> FileTokenizer:
    """The tokenizer of a folder. Raises RunFolderError if it cannot be read."""
    return _read(folder, read_tokenizer)


def load_transformers_tokenizer(folder: Path) -> Any:
    """The same as transformers' `PreTrainedTokenizerFast`, as trainers want it.

    Raises RunFolderError if it cannot be read, ModuleNotFoundError without transformers.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the class that the folder names
    try:
        return _read(
            folder,
            lambda folder: PreTrainedTokenizerFast.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ),
        )
    finally:
        logging.set_verbosity(before)


def _read(folder: Path, read: Callable[[Path], T]) -> T:
    if not (folder / TOKENIZER_FILE).is_file():
        raise RunFolderError(
            f"{folder} holds no tokenizer.json; "
            "the run was copied without its tokenizer, or it was never written"
        )
    try:
        return read(folder)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise RunFolderError(
            f"{folder} holds no tokenizer that can be read: {class_and_message(error)}"
        ) from error


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, as opposed to a request to stop.

    A panic of the Rust tokenizers is no Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def class_and_message(error: BaseException) -> str:
    """An exception's class and message, cut, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
