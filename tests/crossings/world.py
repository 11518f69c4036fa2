"""What every crossing is made of: a model that says a script, a tool, a user, and one fault among
them.

The script has two turns with a call, then an answer. A user, if there is one, asks once more. The
fault strikes at the second turn or later, so that a conversation that is cut off, forked or moved
to another server after its first turn still meets it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from agent.engines.engine import Generation, SamplingParams
from agent.errors import EngineError
from agent.interactions import load_interactions
from agent.loop.calls import Dispatcher
from agent.loop.images import ImageReader
from agent.loop.runtime import Runtime
from agent.loop.tasks import Task, row_task
from conversations.errors import TemplateError
from conversations.messages import Message
from conversations.template import ChatTemplate, Delta
from conversations.tokens import TOOL
from tests.conversations.formats.written import WRITERS
from tests.helpers import call, logprobs, settings
from tools.base import AskModel, BackendError, BaseTool, ToolResponse
from tools.registry import load_tools

ANSWERS = ("It is 42.", "Yes, 42.")
QUESTION = "What is 6 times 7?"
OPINION, DOUBT = "Give me a second opinion", "Really?"
"""What a tool asks the model, and asks behind the first of `OPINIONS`."""
OPINIONS = ("Looks right.", "Yes, really.")
SLOW = "Take your time."
"""The question of the conversation that only ends when it is let go, or cut off."""


@dataclass(frozen=True, slots=True)
class Script:
    """The turns in one call format, and what opens a turn in the model's template."""

    calls: tuple[str, str]
    opens: str

    @property
    def turns(self) -> tuple[str, ...]:
        return (*self.calls, *ANSWERS)


def script_in(form: str, opens: str) -> Script:
    first, second = (WRITERS[form]([("desk", {"step": step})]) for step in (0, 1))
    return Script((first, second), opens)


HERMES = Script((call("desk", step=0), call("desk", step=1)), "<|im_start|>assistant\n")
SCRIPTS = {
    "qwen3_5_nothink": script_in("qwen3_coder", "<|im_start|>assistant\n"),
    "glm4moe": script_in("glm45", "<|assistant|>"),
}
"""Other formats by a template that TRL ships: calls in XML, and a turn that ends with the next
role's token.
"""

LIMITS = {"prompt_length": 4096, "response_length": 4096, "max_model_len": 8192}
USER_REWARDS = [0.5, 1.0]
DIES_AT = 2
"""The turn at which an engine dies: every feature comes to it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and what must be in the record: stop reason, `infra_error`, the second
    call's status.

    `error` is a word that the record's `error` must hold. `is_kept` is False if no finished record
    may be there.
    """

    name: str
    stop_reason: str = "stop"
    infra_error: bool = False
    status: str = "ok"
    error: str | None = None
    tool: str = "answers"
    user: str | None = None
    dies: bool = False
    refuses: bool = False
    cancels: bool = False
    deadline_s: float | None = None

    @property
    def is_kept(self) -> bool:
        return not self.cancels


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("nothing"),
        Fault("tool raises", tool="raises", status="tool_error"),
        Fault("tool exits", tool="exits", status="tool_error"),
        Fault("backend fails", tool="backend", status="backend_error", infra_error=True),
        Fault("user raises", user="raises", infra_error=True, error="generate_response"),
        Fault("user exits", user="exits", infra_error=True, error="generate_response"),
        Fault("user hangs", user="hangs", infra_error=True, error="generate_response"),
        Fault("user ignores", user="ignores", infra_error=True, error="generate_response"),
        Fault("user asks too much", user="huge", infra_error=True, error="reward"),
        Fault("cancelled", tool="hangs", cancels=True, stop_reason="cancelled", status="cancelled"),
        Fault("deadline", tool="hangs", deadline_s=2.0, stop_reason="deadline", status="cancelled"),
        Fault("template refuses", refuses=True, stop_reason="engine_error", error="refuse"),
        Fault("engine dies", dies=True, stop_reason="engine_error", infra_error=True, error="503"),
    )
}

# ---------------------------------------------------------------------- the parts


