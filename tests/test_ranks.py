"""Ranks: a model shared by several processes."""

import collections
import contextlib
import dataclasses
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from mlx.utils import tree_flatten

from tests.support import (
    CTRL_C,
    CTRL_D,
    DATA,
    HERE,
    PROGRAM,
    STORIES,
    USER,
    Terminal,
    assert_close,
    chat_with,
    command,
    ends,
    four_bit_model,
    load_model,
    on_the_cpu,
    peer,
    quantize,
    random_folder,
    start,
    turns,
    with_extras,
    write_model,
)

pytest_plugins = ["tests.fixtures"]


# Four ranks divide H, Hkv, F and, quantized, the groups.
SPLIT = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def split_folder(path: Path, *, bits: int | None = None, **changes) -> Path:
    """A model of random weights, all of which matter; given bits, down_proj has 8.

    It has the biases and norms that its family and config.json ask for.
    """
    config = SPLIT | changes
    model = with_extras(llama.Llama(llama.ModelArgs.from_dict(config)), config)
    rng = np.random.default_rng(0)
    for name, array in tree_flatten(model.parameters()):
        value = rng.normal(float("norm" in name), 0.2, array.shape)
        model.load_weights([(name, mx.array(value, mx.float32))], strict=False)
    if bits:
        own = {"group_size": 64, "bits": 8}
        for block in model.model.layers:
            quantize(block.mlp, 64, 8)  # down_proj alone: 64 divides no D
        quantize(model, 32, bits)
        names = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
        settings = {"group_size": 32, "bits": bits} | dict.fromkeys(names, own)
        config = config | {"quantization": settings}
    path.mkdir()
    return write_model(path, config, dict(tree_flatten(model.parameters())))


def quantized_copy(folder: Path, path: Path) -> Path:
    """A folder at 4 bits, in groups of 32."""
    model = load_model(folder)
    quantize(model, group_size=32, bits=4)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    path.mkdir()
    return write_model(path, config, dict(tree_flatten(model.parameters())))


def dense_copy(folder: Path, path: Path) -> Path:
    """A quantized folder with its weights unpacked."""
    weights = dict(tree_flatten(load_model(folder).parameters()))
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization")
    for name in [name for name in weights if name.endswith(".scales")]:
        packed = [weights.pop(name.replace("scales", part)) for part in PACKED]
        weight = mx.dequantize(*packed, settings["group_size"], settings["bits"])
        weights[name.replace("scales", "weight")] = weight
    path.mkdir()
    return write_model(path, config, weights)


PACKED = ("weight", "scales", "biases")


def ring(n: int, path: Path) -> list[dict[str, str]]:
    """What makes n processes the ranks of a ring on this machine: an environment each,
    which MLX reads, with a file of addresses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        names = [["{}:{}".format(*each.getsockname())] for each in sockets]
    (path / "hosts.json").write_text(json.dumps(names))
    hosts = {"MLX_HOSTFILE": str(path / "hosts.json")}
    return [hosts | {"MLX_RANK": str(rank)} for rank in range(n)]


def started(
    n: int, path: Path, *words: object, stdin: int = subprocess.DEVNULL
) -> list[subprocess.Popen]:
    """The ranks of a ring that run the same command; rank 0 may be talked to."""
    lead, *others = ring(n, path)
    lead = start(lead, *words, stdin=stdin)
    time.sleep(0.1)  # who does not find it listening tries again after a second
    return [lead, *[start(other, *words) for other in others]]


def in_ranks(n: int, path: Path, *words: object) -> list[tuple[int, str, str]]:
    """How the ranks of a ring end that run the same command."""
    return ends(*started(n, path, *words))


def said_by(model: llama.Llama, count: int) -> list:
    """Logits after a prompt long enough to be computed layer by layer, and after one
    more token; and so many tokens of greedy text, with drafts."""
    cache, tokens = model.make_cache(160), [1, 40, 99, 7, 21, 64, 3] * 20
    parts = mx.split(mx.array([tokens]), [139], axis=1)
    logits = [model(part, cache, logits_to_keep=1)[0] for part in parts]
    lookup, cache = llama.Lookup(3, tokens[:9]), model.make_cache(160)
    *_, (_, last) = llama.prefill(model, tokens[:9], cache)
    start = lookup, model, last, cache, llama.greedy
    text = [*llama.decode_with_lookup(*start, count)]
    return [mx.concatenate(logits).astype(mx.float32).tolist(), text, lookup.accepted]


EACH_FOLDER = f"""
import json, sys
import llama, mlx.core as mx
mx.set_default_device(mx.cpu)  # to compare exactly
{inspect.getsource(said_by)}
group = llama.join_ranks()
for folder in sys.argv[2:]:
    loading = llama.Loading(*llama.examine(folder), group)
    list(loading.read())
    found = said_by(loading.model, int(sys.argv[1]))
    if group.rank() == 0:
        print(json.dumps(found))
