"""Tests of sections 19 and 20: what a GPU gains by is built directly, on any device.

Each part must give what the part gives that it takes the place of. What a CPU gains by
is in test_cpu.py.
"""

import collections
import functools

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from tests.support import (
    CONFIG,
    GPU_TOLERANCE,
    WIDE,
    assert_close,
    filled,
    in_another_thread,
    in_parts,
    on_a_gpu,
    on_the_cpu,
    quantize,
    random_tokens,
    tiny_model,
)

pytest_plugins = ["tests.fixtures"]


def packed_model(group_size=32, bits=8, config=WIDE):
    model = filled(config)
    quantize(model, group_size, bits)
    return model


def decoded(model, n=12):
    """The logits of a batch of one, read one token at a time."""
    tokens = mx.array(random_tokens(CONFIG, length=n))
    return np.array(in_parts(model, tokens, tuple(range(1, n))))


@pytest.fixture
def unpacked(monkeypatch):
    """The shapes of the matrices that are unpacked as a whole, in order."""
    shapes, dequantize = [], mx.dequantize

    def unpack(weight, *rest):
        if weight.ndim == 2:  # 3: the embeddings of tokens
            shapes.append(weight.shape)
        return dequantize(weight, *rest)

    monkeypatch.setattr(mx, "dequantize", unpack)
    return shapes


# -----------------------------------------------------------------------------
# Packed matrices
# -----------------------------------------------------------------------------


@on_the_cpu
@pytest.mark.parametrize(
    ("columns", "rows", "whole"),
    [
        (128, 1, False),
        (128, 2, False),
        (128, 127, False),
        (128, 128, True),
        (128, 300, True),
        # A row that is a single group; MLX's CUDA product is wrong for several rows.
        (64, 1, False),
        (64, 2, True),
        (64, 127, True),
        (64, 128, True),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_matrix_is_unpacked_for_many_rows(
    unpacked, monkeypatch, columns, rows, whole, bias
):
    monkeypatch.setattr(llama, "on_cuda", lambda: True)
    model = nn.Sequential(nn.Linear(columns, 24, bias=bias))
    quantize(model, group_size=64, bits=4)
    layer, x = model.layers[0], mx.random.normal((rows, columns))
    other = llama.as_subclass(layer, llama.UnpackedLinear)
    for given in (x, x[None], x[:, None]):
        assert_close(other(given), np.array(layer(given)), 1e-5)
    assert len(unpacked) == 3 * whole
    assert other.parameters().keys() == layer.parameters().keys()


@on_the_cpu
@pytest.mark.parametrize(("rows", "whole"), [(1, False), (7, False), (8, True)])
def test_on_a_cpu_fewer_rows_are_many(unpacked, rows, whole):
    model, x = nn.Sequential(nn.Linear(128, 24)), mx.random.normal((rows, 128))
    quantize(model, 64, 4)
    (layer,) = model.layers
    got = llama.as_subclass(layer, llama.UnpackedLinear)(x)
    assert_close(got, np.array(layer(x)), 1e-5)
    assert len(unpacked) == whole


@on_the_cpu
@pytest.mark.parametrize("tied", [False, True])
def test_all_packed_matrices_of_a_model_are_unpacked_for_many_rows(
    unpacked, monkeypatch, tied
):
    """A packed embedding too, where it is the head; a token's row of it always is."""
    monkeypatch.setattr(llama, "on_cuda", lambda: True)
    model = packed_model(config=WIDE | {"tie_word_embeddings": tied})
    tokens = mx.array(random_tokens(WIDE, batch=2, length=200))
    wanted, names = np.array(model(tokens)), [*dict(model.named_modules())]
    llama.unpack_for_many(model)
    kinds = collections.Counter(type(m) for m in model.modules())
    layers = 7 * len(model.model.layers) + 1  # and the head, which may be the embedding
    assert kinds[llama.UnpackedLinear] == layers - tied
    assert kinds[llama.UnpackedEmbedding] == 1
    assert kinds[llama.QuantizedLinear] == kinds[llama.QuantizedEmbedding] == 0
    assert [*dict(model.named_modules())] == names
    # 200 rows, 40 of two texts, 6, 2, 24, and 128
    got = in_parts(model, tokens, (100, 120, 123, 124, 136))
    assert_close(got, wanted, 1e-4)
    assert len(unpacked) == 2 * layers


@on_a_gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 17, 127, 128])
def test_a_row_of_a_single_group_is_multiplied_rightly_on_a_gpu(bits, tied, rows):
    """CUDA's own product is wrong there, so accelerate puts another in."""
    config = CONFIG | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    config |= {"num_attention_heads": 4, "tie_word_embeddings": tied}
    model = packed_model(128, bits, config)
    assert model.model.layers[0].mlp.up_proj.scales.shape[1] == 1
    tokens = mx.array(random_tokens(config, length=rows))
    mx.eval(model.parameters())
    with mx.stream(mx.cpu):
        wanted = np.array(model(tokens))
    llama.accelerate(model)
    assert_close(model(tokens), wanted, GPU_TOLERANCE)


