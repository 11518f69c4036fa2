"""LLaMA-Factory's own reading of a ShareGPT export: its converter, its `qwen` template; token
ids and loss mask of each row to stdout.

    python llamafactory_reads.py FOLDER TOKENIZER

A process of its own, as two things must be arranged first: the package's `data` is imported
module by module, because all of it wants a user interface, and torchaudio, which is not
installed and not used for text, is an empty module.
"""

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import transformers  # before the empty module: it looks for torchaudio itself


def main(folder: Path, tokenizer_folder: str) -> None:
    _arrange()
    from llamafactory.data.converter import SharegptDatasetConverter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.template import TEMPLATES

    info = json.loads((folder / "dataset_info.json").read_text())["turntrace"]
    attributes = DatasetAttr(
        "file", info["file_name"], formatting=info["formatting"], **info["columns"]
    )
    convert = SharegptDatasetConverter(attributes, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    template = TEMPLATES["qwen"]
    for line in (folder / info["file_name"]).read_text().splitlines():
        row = convert(json.loads(line))
        pairs = template.encode_multiturn(
            tokenizer, row["_prompt"] + row["_response"], row["_system"], row["_tools"]
        )
        ids = [token for pair in pairs for part in pair for token in part]
        mask = [own for pair in pairs for part, own in zip(pair, (0, 1), strict=True) for _ in part]
        print(
            json.dumps(
                {
                    "roles": [turn["role"] for turn in row["_prompt"] + row["_response"]],
                    "ids": ids,
                    "mask": mask,
                }
            )
        )


def _arrange() -> None:
    audio = types.ModuleType("torchaudio")
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = audio
    found = importlib.util.find_spec("llamafactory")
    data = types.ModuleType("llamafactory.data")
    data.__path__ = [f"{found.submodule_search_locations[0]}/data"]
    sys.modules["llamafactory.data"] = data


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