"""


@on_the_cpu
@pytest.mark.parametrize(("n", "count"), [(2, 8), (4, 3)])  # four need four cores
def test_ranks_give_the_logits_and_the_text_of_one_process(n, count, tmp_path):
    biases = {"attention_bias": True, "mlp_bias": True}
    folders = [split_folder(tmp_path / "4 and 8 bits", bits=4, **biases)]
    if DATA.is_dir():
        folders.append(DATA / "models" / "stories260K")
    if n == 2:
        folders.append(STORIES)
        tied = biases | {"tie_word_embeddings": True}
        folders.append(split_folder(tmp_path / "a tied head and biases", **tied))
        folders.append(split_folder(tmp_path / "a head of its own"))
        folders.append(split_folder(tmp_path / "qwen2", model_type="qwen2"))
        folders.append(split_folder(tmp_path / "qwen3", bits=4, model_type="qwen3"))
        folders.append(dense_copy(STORIES, tmp_path / "stories in float32"))
        if DATA.is_dir():
            folders.append(quantized_copy(folders[1], tmp_path / "260K at 4 bits"))
    for status, out, error in (
        ranks := in_ranks(n, tmp_path, "-c", EACH_FOLDER, count, *folders)
    ):
        assert (status, error) == (0, ""), error
        assert out == "" or out == ranks[0][1]
    lines = ranks[0][1].splitlines()
    for folder, line in zip(folders, lines, strict=True):
        logits, *text = json.loads(line)
        wanted, *wanted_text = said_by(load_model(folder), count)
        assert_close(np.array(logits), wanted, 1e-4)
        assert text == wanted_text, folder.name


def rank_of(rank: int, n: int) -> types.SimpleNamespace:
    """What a group tells of itself."""
    return types.SimpleNamespace(rank=lambda: rank, size=lambda: n)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_shares_of_all_ranks_make_up_the_file(bits, tmp_path):
    changes = {"attention_bias": True, "mlp_bias": True}
    folder = split_folder(tmp_path / "m", bits=bits, **changes)
    if bits is None:  # aligned, as MLX's own writer does not
        file = folder / "model.safetensors"
        arrays = {name: np.array(array) for name, array in mx.load(str(file)).items()}
        safetensors.numpy.save_file(arrays, file)
    model, tensors = llama.examine(folder)
    ranks = (rank_of(rank, 4) for rank in range(4))
    shares = [llama.rank_share(model, tensors, rank)[1] for rank in ranks]
    parts = [
        {info.name: array for info, array in llama.read_tensors(share.values())}
        for share in shares
    ]
    for info, whole in llama.read_tensors(tensors.values()):
        kept = [share[info.name] for share in shares]
        mine = [part[info.name] for part in parts]
        assert [(a.shape, a.nbytes) for a in mine] == [
            (k.shape, k.nbytes) for k in kept
        ]
        layer, part = info.name.split(".")[-2:]
        axis = {"o_proj": 1, "down_proj": 1}.get(layer, 0)
        if not layer.endswith("_proj") or (axis and part == "bias"):
            assert all(mx.array_equal(part, whole) for part in mine)
        else:
            assert mx.array_equal(mx.concatenate(mine, axis), whole), info.name


def quantized_folder(dense: Path, path: Path) -> Path:
    """The folder with each matrix quantized as a whole, if 64 divides its width."""
    weights, how = mx.load(str(dense / "model.safetensors")), {"bits": 4}
    how["group_size"] = 64
    for name in [name for name, array in weights.items() if array.ndim == 2]:
        if weights[name].shape[1] % 64 == 0:
            parts = mx.quantize(weights.pop(name), **how)
            names = (name.replace("weight", part) for part in PACKED)
            weights |= dict(zip(names, parts))
    config = json.loads((dense / "config.json").read_text())
    path.mkdir()
    return write_model(path, config | {"quantization": how}, weights)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_rank_that_quantizes_its_share_has_that_of_the_whole_quantized(n, tmp_path):
    """D of 96 is in no groups, so only o_proj and down_proj are quantized, by columns;
    with D of 128 the others are too, by rows."""
    for width, extra in ((96, {}), (128, {"attention_bias": True, "mlp_bias": True})):
        sizes = {"hidden_size": width, "head_dim": 32, **extra}
        dense = split_folder(tmp_path / f"{width}", **sizes)
        packed = quantized_folder(dense, tmp_path / f"{width} packed")
        for rank in range(n):
            own = llama.rank_share(*llama.examine(dense), rank_of(rank, n), 4)[1]
            wanted = llama.rank_share(*llama.examine(packed), rank_of(rank, n))[1]
            assert own.keys() == wanted.keys()
            expected = {i.name: a for i, a in llama.read_tensors(wanted.values())}
            for info, array in llama.read_tensors(own.values()):
                assert (info.shape, info.nbytes) == (array.shape, array.nbytes)
                assert mx.array_equal(array, expected[info.name]), info.name
    # Of o_proj, a row is 128 weights in two groups, and a group is not shared.
    dense = split_folder(tmp_path / "cut", head_dim=16)
    words = r"^4 ranks cannot share model\.layers\.0\.self_attn\.o_proj\.weight, "
    words += r"\[96, 128\], to quantize it: each needs a multiple of 64 columns"
    if n == 4:
        with pytest.raises(ValueError, match=words):
            llama.rank_share(*llama.examine(dense), rank_of(0, n), 4)
        return
    llama.rank_share(*llama.examine(dense), rank_of(0, n), 4)


def test_what_ranks_cannot_share_is_named(tmp_path):
    args = llama.ModelArgs.from_dict(SPLIT)
    with pytest.raises(ValueError, match=r"^3 ranks .* 8 heads, 4 key/value heads and"):
        llama.rank_args(args, 3)
    with pytest.raises(ValueError, match="8 ranks cannot share 8 heads, 4 key/value"):
        llama.rank_args(args, 8)
    with pytest.raises(ValueError, match="2 ranks .* an MLP of 255"):
        llama.rank_args(dataclasses.replace(args, intermediate_size=255), 2)
    own = llama.rank_args(args, 4)
    assert (own.num_attention_heads, own.num_key_value_heads, own.head_dim) == (
        2,
        1,
        16,
    )
    assert llama.kv_bytes_per_token(own, 4) * 4 == llama.kv_bytes_per_token(args, 4)
    # Of o_proj, a row is 64 weights in two groups, and a group is not shared.
    folder = split_folder(tmp_path / "m", bits=4, head_dim=8)
    model, tensors = llama.examine(folder)
    words = r"^4 ranks cannot share .*o_proj.(scales|biases), \[96, 2\], evenly along axis 1$"
    with pytest.raises(ValueError, match=words):
        llama.rank_share(model, tensors, rank_of(0, 4))


def test_a_rank_alone_has_its_layers_fused_and_several_sum_what_theirs_give(kernels):
    alone = (llama.FusedBlock, llama.UnpackedLinear)
    shared = (llama.CompiledBlock, llama.SummedLinear)
    cases = ((None, alone), (rank_of(0, 1), alone), (rank_of(1, 2), shared))
    for group, wanted in cases:
        model = four_bit_model(True, num_hidden_layers=1)
        llama.accelerate(model, group)
        (launched,) = model.model.layers
        block = launched.block
        assert (type(block), type(block.self_attn.o_proj)) == wanted
        assert type(block.mlp.down_proj) is wanted[1]
        llama.fuse(model)  # once more changes nothing
        assert model.model.layers == [launched] and launched.block is block


MESSAGES = """
import os, llama
group = llama.join_ranks()
rank = group.rank()
message = [[*range(300)], "\u00e9", None]
assert llama.broadcast(group, message if rank == 0 else ["unheard"]) == message
assert llama.broadcast(group, []) == []
tokens = []
stop = llama.cancelled_by_any(group, lambda: rank == 1 and len(tokens) == 2, tokens)
for token in range(4):
    print(stop())
    tokens.append(token)
