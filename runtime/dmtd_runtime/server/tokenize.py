"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from dmtd_runtime.server.conversation import chat_prompt
from dmtd_runtime.server.errors import invalid
from dmtd_runtime.server.schema import DetokenizeBody, TokenizeBody
from dmtd_runtime.server.served import Served
from dmtd_runtime.server.tokens import TokenTexts


async def tokenize(served: Served, body: TokenizeBody) -> dict[str, Any]:
    """A prompt's or a conversation's token ids."""
    served.check_model(body.model)
    tokenizer = served.tokenizer
    if body.messages is not None:
        ids = await chat_prompt(
            served,
            body.messages,
            tools=body.tools,
            documents=body.documents,
            template_kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=bool(body.add_special_tokens),
        )
    else:
        prompt, special = body.prompt or "", body.add_special_tokens is not False
        ids = await asyncio.to_thread(tokenizer.encode, prompt, add_special_tokens=special)
    texts = TokenTexts(tokenizer, as_ids=False)
    return {
        "count": len(ids),
        "max_model_len": served.llm.max_model_len,
        "tokens": ids,
        "token_strs": [texts.text(token_id) for token_id in ids] if body.return_token_strs else None,
    }


async def detokenize(served: Served, body: DetokenizeBody) -> dict[str, Any]:
    """Token ids as text, special tokens included."""
    served.check_model(body.model)
    vocab_size = served.llm.manifest.model.vocab_size
    for place, token_id in enumerate(body.tokens):
        if not 0 <= token_id < vocab_size:
            raise invalid(f"tokens[{place}]", f"got {token_id}, expected ids from 0 to {vocab_size - 1}")
    return {"prompt": await asyncio.to_thread(served.tokenizer.decode, body.tokens, skip_special_tokens=False)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """What harnesses ask of a tokenizer before they send prompts."""
    tokenizer = served.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": None,
        "chat_template": None if served.template is None else served.template.source,
    }
