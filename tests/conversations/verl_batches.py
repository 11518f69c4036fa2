"""verl's own multi-turn loop beside `padded_batch`: prints which tensors are equal, fails where
one is not.

    python -m tests.conversations.verl_batches

A process of its own: verl's rollout wants a process group, import guards on a CPU, and
environment variables.
"""

import asyncio
from dataclasses import replace

import numpy as np

from conversations.padding import padded_batch
from conversations.trajectory import Trajectory
from tests.bench.loop_cpu import _peer
from tests.bench.workload import workload
from tests.conversations.exports import small_run


def main() -> None:
    work = workload()
    with _peer(work) as peer:
        from tests.bench import verl_peer

        asyncio.set_event_loop(peer._loop)
        length = 3 * verl_peer.TOKENS_PER_TURN
        config = verl_peer.rollout_config(
            peer._tools, 3, verl_peer.PROMPT_LENGTH, length, "disable"
        )
        rollout = verl_peer.rollout(config, peer._model, peer._engine)
        done = rollout.generate_sequences(verl_peer.batch(verl_peer.tasks(5), verl_peer.TOOL_NAME))
        tensors = {name: tensor.numpy() for name, tensor in done.batch.items()}
        ours = padded_batch(
            list(
                map(
                    _trajectory,
                    *(
                        tensors[name]
                        for name in ("prompts", "responses", "response_mask", "attention_mask")
                    ),
                )
            ),
            prompt_length=rollout.config.prompt_length,
            response_length=rollout.config.response_length,
            pad_id=rollout.pad_token_id,
            logprobs=False,
        )
    for name, array in ours.items():
        assert array.dtype == tensors[name].dtype, (
            f"{name}: {array.dtype}, verl's is {tensors[name].dtype}"
        )
        assert np.array_equal(array, tensors[name]), f"{name} differs"
    assert set(ours) == set(tensors), f"verl has {sorted(tensors)}"
    print("equal:", *sorted(ours))


def _trajectory(
    prompt: np.ndarray, response: np.ndarray, mask: np.ndarray, attention: np.ndarray
) -> Trajectory:
    """What verl's row holds, without its padding."""
    real = attention.astype(bool)
    count = int(real[len(prompt) :].sum())
    any_one = next(iter(small_run()))
    return replace(
        any_one,
        prompt_ids=prompt[real[: len(prompt)]].tolist(),
        response_ids=response[:count].tolist(),
        response_mask=mask[:count].tolist(),
        response_logprobs=[None] * count,
    )


if __name__ == "__main__":
    main()
