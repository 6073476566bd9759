"""Measure llama.py beside mlx-lm, turn about, for ratios that hold on a noisy machine.
Needs mlx-lm; run it with nothing else on the machine.

    python benchmarks/bench.py speed 8b --bits 4        prefill, decode and peak memory of both
    python benchmarks/bench.py steps 8b --bits 4        what one decode step is made of, in both
    python benchmarks/bench.py context 8b --bits 4      prefill, decode, memory as the context grows
    python benchmarks/bench.py capacity 1b --bits 4     a token over a large cache, whole and in halves
    python benchmarks/bench.py turns stories            what each turn of a chat reads anew
    python benchmarks/bench.py memory FOLDER            weights, load, cache, peak, Python's own: MB
    python benchmarks/bench.py lookup 8b                prompt lookup, on copying and on free text
    python benchmarks/bench.py blas FOLDER              both, and OpenBLAS on a CPU of Linux

MODEL is a preset, whose random weights both tools share, or a folder, which each loads.
`mlx.launch -n 2 -- python benchmarks/bench.py speed 8b` measures two ranks of a preset.
Speeds are tokens/s: prefill to the first token, decode from the first to the last.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# This file may be started from any folder, and llama.py lies in the one above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models import llama as peer
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def loaded(folder):
    """Return llama.py's model of a folder, as it is before anything makes it faster."""
    model, tensors = llama.examine(folder)
    for _ in llama.read_weights(model, tensors, llama.default_dtype()):
        pass
    return model


def both_models(options):
    """Return llama.py's model, as its engine would run it, and mlx-lm's.

    Ranks that mlx.launch has started share a preset between them, as each tool shares
    it; then the weights of the two differ.
    """
    if options.model not in llama.PRESETS:
        folder = llama.find_folder(options.model)
        model = loaded(folder)
        llama.accelerate(model)
        return model, load_model(folder)[0]
    args, group = llama.PRESETS[options.model], llama.join_ranks()
    share = llama.rank_args(args, group.size()) if group else args
    model = llama.random_model(share, options.bits)
    # First, since it may put packed weights in other places. They stay packed on a CPU
    # too, for mlx-lm takes them as they are.
    llama.accelerate(model, group, keep_packed=True)
    other = peer.Model(
        peer.ModelArgs.from_dict(dataclasses.asdict(args) | {"model_type": "llama"})
    )
    if options.bits:
        nn.quantize(other, group_size=64, bits=options.bits)
    if group is None:
        other.load_weights(tree_flatten(model.parameters()))
        return model, other
    other.set_dtype(mx.bfloat16)
    other.shard(group)
    for layer in other.model.layers:  # one by one, since each is made whole first
        mx.eval(layer.parameters())
        mx.clear_cache()
    return model, other


def cached_bytes(cache):
    filled = [layer for layer in cache if layer.keys is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)


def rewind(cache, length):
    for layer in cache:
        layer.trim(layer.offset - length)


def timed(generation, others=()):
    """Return (seconds to the first token, tokens/s after it, peak GB without the cache
    of others). generation: a function that begins to read the prompt, and returns an
    iterator over what follows."""
    # mlx-lm launches a step more than it is asked for, in a stream of its own. It would
    # take time from what is measured here, and sums of ranks in two streams get mixed.
    mx.synchronize(generation_stream)
    mx.clear_cache()
    mx.reset_peak_memory()
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in generation()]
    decode = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else 0.0
    peak = mx.get_peak_memory() - cached_bytes(others)
    return times[1] - times[0], decode, peak / 1e9


def ours(model, ids, count, cache=None, others=(), sampler=llama.greedy, lookup=None):
    """Return what `timed` does of llama.py, with prompt lookup if there is a Lookup."""
    cache = cache or model.make_cache(len(ids) + count)
    step = llama.default_prefill_step()

    def generation():
        for _, logits in llama.prefill(model, ids, cache, step):
            pass
        start = model, logits, cache, sampler
        if lookup is None:
            return llama.decode(*start, count)
        return llama.decode_with_lookup(lookup, *start, count)

    return timed(generation, others)


def theirs(model, ids, count, cache, others):
    """Return what `timed` does of mlx-lm."""
    ids, most = mx.array(ids), {"max_tokens": count, "prompt_cache": cache}
    return timed(lambda: generate_step(ids, model, **most), others)


def random_ids(model, count):
    return mx.random.randint(0, model.args.vocab_size, (count,)).tolist()


