"""The loss is that of the masked tokens, and the adapter that is written is the model that was
trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from agent.model.base import merge_lora  # noqa: E402
from agent.recipe.data import Example, write_examples  # noqa: E402
from agent.recipe.lora import adapter_state, add_lora, save_adapter  # noqa: E402
from agent.recipe.train import (  # noqa: E402
    Settings,
    TokenFile,
    TrainingProgress,
    batches_of_like_length,
    fit,
    held_out_loss,
    learning_rate,
    loss_sum,
)

R, ALPHA = 4, 8.0


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    shape: dict[str, float] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    shape["initializer_range"] = (
        0.3  # with the default the frozen head could say nothing with certainty
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **shape))


def tokens(path: Path, count: int = 24) -> TokenFile:
    rng = np.random.default_rng(0)
    examples = []
    for index in range(count):
        prompt, turn = rng.integers(3, 64, rng.integers(4, 12)).tolist(), [7, 8, 9, 2]
        examples.append(
            Example(
                prompt + turn,
                [0] * len(prompt) + [1] * 4,
                "kind/plain",
                "1",
                held_out=index % 6 == 0,
            )
        )
    write_examples(examples, path / "tokens.npz")
    return TokenFile.read(path / "tokens.npz")


def test_the_loss_is_transformers_own_over_the_masked_tokens(tmp_path: Path) -> None:
    model, data = tiny_model(), tokens(tmp_path)
    batch = data.batch(np.array([0, 1, 2]), "cpu")
    labels = torch.full(batch.ids.shape, -100).flatten()
    labels[batch.learned] = batch.ids.flatten()[batch.learned]
    expected = model(input_ids=batch.ids, labels=labels.view(batch.ids.shape)).loss
    assert torch.allclose(loss_sum(model, batch) / batch.learned.numel(), expected, atol=1e-5)


def test_batches_hold_every_row_once_and_keep_to_the_limit(tmp_path: Path) -> None:
    lengths = tokens(tmp_path, 100).lengths()
    parts = list(batches_of_like_length(lengths, np.arange(100), 64, np.random.default_rng(1)))
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert all(len(part) * lengths[part].max() <= 64 for part in parts)


def alike(path: Path, rows: int = 20) -> TokenFile:
    """Conversations whose first 130 tokens are the same, as with the same tools in the prompt, and
    a few others.
    """
    rng = np.random.default_rng(0)
    start = rng.integers(3, 64, 130).tolist()
    examples = []
    for index in range(rows + 3):
        prompt = (start if index < rows else rng.integers(3, 64, 130).tolist()) + rng.integers(
            3, 64, rng.integers(4, 12)
        ).tolist()
        turns = [7, 8, 2, 5, 6, 9, 2]
        examples.append(
            Example(
                prompt + turns,
                [0] * len(prompt) + [1, 1, 1, 0, 0, 1, 1],
                "kind/plain",
                "1",
                held_out=False,
            )
        )
    write_examples(examples, path / "alike.npz")
    return TokenFile.read(path / "alike.npz")


def test_a_shared_beginning_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    data, rows = alike(tmp_path), np.array([0, 3, 5])
    found = []
    for share in (False, True):
        model = tiny_model()
        parameters = add_lora(model, R, ALPHA)
        for parameter in parameters:
            torch.nn.init.normal_(
                parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel())
            )
        batch = data.batch(rows, "cpu", share=share)
        assert (batch.shared >= 130) == share
        loss = loss_sum(model, batch)
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in parameters]))
    (plain, plain_gradients), (shared, shared_gradients) = found
    assert torch.allclose(plain, shared, rtol=1e-5)
    assert all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(plain_gradients, shared_gradients, strict=True)
    )


def test_rows_that_are_the_same_throughout_still_have_a_token_that_predicts_the_first_with_loss(
    tmp_path: Path,
) -> None:
    data = alike(tmp_path)
    batch, plain = (
        data.batch(np.array([2, 2]), "cpu", share=True),
        data.batch(np.array([2, 2]), "cpu"),
    )
    assert batch.learned.min() == 1
    assert torch.allclose(loss_sum(tiny_model(), batch), loss_sum(tiny_model(), plain), rtol=1e-5)
    assert data.batch(np.array([2]), "cpu", share=True).shared == 0


def test_batches_of_conversations_that_begin_alike_hold_no_others(tmp_path: Path) -> None:
    data = alike(tmp_path)
    groups = data.groups()
    assert len(set(groups[:20])) == 1
    assert groups[0] > 0
    assert groups[20:].tolist() == [0, 0, 0]
    parts = list(
        batches_of_like_length(data.lengths(), np.arange(23), 700, np.random.default_rng(1), groups)
    )
    assert sorted(np.concatenate(parts).tolist()) == list(range(23))
    assert all(len(set(groups[part])) == 1 for part in parts)


def test_training_lowers_the_held_out_loss_and_touches_the_adapter_alone(tmp_path: Path) -> None:
    model, data = tiny_model(), tokens(tmp_path)
    add_lora(model, R, ALPHA)
    frozen = {
        name: value.clone() for name, value in model.named_parameters() if not value.requires_grad
    }
    before = held_out_loss(model, data, 256, "cpu")["all"]
    fit(
        model,
        data,
        Settings(lr=2e-2, batch_tokens=256, epochs=30, max_seconds=60, r=R, alpha=ALPHA),
        "cpu",
        lambda progress: None,
    )
    assert held_out_loss(model, data, 256, "cpu")["all"] < 0.7 * before
    assert all(
        torch.equal(value, frozen[name])
        for name, value in model.named_parameters()
        if name in frozen
    )


def test_ctrl_c_ends_a_training_early_and_says_so(tmp_path: Path) -> None:
    model, data = tiny_model(), tokens(tmp_path)
    add_lora(model, R, ALPHA)
    settings = Settings(lr=1e-3, batch_tokens=256, epochs=2, max_seconds=60, r=R, alpha=ALPHA)
    seen: list[int] = []

    def interrupt(progress: TrainingProgress) -> None:
        seen.append(progress.step)
        if progress.step == 2:
            raise KeyboardInterrupt

    assert not fit(model, data, settings, "cpu", interrupt)
    assert seen == [0, 1, 2]
    assert fit(model, data, settings, "cpu", lambda progress: None)


def test_the_file_merged_into_the_base_is_the_trained_model(tmp_path: Path) -> None:
    base, model = tiny_model(), tiny_model()
    add_lora(model, R, ALPHA)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(torch.bfloat16).float()  # what the file can hold
    state = adapter_state(model)
    save_adapter(state, R, ALPHA, "some/base", tmp_path)
    weights = base.state_dict()
    merge_lora(weights, state, json.loads((tmp_path / "adapter_config.json").read_text()))
    base.load_state_dict(weights)
    ids = torch.arange(3, 20)[None]
    assert torch.allclose(base(ids).logits, model(ids).logits, atol=1e-5)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = Settings(lr=1.0, batch_tokens=1, epochs=1, max_seconds=1)
    assert learning_rate(settings, 0.0) == 0.0
    assert learning_rate(settings, settings.warmup) == 1.0
    assert learning_rate(settings, 1.0) == pytest.approx(0.05)
