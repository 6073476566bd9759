"""Hold two versions of llama.py against each other: do users see the same?

    python tests/same_outputs.py REVISION             such as HEAD, or main
    python tests/same_outputs.py REVISION --only lookup session

For a change that should not change what users see: a refactoring. The old version is
llama.py and stories/ of a git revision, the new one those beside this folder, copied
when it starts, so they may be edited meanwhile. Both run the same commands, on a CPU,
over the same small model folders, made from stories/ and from a seed; two processes at
a time, in two to three minutes of two free cores. LLAMA_TEST_DATA, a folder of real
vocabularies and models, adds those.

These must not differ: what chat writes to stdout, byte by byte; the values that --json
prints, except times, speeds and KNOWN_DIFFERENCES; exit statuses; the files that are
left behind, except within sessions. What is written for people may: stderr, and the
tables of info and inspect. Where they do, a diff is printed, for a person to judge.
Sessions that the old version wrote are continued by both.

The exit status is 0, 1 if anything differs that must not, 2 for usage.
"""

import argparse
import collections
import difflib
import fcntl
import io
import json
import math
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

HERE = Path(__file__).resolve().parent.parent
SECONDS = 60  # A process that takes longer is ended, and counts as different.
LINES = 24  # So much of a diff is printed.

# Keys of --json that are measured: times, speeds, and memory in use.
MEASURED = {"time_to_first_token_s", "prefill_tps", "decode_tps", "peak_memory"}
MEASURED |= {"gbps", "bandwidth_share", "active_gb", "peak_gb"}

# Keys of --json that are known to differ between the two versions, and why. They are
# shown to a person, as stderr is. Any part of a path counts, so "stats" is all of it.
KNOWN_DIFFERENCES: dict[str, str] = {}

# In what is written for people, and in the values of --json: what is measured.
MASKS = (
    (r"[\d.,]+ tokens/s", "N tokens/s"),
    (r"first token after +[\d.]+ s", "first token after N s"),
    (r"(peak +)[\d.]+ [GMk]B", r"\1N GB"),
    (r"[\d.,]+ GB/s", "N GB/s"),
    (r"[\d.]+ [GMk]B at the end", "N GB at the end"),
    (r"\d+ % of what copying", "N % of what copying"),
    (r"(as a row .*?\|.*?\|.*?\|).*", r"\1 N |"),
)

# -----------------------------------------------------------------------------
# Model folders
# -----------------------------------------------------------------------------

Weights = dict[str, mx.array]

FULL_STOP, COMMA = 18, 16  # Ids in the vocabulary of stories/.

# The marks in a chat template by which its family is recognised.
FIRST = {"type": "BertProcessing", "cls": ["<|begin_of_text|>", 0], "sep": ["", 0]}
CHATML = "{{ '<|im_start|>' + message['role'] + '\n' }}"


def unpacked(weights: Weights) -> Weights:
    """Return the weights of stories/, which are in 8 bits, in float32."""
    dense = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and f"{path}.scales" in weights:
            scales, biases = weights[f"{path}.scales"], weights[f"{path}.biases"]
            array = mx.dequantize(array, scales, biases, group_size=64, bits=8)
        if kind in ("weight", "bias"):
            dense[name] = array.astype(mx.float32)
    return dense


def packed(weights: Weights, group_size: int, bits: int, mode: str) -> Weights:
    """Return weights with every matrix quantized, as MLX's converter does it."""
    found = {}
    for name, array in weights.items():
        if array.ndim < 2:
            found[name] = array.astype(mx.bfloat16)
            continue
        path = name.removesuffix(".weight")
        array = array.astype(mx.bfloat16)
        parts = mx.quantize(array, group_size=group_size, bits=bits, mode=mode)
        for kind, part in zip(("weight", "scales", "biases"), parts):
            found[f"{path}.{kind}"] = part
    return found


def cast(weights: Weights, dtype: mx.Dtype) -> Weights:
    return {name: array.astype(dtype) for name, array in weights.items()}


def with_biases(weights: Weights) -> Weights:
    """Return weights with small random biases on every product of a layer."""
    biased = dict(weights)
    for name, array in weights.items():
        if name.endswith("_proj.weight"):
            bias = 0.02 * mx.random.normal((array.shape[0],))
            biased[name.removesuffix("weight") + "bias"] = bias
    return biased


def with_head(weights: Weights) -> Weights:
    """Return weights with a head that is nearly, but not quite, the embedding."""
    embedding = weights["model.embed_tokens.weight"]
    noise = 0.1 * embedding.std() * mx.random.normal(embedding.shape)
    return weights | {"lm_head.weight": embedding + noise}


def random_weights(config: dict) -> Weights:
    """Return random weights, with a head of its own, that give logits of some size."""
    D, F, V = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    Q = config["num_attention_heads"] * config["head_dim"]
    KV = config["num_key_value_heads"] * config["head_dim"]
    block = {"self_attn.q_proj": (Q, D), "self_attn.k_proj": (KV, D)}
    block |= {"self_attn.v_proj": (KV, D), "self_attn.o_proj": (D, Q)}
    block |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    block |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes = {"model.embed_tokens": (V, D), "lm_head": (V, D), "model.norm": (D,)}
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in block.items()}
    weights = {}
    for name, shape in shapes.items():
        array = mx.random.normal(shape) * (3 if name == "lm_head" else 1)
        array = array / math.sqrt(D) if len(shape) == 2 else 1 + 0.1 * array
        weights[f"{name}.weight"] = array
    return weights


def change_json(file: Path, changes: dict) -> None:
    """Change keys of a JSON file; None takes a key out."""
    values = json.loads(file.read_text("utf-8")) | changes
    values = {key: value for key, value in values.items() if value is not None}
    file.write_text(json.dumps(values), "utf-8")


def write_weights(folder: Path, weights: Weights) -> None:
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def derived(models: Path, name: str, weights: Weights, **changes) -> Path:
    """Write a folder like stories/, with other weights and changes to config.json."""
    folder = models / name
    left_out = shutil.ignore_patterns("*.safetensors", "*.md", "*.py", "dial*")
    shutil.copytree(models / "stories", folder, ignore=left_out)
    change_json(folder / "config.json", {"quantization": None} | changes)
    write_weights(folder, weights)
    return folder


def write_shards(folder: Path, weights: Weights) -> None:
    """Put a folder's weights into two files, with an index."""
    names, places = sorted(weights), {}
    for n, half in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{n:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in half})
        places |= dict.fromkeys(half, file)
    (folder / "model.safetensors").unlink()
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)