stop = llama.cancelled_by_any(group, lambda: False, [5 + rank])
stop()
try:
    stop()
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)  # Python's own exit can meet MLX's ring in the middle of its, and crash
"""


def test_ranks_hear_what_rank_0_says_and_stop_together(tmp_path):
    # The answer to the question before: asked with two tokens, known with three.
    stops = "False\nFalse\nFalse\nTrue\nnot all ranks have sampled the token"
    for rank, done in enumerate(in_ranks(2, tmp_path, "-c", MESSAGES)):
        assert done == (0, f"{stops} {5 + rank}\n", "")


@pytest.fixture
def alone(folder, monkeypatch):
    """An engine whose only rank hears itself, and which notes what it is asked."""
    asked = []

    def cancelled_by_any(group, stop, tokens):
        return lambda: asked.append(len(tokens)) or stop()

    monkeypatch.setattr(llama, "broadcast", lambda group, message: message)
    monkeypatch.setattr(llama, "cancelled_by_any", cancelled_by_any)
    engine = llama.Engine(folder, group=rank_of(0, 1))
    yield engine, asked
    engine.close()


def test_a_request_that_cannot_be_passed_on_to_the_ranks_fails(alone, monkeypatch):
    engine, _ = alone
    assert "".join(engine.chat(USER, max_tokens=3, temperature=0))

    def fail(_group, message):
        if message:
            raise ConnectionError("a rank is gone")
        return message

    monkeypatch.setattr(llama, "broadcast", fail)
    reply = engine.chat(USER, max_tokens=3)
    assert str(reply._request.events.get(timeout=20)) == "a rank is gone"
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.chat(USER)


def test_a_request_that_comes_as_the_worker_fails_is_told(alone, monkeypatch):
    """After it has looked into its queue for the last time."""
    engine, _ = alone
    worker, failure = engine._worker, ConnectionError("a rank is gone")
    put = lambda _: setattr(worker, "failure", failure)
    get, empty = worker.requests.get, lambda: True
    with monkeypatch.context() as patch:
        fake = types.SimpleNamespace(put=put, get=get, empty=empty)
        patch.setattr(worker, "requests", fake)
        reply = engine.chat(USER, max_tokens=3)
        assert reply._request.events.get(timeout=20) is failure


@pytest.mark.parametrize("lookup", [0, 4])
def test_ranks_are_asked_once_a_pass_whether_one_wants_to_stop(
    alone, monkeypatch, lookup
):
    engine, asked = alone
    settings = {"temperature": 0, "max_tokens": 60}
    reply = engine.complete("abc", lookup=0, **settings)
    collections.deque(reply, 0)
    ids = engine.tokenizer.encode("abc") + reply.taken.ids
    monkeypatch.setattr(
        llama.Lookup, "drafts", lambda self: ids[len(self.ids) :][: self.n]
    )
    asked.clear()
    reply = engine.complete("abc", lookup=lookup, **settings)
    collections.deque(reply, 0)
    # A pass gives the first token, one the next, and each of the others four drafts.
    passes = [1, 2, *range(6, 61, 5)] if lookup else [*range(1, 61)]
    assert reply.stats.generation_tokens == 60
    assert [count for count in asked if count > 0] == passes


IN_TURNS = f"""
import collections, json, sys
import llama, mlx.core as mx
mx.set_default_device(mx.cpu)  # where a number takes 4 bytes
USER = {USER}
{inspect.getsource(turns).replace(": llama.Engine", "")}
group = llama.join_ranks()
llama.require_memory = lambda *nbytes: print(*nbytes)
with llama.Engine(sys.argv[1], group=group) as engine:
    if group.rank() == 0:
        print(json.dumps(turns(engine)))
        any_seed = engine.chat(USER, temperature=9.0, max_tokens=9)
        collections.deque(any_seed, 0)
    try:
        (engine.complete if group.rank() else engine.restore)("x")
    except (RuntimeError, ValueError) as error:
        print(error)
    if group.rank() > 0:
        make = llama.make_sampler  # another seed than rank 0's, from the third turn on
        llama.make_sampler = lambda seed, **rest: make(seed=seed + (seed == 3), **rest)
    else:
        try:
            collections.deque(engine.chat(USER, temperature=9, top_p=1.0, seed=3), 0)
        except RuntimeError as error:
            print(error)
