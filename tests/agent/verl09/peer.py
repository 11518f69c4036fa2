"""verl's own agent loop workers, its client and its balancer, around servers that answer from a
script.

Everything but the servers and Ray is verl's: the trainer's config, `AgentLoopWorker`,
`AgentLoopManager`, `LLMServerClient`, `GlobalRequestLoadBalancer`. What would be a Ray actor is
called in process, its arguments pickled as Ray would do. Importing this imports verl 0.8 or later.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopManager, AgentLoopWorker
from verl.protocol import DataProto
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse
from verl.workers.rollout import llm_server
from verl.workers.rollout.replica import TokenOutput

from agent.engines.engine import Generation, SamplingParams
from conversations.template import ChatTemplate
from tests.helpers import LOOK_SCHEMA
from tests.vision import drawn

VERSION = tuple(int(part) for part in verl.__version__.split(".")[:2])
PROMPT, RESPONSE = 512, 512

Say = Callable[[str], Any]
"""What the model says after the text of a prompt: a text (the end token is added), ids, a
TokenOutput, or an exception.
"""


class LookTool(BaseTool):  # type: ignore[misc]
    """A tool of verl's kind.

    It notes what is done to it in `events`, and its reward is the number of its calls.
    """

    events: list[tuple[str, str]] = []  # noqa: RUF012 - of all instances: verl makes some of its own

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        super().__init__(config, tool_schema)
        self.calls: dict[str, int] = {}

    async def create(
        self, instance_id: str | None = None, **kwargs: Any
    ) -> tuple[str, ToolResponse]:
        made, _ = await super().create(instance_id, **kwargs)
        self.calls[made] = 0
        self.events.append(("create", json.dumps(kwargs.get("create_kwargs"))))
        return made, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        self.calls[instance_id] += 1
        self.events.append(("execute", parameters["question"]))
        match parameters["question"]:
            case "break":
                raise RuntimeError("secret of the tool")
            case "hang":
                await asyncio.sleep(60)
            case "long":
                return ToolResponse(text="word " * 300), 0.0, {}
        return ToolResponse(text=f"about {parameters['question']}"), 0.5, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return float(self.calls[instance_id])

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.events.append(("release", str(self.calls[instance_id])))


class PictureTool(LookTool):
    """Answers with pictures of the sizes in the question, drawn from it."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        sizes = json.loads(parameters["question"])
        images = [drawn(random.Random(str(size)), tuple(size)) for size in sizes]
        return ToolResponse(text="Here.", image=images), 0.5, {}


class Server:
    """One of a trainer's servers, as SGLang's or vLLM's answers.

    `seen` holds (prompt ids, sampling params) of each request, `media` its images and the like.
    """

    def __init__(
        self, template: ChatTemplate, say: Say, *, backend: str = "sglang", step: int = 7
    ) -> None:
        self._template, self._say = template, say
        self._backend, self._step = backend, step
        self.seen: list[tuple[list[int], dict[str, Any]]] = []
        self.media: list[dict[str, Any]] = []

    async def generate(
        self,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        **media: Any,
    ) -> TokenOutput:
        self.media.append(media)
        self.seen.append((prompt_ids, dict(sampling_params)))
        await asyncio.sleep(0)
        said = self._say(self._template.decode(prompt_ids))
        said = await said if asyncio.iscoroutine(said) else said
        if isinstance(said, Exception):
            raise said
        if isinstance(said, TokenOutput):
            return said
        ids = self._ids(said)
        limit = sampling_params.get("max_tokens", RESPONSE)
        reason = "length" if len(ids) > limit else "stop"
        return TokenOutput(
            token_ids=ids[:limit],
            log_probs=logprobs(ids[:limit]) if sampling_params["logprobs"] else None,
            stop_reason=reason if self._backend == "sglang" else "completed",
            num_preempted=1,
            extra_fields={"global_steps": self._step},
        )

    def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """What it samples, for an engine of turntrace's own."""
        ids = self._ids(self._say(self._template.decode(prompt_ids)))
        return Generation(ids, logprobs(ids), "stop")

    def _ids(self, said: str | list[int]) -> list[int]:
        return (
            [*self._template.encode(said), self._template.end_id] if isinstance(said, str) else said
        )


def logprobs(ids: Sequence[int]) -> list[float]:
    """What the servers say of ids."""
    return [-0.5 - index / 8 for index in range(len(ids))]