def rename_tokens(folder: Path, renamed: dict[str, str]) -> None:
    """Give control tokens of a folder other names."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text("utf-8")
        for old, new in renamed.items():
            text = text.replace(old, new)
        (folder / name).write_text(text, "utf-8")


# rope_scaling over few positions, so that it shows within a short text.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"type": "linear", "factor": 2.0}

# The shape of models with random weights.
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL |= {"tie_word_embeddings": False, "rope_scaling": None}

# Its cache, of 8192 tokens, is so large that llama.py computes a token in halves.
LARGE = SMALL | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
LARGE |= {"max_position_embeddings": 8192, "vocab_size": 2048}


def write_models(models: Path) -> None:
    """Write the folders that need stories/ alone, which is there already."""
    stories = mx.load(str(models / "stories" / "model.safetensors"))
    dense = unpacked(stories)
    bf16, untied = cast(dense, mx.bfloat16), with_head(dense)
    derived(models, "bf16", bf16)
    derived(models, "f16", cast(dense, mx.float16))
    derived(models, "f32", dense)
    derived(models, "untied", cast(untied, mx.bfloat16), tie_word_embeddings=False)
    for name, weights, group_size, bits, mode in (
        ("q4", dense, 64, 4, "affine"),
        ("q8", dense, 32, 8, "affine"),
        ("mxfp4", dense, 32, 4, "mxfp4"),
        ("q4-untied", untied, 64, 4, "affine"),
    ):
        how = {"group_size": group_size, "bits": bits, "mode": mode}
        tied = weights is dense
        packs = {"quantization": how, "tie_word_embeddings": tied}
        derived(models, name, packed(weights, **how), **packs)
    embedding = {name: a for name, a in stories.items() if "embed_tokens" in name}
    q4 = packed(dense, 64, 4, "affine") | embedding
    own = {"model.embed_tokens": {"group_size": 64, "bits": 8}}
    derived(models, "mixed", q4, quantization={"group_size": 64, "bits": 4} | own)
    write_shards(derived(models, "shards", bf16), bf16)
    biased = with_biases(dense)
    derived(models, "biases", biased, attention_bias=True, mlp_bias=True)
    q8 = packed(biased, 64, 8, "affine") | cast(
        {name: a for name, a in biased.items() if name.endswith("bias")}, mx.bfloat16
    )
    how = {"quantization": {"group_size": 64, "bits": 8}}
    derived(models, "q8-biases", q8, attention_bias=True, mlp_bias=True, **how)
    derived(models, "linear", bf16, rope_scaling=LINEAR)
    derived(models, "llama3", bf16, rope_scaling=LLAMA3)
    derived(models, "yarn", bf16, rope_scaling=YARN)
    derived(models, "neighbours", bf16, rope_traditional=True)
    moved = {"rope_theta": None, "rope_scaling": None}
    moved["rope_parameters"] = LLAMA3 | {"rope_theta": 10000.0}
    derived(models, "rope-parameters", bf16, **moved)
    derived(models, "large-cache", random_weights(LARGE), **LARGE)
    config = SMALL | {"vocab_size": 2048}
    derived(models, "small", cast(random_weights(config), mx.bfloat16), **config)

    base = derived(models, "base", bf16)
    change_json(base / "tokenizer_config.json", {"chat_template": None})
    unknown = derived(models, "unknown-template", bf16)
    change_json(unknown / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    chatml = derived(models, "chatml", bf16)
    renamed = {"<|start_header_id|>": "<|im_start|>", "<|eot_id|>": "<|im_end|>"}
    rename_tokens(chatml, renamed)
    (chatml / "chat_template.jinja").write_text(CHATML)
    bos = derived(models, "bos", bf16)
    change_json(bos / "tokenizer.json", {"post_processor": FIRST})
    # Two ordinary tokens end a reply, each named in a file of its own.
    stops = derived(models, "stops", bf16, eos_token_id=[1, FULL_STOP])
    change_json(stops / "generation_config.json", {"eos_token_id": COMMA})
    greedy = derived(models, "greedy", bf16)
    settings = {"do_sample": False, "repetition_penalty": 1.3}
    change_json(greedy / "generation_config.json", settings)


def write_vocabularies(models: Path, data: Path) -> None:
    """Write folders with real vocabularies, and link to a real model."""
    (models / "stories260K").symlink_to(data / "models" / "stories260K")
    ends = {"bos_token_id": None, "eos_token_id": None}
    for name, source, rows, files in (
        ("llama3-ranks", "llama3", 128_256, ("tokenizer.model",)),
        ("llama2", "llama2", 32_000, ("tokenizer.json", "tokenizer_config.json")),
        ("gpt2", "gpt2-digits", 50_304, ("tokenizer.json", "tokenizer_config.json")),
    ):
        config = SMALL | ends | {"vocab_size": rows}
        weights = cast(random_weights(config), mx.bfloat16)
        folder = derived(models, name, weights, **config)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        change_json(folder / "generation_config.json", ends)
        for file in files:
            shutil.copy(data / "tokenizers" / source / file, folder / file)


def header_changed(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return a function that changes the header of a folder's safetensors file."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        parts = struct.pack("<Q", len(text)), text, data[8 + length :]
        file.write_bytes(b"".join(parts))

    return spoil


def weights_changed(change: Callable[[Weights], None]) -> Callable[[Path], None]:
    """Return a function that changes the weights of a folder."""

    def spoil(folder: Path) -> None:
        # The files are mapped while they are read, so they are not written over.
        weights = mx.load(str(folder / "model.safetensors"))
        mx.eval(weights)
        change(weights)
        (folder / "model.safetensors").unlink()
        write_weights(folder, weights)

    return spoil


def config_changed(**changes) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", changes)


def generation_changed(**changes) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "generation_config.json", changes)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def missing_shard(folder: Path) -> None:
    write_shards(folder, mx.load(str(folder / "model.safetensors")))
    (folder / "model-00002-of-00002.safetensors").unlink()


NORM, HEAD = "model.norm.weight", "lm_head.weight"
PROJECTION = "model.layers.1.mlp.up_proj.weight"

# Copies of the small folder, each spoilt in its own way.
BAD = {
    "no-config": without("config.json"),
    "config-cut": rewritten("config.json", lambda data: data[:100]),
    "config-list": rewritten("config.json", lambda data: b"[]"),
    "no-weights": without("model.safetensors"),
    "missing-shard": missing_shard,
    "truncated": rewritten("model.safetensors", lambda data: data[:-1000]),
    "cut-in-header": rewritten("model.safetensors", lambda data: data[:200]),
    "empty-weights": rewritten("model.safetensors", lambda data: b""),
    "git-lfs": rewritten("model.safetensors", lambda data: b"version https://git-lfs"),
    "dtype-unknown": header_changed(lambda h: h[NORM].update(dtype="I16")),
    "shape-too-large": header_changed(lambda h: h[NORM].update(shape=[1, 65])),
    "dtype-other": weights_changed(lambda w: w.update({NORM: w[NORM].view(mx.int32)})),
    "shape-other": weights_changed(lambda w: w.update({HEAD: w[HEAD][:-1]})),
    "nan": weights_changed(lambda w: w.update({PROJECTION: w[PROJECTION] * mx.nan})),
    "infinite": weights_changed(lambda w: w.update({NORM: w[NORM] * mx.inf})),
    "extra-tensor": weights_changed(lambda w: w.update({"more.weight": w[NORM]})),
    "missing-tensor": weights_changed(lambda w: w.pop(PROJECTION)),
    "no-tokenizer": without("tokenizer.json"),
    "tokenizer-cut": rewritten("tokenizer.json", lambda data: data[:999]),
    "tokenizer-empty": rewritten("tokenizer.json", lambda data: b"{}"),
    "model-type": config_changed(model_type="gemma"),
    "activation": config_changed(hidden_act="gelu"),
    "sliding-window": config_changed(sliding_window=4096),
    "heads": config_changed(num_key_value_heads=3),
    "odd-head": config_changed(head_dim=15),
    "text-for-number": config_changed(hidden_size="64"),
    "negative": config_changed(rms_norm_eps=-1e-5),
    "key-missing": config_changed(hidden_size=None),
    "rope-unknown": config_changed(rope_scaling={"rope_type": "dynamic"}),
    "rope-incomplete": config_changed(rope_scaling={"rope_type": "llama3"}),
    "rope-partial": config_changed(partial_rotary_factor=0.5),
    "more-layers": config_changed(num_hidden_layers=3),
    "fewer-layers": config_changed(num_hidden_layers=1),
    "other-width": config_changed(intermediate_size=96),
    "small-vocabulary": config_changed(vocab_size=1000),
    "end-is-text": config_changed(eos_token_id="</s>"),
    "sampling-range": generation_changed(temperature=-1),
}


def write_bad(models: Path) -> None:
    for name, spoil in BAD.items():
        shutil.copytree(models / "small", models / "bad" / name)
        spoil(models / "bad" / name)
    # Scales without a word in config.json, and with one that MLX has no kernel for.
    for name, settings in (("no-settings", None), ("bad-settings", {"bits": 7})):
        shutil.copytree(models / "q4", models / "bad" / name)
        change_json(models / "bad" / name / "config.json", {"quantization": settings})


# -----------------------------------------------------------------------------
# What is said
# -----------------------------------------------------------------------------

TELL = "Tell me a story about a bird and a hat."
NOTE = "Sue has a red hat.\nThe bird is called Tom.\n"
ODD = (
    "Zoë said: “naïve café”, 12345 + 67.8, don't WE'LL\t x  y\n\n\r\n  end "
    "日本語 한국어 עברית 🙂👩‍👩‍👧 e\u0301 <|eot_id|><|im_end|></s>[INST] \x07\u202e?"
)
LONG = " ".join(f"On day {n} the bird lost hat {7 * n}." for n in range(1, 31))
REPEATS = "The cat saw the hat and the bird. " * 12

# Programs that use llama.py as a module.
PROGRAMS = {
    "engine.py": """
