"""A conversation that searches keeps what it read and how its calls ended.

A search server that is away counts as infrastructure.
"""

from __future__ import annotations

import json

import pytest

from conversations.template import ChatTemplate
from tests.helpers import call, run_one, runtime, says
from tools.registry import load_tools
from tools.search import SearchTool
from tools.toolset import ToolSet


@pytest.fixture(scope="module")
def searching() -> ToolSet:
    return load_tools("search")


async def test_what_was_found_is_read_and_kept(smollm2: ChatTemplate, searching: ToolSet) -> None:
    engine = says(
        smollm2,
        call("search", query_list=["Who discovered penicillin?"])
        + call("search", query_list=["Mona Lisa painter", "zzzzqqqq"]),
        call("search", query_list="penicillin") + call("search", query_list=[]),
        "It was Alexander Fleming.",
    )
    tool = searching["search"].tool
    await searching.start()
    try:
        record = await run_one(
            runtime(
                smollm2,
                engine,
                [tool],
                prompt_length=8192,
                response_length=8192,
                max_model_len=16_384,
            )
        )
    finally:
        await searching.close()
    assert (record.stop_reason, record.infra_error, record.reward) == ("stop", False, None)
    assert [line.status for line in record.tool_calls] == [
        "ok",
        "ok",
        "invalid_arguments",
        "tool_error",
    ]
    found, both, wrong, empty = record.tool_calls
    assert json.loads(found.response or "")["result"].startswith('Doc 1 (Title: "Penicillin")\n')
    assert found.metrics == {"query_count": 1, "status": "success", "total_results": 3}
    assert json.loads(both.response or "")["result"].startswith('Doc 1 (Title: "Mona Lisa")\n')
    assert (
        wrong.response
        == 'Error: invalid arguments for search: query_list: "penicillin" is not of type "array"'
    )
    assert empty.response == "query_list must be a list of one or more strings"
    assert found.response in [message["content"] for message in record.messages]


async def test_a_search_server_that_is_away_is_no_fault_of_the_models(
    smollm2: ChatTemplate, searching: ToolSet
) -> None:
    away = SearchTool(
        {"retrieval_service_url": "http://127.0.0.1:1/retrieve"}, searching.schemas[0]
    )
    record = await run_one(
        runtime(smollm2, says(smollm2, call("search", query_list=["x"]), "I do not know."), [away])
    )
    await away.close()
    (line,) = record.tool_calls
    assert (line.status, line.response) == ("backend_error", "Error: search is not available")
    assert line.error is not None
    assert "ConnectError" in line.error
    assert (record.infra_error, record.reward) == (True, None)
