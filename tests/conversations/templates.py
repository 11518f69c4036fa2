"""Chat templates of other families, shortened but true to what matters here, and tokenizers to put
them on.
"""

# ruff: noqa: E501 - texts that stand here as they are

from __future__ import annotations

import copy
import functools
from typing import Any

from agent.model.base import base_model_dir
from conversations.template import ChatTemplate
from tests.helpers import fresh_tokenizer

CHATML = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

CHATML_TOOLS = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{- '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

THINKING = CHATML_TOOLS.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")

LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}{{- system + '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '}' + '<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA3_EOM = LLAMA3.replace("'}' + '<|eot_id|>'", "'}' + '<|eom_id|>'")

MISTRAL = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and (loop.last or loop.length == loop.index0 + 2) %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}{{- (c.function | tojson) + (']' if loop.last else ', ') }}{%- endfor %}{{- eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + (m.content | trim) + eos_token }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' }}
{%- endif %}{%- endfor %}"""

MISTRAL_STRICT = MISTRAL.replace(
    "{%- elif m.role == 'tool' %}",
    "{%- elif m.role == 'tool' %}{%- if m.tool_call_id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}",
)

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# What cannot be continued turn by turn.
NUMBERED = CHATML_TOOLS.replace("m.role + '\\n'", "m.role + ' ' + (loop.index | string) + '\\n'")
COUNTS_TOOLS = CHATML_TOOLS.replace(
    "{%- for m in messages %}", "{%- set ns = namespace(n=0) %}{%- for m in messages %}"
).replace(
    "+ m.content }}",
    "+ m.content }}{%- if m.role == 'tool' %}{%- set ns.n = ns.n + 1 %}{{- ' #' + (ns.n | string) }}{%- endif %}",
)
CALL_NAMED = CHATML_TOOLS.replace(
    "{%- for m in messages %}", "{%- set ns = namespace(name='') %}{%- for m in messages %}"
).replace(
    "+ m.content }}",
    "+ (ns.name if m.role == 'tool' else '') + m.content }}"
    "{%- if m.tool_calls %}{%- set ns.name = m.tool_calls[-1].function.name %}{%- endif %}",
)
PLAIN_END = CHATML_TOOLS.replace("<|im_end|>", "###")
LAST_UNENDED = CHATML_TOOLS.replace(
    "{{- '<|im_end|>\\n' }}", "{%- if not loop.last %}{{- '<|im_end|>\\n' }}{%- endif %}"
)
GENERATION_REWRITES = CHATML_TOOLS.replace(
    "{%- for m in messages %}",
    "{{- 'generating' if add_generation_prompt }}{%- for m in messages %}",
    1,
)

NO_TOOL_MESSAGES = CHATML_TOOLS.replace(
    "{%- for m in messages %}", "{%- for m in messages if m.role != 'tool' %}", 1
)
CALL_IDS = CHATML_TOOLS.replace("+ m.content }}", "+ m.content + (m.tool_call_id or '') }}")
NEEDS_TOOLS = "{%- for t in tools %}{{- t.function.name }}{%- endfor %}" + CHATML_TOOLS

GLM = """{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\\n' + (tools | tojson) }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|user|>\\n' + m.content }}
{%- elif m.role == 'system' %}{{- '<|system|>\\n' + m.content }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else %}{{- '<|assistant|>\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{- '\\n<tool_call>' + c.function.name }}
{%- for k, v in c.function.arguments.items() %}
{{- '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>' }}
{{- (v if v is string else v | tojson) + '</arg_value>' }}{%- endfor %}
{{- '\\n</tool_call>' }}{%- endfor %}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

HARMONY = """{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{%- set c = m.tool_calls[0].function %}
{{- '<|start|>assistant<|channel|>commentary to=functions.' + c.name }}
{{- ' <|constrain|>json<|message|>' + (c.arguments | tojson) + '<|call|>' }}
{%- elif m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

GLM_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>")
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
MISTRAL_TOKENS = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")


def on_smollm2(chat_template: str, tokens: tuple[Any, ...] = (), **special: str) -> Any:
    """SmolLM2's tokenizer with another family's template and special tokens, which are fixed: its
    vocabulary is shared.
    """
    tokenizer = copy.copy(_with_special_tokens(tokens, **special))
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def _with_special_tokens(tokens: tuple[Any, ...], **special: str) -> Any:
    tokenizer = fresh_tokenizer(base_model_dir())
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens), **special})
    return tokenizer


@functools.cache
def family(name: str) -> ChatTemplate:
    """The templates that can be continued, each on a tokenizer that suits it."""
    return ChatTemplate(
        {
            "chatml": lambda: on_smollm2(CHATML),
            "chatml_tools": lambda: on_smollm2(CHATML_TOOLS),
            "thinking": lambda: on_smollm2(THINKING),
            "llama3": lambda: on_smollm2(
                LLAMA3, LLAMA3_TOKENS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
            ),
            "mistral": lambda: on_smollm2(
                MISTRAL, MISTRAL_TOKENS, bos_token="<s>", eos_token="</s>"
            ),
            "gemma": lambda: on_smollm2(GEMMA, GEMMA_TOKENS, bos_token="<bos>", eos_token="<eos>"),
            "call_named": lambda: on_smollm2(CALL_NAMED),
            "last_unended": lambda: on_smollm2(LAST_UNENDED),
            "mistral_strict": lambda: on_smollm2(
                MISTRAL_STRICT, MISTRAL_TOKENS, bos_token="<s>", eos_token="</s>"
            ),
            "glm": lambda: on_smollm2(GLM, GLM_TOKENS, eos_token="<|endoftext|>"),
            "harmony": lambda: on_smollm2(HARMONY, HARMONY_TOKENS, eos_token="<|return|>"),
            "metaspace_first": lambda: metaspace("first", CHATML_TOOLS),
            "metaspace_always": lambda: metaspace("always", CHATML_TOOLS),
            "metaspace_mistral": lambda: metaspace("first", MISTRAL),
            "metaspace_plain": lambda: metaspace("first", PLAIN_ROLES),
        }[name]()
    )


PLAIN_ROLES = """{{- bos_token }}{%- for m in messages %}
{{- 'U: ' if m.role == 'user' else ('T: ' if m.role == 'tool' else 'A: ') }}{{- m.content }}
{%- for c in m.tool_calls or [] %}{{- ' call ' + (c.function | tojson) }}{%- endfor %}
{{- '</s>' if m.role == 'assistant' else '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'A:' }}{%- endif %}"""
"""Roles in ordinary words: no control token keeps the edges of a block apart."""


def metaspace(prepend_scheme: str, chat_template: str) -> Any:
    """A SentencePiece-like tokenizer: a space is part of the word, and one is put before the first
    word of a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<|im_start|>", "<|im_end|>", *MISTRAL_TOKENS]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=prepend_scheme, split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = [*(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*specials, *alphabet], show_progress=False
    )
    tokenizer.train_from_iterator(
        ["user assistant tool system\nA: U: T: the answer is 42, call f x 1"] * 20, trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": specials[1:]})
    fast.chat_template = chat_template
    return fast