"""


@on_the_cpu
def test_a_turn_cancelled_on_all_ranks_and_the_next_are_those_of_one(folder, tmp_path):
    lead, follower = in_ranks(2, tmp_path, "-c", IN_TURNS, folder)
    lines, others = lead[1].splitlines(), follower[1].splitlines()
    args = llama.ModelArgs.from_dict(json.loads((folder / "config.json").read_text()))
    cache = llama.kv_bytes_per_token(args, 4) * 512 // 2
    _, share = llama.rank_share(*llama.examine(folder), rank_of(0, 2))
    wanted = f"{llama.memory_of(share.values(), mx.float32)} {cache}"
    assert (lines.pop(0), others.pop(0)) == (wanted, wanted)  # bytes that a rank needs
    assert others[0] == "only rank 0 can be asked; the others follow"
    assert lines[1].startswith("a session is kept by one rank")
    apart = "not all ranks have sampled the token"
    assert lines[2].startswith(apart)
    for status, _, error in lead, follower:  # the engine has ended with it, too
        assert status == 1 and f"RuntimeError: {apart}" in error
    with llama.Engine(folder) as engine:
        wanted = turns(engine)
    assert json.loads(lines[0]) == wanted and wanted[1::2] == ["cancelled", True]


CHAT = (*PROGRAM, "chat")


def test_ranks_that_cannot_load_say_why_and_end(folder, tmp_path, monkeypatch, capsys):
    cannot = "3 ranks cannot share 4 heads, 2 key/value heads and an MLP of 64 evenly"
    for n, done in enumerate(in_ranks(3, tmp_path, *CHAT, folder, "--prompt", "x")):
        assert done == (1, "", f"llama.py: error: rank {n} of 3: {cannot}")
    monkeypatch.setattr(llama, "join_ranks", lambda: rank_of(1, 2))
    assert llama.main(["chat", str(folder), "--session", str(tmp_path / "s")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llama.py: error: rank 1 of 2: --session needs one rank")


def test_rank_0_alone_reads_and_prints(folder, tmp_path):
    words = (folder, "--max-tokens", 5, "--temperature", 0, "--stats", "--seed", 1)
    typed = "Hello!\nAnd now?\n"
    lead, other = started(2, tmp_path, *CHAT, *words, stdin=subprocess.PIPE)
    lead.stdin.write(typed)
    lead, other = ends(lead, other)
    assert other == (0, "", "") and lead[0] == 0
    assert lead[2].count(", 2 ranks") == 2 and "(reused 0)" in lead[2]
    with llama.Engine(folder) as engine:
        chat = chat_with(engine, *map(str, words[1:]))
        wanted = [chat.ask(text, 1).text for text in typed.splitlines()]
    assert lead[1] == "".join(f"{text}\n" for text in wanted)


def test_info_measures_all_ranks_together(folder, tmp_path):
    few = ("--prompt-tokens", 4, "--generation-tokens", 4)
    words = (*PROGRAM, "info", folder, "--measure", "--json", *few)
    (status, out, error), other = in_ranks(2, tmp_path, *words)
    assert (status, error) == (0, "") and other == (0, "", "")
    found = json.loads(out)["measured"]
    _, share = llama.rank_share(*llama.examine(folder), rank_of(0, 2))
    assert found["weights_gb"] == llama.memory_of(share.values(), mx.float32) / 1e9
    assert found["ranks"] == 2


# The benchmark with a preset that two ranks on a CPU measure within seconds.
SMALL_BENCHMARK = """
import runpy, sys, llama, mlx.core as mx
mx.set_default_device(mx.cpu)
llama.PRESETS["1b"] = llama.llama3_args(128, 256, 2, 8)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_benchmark_of_ranks_prints_one_table(tmp_path):
    peer("mlx_lm")
    bench = HERE / "benchmarks" / "bench.py"
    few = ("--prompt-tokens", 5, "--generation-tokens", 6, "--trials", 1)
    words = ("-c", SMALL_BENCHMARK, bench, "speed", "1b", "--bits", 4, *few)
    (status, out, error), other = in_ranks(2, tmp_path, *words)
    assert (status, error) == (0, "") and other == (0, "", "")
    assert len(out.splitlines()) == 1 and out.startswith("| 1b 4-bit | 5 |"), out