def median(values):
    return statistics.median(values)


def weight_bytes_read(model):
    """Return the bytes of weights that one token reads."""
    embedding = model.model.embed_tokens if "lm_head" in model else nn.Module()
    total, unread = (
        sum(array.nbytes for _, array in tree_flatten(part.parameters()))
        for part in (model, embedding)
    )
    return total - unread


def speed(options):
    """Prompts from an empty cache, then replies from the last of them, turn about."""
    model, other = both_models(options)
    bandwidth, read = llama.copy_bandwidth(), weight_bytes_read(model)
    count = options.generation_tokens
    for length in options.prompt_tokens:
        ids, prompts, replies = random_ids(model, length), [], []
        for _ in range(options.trials + 1):  # the first compiles kernels
            mine, peers = model.make_cache(length + count), make_prompt_cache(other)
            us = ours(model, ids, 9, mine, peers)
            prompts.append((us, theirs(other, ids, 9, peers, mine)))
        for _ in range(4 * options.trials + 1):
            rewind((*mine, *peers), length)
            us = ours(model, [1], count - 1, mine, peers)
            replies.append((us, theirs(other, [1], count - 1, peers, mine)))
        us, them = zip(*prompts[1:])
        first = [median(seconds for seconds, _, _ in side) for side in (us, them)]
        peak = [max(gb for _, _, gb in side) for side in zip(*prompts[1:], *replies)]
        decode = [median(run[1] for run in side) for side in zip(*replies[1:])]
        ratios = (
            median(b[0] / a[0] for a, b in prompts[1:]),
            median(a[1] / b[1] for a, b in replies[1:]),
        )
        print(
            f"| {options.name} | {length:,} | {length / first[0]:,.1f} | "
            f"{length / first[1]:,.1f} | {ratios[0]:.2f} | {decode[0]:,.1f} | "
            f"{decode[1]:,.1f} | {ratios[1]:.2f} | {read * decode[0] / bandwidth:.0%} | "
            f"{peak[0]:.2f} | {peak[1]:.2f} | {peak[0] / peak[1]:.2f} |",
            flush=True,
        )


def primitives(logits):
    """Return how often a graph has each primitive."""
    with tempfile.TemporaryDirectory() as folder:
        dot = Path(folder) / "step.dot"
        mx.export_to_dot(str(dot), logits)
        kinds = re.findall(r'label ?= ?"([^"]*)", shape=rectangle', dot.read_text())
    return collections.Counter(kinds)


def steps(options):
    model, other = both_models(options)
    ids = mx.array([random_ids(model, 64)])
    for name, llm, cache in (
        ("llama.py", model, model.make_cache(128)),
        ("mlx-lm", other, make_prompt_cache(other)),
    ):
        mx.eval(llm(ids, cache))
        token, seconds = mx.array([[1]]), []
        for _ in range(12):
            started = time.perf_counter()
            logits = llm(token, cache)
            token = mx.argmax(logits[:, -1], axis=-1)[:, None]
            built = time.perf_counter()
            mx.async_eval(token)
            launched = time.perf_counter()
            mx.synchronize()
            seconds.append(
                (built - started, launched - built, time.perf_counter() - launched)
            )
        count = primitives(llm(token, cache))
        build, launch, wait = (1e3 * median(column) for column in zip(*seconds[2:]))
        total, layers = sum(count.values()), len(model.model.layers)
        print(
            f"| {options.name} | {name} | {total} | {total / layers:.1f} | {build:.2f} | "
            f"{launch:.2f} | {wait:.2f} |  {dict(count.most_common())}",
            flush=True,
        )


def flop_of_prompt(args, length):
    """Return the operations that a prompt takes: every weight of the layers for each
    token, and each token of the attention for each that it sees."""
    H, Hkv, Dh = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    D, F = args.hidden_size, args.intermediate_size
    weights = D * (2 * H + 2 * Hkv) * Dh + 3 * D * F
    return args.num_hidden_layers * (2 * weights * length + 2 * H * Dh * length**2)


