"""SGLang's own server, started once for the files that ask it: a start takes 20 s of CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.model.base import base_model_dir
from tests.agent.native_api import Launched, free_port, launch, wait_for_health

OPTIONS = {"dtype": "float32", "max-running-requests": 64, "max-total-tokens": 16384}


class OwnServer:
    """`sglang.launch_server` with the model in `model`, on one port. `start` it first."""

    def __init__(self, model: Path, log: Path) -> None:
        self.model = model
        self._port = free_port()
        self._log = log
        self._process: Launched | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts it, and does not wait for it."""
        self._process = launch(self.model, self._port, self._log, **OPTIONS)

    def wait(self) -> None:
        """Returns once it is healthy."""
        assert self._process is not None
        wait_for_health(self._process, self._log)

    def kill(self) -> None:
        """`kill -9` of all of it. Safe if it was never started."""
        if self._process:
            self._process.kill()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    folder = tmp_path_factory.mktemp("server")
    server = OwnServer(tiny_llama(folder / "model"), folder / "log")
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.kill()


def tiny_llama(folder: Path) -> Path:
    """A random two-layer model in float32: tokens of a greedy run do not depend on what else is in
    the batch.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
    vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_dir()).save_pretrained(folder)
    return folder