class Model:
    """Says a script's turns one after the other, told apart by how many it is shown.

    At turn `waits_at` it waits until it is cancelled; a conversation that asks `SLOW` waits for
    `let_go` instead.
    """

    def __init__(
        self,
        template: ChatTemplate,
        script: Script = HERMES,
        *,
        dies: bool = False,
        waits_at: int | None = None,
    ) -> None:
        self.template = template
        self.script = script
        self.dies = dies
        self.waits_at = waits_at
        self.waiting = asyncio.Event()
        self.let_go = asyncio.Event()
        self.given: list[dict[str, Any]] = []
        """What else each request held: `evidence` and `images`."""

    def describe(self) -> dict[str, Any]:
        return {"name": "crossing"}

    def turn(self, prompt_ids: Sequence[int]) -> tuple[int, list[int]]:
        """The number of the turn that comes next, and its ids."""
        number = self.template.decode(prompt_ids).count(self.script.opens) - 1
        is_call = number < len(self.script.calls)
        end = self.template.missing_end(None, TOOL) if is_call else [self.template.end_id]
        return number, [*self.template.encode(self.script.turns[number]), *end]

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, request_id: str, **given: Any
    ) -> Generation:
        number, ids = self.turn(prompt_ids)
        self.given.append({**given, "images": list(given.get("images", ()))})
        await asyncio.sleep(0)
        if self.dies and number == DIES_AT:
            raise EngineError("the engine answered with status 503")
        if number == self.waits_at:
            self.waiting.set()
            await asyncio.Event().wait()
        if number == 0 and SLOW in self.template.decode(prompt_ids):
            await self.let_go.wait()
        return Generation(ids, logprobs(ids), "stop")

    async def abort(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


class Desk(BaseTool):
    """Answers step 0; what step 1 does is its config's `behaviour`. `hanging` is set once it hangs.

    `last` is the one that was made last.
    """

    config_keys = frozenset({"behaviour", "shows"})
    last: ClassVar[Desk]

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any]) -> None:
        super().__init__(config, tool_schema)
        self.hanging = asyncio.Event()
        Desk.last = self

    async def create(
        self, instance_id: str | None = None, **create_kwargs: Any
    ) -> tuple[str, ToolResponse]:
        assert instance_id is not None
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        if parameters["step"] == 1:
            await self._misbehave(self.config.get("behaviour", "answers"))
        text = f"step {parameters['step']} done"
        return ToolResponse(text, image=[picture()] if self.config.get("shows") else None), 0.25, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 1.0

    async def _misbehave(self, behaviour: str) -> None:
        if behaviour == "raises":
            raise ZeroDivisionError("inside")
        if behaviour == "exits":
            raise SystemExit(3)
        if behaviour == "backend":
            raise BackendError("connection refused")
        if behaviour == "hangs":
            self.hanging.set()
            await asyncio.Event().wait()


class AskingDesk(Desk):
    """Asks the model for a second opinion, two turns long, before it does its step."""

    asks_model = True

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        model: AskModel = kwargs.pop("model")
        chat = model.chat([{"role": "user", "content": f"{OPINION} ({parameters['step']})"}])
        assert (await chat.answer(), await chat.answer(DOUBT)) == OPINIONS
        return await super().execute(instance_id, parameters, **kwargs)


def picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 48), (200, 30, 30))


class User:
    """Asks once whether the answer is right, then is content; or does what its config's `behaviour`
    says.

    `last` is the one that was made last. One that ignores cancellation ends at `let_go`.
    """

    last: ClassVar[User]

    def __init__(self, config: dict[str, Any]) -> None:
        User.last = self
        self.let_go = asyncio.Event()
        self.behaviour = config.get("behaviour", "asks")
        self.asked: dict[str, int] = {}

    async def start_interaction(self, instance_id: str | None = None, **kwargs: Any) -> str:
        self.asked[instance_id or ""] = 0
        return instance_id or ""

    async def generate_response(
        self, instance_id: str, messages: list[Message], **kwargs: Any
    ) -> tuple[bool, str, float, dict[str, Any]]:
        if self.behaviour == "raises":
            raise ValueError("inside")
        if self.behaviour == "exits":
            raise SystemExit(3)
        if self.behaviour == "hangs":
            await asyncio.Event().wait()
        if self.behaviour == "ignores":
            await self._ignore_cancellation()
        asked = self.asked[instance_id]
        self.asked[instance_id] += 1
        reward = 1e39 if self.behaviour == "huge" else USER_REWARDS[asked]
        return asked == 1, "Are you sure?" if asked == 0 else "", reward, {}

    async def finalize_interaction(self, instance_id: str, **kwargs: Any) -> None:
        del self.asked[instance_id]

    async def _ignore_cancellation(self) -> None:
        """Swallows a thousand cancellations: more than anybody who gives up waiting will send."""
        for _ in range(1000):
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                async with asyncio.timeout(3600):
                    await self.let_go.wait()
                    return