def context(options):
    """Prefill and peak of one length after another, then decode of all, turn about."""
    model, _ = both_models(options)
    lengths, count = options.prompt_tokens, options.generation_tokens
    caches = {length: model.make_cache(length + count) for length in lengths}
    rows, times = {}, {length: [] for length in lengths}
    for length, cache in caches.items():
        ids = random_ids(model, length)
        others = [
            layer for other in caches.values() if other is not cache for layer in other
        ]
        for _ in range(2):  # the first makes plans for every step
            rewind(cache, 0)
            seconds, _, peak = ours(model, ids, count, cache, others)
        tflops = flop_of_prompt(model.args, length) / seconds / 1e12
        rows[length] = length / seconds, tflops, peak
    for _ in range(options.trials + 1):
        for length, cache in caches.items():
            rewind(cache, length)
            times[length].append(1e3 / ours(model, [1], count - 1, cache)[1])
    read, first = weight_bytes_read(model), None
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    for length, cache in caches.items():
        prefill, tflops, peak = rows[length]
        took, nbytes = median(times[length][1:]), read + cached_bytes(cache)
        first = first or (took, nbytes)
        print(
            f"| {options.name} | {length:,} | {prefill:,.0f} | {tflops:,.2f} | "
            f"{took:.2f} | {took / first[0]:.2f} | {nbytes / first[1]:.2f} | {peak:.2f} | "
            f"{(weights + cached_bytes(cache)) / 1e9:.2f} |",
            flush=True,
        )


def capacity(options):
    """A short prompt in a small and in a large cache, whose tokens are launched whole or
    in halves, turn about: does a step copy what the last one still reads?"""
    model, _ = both_models(options)
    ids, count = random_ids(model, 16), options.generation_tokens
    ways = [(512, "whole"), (options.context, "whole"), (options.context, "halves")]
    runs, large_cache = {way: [] for way in ways}, llama.large_cache
    for _ in range(options.trials + 1):
        for slots, way in ways:
            limit = math.inf if way == "whole" else 0
            llama.large_cache = lambda limit=limit: limit
            runs[slots, way].append(ours(model, ids, count, model.make_cache(slots)))
    llama.large_cache = large_cache
    for slots, way in ways:
        _, decode, peak = zip(*runs[slots, way][1:])
        pairs = zip(runs[slots, way][1:], runs[ways[0]][1:])
        ratio = median(one[1] / first[1] for one, first in pairs)
        nbytes = slots * 2 * model.args.num_key_value_heads * model.args.head_dim
        print(
            f"| {options.name} | {way} | {slots:,} | {nbytes * 2 / 1e6:,.1f} | "
            f"{median(decode):,.1f} | {ratio:.2f} | {max(peak):.2f} |",
            flush=True,
        )


def turns(options):
    """What each turn of a chat reads, and what of it is new."""
    messages = []
    with llama.Engine(llama.find_folder(options.model)) as engine:
        for turn in range(10):
            messages.append(
                {"role": "user", "content": f"Tell me story number {turn}."}
            )
            reply = engine.chat(
                messages, max_tokens=options.generation_tokens, seed=turn
            )
            messages.append({"role": "assistant", "content": "".join(reply)})
            stats = reply.stats
            print(
                f"| {turn + 1} | {stats.prompt_tokens} | {stats.reused_tokens} | "
                f"{stats.prompt_tokens - stats.reused_tokens} |",
                flush=True,
            )


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def memory(options):
    """The most anonymous memory, on Linux, that loading a folder and a reply take."""
    before, highest, ended = anonymous_bytes(), [], threading.Event()

    def watch():
        while not ended.wait(0.002):
            highest.append(anonymous_bytes() - before)

    threading.Thread(target=watch, daemon=True).start()
    model = loaded(llama.find_folder(options.model))
    after_load = max(highest, default=0)
    weights = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    cache = model.make_cache(options.context)
    ids = random_ids(model, options.prompt_tokens[0])
    ours(model, ids, options.generation_tokens, cache)
    ended.set()
    peak = max(highest, default=0)
    parts = (weights, after_load, cached_bytes(cache), peak, before)
    print(f"| {options.name} | " + " | ".join(f"{n / 1e6:,.1f}" for n in parts) + " |")