class _Actor:
    """A Ray actor's handle: `await handle.method.remote(...)`, what goes in and out pickled."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=functools.partial(self._remote, getattr(self._actor, name)))

    def _remote(self, method: Any, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        async def answer() -> Any:
            given_args, given = (
                pickle.loads(pickle.dumps((args, kwargs)))
                if method.__name__ == "generate"
                else (args, kwargs)
            )
            result = method(*given_args, **given)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.ensure_future(answer())


class Peers:
    """Makes verl's workers on scripts. `folder` gets their model and config files.

    `config` is the model's config.json, by default a text model's.
    """

    def __init__(
        self, folder: Path, template: ChatTemplate, config: dict[str, Any] | None = None
    ) -> None:
        self._folder = folder
        self._files = 0
        model = folder / "model"
        template.tokenizer.save_pretrained(model)
        (model / "config.json").write_text(
            json.dumps(
                config
                or {
                    "model_type": "qwen2",
                    "architectures": ["Qwen2ForCausalLM"],
                    "transformers_version": "4.57.1",
                    "max_position_embeddings": 1 << 16,
                }
            )
        )
        with initialize_config_dir(
            config_dir=str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None
        ):
            overrides = [
                f"actor_rollout_ref.model.path={model}",
                "actor_rollout_ref.rollout.name=sglang",
            ]
            self._config = OmegaConf.create(
                OmegaConf.to_container(compose("ppo_trainer", overrides), resolve=False)
            )
        self._tokenizer = AgentLoopWorker(self._config, None).tokenizer
        # transformers 5 does not load the tokenizer just as it was saved
        self.template = ChatTemplate(self._tokenizer, images=template.images)
        self._config.actor_rollout_ref.model.load_tokenizer = (
            False  # each worker would load it, twice
        )

    def server(self, say: Say, **options: Any) -> Server:
        return Server(self.template, say, **options)

    def worker(
        self,
        servers: Server | Sequence[Server],
        *,
        tools: bool | str = False,
        options: dict[str, Any] | None = None,
        **rollout: Any,
    ) -> Any:
        """An `AgentLoopWorker`.

        `options` are those of turntrace's entry, `rollout` overrides the trainer's config.
        """
        config = copy.deepcopy(self._config)
        multi_turn = {
            "max_parallel_calls": 16,
            **({"tool_config_path": self.tools(tools)} if isinstance(tools, str) else {}),
            **({"tool_config_path": self.tools()} if tools is True else {}),
            **rollout.pop("multi_turn", {}),
        }
        agent = {"agent_loop_config_path": self.entry(options or {})}
        shape = {"prompt_length": PROMPT, "response_length": RESPONSE, "calculate_log_probs": True}
        config.actor_rollout_ref.rollout.update({**shape, **rollout})
        config.actor_rollout_ref.rollout.multi_turn.update(multi_turn)
        config.actor_rollout_ref.rollout.agent.update(agent)
        worker = AgentLoopWorker(
            config, self.client(config, [servers] if isinstance(servers, Server) else servers)
        )
        worker.tokenizer = copy.copy(self._tokenizer)
        return worker

    def client(self, config: Any, servers: Sequence[Server]) -> Any:
        """verl's client on verl's balancer."""
        balancer = llm_server.GlobalRequestLoadBalancer
        balancer = getattr(
            balancer, "__ray_metadata__", SimpleNamespace(modified_class=balancer)
        ).modified_class
        handles = {str(index): _Actor(server) for index, server in enumerate(servers)}
        return llm_server.LLMServerClient(config, load_balancer_handle=_Actor(balancer(handles)))

    def manager(self, workers: Sequence[Any]) -> Any:
        """An `AgentLoopManager` over these workers."""
        made = AgentLoopManager(workers[0].config, workers[0].llm_client)
        made.agent_loop_workers = [_Actor(worker) for worker in workers]
        return made

    def entry(self, options: dict[str, Any]) -> str:
        target = {"name": "turntrace", "_target_": "agent.verl_agent_loop.TurntraceAgentLoop"}
        return self._write([{**target, **options}])

    def tools(self, tool: str = "LookTool") -> str:
        return self._write(
            {
                "tools": [
                    {
                        "class_name": f"{__name__}.{tool}",
                        "config": {"type": "native"},
                        "tool_schema": LOOK_SCHEMA,
                    }
                ]
            }
        )

    def _write(self, content: Any) -> str:
        self._files += 1
        path = self._folder / f"{self._files}.yaml"  # JSON is YAML
        path.write_text(json.dumps(content))
        return str(path)


def batch(
    questions: Sequence[str | list[Any]],
    *,
    agent: str = "turntrace",
    meta: dict[str, Any] | None = None,
    **columns: Any,
) -> DataProto:
    """A trainer's batch: a row for each question (or list of messages), with what `columns` adds, a
    list of one value a row.
    """
    messages = [
        question if isinstance(question, list) else [{"role": "user", "content": question}]
        for question in questions
    ]
    given = {"raw_prompt": messages, "agent_name": [agent] * len(messages), **columns}
    return DataProto(
        non_tensor_batch={name: _objects(values) for name, values in given.items()},
        meta_info={"global_steps": 3, **(meta or {})},
    )


def _objects(values: Sequence[Any]) -> Any:
    column = np.empty(len(values), dtype=object)
    column[:] = list(values)
    return column