import llama, sys

with llama.Engine(sys.argv[1]) as engine:
    messages = [{"role": "user", "content": "Hi!"}]
    for _ in range(3):
        reply = engine.chat(messages, max_tokens=20, temperature=0.7, seed=1)
        print("".join(reply))
        print(reply.stats.finish_reason, reply.stats.reused_tokens)
        messages += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": "And then?"},
        ]
""",
    "parts.py": """
import llama, sys

model, tokenizer = llama.load(sys.argv[1])
ids = tokenizer.encode_chat([{"role": "user", "content": "Hi!"}])
cache = model.make_cache(256)
sampler = llama.make_sampler(temperature=0.0)
for token in llama.generate(model, ids, max_tokens=10, sampler=sampler, cache=cache):
    print(token, tokenizer.decode([token]))
""",
    "logits.py": """
import llama, mlx.core as mx, sys

model, tokenizer = llama.load(sys.argv[1])
ids = tokenizer.encode(sys.stdin.read())
logits = model(mx.array([ids]))[0, -1]
print(len(ids), *(f"{value:.4g}" for value in logits[:100].tolist()))
""",
    "ids.py": """
import llama, sys

tokenizer = llama.load(sys.argv[1])[1]
text = sys.stdin.buffer.read().decode()
ids = tokenizer.encode(text)
print(ids, ascii(tokenizer.decode(ids)), tokenizer.bos, sorted(tokenizer.stop_tokens))
""",
}


# -----------------------------------------------------------------------------
# The cases
# -----------------------------------------------------------------------------


class Step(NamedTuple):
    """A process: a command line and what it is told.

    typed: lines typed at a terminal, then Ctrl-D; None pipes stdin in. screen: whether
    stdout is that terminal too, rather than a pipe.
    """

    command: str
    stdin: str | bytes = b""
    typed: tuple[str, ...] | None = None
    screen: bool = False


def typed(command: str, *lines: str) -> Step:
    return Step(command, typed=lines)


def screen(command: str, *lines: str) -> Step:
    return Step(command, typed=lines, screen=True)


def ask(options: str, model: str = "models/stories", prompt: str = TELL) -> Step:
    """Return a process that answers one prompt."""
    return Step(f"chat {model} --prompt {shlex.quote(prompt)} {options}")


Cases = dict[str, tuple[Step, ...]]

# name: options of sampling, on stories
SAMPLING = {
    "defaults": "",
    "greedy": "--temperature 0",
    "temperature 0.7": "--temperature 0.7",
    "temperature 1.5": "--temperature 1.5",
    "temperature 1.5 alone": "--temperature 1.5 --top-p 1",
    "top-k 1": "--top-k 1",
    "top-k 5": "--top-k 5 --temperature 1.5 --top-p 1",
    "top-k beyond": "--top-k 100000",
    "top-p 0.5": "--top-p 0.5 --temperature 1.5",
    "top-p tiny": "--top-p 0.0001",
    "min-p 0.05": "--min-p 0.05 --temperature 1.5 --top-p 1",
    "min-p 1": "--min-p 1",
    "penalty 1.5": "--repetition-penalty 1.5 --temperature 0",
    "penalty 0.8": "--repetition-penalty 0.8",
    "all filters": "--temperature 1.2 --top-k 40 --top-p 0.9 --min-p 0.02 "
    "--repetition-penalty 1.1",
    "seed 0": "--seed 0",
    "seed large": f"--seed {2**63 - 1}",
}


def one_shot_cases() -> Cases:
    """Return cases of one reply by the small storyteller."""
    cases = {
        f"sampling, {name}": ask(f"--seed 7 --max-tokens 40 {options}")
        for name, options in SAMPLING.items()
    }
    for n in (0, 1, 40):
        cases[f"max-tokens {n}"] = ask(f"--seed 2 --max-tokens {n} --stats")
        cases[f"max-tokens {n}, json"] = ask(f"--seed 2 --max-tokens {n} --json")
    cases |= {
        "no MODEL": Step("chat --prompt Hi! --seed 4"),
        "no MODEL, stats": Step("chat --prompt Hi! --seed 4 --stats"),
        "greedy without a seed": ask("--temperature 0 --max-tokens 60"),
        "to the end of the story": ask("--seed 5"),
        "system": ask("--seed 1 --max-tokens 40 --system 'Be kind.' --json"),
        "system, empty": ask("--seed 1 --max-tokens 20 --system ''"),
        "stdin": Step("chat models/stories --seed 1 --max-tokens 30", TELL + "\n"),
        "stdin, odd": Step("chat models/stories --seed 1 --max-tokens 30 --json", ODD),
        "stdin and prompt": Step(
            "chat models/stories --prompt 'Go on:' --seed 1 --max-tokens 30 --json",
            NOTE,
        ),
        "org/name": ask("--seed 1 --max-tokens 10", "some/stories"),
        "prefill-step 1": ask("--seed 1 --max-tokens 30 --prefill-step 1"),
        "prefill-step 7": ask("--seed 1 --max-tokens 30 --prefill-step 7 --json"),
    }
    raw = "chat models/stories --raw --max-tokens 30"
    start = "'Once upon a time'"
    cases |= {
        "raw": Step(f"{raw} --prompt {start} --seed 1 --temperature 0 --json"),
        "raw, sampled": Step(f"{raw} --prompt {start} --seed 3"),
        "raw, BOS": Step(
            f"{raw.replace('stories', 'bos')} --seed 3 --prompt {start} --json"
        ),
        "raw, stdin": Step(f"{raw} --seed 3", "Tom had a hat. He"),
        "raw, space at the end": Step(f"{raw} --seed 3 --prompt 'One day, '"),
    }
    long = "chat models/stories --raw --seed 1 --max-tokens 40 --json"
    for step in (1, 200):
        cases[f"long prompt, prefill-step {step}"] = Step(
            f"{long} --prefill-step {step}", LONG
        )
    cases["long prompt"] = Step(long, LONG)
    # A penalty below 1 makes the model repeat itself, so that drafts are accepted.
    greedy = "--repetition-penalty 0.6 --temperature 0"
    sampled = "--repetition-penalty 0.7 --temperature 1"
    for n in (0, 1, 4, 15):
        options = f"--max-tokens 80 --json --seed 1 --lookup {n}"
        cases[f"lookup {n}, greedy"] = ask(f"{options} {greedy}")
        cases[f"lookup {n}, sampled"] = ask(f"{options} {sampled}")
    cases["lookup 15, plain"] = Step(f"chat models/stories --raw {options}", REPEATS)
    for n in (25, 40, 64):
        full = f"--ctx {n} --seed 1"
        cases[f"ctx {n}"] = ask(full)
        cases[f"ctx {n}, json, lookup"] = ask(f"{full} --json --lookup 4")
    for name in TEMPLATES:
        options = f"--template {name} --seed 1 --max-tokens 20 --json"
        cases[f"template {name}"] = ask(options)
        cases[f"template {name}, system"] = ask(f"{options} --system 'Be kind.'")
    return {name: (step,) for name, step in cases.items()}


TEMPLATES = ("llama3", "llama2", "chatml", "zephyr", "mistral", "mistral-v3")
TEMPLATES += ("llama3.1",)

GOOD = "bf16 f16 f32 untied q4 q8 mxfp4 q4-untied mixed shards biases q8-biases linear"
GOOD += " llama3 yarn neighbours rope-parameters large-cache small base bos chatml"
GOOD += " greedy stops"


def folder_cases() -> Cases:
    """Return cases of folders of all kinds, and of those at fault."""
    cases = {}
    for name in GOOD.split():
        raw = "--raw" if name == "base" else ""
        options = f"{raw} --seed 3 --max-tokens 30 --json"
        cases[f"folder {name}"] = ask(options, f"models/{name}")
        # Texts hide small changes of numbers, which may be the whole of a mistake.
        cases[f"logits of {name}"] = Step(f"models/logits.py models/{name}", NOTE)
        cases[f"inspect {name}"] = Step(f"inspect models/{name} --json")
    for dtype in ("float32", "float16", "bfloat16"):
        for name in ("stories", "bf16", "mxfp4"):
            # Few tokens: 16 bits take a CPU long.
            command = f"chat models/{name} --raw --seed 3 --max-tokens 12"
            cases[f"dtype {dtype}, {name}"] = Step(
                f"{command} --dtype {dtype}", "One day, a bird"
            )
    for name in [*BAD, "no-settings", "bad-settings"]:
        folder = f"models/bad/{name}"
        cases[f"inspect bad {name}"] = Step(f"inspect {folder} --check --json")
        cases[f"chat bad {name}"] = ask("--seed 1 --max-tokens 3", folder)
    cases |= {
        "chat base": ask("", "models/base"),
        "chat base, template": ask(
            "--template llama3 --seed 1 --max-tokens 20", "models/base"
        ),
        "chat unknown template": ask(
            "--seed 1 --max-tokens 3", "models/unknown-template"
        ),
        "inspect unknown template": Step("inspect models/unknown-template --json"),
        "inspect, no MODEL": Step("inspect --json"),
        "inspect, table": Step("inspect models/q4"),
        "inspect, table of shards": Step("inspect models/shards --check"),
        "inspect, table of problems": Step("inspect models/bad/nan --check"),
        "inspect without check": Step("inspect models/bad/nan --json"),
    }
    info = ("8b", "1b", "70b", "models/q4", "models/untied", "models/yarn", "")
    for name in (*info, "models/mxfp4", "models/bad/heads", "nothing"):
        cases[f"info {name or 'stories'}"] = Step(f"info {name} --json")
    measure = "--measure --prompt-tokens 8 --generation-tokens 4"
    cases |= {
        "info, table": Step("info 8b"),
        "info, table of a folder": Step("info models/q4"),
        "info, measured": Step(f"info models/q4 {measure} --json"),
        "info, measured, table": Step(f"info models/q4 {measure}"),
        "info, too long": Step("info models/q4 --measure --prompt-tokens 4000"),
    }
    return {name: (step,) for name, step in cases.items()}


# name: a command line that is refused
REFUSED = {
    "no command": "",
    "no such command": "talk",
    "no such option": "chat --no-such-option",
    "two models": "chat models/q4 models/q8",
    "value missing": "chat --prompt",
    "temperature below": "chat --prompt a --temperature -1",
    "temperature no number": "chat --prompt a --temperature warm",
    "temperature nan": "chat --prompt a --temperature nan",
    "top-k 0": "chat --prompt a --seed 1 --max-tokens 20 --top-k 0",
    "top-k fraction": "chat --prompt a --top-k 1.5",
    "top-p 0": "chat --prompt a --seed 1 --max-tokens 20 --top-p 0",
    "top-p above": "chat --prompt a --top-p 1.1",
    "min-p 0": "chat --prompt a --seed 1 --max-tokens 20 --min-p 0",
    "penalty 0": "chat --prompt a --seed 1 --max-tokens 20 --repetition-penalty 0",
    "max-tokens below": "chat --prompt a --max-tokens -1",
    "seed below": "chat --prompt a --seed -1",
    "seed above": f"chat --prompt a --seed {2**63}",
    "lookup below": "chat --prompt a --lookup -1",
    "prefill-step 0": "chat --prompt a --prefill-step 0",
    "ctx 0": "chat --prompt a --ctx 0",
    "ctx above": "chat --prompt a --seed 1 --max-tokens 20 --ctx 100000",
    "dtype": "chat --prompt a --dtype float64",
    "template": "chat --prompt a --template gemma",
    "raw and system": "chat --prompt a --raw --system b",
    "raw and template": "chat --prompt a --raw --template llama3",
    "bits 5": "info 8b --measure --bits 5",
    "bits of a folder": "info models/q4 --measure --bits 4",
    "bits alone": "info 8b --bits 4",
    "prompt-tokens 1": "info 8b --measure --prompt-tokens 1",
    "missing folder": "chat models/nothing-there --prompt a",
    "missing path": "chat ./nothing/there/at-all --prompt a",
    "file": "chat models/note.txt --prompt a",
    "not cached": "chat some/other --prompt a",
    "near in the cache": "chat some/storys --prompt a",
    "preset": "chat 8b --prompt a",
    "inspect nothing": "inspect models/nothing-there --json",
    "empty prompt": "chat --prompt ''",
    "raw, empty prompt": "chat --raw --prompt ''",
    "prompt too long": f"chat --ctx 8 --prompt {shlex.quote(TELL)}",
    "session in no folder": "chat --prompt a --session nowhere/talk.session",
    "session is no session": "chat --prompt a --session models/note.txt",
    "session is a model": "chat --prompt a --session models/q4/model.safetensors",
    "help": "--help",
    "help of chat": "chat --help",
    "help of info": "info --help",
    "help of inspect": "inspect -h",
}


def refused_cases() -> Cases:
    """Return cases of usage and errors."""
    cases = {f"usage, {name}": Step(command) for name, command in REFUSED.items()}
    cases["usage, not UTF-8"] = Step("chat --seed 1", b"caf\xe9")
    cases["usage, newline alone"] = Step("chat --seed 1", "\n")
    cases["usage, spaces alone"] = Step("chat --seed 1 --max-tokens 9 --json", "  \n")
    cases["usage, raw, a newline"] = Step("chat --raw --seed 1", "\n\n")
    return {name: (step,) for name, step in cases.items()}


CHAT = "chat models/stories --seed 4 --max-tokens 40"
SESSION = "talk.session"


def talk_cases() -> Cases:
    """Return cases of conversations at a terminal, and of sessions."""
    cases = {
        "three turns": typed(CHAT, "Hi!", TELL, "What happened next?", "/context"),
        "three turns, json": typed(f"{CHAT} --json", "Hi!", TELL, "And then?"),
        "three turns, system": typed(f"{CHAT} --system 'Be kind.'", "Hi!", TELL),
        "three turns, raw": typed(f"{CHAT} --raw", "Once upon", " He said", " Then"),
        "three turns, lookup": typed(
            f"{CHAT} --lookup 4 --json", TELL, "Tell it again.", "Tell it again."
        ),
        "undo": typed(CHAT, "Hi!", TELL, "/undo", TELL, "/undo", "/undo", "/undo"),
        "retry": typed(f"{CHAT} --json", TELL, "/retry", "/retry", "Go on", "/retry"),
        "reset": typed(f"{CHAT} --json", TELL, "/reset", "/retry", TELL, "/context"),
        "set": typed(
            CHAT,
            "/set",
            "/set temperature 0",
            TELL,
            "/set temperature 1.5",
            "/set top_p 0.5",
            "/set top-k 20",
            "/set max_tokens 10",
            "/set seed 99",
            TELL,
            "/set temperature default",
            "/set max_tokens default",
            "/set temperature hot",
            "/set top_p 2",
            "/set colour red",
            "/set",
            "/undo",
            TELL,
        ),
        "system command": typed(
            f"{CHAT} --json", "/system Speak of hats.", "Hi!", "/system", "Hi!"
        ),
        "system command, raw": typed(f"{CHAT} --raw", "/system a", "Once"),
        "file": typed(
            f"{CHAT} --json",
            "/file models/note.txt",
            "/context",
            "/undo",
            "/file models/note.txt",
            "/file models/note.txt",
            "Who has a hat?",
            "/undo",
            "/file models/none.txt",
            "/file models/q4/model.safetensors",
            "/file models/long.txt",
            "Who?",
        ),
        "stats and context": typed(
            f"{CHAT} --stats", "/stats", "/context", "Hi!", "/stats", "/context"
        ),
        "block of lines": typed(CHAT, '"""Tell me', "a story", 'of a cat."""', "Hi!"),
        "slashes": typed(CHAT, "//undo", "/undoo", "/exit", "/help", "/reset x", "/"),
        "private": typed(CHAT, "Hi!", "/private", TELL),
        "empty lines": typed(CHAT, "", "   ", "Hi!", ""),
        "nothing said": typed(CHAT),
        "full context": typed(
            "chat models/stories --seed 4 --ctx 80", TELL, "And then?", "/undo", "Hi!"
        ),
        "save and load": typed(
            f"{CHAT} --json",
            "Hi!",
            TELL,
            "/save a.session",
            "/save a.session",
            "/save talk.md",
            "/save",
            "/save nowhere/b.session",
            "/reset",
            "Hello!",
            "/load a.session",
            "/context",
            "What happened next?",
            "/save b.session",
        ),
        "load of a wrong file": typed(
            CHAT,
            "/load models/note.txt",
            "/load models/q4/model.safetensors",
            "/load none.session",
            "/load",
            "Hi!",
        ),
        "prompt at a terminal": typed(f"{CHAT} --prompt Hi!"),
        "screen": screen(CHAT, "Hi!", TELL, "/undo", "/retry", "Why?", "/context"),
        "screen, odd": screen("chat models/small --seed 1 --max-tokens 60", ODD[:60]),
        "screen, json": screen(f"{CHAT} --json", "Hi!", "/reset", TELL),
        "screen, save and load": screen(
            CHAT, TELL, "/save a.session", "/reset", "/load a.session", "Why?"
        ),
    }
    cases = {f"talk, {name}": (step,) for name, step in cases.items()}
    session = f"{CHAT} --session talk.session"
    cases |= {
        "session, three processes": tuple(
            Step(f"{session} --json", text) for text in (TELL, "Why?", "And then?")
        ),
        "session, other seed": (
            Step(session, TELL),
            Step(f"{session.replace('--seed 4', '--seed 77')} --json", "Why?"),
        ),
        "session, raw": tuple(
            Step(f"{session} --raw --json", text)
            for text in ("Once upon a time", " He said", " Then")
        ),
        "session, settings": (
            typed(session, "/set temperature 1.5", "/system Be kind.", TELL),
            Step(f"{session} --json", "Why?"),
            typed(session, "/set", "/context", "/undo", "Why?"),
        ),
        "session, undone": (
            typed(session, "Hi!", TELL, "/undo"),
            Step(f"{session} --json", TELL),
        ),
        "session, of another model": (
            Step(session, TELL),
            Step(session.replace("models/stories", "models/q4"), "Why?"),
            screen(session.replace("models/stories", "models/q4"), "y", "Why?"),
        ),
        "session, of another model, declined": (
            Step(session, TELL),
            screen(session.replace("models/stories", "models/q4"), "n"),
        ),
        "session, of another model, to a pipe": (
            Step(session, TELL),
            typed(session.replace("models/stories", "models/q4"), "y", "Why?"),
        ),
        "session, too long": (
            Step(session, TELL),
            Step(f"{session} --ctx 30", "Why?"),
        ),
        "session, packed, in bfloat16": tuple(
            Step(f"{session.replace('stories', 'mxfp4')} --dtype bfloat16 --json", text)
            for text in (TELL, "Why?")
        ),
    }
    return cases


# The old version does the first step; both go on from what it wrote.
CROSSINGS: Cases = {
    "crossing, session": (
        Step(f"{CHAT} --session talk.session", TELL),
        Step(f"{CHAT} --session talk.session --json", "Why?"),
    ),
    "crossing, settings and system": (
        typed(
            f"{CHAT} --session talk.session",
            "/set temperature 1.5",
            "/system Be kind.",
            "Hi!",
            TELL,
        ),
        Step(f"{CHAT} --session talk.session --json", "Why?"),
    ),
    "crossing, raw": (
        Step(f"{CHAT} --session talk.session --raw", "Once upon a time"),
        Step(f"{CHAT} --session talk.session --raw --json", " He said"),
    ),
    "crossing, load": (
        typed(CHAT, TELL, "/save talk.session"),
        typed(f"{CHAT} --json", "/load talk.session", "Why?"),
    ),
}


def data_cases() -> Cases:
    """Return cases of real vocabularies, and of a real model."""
    cases = {}
    for name in ("stories260K", "llama3-ranks", "llama2", "gpt2"):
        model = f"models/{name}"
        options = "--seed 3 --max-tokens 40 --json"
        cases[f"ids of {name}"] = Step(f"models/ids.py {model}", ODD)
        cases[f"inspect {name}"] = Step(f"inspect {model} --json")
        cases[f"{name}, raw"] = Step(f"chat {model} --raw {options}", "Once upon a")
        cases[f"{name}, raw, odd"] = Step(f"chat {model} --raw {options}", ODD)
        cases[f"{name}, raw, text"] = Step(
            f"chat {model} --raw --temperature 1 --seed 8 --max-tokens 40", " One day"
        )
        if name == "stories260K":
            cases[f"{name}, greedy"] = ask(
                "--raw --temperature 0 --max-tokens 90", model
            )
    for name, templates in (
        ("llama3-ranks", ("llama3", "llama3.1")),
        ("llama2", ("llama2", "zephyr", "mistral", "mistral-v3")),
        ("gpt2", ("chatml",)),
    ):
        for template in templates:
            command = f"chat models/{name} --template {template} --seed 1 --json"
            cases[f"{name}, template {template}"] = typed(
                f"{command} --max-tokens 12",
                "Hi! <|eot_id|>",
                "/system Be kind.",
                "So?",
            )
    cases["gpt2, its own template"] = ask("--seed 1 --max-tokens 20", "models/gpt2")
    return {name: (step,) for name, step in cases.items()}


def all_cases(data: Path | None) -> Cases:
    cases = one_shot_cases() | talk_cases() | CROSSINGS
    cases |= folder_cases() | refused_cases()
    for name in ("engine.py", "parts.py"):
        for model in ("stories", "untied"):
            step = Step(f"models/{name} models/{model}")
            cases[f"program {name}, {model}"] = (step,)
    cases["ids of stories"] = (Step("models/ids.py models/stories", ODD),)
    return cases | (data_cases() if data else {})


# -----------------------------------------------------------------------------
# Running
# -----------------------------------------------------------------------------

# What a process does before it is llama.py: it puts MLX on the CPU. The worker thread
# of llama.py follows, since MLX has one default device for all threads.
PREAMBLE = """
import runpy, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
sys.path[0] = sys.argv[1]
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