def launcher(path: Path, *words: object) -> list[str]:
    """The command that starts two ranks as the README has it, but for the two Macs."""
    launch = Path(sys.executable).with_name("mlx.launch")
    if not launch.exists():
        pytest.skip("mlx.launch is not installed")
    hosts = path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [launch, "--hostfile", hosts, "-p", port, "--", sys.executable, *words]
    return [*map(str, line)]


def test_the_launcher_of_mlx_starts_it(folder, tmp_path):
    words = ["chat", str(folder), "--prompt", "x", "--max-tokens", "2", "--seed", "1"]
    done = subprocess.run(
        launcher(tmp_path, HERE / "llama.py", *words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == command(*words).stdout and done.returncode == 0


# Runs llama.py as the command that it is, and says which process it is.
NUMBERED = """
import os, runpy, sys
with open(os.path.join(sys.argv[1], os.environ["MLX_RANK"]), "w") as file:
    file.write(str(os.getpid()))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_the_launcher_of_mlx_ends_all_ranks_when_one_dies(killed, tmp_path):
    slow, program = random_folder(tmp_path / "m", context=8192), tmp_path / "rank.py"
    program.write_text(NUMBERED)
    words = HERE / "llama.py", "chat", slow, "--prompt", "x", "--temperature", 0
    launch = subprocess.Popen(
        launcher(tmp_path, program, tmp_path, *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    launch.stdout.read(20)  # a reply has begun
    ranks = [int((tmp_path / name).read_text()) for name in "01"]
    os.kill(ranks[killed], signal.SIGKILL)
    try:
        launch.communicate(timeout=20)
    finally:
        ended = []
        for rank in ranks:
            try:
                os.kill(rank, signal.SIGKILL)
            except ProcessLookupError:
                ended.append(rank)
        launch.kill()
    assert ended == ranks


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_waits_for_a_silent_one_is_ended_by_a_signal(silent, tmp_path):
    """At once: MLX waits without end, and this is how mlx.launch ends a rank."""
    slow = random_folder(tmp_path / "m", context=8192)
    words = (*CHAT, slow, "--prompt", "x")
    ranks = started(2, tmp_path, *words)
    ranks[0].stdout.read(20)
    ranks[silent].send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.5)
        waits = ranks[1 - silent]
        waits.send_signal(signal.SIGTERM)
        assert waits.wait(8) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def seconds_used(process: subprocess.Popen) -> float:
    """The processor time of a running process."""
    numbers = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def test_ctrl_c_ends_a_reply_on_all_ranks_and_ctrl_d_the_conversation(tmp_path):
    slow, at = random_folder(tmp_path / "m", context=8192), ring(2, tmp_path)
    chat = Terminal("chat", slow, "--temperature", 0, **at[0])
    follower = start(at[1], *CHAT, slow)
    before = termios.tcgetattr(chat.master)
    for _ in range(2):
        chat.wait_for(">>> ")
        chat.type("Hello!\r")
        chat.wait_for("\\x")
        chat.type(CTRL_C)
        chat.wait_for("[stopped: Ctrl-C]", 10)
    chat.wait_for(">>> ")
    if sys.platform == "linux":  # ranks that wait for a line to be typed do little
        used = [seconds_used(rank) for rank in (chat.process, follower)]
        time.sleep(0.5)
        assert seconds_used(chat.process) - used[0] < 0.25
        assert seconds_used(follower) - used[1] < 0.25
    chat.type(CTRL_D)
    chat.process.wait(20)
    assert termios.tcgetattr(chat.master) == before and chat.status() == 0
    [(status, out, error)] = ends(follower)
    assert (status, out) == (0, ""), error