# -----------------------------------------------------------------------------
# A few rows, compiled blocks and SwiGLU
# -----------------------------------------------------------------------------


@on_the_cpu
def test_a_few_tokens_attend_over_a_multiple_of_256_slots(monkeypatch):
    model, tokens = filled(WIDE), mx.array(random_tokens(WIDE, batch=2, length=300))
    wanted, layers = np.array(model(tokens)), model.model.layers
    for block in layers:
        block.self_attn = llama.as_subclass(block.self_attn, llama.PaddedAttention)
    seen, attention = [], mx.fast.scaled_dot_product_attention

    def attend(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    cache, at, parts = model.make_cache(300), 0, []
    lengths = (17, 2, 16, 3, 1, 21, 191, 5, 2, 16, 26)
    for length in lengths:
        cut = tokens[:, at : at + length]
        if length in (2, 16):  # what is trimmed stays in its slots, and must not count
            model(cut[:, ::-1], cache)
            for layer in cache:
                layer.trim(length)
            del seen[-len(layers) :]
        parts.append(model(cut, cache))
        at += length
    assert_close(mx.concatenate(parts, axis=1), wanted, 1e-5)
    # One token, and more than 16, over the slots that are filled. 251, 256, 258, 274
    slots = [17, 256, 256, 256, 39, 60, 251, 256, 512, 512, 300]
    assert seen[:: len(layers)] == [*zip(lengths, slots, strict=True)]


@on_the_cpu
@pytest.mark.parametrize("rows", [1, 5])
def test_a_fused_mlp_gives_what_its_mlp_gives(rows):
    mlp = filled(WIDE).model.layers[0].mlp
    x = mx.random.normal((2, rows, 128), key=mx.random.key(0))
    assert_close(llama.as_subclass(mlp, llama.FusedMLP)(x), np.array(mlp(x)), 1e-5)


def compile_all(model):
    blocks = model.model.layers
    blocks[:] = [llama.CompiledBlock.of(block) for block in blocks]
    return model


def model_with_everything():
    """One that has a bias and a norm wherever a checkpoint may have them."""
    model, key = filled(WIDE), mx.random.key(1)
    for block in model.model.layers:
        for layer in (*block.self_attn.children().values(), *block.mlp.values()):
            layer.bias = mx.random.normal(layer.weight.shape[:1], key=key)
        for name in ("q_norm", "k_norm"):
            block.self_attn[name] = nn.RMSNorm(WIDE["head_dim"])
            block.self_attn[name].weight = mx.random.uniform(0.2, 2, (32,), key=key)
    return model


@on_the_cpu
@pytest.mark.parametrize(
    "make", [packed_model, functools.partial(filled, WIDE), model_with_everything]
)
def test_a_model_of_compiled_blocks_decodes_as_it_did(make):
    wanted, model = decoded(make()), compile_all(make())
    assert_close(decoded(model), wanted, 1e-5)
    tokens = mx.array(random_tokens(CONFIG, length=12))
    assert_close(in_parts(model, tokens, (5, 6, 7)), wanted, 1e-5)


def test_compiled_pieces_are_for_one_token_of_one_text(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mx, "compile", lambda piece: lambda *given: calls.append(1) or piece(*given)
    )
    model = compile_all(tiny_model())
    for batch, length, pieces in ((1, 1, 4), (1, 2, 0), (2, 1, 0), (1, 5, 0)):
        model(mx.zeros((batch, length), mx.int32))
        assert len(calls) == pieces
        calls.clear()


@on_the_cpu
def test_compiled_models_of_one_thread_are_not_mixed_up():
    configs = [CONFIG, CONFIG | {"rope_theta": 100.0}]
    wanted = [decoded(filled(config)) for config in configs]
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    models = [compile_all(filled(config)) for config in configs]
    for _ in range(2):
        for model, logits in zip(models, wanted, strict=True):
            assert_close(decoded(model), logits, 1e-5)
    for n in range(8):  # one after another, each where the last one was
        assert_close(decoded(compile_all(filled(configs[n % 2]))), wanted[n % 2], 1e-5)


def test_what_was_compiled_is_never_called_with_the_same_number_again(monkeypatch):
    """MLX finds it by the address of a function, and other threads than the one that
    frees it do not forget it: then another model's could be found there."""
    numbers = []
    monkeypatch.setattr(
        mx,
        "compile",
        lambda piece: lambda number, *x: numbers.append(number) or piece(number, *x),
    )
    for _ in range(3):
        compile_all(tiny_model())(mx.array([[1]]))
    assert len(numbers) == 3 * 2 * 2
    assert len({*numbers}) == 3 * 2 * 2


@on_the_cpu
def test_a_compiled_model_works_in_other_threads_than_the_one_that_made_it():
    wanted = decoded(tiny_model())
    model = in_another_thread(lambda: compile_all(tiny_model()))
    for _ in range(2):
        assert_close(in_another_thread(lambda: decoded(model)), wanted, 1e-5)
    assert_close(decoded(model), wanted, 1e-5)
    own = compile_all(tiny_model())
    assert_close(decoded(own), wanted, 1e-5)
    assert_close(in_another_thread(lambda: decoded(own)), wanted, 1e-5)


# -----------------------------------------------------------------------------
# Launching in pieces
# -----------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """What is launched ("go") and waited for ("wait") from now on, in order."""
    order, launch, wait = [], mx.async_eval, mx.eval
    monkeypatch.setattr(
        mx, "async_eval", lambda x: order.append(("go", x)) or launch(x)
    )
    monkeypatch.setattr(mx, "eval", lambda x: order.append(("wait", x)) or wait(x))
    return order


def are(order, steps):
    """Whether these very arrays were launched and waited for in this order."""
    pairs = zip(order, steps, strict=True)
    return all(a == b and x is y for (a, x), (b, y) in pairs)


DEEP = CONFIG | {"num_hidden_layers": 4}


@on_the_cpu
def test_a_long_part_of_a_prompt_is_computed_as_its_layers_are_built(launched):
    model, tokens = filled(DEEP), mx.array(random_tokens(DEEP, length=140))
    wanted = np.array(model(tokens))
    llama.launch_in_pieces(model)
    assert launched == []
    got = model(tokens, model.make_cache(140))
    # The embedding and three of four layers; the last is left to who asks for it.
    (_, x0), (_, none), (_, x1), _, (_, x2), _, (_, x3), _ = launched
    steps = [("go", x0), ("wait", none), ("go", x1), ("wait", x0)]
    steps += [("go", x2), ("wait", x1), ("go", x3), ("wait", x2)]
    assert are(launched, steps)  # each is launched before the one before it ends
    assert [x.shape for x in (x0, x1, x2, x3)] == [(1, 140, 48)] * 4
    assert_close(got, wanted, 1e-5)
    launched.clear()
    model(tokens, model.make_cache(140))
    assert launched[1][1].ndim == 0  # a step that has failed is not waited for
    launched.clear()
    model(tokens[:, :127], model.make_cache(140))
    assert launched == []  # not for a few


@on_the_cpu
def test_the_length_from_which_a_prompt_is_launched_in_pieces(launched, monkeypatch):
    model, tokens = filled(DEEP), mx.array(random_tokens(DEEP, length=30))
    llama.launch_in_pieces(model)
    monkeypatch.setattr(llama, "LONG", 20)
    for length, steps in ((19, 0), (20, 8), (30, 8)):
        model(tokens[:, :length], model.make_cache(30))
        assert len(launched) == steps
        launched.clear()


@on_the_cpu
def test_a_token_over_a_large_cache_is_launched_in_halves_behind_the_last(
    launched, monkeypatch
):
    model, tokens = filled(DEEP), mx.array(random_tokens(DEEP, length=12))
    wanted, blocks = np.array(model(tokens)), model.model.layers
    llama.launch_in_pieces(model)
    ends, note = [], lambda x, cache: ends.append(x)
    blocks[-1] = llama.LaunchedBlock.of(blocks[-1], note)
    cache, got = model.make_cache(12), []
    for n in range(12):
        if n == 10:
            monkeypatch.setattr(llama, "large_cache", lambda: 1)
        got.append(model(tokens[:, n : n + 1], cache))
        assert len(launched) == 3 * max(n - 9, 0)  # not over a small cache
    assert_close(mx.concatenate(got, axis=1), wanted, 1e-5)
    (_, none), (_, half), (_, nothing), _, (_, other), _ = launched
    # Of the token before: first its first half, and then its second one. Before the
    # first token over a large cache there is nothing to wait for.
    assert none.ndim == nothing.ndim == 0
    steps = [("wait", none), ("go", half), ("wait", nothing)]
    steps += [("wait", half), ("go", other), ("wait", ends[10])]
    assert are(launched, steps)
    assert half is not other
    # Another conversation waits for nothing of this one, whose last step may have
    # failed. Its first token finds no cache that is large.
    cache = model.make_cache(12)
    launched.clear()
    for n in range(2):
        model(tokens[:, n : n + 1], cache)
    assert [x.ndim for kind, x in launched if kind == "wait"] == [0, 0]


@on_the_cpu
def test_a_cache_is_large_by_its_bytes(launched, monkeypatch):
    """Keys and values of one layer, of all slots: 2 * 2 heads * 256 * 16 * 4 bytes."""
    model = filled(DEEP)
    llama.launch_in_pieces(model)
    for large, steps in ((65_536, 3), (65_537, 0)):
        monkeypatch.setattr(llama, "large_cache", lambda n=large: n)
        cache = model.make_cache(12)
        model(mx.array([[1, 2]]), cache)  # there is no cache yet to be large
        assert launched == []
        model(mx.array([[3]]), cache)
        assert len(launched) == steps
        launched.clear()


@on_the_cpu
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("large", [1, 10**9])
def test_stacks_of_few_layers_are_launched_in_pieces_too(monkeypatch, layers, large):
    config = CONFIG | {"num_hidden_layers": layers}
    tokens = mx.array(random_tokens(config, length=150))
    wanted, model = np.array(filled(config)(tokens)), filled(config)
    llama.launch_in_pieces(model)
    monkeypatch.setattr(llama, "large_cache", lambda n=large: n)
    assert_close(in_parts(model, tokens, (130, 140, 141, 142)), wanted, 1e-5)


# -----------------------------------------------------------------------------
# All of it
# -----------------------------------------------------------------------------


def test_nothing_is_put_into_a_model_on_a_cpu_without_openblas(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(llama, "has_openblas", lambda: False)
    model = packed_model(64, 4)
    before = [(path, id(module)) for path, module in model.named_modules()]
    llama.accelerate(model)
    assert [(path, id(module)) for path, module in model.named_modules()] == before


@on_the_cpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("on_cuda", [False, True])
def test_all_that_is_put_into_a_model_gives_the_same(monkeypatch, packed, on_cuda):
    """As a GPU has it, computed on a CPU."""
    tokens = mx.array(random_tokens(WIDE, length=220))
    make = packed_model if packed else lambda: filled(WIDE)
    model, wanted = make(), np.array(make()(tokens))
    names = [name for name, _ in tree_flatten(model.parameters())]
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.gpu)
        patch.setattr(mx.cuda, "is_available", lambda: on_cuda)
        llama.accelerate(model)
    for block in model.model.layers:
        assert type(block) is llama.LaunchedBlock
        assert type(block.block) is llama.CompiledBlock
        assert type(block.block.mlp) is llama.FusedMLP
        few = type(block.block.self_attn) is llama.PaddedAttention
        many = type(block.block.mlp.up_proj) is llama.UnpackedLinear
        assert (few, many) == (on_cuda, on_cuda and packed)
    for large in (llama.large_cache(), 1):
        monkeypatch.setattr(llama, "large_cache", lambda n=large: n)
        cuts = (150, 170, 183, *range(184, 200), 205)
        assert_close(in_parts(model, tokens, cuts), wanted, 1e-4)
    assert [name for name, _ in tree_flatten(model.parameters())] == names


@on_a_gpu
@pytest.mark.parametrize("packed", [None, (64, 4), (32, 8)])
def test_an_accelerated_model_gives_on_a_gpu_what_a_plain_one_gives(
    monkeypatch, packed
):
    def make():
        return filled(WIDE) if packed is None else packed_model(*packed)

    tokens, model = mx.array(random_tokens(WIDE, length=220)), make()
    plain = np.array(make()(tokens))
    llama.accelerate(model)
    assert {type(block) for block in model.model.layers} == {llama.LaunchedBlock}
    for large in (llama.large_cache(), 1):
        monkeypatch.setattr(llama, "large_cache", lambda n=large: n)
        got = in_parts(model, tokens, (150, 170, 183, *range(184, 200), 205))
        assert_close(got, plain, GPU_TOLERANCE)