PROMPTS = (">>> ", "... ", "[y/N] ")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[\x01\x02\r]")


class Outcome(NamedTuple):
    """What came of a process."""

    status: int | str
    stdout: bytes
    stderr: bytes


def environment(root: Path, folder: Path) -> dict[str, str]:
    """Return the environment of a process: nothing of this user's, and no GPU."""
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    home = {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    hub = {"HF_HUB_CACHE": str(root / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    talk = {"TERM": "xterm", "LANG": "C.UTF-8", "COLUMNS": "80"}
    # Two processes run at a time, so that each has a core.
    threads = {"OPENBLAS_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"}
    return found | home | hub | talk | threads | {"PYTHONDONTWRITEBYTECODE": "1"}


def pump(descriptor: int, into: bytearray) -> threading.Thread:
    """Read a descriptor to its end, in a thread."""

    def read() -> None:
        while True:
            try:
                data = os.read(descriptor, 65536)
            except OSError:  # It is a terminal, whose last user has gone.
                data = b""
            if not data:
                return
            into.extend(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def plain(data: bytes) -> str:
    """Return what a terminal was sent, without escapes and carriage returns."""
    return ESCAPES.sub("", data.decode("utf-8", "replace"))


def converse(command: list[str], step: Step, **where) -> Outcome:
    """Run a process at a terminal: type each line when it asks for one."""
    master, terminal = pty.openpty()
    # So wide that the line editor never wraps what is typed.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 2000, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal if step.screen else subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **where,
    )
    os.close(terminal)
    shown, stdout, stderr = bytearray(), bytearray(), bytearray()
    readers = [pump(master, shown), pump(process.stderr.fileno(), stderr)]
    if not step.screen:
        readers.append(pump(process.stdout.fileno(), stdout))
    # It asks on stdout or stderr: a prompt is waited for in what is new of each.
    streams = (shown, stdout, stderr)
    seen = [0, 0, 0]
    deadline, status = time.monotonic() + SECONDS, None
    try:
        for line in (*(f"{line}\n" for line in step.typed), "\x04"):
            while not any(
                plain(stream[start:]).endswith(PROMPTS)
                for stream, start in zip(streams, seen)
            ):
                if process.poll() is not None:
                    break
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(command, SECONDS)
                time.sleep(0.005)
            seen = [*map(len, streams)]
            if process.poll() is None:
                os.write(master, line.encode())
        status = process.wait(max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = f"ended after {SECONDS} s"
    for reader in readers:
        reader.join(5)
    os.close(master)
    process.stderr.close()
    if not step.screen:
        process.stdout.close()
        return Outcome(status, bytes(stdout), bytes(stderr))
    # Of a screen, the replies: what was typed stands after a prompt.
    lines = plain(shown).splitlines(keepends=True)
    lines = [line for line in lines if not line.startswith(PROMPTS)]
    return Outcome(status, "".join(lines).encode(), bytes(stderr))


def run_step(root: Path, side: str, folder: Path, step: Step) -> Outcome:
    """Run a process in a folder, with the old or the new version."""
    words = shlex.split(step.command)
    if not (words and words[0].endswith(".py")):
        words = [str(root / side / "llama.py"), *words]
    command = [sys.executable, "-c", PREAMBLE, str(root / side), *words]
    where = {"cwd": folder, "env": environment(root, folder)}
    if step.typed is not None:
        return converse(command, step, **where)
    stdin = step.stdin.encode() if isinstance(step.stdin, str) else step.stdin
    where |= {"capture_output": True, "timeout": SECONDS}
    try:
        done = subprocess.run(command, input=stdin, check=False, **where)
    except subprocess.TimeoutExpired as late:
        status = f"ended after {SECONDS} s"
        return Outcome(status, late.stdout or b"", late.stderr or b"")
    return Outcome(done.returncode, done.stdout, done.stderr)


def working_folder(root: Path, side: str, n: int) -> Path:
    """Return a new folder for case n, from which models/ can be seen."""
    folder = root / "work" / f"{n}-{side}"
    folder.mkdir(parents=True)
    (folder / "models").symlink_to(root / "models")
    return folder


def files_left(folder: Path) -> dict[str, bytes]:
    """Return what a case left in its folder; of sessions the name alone."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_file() and not name.startswith("models"):
            found[name] = b"" if file.suffix == ".session" else file.read_bytes()
    return found


# -----------------------------------------------------------------------------
# Comparing
# -----------------------------------------------------------------------------


class Verdict(NamedTuple):
    """How two versions differ, in lines: where they must not, and in words."""

    different: list[str]
    words: list[str]

    def add(self, other: "Verdict") -> None:
        self.different.extend(other.different)
        self.words.extend(other.words)


Places = list[tuple[Path, Path]]  # Of each version: where it is, and where it was run.


def masked(text: str, places: tuple[Path, Path]) -> str:
    """Return text without what is measured, and without names of places."""
    for name, place in zip(("FOLDER", "HERE"), places):
        text = text.replace(str(place), name)
    for pattern, instead in MASKS:
        text = re.sub(pattern, instead, text)
    return text


def diff(what: str, old: str, new: str) -> list[str]:
    """Return a diff of texts as lines, none if they are the same."""
    if old == new:
        return []
    texts = old.splitlines(keepends=True), new.splitlines(keepends=True)
    lines = difflib.unified_diff(*texts, "old", "new", n=0)
    lines = [ascii(line)[1:-1] if line.strip() else "" for line in lines][2:]
    lines = [line.removesuffix("\\n") for line in lines if not line.startswith("@@")]
    more = len(lines) - LINES
    rest = [f"({more} more lines)"] if more > 0 else []
    return [f"{what}:", *(f"    {line:.600}" for line in lines[:LINES] + rest)]


def json_values(text: str) -> list | None:
    """Return the JSON values that a text consists of, None if it holds other things."""
    values, decoder, text = [], json.JSONDecoder(), text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            return None
        values.append(value)
        text = text[end:].strip()
    return values


def leaves(value: object, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """Yield each number and text within a JSON value, with the keys that lead to it."""
    parts = []
    if isinstance(value, dict):
        parts = [*value.items()]
    elif isinstance(value, list):
        parts = [*enumerate(value)]
    for key, part in parts:
        yield from leaves(part, (*path, str(key)))
    if not parts:
        yield path, value


def compare_json(old: list, new: list, places: Places) -> Verdict:
    """Compare what --json printed, value by value."""
    verdict = Verdict([], [])
    old, new = dict(leaves(old)), dict(leaves(new))
    for path in [*old, *(path for path in new if path not in old)]:
        keys = {*path}
        if keys & MEASURED and path in old and path in new:
            continue
        pair = [
            masked(json.dumps(side[path]), place) if path in side else "(none)"
            for side, place in zip((old, new), places)
        ]
        into = verdict.words if keys & {*KNOWN_DIFFERENCES} else verdict.different
        into += diff(f"value {'.'.join(path)}", *pair)
    return verdict


def compare_step(step: Step, old: Outcome, new: Outcome, places: Places) -> Verdict:
    """Compare what came of a process with either version."""
    verdict = Verdict([], [])
    verdict.different.extend(diff("status", str(old.status), str(new.status)))
    out = [plain(o.stdout) if step.screen else o.stdout for o in (old, new)]
    texts = [o.stdout.decode("utf-8", "backslashreplace") for o in (old, new)]
    words = shlex.split(step.command)
    values = [*map(json_values, texts)] if "--json" in words else [None, None]
    for_people = words[:1] in (["info"], ["inspect"]) or {"--help", "-h"} & {*words}
    if None not in values:
        verdict.add(compare_json(*values, places))
    elif for_people and "--json" not in words:
        masks = (masked(text, place) for text, place in zip(texts, places))
        verdict.words.extend(diff("stdout", *masks))
    elif out[0] != out[1]:
        verdict.different.extend(diff("stdout", *texts) or ["stdout, in its bytes"])
    texts = (plain(o.stderr) for o in (old, new))
    masks = (masked(text, place) for text, place in zip(texts, places))
    verdict.words.extend(diff("stderr", *masks))
    return verdict


def compare_files(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """Compare what a case left behind."""
    found = diff("names of files", "\n".join(old), "\n".join(new))
    for name in old.keys() & new.keys():
        texts = (side[name].decode("utf-8", "replace") for side in (old, new))
        found += diff(f"file {name}", *texts)
    return found


def run_both(root: Path, folders: dict[str, Path], step: Step) -> Verdict:
    """Run a step with both versions, and compare."""
    outcomes = [run_step(root, side, folder, step) for side, folder in folders.items()]
    places = [(root / side, folder) for side, folder in folders.items()]
    return compare_step(step, *outcomes, places)


def run_crossing(
    root: Path, folders: dict[str, Path], first: Step, then: Step
) -> tuple[Verdict, str]:
    """Let both versions continue what the old one wrote in the first step.

    Returns how they differ, and in words what the new one did. It may refuse, if it
    names the file, and offers the text anew to who sits at a terminal.
    """
    started = run_step(root, "old", folders["old"], first)
    written = folders["old"] / SESSION
    if started.status or not written.exists():
        error = plain(started.stderr)
        return Verdict([f"the old version wrote no session: {error}"], []), ""
    session = written.read_bytes()
    (folders["new"] / SESSION).write_bytes(session)
    verdict = run_both(root, folders, then)
    if not verdict.different:
        return verdict, "the new version goes on as the old one does"
    (folders["new"] / SESSION).write_bytes(session)
    command = f"{CHAT} --session {SESSION}" + " --raw" * ("--raw" in then.command)
    asked = run_step(root, "new", folders["new"], screen(command, "y", "Why?"))
    shown, error = plain(asked.stdout), plain(asked.stderr)
    # The question itself appears on stdout or stderr, as Python's input() chooses.
    offered = "[y/N]" in shown + error and SESSION in error
    answered = shown.rpartition("[y/N]")[2].strip()
    if offered and answered and asked.status == 0:
        words = [line for lines in verdict for line in lines]
        return Verdict([], words), "the new version refuses, but offers the text anew"
    return verdict, ""


def run_case(root: Path, n: int, name: str, steps: tuple[Step, ...]) -> tuple:
    """Run a case with both versions; return a Verdict, and a remark."""
    folders = {side: working_folder(root, side, n) for side in ("old", "new")}
    if name in CROSSINGS:
        return run_crossing(root, folders, *steps)
    verdict = Verdict([], [])
    for step in steps:
        verdict.add(run_both(root, folders, step))
    verdict.different.extend(compare_files(*map(files_left, folders.values())))
    return verdict, ""


# -----------------------------------------------------------------------------
# The command
# -----------------------------------------------------------------------------


def git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, check=False)
    if done.returncode:
        print(f"git {' '.join(words)}: {done.stderr.decode().strip()}", file=sys.stderr)
        sys.exit(2)
    return done.stdout


def lay_out(root: Path, revision: str, data: Path | None) -> None:
    """Put both versions and all that they are tried on into a folder."""
    archive = git("archive", "--format=tar", revision, "llama.py", "stories")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(root / "old", filter="data")
    shutil.copytree(HERE / "stories", root / "new" / "stories")
    shutil.copy(HERE / "llama.py", root / "new")
    models = root / "models"
    shutil.copytree(root / "old" / "stories", models / "stories")
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    write_models(models)
    write_bad(models)
    if data:
        write_vocabularies(models, data)
    (models / "note.txt").write_text(NOTE, "utf-8")
    (models / "long.txt").write_text(LONG * 8, "utf-8")
    for name, text in PROGRAMS.items():
        (models / name).write_text(text, "utf-8")
    # A cache of Hugging Face's with one model.
    repo = root / "hub" / "models--some--stories"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abcd\n")
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / "0123abcd").symlink_to(models / "stories")


def main() -> int:
    description = "Hold two versions of llama.py against each other."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("revision", help="of git, whose llama.py is the old one")
    only = "cases whose names contain one of these texts"
    parser.add_argument("--only", nargs="+", metavar="TEXT", help=only)
    options = parser.parse_args()
    only = options.only or [""]
    data = os.environ.get("LLAMA_TEST_DATA")
    if not data:
        print("LLAMA_TEST_DATA is not set: no real vocabularies")
    data = Path(data).resolve() if data else None
    started, counts = time.monotonic(), collections.Counter()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as threads:
        root = Path(name).resolve()
        lay_out(root, options.revision, data)
        cases = {
            case: steps
            for case, steps in all_cases(data).items()
            if any(text in case for text in only)
        }
        # Each thread runs one case, and of that one process, at a time.
        runs = [
            threads.submit(run_case, root, n, case, steps)
            for n, (case, steps) in enumerate(cases.items())
        ]
        for case, run in zip(cases, runs):
            verdict, remark = run.result()
            kind = "different" if verdict.different else "words"
            kind = kind if any(verdict) else "same"
            counts[kind] += 1
            says = {"different": "DIFFERENT", "words": "other words", "same": ""}[kind]
            if says or remark:
                print(f"{case}: {'; '.join(filter(None, (says, remark)))}")
            for line in (*verdict.different, *verdict.words):
                print(f"    {line}")
            sys.stdout.flush()
    print(
        f"{counts['same']} same, {counts['words']} with other words on stderr, "
        f"{counts['different']} different; {time.monotonic() - started:.0f} s"
    )
    return 1 if counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