def lookup(options):
    """A sampler that returns to the prompt makes a copy of it, whatever the weights."""
    model, _ = both_models(options)
    ids, count = random_ids(model, options.prompt_tokens[0]), options.generation_tokens

    class Copying:
        def __init__(self):
            self.at = -1

        def __call__(self, logits):
            self.at += 1
            wanted = mx.array([ids[self.at % len(ids)]])
            return mx.where(mx.isnan(logits[:, 0]), 0, wanted)

    def free(seed):
        return llama.make_sampler(temperature=1.0, seed=seed)

    for name, sampler in (("copying", lambda seed: Copying()), ("free text", free)):
        ratios, speeds = [], []
        for seed in range(options.trials + 1):
            plain = ours(model, ids, count, sampler=sampler(seed))[1]
            drafted = llama.Lookup(options.drafts, ids)
            ahead = ours(model, ids, count, sampler=sampler(seed), lookup=drafted)[1]
            speeds.append((plain, ahead, drafted.accepted))
            ratios.append(ahead / plain)
        plain, ahead, accepted = (median(column) for column in zip(*speeds[1:]))
        print(
            f"| {options.name} | {name} | {plain:,.1f} | {ahead:,.1f} | "
            f"{median(ratios[1:]):.2f} | {accepted:.0f} of {count} |",
            flush=True,
        )


def alone(options):
    """Print, as JSON, tokens/s of prefill and decode of one of the tools; see blas."""
    folder, count = llama.find_folder(options.model), options.generation_tokens
    length = options.prompt_tokens[0]
    if options.peer:
        model = load_model(folder)[0]
        cache = make_prompt_cache(model)
    else:
        model = loaded(folder)
        llama.accelerate(model)
        cache = model.make_cache(length + count)
    one = theirs if options.peer else ours
    one(model, random_ids(model, 2), 2, cache, ())  # to warm up
    rewind(cache, 0)
    seconds, decode, _ = one(model, random_ids(model, length), count, cache, ())
    print(json.dumps([length / seconds, decode]))


# Starts this file, but only after MLX, which so keeps the BLAS of its wheel.
MLX_FIRST = "import mlx.core, runpy; runpy.run_path({!r}, run_name='__main__')"


def blas(options):
    """llama.py with OpenBLAS, without it, and mlx-lm as installed: a process each, since
    within one all use the same BLAS; turn about."""
    if not llama.has_openblas():
        sys.exit("OpenBLAS is not installed (Debian: apt install libopenblas0)")

    def words(prompt, reply):
        words = ["--prompt-tokens", prompt, "--generation-tokens", reply]
        return ["alone", options.model, *map(str, words)]

    ours = words(options.prompt_tokens[0], options.generation_tokens)
    theirs = ours
    if options.peer_tokens:
        theirs = words(options.peer_tokens, options.peer_tokens)
    mlx_first = ["-c", MLX_FIRST.format(__file__)]
    sides = {
        "with OpenBLAS": [__file__, *ours],
        "without": [*mlx_first, *ours],
        "mlx-lm": [*mlx_first, *theirs, "--peer"],
    }
    found = {name: [] for name in sides}
    for _ in range(options.trials):
        for name, side in sides.items():
            command = [sys.executable, *side]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[name].append(json.loads(done.stdout))
    for name, runs in found.items():
        both = [median(column) for column in zip(*runs)]
        ratios = [
            median(a[i] / b[i] for a, b in zip(runs, found["mlx-lm"])) for i in (0, 1)
        ]
        print(
            f"| {options.name} | {name} | {both[0]:,.2f} | {ratios[0]:,.2f} | "
            f"{both[1]:,.2f} | {ratios[1]:,.2f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = speed, steps, context, capacity, turns, memory, lookup, blas, alone
    parser.add_argument(
        "what",
        choices=[f.__name__ for f in commands],
    )
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of a preset; else 16")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--generation-tokens", type=int, default=128)
    parser.add_argument(
        "--context", type=int, default=8192, help="tokens, of memory and capacity"
    )
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="mlx-lm, of alone")
    text = "of mlx-lm's prompt and reply, of blas, if others would take it minutes"
    parser.add_argument("--peer-tokens", type=int, help=text)
    parser.add_argument("--drafts", type=int, default=15, help="at a time, of lookup")
    options = parser.parse_args()
    bits = f"{options.bits}-bit" if options.bits else "bf16"
    preset = options.model in llama.PRESETS
    options.name = f"{options.model} {bits}" if preset else Path(options.model).name
    group = llama.join_ranks()
    if group and (not preset or options.what != "speed"):
        parser.error("ranks measure the speed of a preset, and nothing else")
    mx.random.seed(0)  # all ranks read the same tokens
    # Every rank measures, and one says so.
    out = io.StringIO() if group and group.rank() else sys.stdout
    with contextlib.redirect_stdout(out):
        globals()[options.what](options)


if __name__ == "__main__":
    main()
