"""What an engine samples beside images is what transformers computes for the same ids and pixels.

`test_other_sglangs.py` runs this file in the environment of another version of SGLang, on tiny
models of each shape with random weights. The prompt holds ids that no text encodes to, and an
image comes from a tool after a sampled turn: whoever decodes and encodes on the way is found.
"""

from __future__ import annotations

import functools
import os
import random
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent.engines.engine import Generation
from agent.engines.servers import SGLangServerEngine
from agent.engines.start import start
from conversations.images.pixels import joined_pixels, pixels_of, slow_processor
from conversations.images.placing import PlacedImage
from conversations.images.processor import ImageProcessor, load_processor
from conversations.tokenizer import FileTokenizer
from tests.agent.native_api import free_port, launched
from tests.agent.test_rollout import ODD_IDS
from tests.vision import SHAPES, picture
from tests.vision_models import weights, write_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

SERVED = "TURNTRACE_TEST_SERVER"
"""Variable: ask SGLang's own server, too, which not every version can be given images by."""
BFLOAT16 = 0.3
"""Nats: what rounding to bf16 may do; wrong positions, pixels or ids cost several."""
NEW_TOKENS = 8
SIZES = ((200, 120), (90, 310))


class Dialog:
    """Ids and images of a conversation with the model in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = FileTokenizer(folder)
        found = load_processor(folder, self.tokenizer)
        assert found is not None
        self.processor: ImageProcessor = found
        self.ids: list[int] = []
        self.images: list[PlacedImage] = []

    def text(self, text: str) -> None:
        self.ids += self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def image(self, seed: int) -> None:
        shown = picture(random.Random(seed), SIZES[seed % 2])
        grid = self.processor.grid(shown.width, shown.height)
        self.text("<|vision_start|>")
        start = len(self.ids)
        self.ids += [self.processor.placeholder_id] * self.processor.tokens(grid)
        self.images.append(PlacedImage(shown, grid, start, len(self.ids)))
        self.text("<|vision_end|>")

    async def turn(self, engine: Any) -> Generation:
        generation: Generation = await engine.generate(
            self.ids,
            {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            request_id=uuid.uuid4().hex,
            images=self.images,
        )
        assert generation.prompt_tokens == len(self.ids)
        assert len(generation.token_ids) == NEW_TOKENS
        return generation

    def error(self, generation: Generation, weights_seed: int = 0) -> float:
        """The largest difference of its log-probs to transformers'."""
        whole = self.ids + generation.token_ids
        found = transformers_logprobs(self.folder, whole, self.pixels(), weights_seed)
        theirs = found[-NEW_TOKENS:]
        return max(abs(one - two) for one, two in zip(generation.logprobs, theirs, strict=True))

    def pixels(self) -> dict[str, Any]:
        own = slow_processor(self.processor)
        return joined_pixels([pixels_of(image.picture, own) for image in self.images])


def transformers_logprobs(
    folder: Path, ids: Sequence[int], pixels: dict[str, Any], seed: int
) -> list[float]:
    """The log-prob of each token after the first."""
    import torch

    whole = torch.tensor([ids])
    model = _transformers_model(folder, seed)
    kinds = {"mm_token_type_ids": (whole == model.config.image_token_id).long()}
    given = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **pixels}
    try:
        with torch.no_grad():
            logits = model(**given, **kinds).logits
    except TypeError:  # transformers 4 finds them itself
        with torch.no_grad():
            logits = model(**given).logits
    found = logits[0].float().log_softmax(-1)
    return [float(found[place - 1, ids[place]]) for place in range(1, len(ids))]


@functools.lru_cache(maxsize=4)
def _transformers_model(folder: Path, seed: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    if not seed:
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="session", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="session")
def rollout(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = {
        "prompt_length": 1024,
        "response_length": 1024,
        "dtype": "bfloat16",
        "max_num_seqs": 4,
        "engine_kwargs": {"sglang": {"max_total_tokens": 8192}},
    }
    made = start(config, model, log_path=tmp_path_factory.mktemp("engine") / "log")
    yield made
    made.shutdown()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SGLangServerEngine]:
    if SERVED not in os.environ:
        pytest.skip(f"{SERVED} is not set")
    log = tmp_path_factory.mktemp("server") / "log"
    with launched(model, free_port(), log) as process:
        engine = SGLangServerEngine([process.url])
        await engine.connect()
        yield engine
        await engine.close()


async def check_conversation(engine: Any, model: Path) -> Dialog:
    """Two turns, an image before each, odd ids before both."""
    dialog = Dialog(model)
    dialog.text("<|im_start|>user\n")
    dialog.image(0)
    dialog.text("What is red?<|im_end|>\n<|im_start|>assistant\n")
    dialog.ids += ODD_IDS
    first = await dialog.turn(engine)
    assert dialog.error(first) < BFLOAT16
    dialog.ids += [*first.token_ids, *ODD_IDS]
    before = len(dialog.ids)
    dialog.text("<|im_end|>\n<|im_start|>user\n<tool_response>\n")
    dialog.image(1)
    dialog.text("Here.\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    second = await dialog.turn(engine)
    assert dialog.error(second) < BFLOAT16
    dialog.ids += second.token_ids
    third = await dialog.turn(engine)
    assert third.cached_tokens is not None
    assert third.cached_tokens >= before
    return dialog


async def test_ids_and_logprobs_in_process(rollout: Any, model: Path) -> None:
    assert not rollout.engine().image_problem()
    await check_conversation(rollout.engine(), model)


async def test_another_image_of_the_same_size_is_another_prompt(rollout: Any, model: Path) -> None:
    """The prefix cache knows an image by its content."""
    for seed in (2, 4):
        dialog = Dialog(model)
        dialog.image(seed)
        dialog.text("What is it?")
        assert dialog.error(await dialog.turn(rollout.engine())) < BFLOAT16


async def test_new_weights_see_the_image_anew(rollout: Any, model: Path) -> None:
    """SGLang would keep embeddings of the weights before."""
    dialog = Dialog(model)
    dialog.image(0)
    dialog.text("What is it?")
    old = await dialog.turn(rollout.engine())
    await rollout.update_weights(iter(weights(model, 1).items()))
    new = await dialog.turn(rollout.engine())
    assert dialog.error(new, 1) < BFLOAT16
    assert dialog.error(old, 1) > BFLOAT16
    await rollout.update_weights(iter(weights(model, 0).items()))
    assert dialog.error(await dialog.turn(rollout.engine())) < BFLOAT16


async def test_ids_and_logprobs_over_http(server: SGLangServerEngine, model: Path) -> None:
    assert not server.image_problem()
    await check_conversation(server, model)
