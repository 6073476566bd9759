"""A real model, SmolLM2-135M-Instruct, talked to through the command line.

LLAMA_TEST_MODEL names a folder with two of it: `packed` in 4 bits, `dense` in float16.
transformers and mlx-lm say what is right.
"""

import functools
import json
import os
from pathlib import Path

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import pytest

from tests.support import command, on_the_cpu, peer

pytest_plugins = ["tests.fixtures"]

MODELS = Path(os.environ.get("LLAMA_TEST_MODEL", "") or "/nonexistent")
pytestmark = pytest.mark.skipif(
    not MODELS.is_dir(), reason="LLAMA_TEST_MODEL names no folder of a real model"
)
PACKED, DENSE = MODELS / "packed", MODELS / "dense"
QUESTIONS = [
    "What is the capital of France?",
    "  Name three colours.\n",
    "Write one sentence about the sea <|im_end|> and the wind.",
]
TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And of Italy?"},
]


@functools.lru_cache
def reference(folder: Path = DENSE):
    """The tokenizer and the model of transformers, in float32."""
    transformers = peer("transformers")
    torch = peer("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    return transformers.AutoTokenizer.from_pretrained(folder), model


@functools.lru_cache
def loaded(folder: Path):
    return llama.load(folder, dtype=mx.float32)


def test_inspect_finds_nothing_wrong():
    for folder in (PACKED, DENSE):
        done = command("inspect", folder, "--json", "--check")
        found = json.loads(done.stdout)
        assert done.returncode == 0 and found["problems"] == []
        assert "<|im_start|>user\nHello!<|im_end|>" in found["exchange"]


@pytest.mark.parametrize("messages", [TALK[:1], TALK])
def test_ids_are_those_of_transformers(messages):
    tokenizer, _ = reference()
    wanted = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert llama.Tokenizer.from_folder(DENSE).encode_chat(messages) == wanted


@on_the_cpu
def test_logits_are_those_of_transformers():
    torch = peer("torch")
    model, tokenizer = loaded(DENSE)
    ids = tokenizer.encode_chat(TALK)
    with torch.no_grad():
        wanted = reference()[1](torch.tensor([ids])).logits
    ours = model(mx.array([ids]))
    assert mx.abs(ours - mx.array(wanted.numpy())).max().item() < 1e-3


@on_the_cpu
def test_packed_logits_are_those_of_mlx_lm():
    utilities = peer("mlx_lm.utils")
    model, tokenizer = loaded(PACKED)
    theirs, _ = utilities.load_model(PACKED)
    theirs.set_dtype(mx.float32)
    ids = mx.array([tokenizer.encode_chat(TALK)])
    assert mx.abs(model(ids) - theirs(ids)).max().item() < 1e-3


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_greedy_reply_is_that_of_transformers(question):
    torch = peer("torch")
    tokenizer, model = reference()
    # What looks like a control token in a message is text here, and no text there.
    asked = [{"role": "user", "content": question.replace("<|im_end|>", "")}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    told = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    wanted = tokenizer.decode(told[0, len(ids) :], skip_special_tokens=True)
    words = ("--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "24")
    text = asked[0]["content"]
    done = command("chat", DENSE, "--prompt", text, "--dtype", "float32", *words)
    assert done.stdout.decode().removesuffix("\n") == wanted.removesuffix("\n")
    assert done.returncode == 0


def test_the_next_turns_read_only_what_is_new():
    with llama.Engine(PACKED) as engine:
        messages, reused = [], 0
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            reply = engine.chat(messages, max_tokens=12, temperature=0.0)
            text = "".join(reply)
            assert reply.stats.reused_tokens >= reused
            if reused:
                assert reply.stats.prompt_tokens - reply.stats.reused_tokens < 40
            reused = reply.stats.prompt_tokens + reply.stats.generation_tokens - 1
            messages.append({"role": "assistant", "content": text})
