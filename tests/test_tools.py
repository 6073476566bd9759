"""What stands beside llama.py: the benchmarks, and the training of the storyteller."""

import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.support import (
    HERE,
    STORIES,
    assert_close,
    command,
    on_the_cpu,
    peer,
    random_tokens,
    without,
)

pytest_plugins = ["tests.fixtures"]


def imported(path: Path) -> types.ModuleType:
    """A file that is no module of a package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Of each command: its options, and the rows and cells of the table that it prints.
BENCHMARKS = {
    "speed": (("--prompt-tokens", 5, 20), 2, 12),
    "steps": ((), 2, 8),
    "context": (("--prompt-tokens", 5, 20), 2, 9),
    "capacity": (("--context", 1024), 3, 7),
    "turns": ((), 10, 4),
    "memory": (("--prompt-tokens", 5, "--context", 256), 1, 6),
    "lookup": (("--prompt-tokens", 20), 2, 6),
}


@pytest.mark.parametrize("what", BENCHMARKS)
def test_a_benchmark_prints_its_table_wherever_it_is_started(what, tmp_path):
    peer("mlx_lm")
    if what == "memory" and not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells a process of its anonymous memory")
    options, height, width = BENCHMARKS[what]
    few = ("--generation-tokens", 48 if what == "lookup" else 6, "--trials", 1)
    line = [sys.executable, HERE / "benchmarks" / "bench.py", what, STORIES]
    done = subprocess.run(
        [*map(str, (*line, *options, *few))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines()]
    assert [len(row) for row in rows] == [width] * height, done.stdout
    numbers = [re.findall(r"\d[\d,]*\.?\d*", cell) for row in rows for cell in row[2:]]
    assert all(numbers) and "nan" not in done.stdout
    if what == "lookup":  # a copy of the prompt is what the drafts say
        assert int(re.search(r"copying.* (\d+) of 48 ", done.stdout)[1]) > 20
    if what == "turns":  # each turn reads its own tokens only
        turns = [[*map(int, row)] for row in rows]
        assert all(new == read - held < 60 for _, read, held, new in turns)
        assert all(before[1] < after[2] for before, after in itertools.pairwise(turns))


@on_the_cpu
@pytest.mark.parametrize("bits", [None, 4])
def test_both_sides_of_a_benchmark_compute_the_same_model(bits, monkeypatch):
    peer("mlx_lm")
    bench = imported(HERE / "benchmarks" / "bench.py")
    args = llama.llama3_args(128, 256, 2, 8)
    monkeypatch.setattr(llama, "PRESETS", {"tiny": args})
    for model in ("tiny", str(STORIES)):
        ours, theirs = bench.both_models(Namespace(model=model, bits=bits))
        theirs.set_dtype(mx.float32)  # as ours is here; a folder's is in bfloat16
        tokens = mx.array(random_tokens({"vocab_size": 2048}))
        assert_close(ours(tokens), np.array(theirs(tokens)), 1e-4)


@on_the_cpu
def test_both_sides_of_a_benchmark_share_their_weights(monkeypatch):
    """Or the peak of either would count them twice, after packed ones were moved."""
    peer("mlx_lm")
    bench = imported(HERE / "benchmarks" / "bench.py")

    def accelerate(model, group, *, keep_packed):
        for layer in model.modules():
            if isinstance(layer, llama.QuantizedLinear):
                layer.weight = layer.weight + 0

    monkeypatch.setattr(llama, "PRESETS", {"tiny": llama.llama3_args(128, 256, 2, 8)})
    monkeypatch.setattr(llama, "accelerate", accelerate)
    ours, theirs = bench.both_models(Namespace(model="tiny", bits=4))
    for mine, peers in zip(ours.model.layers, theirs.model.layers, strict=True):
        assert mine.mlp.up_proj.weight is peers.mlp.up_proj.weight


@pytest.fixture
def train(monkeypatch):
    """stories/train.py, with a model that is trained within seconds."""
    peer("tokenizers")
    train = imported(STORIES / "train.py")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setattr(train, "ARGS", train.ARGS | sizes)
    monkeypatch.setattr(train, "WINDOW", 32)
    monkeypatch.setattr(train, "ROWS", 4)
    mx.disable_compile()  # on a CPU, MLX would run a C++ compiler for half a minute
    yield train
    mx.enable_compile()


STORY = "One day, a cat named Tom saw an owl. The cat liked the owl. They played. "


@on_the_cpu
def test_a_step_of_training_goes_down_the_gradient(train):
    """Through a cache, which the model makes when it is given none."""
    mx.random.seed(0)
    model = train.Trainer(100).model
    windows = mx.array(random_tokens({"vocab_size": 2048}, 4, 33))

    def loss(weights: dict) -> mx.array:
        model.update(weights)
        return train.cross_entropy(model, windows).mean()

    weights = model.parameters()
    value, gradient = mx.value_and_grad(loss)(weights)
    assert abs(value.item() - math.log(2048)) < 0.1  # of a model that knows nothing
    flat, slopes = dict(tree_flatten(weights)), dict(tree_flatten(gradient))
    assert flat.keys() == slopes.keys()
    steepest = math.sqrt(sum((slope**2).sum().item() for slope in slopes.values()))
    step = 1e-2 / steepest
    for sign in (1, -1):
        moved = train.tree_map(lambda w, g, s=sign: w + s * step * g, weights, gradient)
        change = loss(moved).item() - value.item()
        assert change == pytest.approx(sign * 1e-2 * steepest, rel=0.05)
    assert all(mx.abs(slope).max().item() > 0 for slope in slopes.values())


def test_what_is_trained_can_be_saved_measured_and_talked_to(
    train, tmp_path, monkeypatch
):
    some = train.pairs(4)
    monkeypatch.setattr(train, "pairs", lambda n: some)  # of 100
    texts = [train.plain(STORY * n) for n in range(1, 6)]
    vocabulary = train.make_vocabulary(texts)
    train.save_tokenizer(vocabulary, tmp_path)
    mx.random.seed(0)
    trainer, documents = train.Trainer(300), train.Documents(vocabulary, texts)
    first = trainer.step(documents.batch(4)).item()
    trainer.run(documents, 60, every=30)
    last = trainer.step(documents.batch(4)).item()
    assert last < first - 1
    half = trainer.in_bfloat16()
    before = train.bits_per_byte(half, llama.Tokenizer.from_folder(tmp_path), STORY, 32)
    train.save(half, tmp_path)
    model, tokenizer = llama.load(tmp_path)
    kinds = {type(layer) for _, layer in model.named_modules()}
    assert {llama.QuantizedLinear, llama.QuantizedEmbedding} <= kinds
    after = train.bits_per_byte(model, tokenizer, STORY, 32)
    assert after == pytest.approx(before, rel=0.02)  # 8 bits lose next to nothing
    assert train.story_test(model, tokenizer)["both"] == 0
    words = ("--prompt", "Hello!", "--max-tokens", 3)
    assert command("chat", tmp_path, *words).returncode == 0


def test_the_rotary_embedding_of_the_training_code_is_that_of_llama(train):
    config = without(train.ARGS, "rope_scaling")
    rope = llama.RoPE(config["head_dim"], config["rope_theta"])
    x = mx.random.normal((2, 4, 1, config["head_dim"]))
    for offset in (0, 7, 400):
        wanted = np.array(rope(x, offset))
        assert_close(train.WideRoPE(rope)(x, offset), wanted, 1e-4)


def test_the_dialogues_of_the_training_code_are_in_the_format_of_llama_3(train):
    turns = ["Hello!", "Hi."]
    text = train.render(turns, types.SimpleNamespace(random=lambda: 1.0))
    tokenizer = llama.Tokenizer.from_folder(STORIES)
    messages = [{"role": "user", "content": "Hello!"}]
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = tokenizer.encode_chat(messages)
    written = "".join(names.get(i) or tokenizer.decode([i]) for i in ids)
    assert text == written + "Hi.<|eot_id|>"
    settings = json.loads((STORIES / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == train.TEMPLATE
