"""verl `DataProto` files, one a batch: the tensors that `generate_sequences` returns.

They are written with verl's own `save_to_disk`, which is a pickle: `DataProto.load_from_disk` runs
any code in such a file, so load only files that you wrote. turntrace never loads one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from conversations.errors import ExportError
from conversations.export.formats import ORIGIN, Format, Record, Row, Source
from conversations.images.pixels import joined_pixels, pixels_of, slow_processor
from conversations.images.processor import ImageProcessor
from conversations.images.reading import Picture
from conversations.padding import padded_batch
from conversations.run.open_run import TOKENIZER, recorded_processor
from conversations.run.saved_tokenizer import load_tokenizer
from conversations.trajectory import Trajectory


def _rows(source: Source) -> Iterator[Row]:
    """One row a batch: its arrays, and the non-tensors."""
    prompt_length, response_length = _lengths(source.run.manifest)
    tokenizer = load_tokenizer(source.run.path / TOKENIZER)
    pad_id = _pad_id(tokenizer)
    processor = recorded_processor(source.run.manifest, tokenizer)
    trajectories = ((_trainable(record), record) for record in source.with_ids())
    while pairs := list(islice(trajectories, source.batch_size)):
        batch = [one for one, _ in pairs]
        arrays = padded_batch(
            batch,
            prompt_length=prompt_length,
            response_length=response_length,
            pad_id=pad_id,
            merge_size=processor.merge_size if processor else None,
        )
        yield {
            "arrays": arrays,
            "messages": [{"messages": one.messages} for one in batch],
            **(_seen(source, [record for _, record in pairs], processor) if processor else {}),
            **_columns(batch),
            "branch": [record["branch"] for _, record in pairs],
            "reason": [record["reason"] for _, record in pairs],
        }


def _seen(
    source: Source, records: Sequence[Record], processor: ImageProcessor
) -> dict[str, list[Any]]:
    """verl's columns of images: PIL images, and what the vision tower is given."""
    image_processor = slow_processor(processor)
    pictures = [
        [
            Picture(image["sha256"], image["width"], image["height"], png)
            for image, png in zip(record["images"], source.images(record), strict=True)
        ]
        for record in records
    ]
    return {
        "multi_modal_data": [{"image": [one.image() for one in each]} for each in pictures],
        "multi_modal_inputs": [
            joined_pixels([pixels_of(one, image_processor) for one in each]) for each in pictures
        ],
    }


def _trainable(record: Record) -> Trajectory:
    """The trajectory; the mask of an infrastructure failure is 0 throughout, as in a trainer."""
    mask = [0] * len(record["response_ids"]) if record["infra_error"] else record["response_mask"]
    known = {name: value for name, value in record.items() if name not in ("branch", "reason")}
    return Trajectory.from_record({**known, "response_mask": mask})


def _columns(batch: Sequence[Trajectory]) -> dict[str, list[Any]]:
    return {
        "reward_scores": [one.reward_parts for one in batch],
        "request_id": [one.id for one in batch],
        "uid": [one.task_id for one in batch],
        "reward": [one.reward for one in batch],
        "ground_truth": [one.ground_truth for one in batch],
        "data_source": [one.data_source for one in batch],
        "__num_turns__": [one.num_turns for one in batch],
    }


def _lengths(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """The run's `prompt_length` and `response_length`, the padded lengths; 0 if it has none."""
    config = manifest.get("config")
    rollout = config.get("rollout") if isinstance(config, dict) else None
    found = rollout if isinstance(rollout, dict) else {}
    prompt, response, longest = (
        each if isinstance(each := found.get(name), int) else 0
        for name in ("prompt_length", "response_length", "max_model_len")
    )
    return prompt, min(response, longest or response)  # a session may have more than a sequence


def _pad_id(tokenizer: Any) -> int:
    """The tokenizer's pad token, or else its end-of-text token, as in verl."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ExportError(
            "the run's tokenizer has neither a pad nor an end-of-text token to pad with"
        )
    return int(pad)


def _write(rows: Iterator[Row], folder: Path) -> int:
    try:
        import numpy as np
        import torch
        from verl import DataProto
    except ImportError as error:
        raise ExportError(
            f"dataproto needs verl and torch, and {error.name} is not installed: "
            "pip install 'turntrace[cuda]', or `make demo` in a checkout on a CPU machine"
        ) from error
    number = -1
    for number, row in enumerate(rows):
        tensors = {name: torch.from_numpy(array) for name, array in row.pop("arrays").items()}
        columns = {name: _objects(values, np) for name, values in row.items()}
        DataProto.from_dict(tensors=tensors, non_tensors=columns).save_to_disk(
            folder / f"batch-{number:05d}.pkl"
        )
    return number + 1


def _objects(values: list[Any], np: Any) -> Any:
    """A one-dimensional array of any objects."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


DATAPROTO = Format(
    name="dataproto",
    consumer="verl's DataProto.load_from_disk",
    rows=_rows,
    write=_write,
    unit="batch",
    fields={
        "prompts, responses, input_ids, attention_mask, position_ids": "int64, padded to the run's "
        "prompt_length and response_length",
        "response_mask": "int64, 1 exactly where the engine sampled the token",
        "rollout_log_probs": "float32, the engine's, 0 where nothing was sampled",
        "multi_modal_data, multi_modal_inputs": "of models that see: PIL images; pixel_values and "
        "image_grid_thw by transformers' Qwen2VLImageProcessor. position_ids have four rows then",
        "messages, reward_scores, request_id": "non-tensors as in verl 0.6.1's rollout: messages, "
        "reward parts, the trajectory's id",
        "uid, reward, ground_truth, data_source, __num_turns__": "the group's id, "
        "and more of the record",
        "branch, reason": ORIGIN["branch, reason"],
    },
    takes_images=True,
    usage='DataProto.load_from_disk("batch-00000.pkl"), a pickle: load none from elsewhere',
)
