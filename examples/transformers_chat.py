"""A chat with a transformers model whose conversations outlive the process.

    python examples/transformers_chat.py MODEL CACHE

MODEL is a Hugging Face folder or name, such as HuggingFaceTB/SmolLM2-135M-Instruct; CACHE a
directory for the KV, or the address of a daemon (unix:///... or kvstore://...). Ask, end with
Ctrl-D, start again and ask the same: what was read and said is loaded and not computed.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvstore
from kvstore.connectors.transformers import PrefixCache


def open_store(cache: str) -> kvstore.BlockStore | kvstore.StoreClient:
    if "://" in cache:
        return kvstore.connect(cache)
    return kvstore.open(ram_bytes="256 MiB", nvme_path=cache, nvme_bytes="2 GiB")


def main(model_name: str, cache: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    with open_store(cache) as store:
        cached = PrefixCache(model, store)  # the first of the two lines
        messages = []
        while question := read("you: "):
            messages.append({"role": "user", "content": question})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = cached.generate(**inputs, max_new_tokens=64, do_sample=False)  # and the second
            answer = output[0, inputs["input_ids"].shape[1] :]
            messages.append(
                {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}
            )
            print(f"model: {messages[-1]['content']!r}")
        stats = cached.stats()
    if stats is not None:
        used = stats.usage
        loaded = used.prompt_tokens - used.recomputed_tokens
        print(f"\n{loaded} of {used.prompt_tokens} tokens of prompts were loaded from the store")


def read(prompt: str) -> str:
    """A line that someone has typed; "" at the end."""
    try:
        return input(prompt)
    except EOFError:
        return ""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"{__doc__}")
    main(*sys.argv[1:])