class RefusingTemplate(ChatTemplate):
    """Refuses the messages that follow the second turn."""

    def delta(self, messages: Sequence[Message], kind: str = "tool", **where: Any) -> Delta:
        if any("step 1" in str(message["content"]) for message in messages):
            raise TemplateError("the chat template refuses these messages")
        return super().delta(messages, kind, **where)


# ---------------------------------------------------------------------- a world with one fault


@dataclass(frozen=True, slots=True)
class World:
    """One fault, its files, and what a feature needs to run conversations into `out`."""

    fault: Fault
    template: ChatTemplate
    folder: Path
    with_user: bool
    script: Script = HERMES

    @property
    def sees(self) -> bool:
        """The model sees images: the task has one, and so has each answer of the tool."""
        return self.template.images is not None

    @property
    def out(self) -> Path:
        return self.folder / "run"

    @property
    def tools_path(self) -> Path:
        return self.folder / "tools.yaml"

    @property
    def users_path(self) -> Path:
        return self.folder / "interactions.yaml"

    def write_files(self) -> None:
        """tools.yaml and interactions.yaml, the fault in their config."""
        shows = str(self.sees).lower()
        self.tools_path.write_text(TOOLS.format(behaviour=self.fault.tool, shows=shows))
        self.users_path.write_text(USERS.format(behaviour=self.fault.user or "asks"))

    def tasks(self, *questions: str) -> list[Task]:
        kwargs = {"interaction_kwargs": {"name": "user"}} if self.with_user else {}
        rows = [{"prompt": text, "extra_info": kwargs} for text in questions or (QUESTION,)]
        if self.sees:
            rows = [
                {**row, "prompt": f"<image>{row['prompt']}", "images": [picture()]} for row in rows
            ]
        return [row_task(row, f"t{i}") for i, row in enumerate(rows)]

    def runtime(self, engine: Any) -> Runtime:
        tools = load_tools(self.tools_path)
        template = self.template
        if self.fault.refuses:
            template = RefusingTemplate(template.tokenizer, images=template.images)
        reader = ImageReader(template.images) if template.images else None
        made = Runtime(
            engine,
            template,
            settings(**LIMITS, deadline_s=self.fault.deadline_s),
            Dispatcher(
                tools,
                max_parallel_calls=16,
                shorten=lambda text: None,
                images=reader,
                placeholder=template.holds_placeholder,
            ),
            images=reader,
        )
        users = load_interactions(self.users_path) if self.with_user else None
        return replace(made, interactions=users)

    def model(self, **options: Any) -> Model:
        return Model(self.template, self.script, dies=self.fault.dies, **options)

    def manifest(self) -> dict[str, Any]:
        """A run.json of which verify can say everything."""
        multi_turn = {"enable": True, "max_tool_response_length": 256}
        multi_turn |= {"tool_response_truncate_side": "middle"}
        rollout = {**LIMITS, "name": "sglang", "multi_turn": multi_turn}
        return {
            "config": {"model_path": "smollm2-base", "rollout": rollout},
            "tools": self.tools_path.read_text(),
            "call_format": self.template.format_entry(),
            "image_processor": self.template.images.as_json() if self.template.images else None,
            "n": 1,
            "parent": None,
        }


TOOLS = """
- class_path: tests.crossings.world.Desk
  config: {{behaviour: {behaviour}, shows: {shows}}}
  tool_schema:
    type: function
    function:
      name: desk
      description: Does the next step.
      parameters: {{type: object, required: [step], properties: {{step: {{type: integer}}}}}}
"""
USERS = """
interaction:
- class_name: tests.crossings.world.User
  name: user
  config: {{behaviour: {behaviour}, timeout_s: 2}}
"""

Feature = Callable[[World], None]
