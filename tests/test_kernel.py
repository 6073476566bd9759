"""The CUDA kernel, compiled as C++ and run on the CPU."""

import gc
import threading

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from tests.emulated import emulated_kernel
from tests.support import (
    WIDE,
    assert_close,
    four_bit_model,
    in_parts,
    random_tokens,
)

pytest_plugins = ["tests.fixtures"]


def as_float64(array):
    return np.array(array.astype(mx.float32), np.float64)


def packed_layer(rows, columns, group_size):
    """A 4-bit layer in bfloat16, and its matrix in float64."""
    layer = llama.QuantizedLinear(rows, columns, group_size, 4, "affine")
    dense = mx.random.normal((rows, columns), mx.bfloat16) * columns**-0.5
    layer.weight, layer.scales, layer.biases = mx.quantize(dense, group_size, 4)
    wide = (part.astype(mx.float32) for part in (layer.scales, layer.biases))
    return layer, as_float64(mx.dequantize(layer.weight, *wide, group_size, 4))


@pytest.mark.parametrize(
    ("columns", "rows", "group_size"),
    [(1120, (7, 7), 32), (3072, (18, 18), 128), (9280, (4,), 64)],
)
def test_a_kernel_computes_what_the_layers_would(
    monkeypatch, columns, rows, group_size
):
    if not mx.cuda.is_available():
        monkeypatch.setattr(mx.fast, "cuda_kernel", emulated_kernel)
    mx.random.seed(0)
    layers, dense = zip(*(packed_layer(n, columns, group_size) for n in rows))
    x = mx.random.normal((1, 1, columns), mx.bfloat16) + 0.3
    residual = mx.random.normal((1, 1, sum(rows)), mx.bfloat16)
    norm = nn.RMSNorm(columns, 1e-2)
    norm.weight = mx.random.uniform(0.5, 1.5, (columns,), mx.bfloat16)
    wide, W = as_float64(x), np.concatenate(dense)
    normed = wide / np.sqrt((wide**2).mean() + 1e-2) * as_float64(norm.weight)

    plain, after_norm = (
        llama.fused_linear(*layers),
        llama.fused_linear(*layers, norm=norm),
    )
    assert_close(plain(x), wide @ W.T, 5e-3)
    assert_close(after_norm(x), normed @ W.T, 5e-3)
    assert_close(plain(x, residual), wide @ W.T + as_float64(residual), 5e-3)
    if len(rows) == 2:
        gate, up = np.split(normed @ W.T, 2, axis=-1)
        swiglu = llama.fused_linear(*layers, norm=norm, parts=2)
        assert_close(swiglu(x), gate / (1 + np.exp(-gate)) * up, 8e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fused_model_decodes_as_before(kernels, tied):
    plain, fused, exact = (four_bit_model(tied, num_hidden_layers=1) for _ in range(3))
    before = dict(tree_flatten(fused.parameters()))
    llama.fuse(fused)
    assert {type(block) for block in fused.model.layers} == {llama.FusedBlock}
    after = dict(tree_flatten(fused.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)

    tokens = mx.array(random_tokens(WIDE, length=4))
    exact.set_dtype(mx.float32)  # the same matrices, other sums
    wanted = as_float64(in_parts(exact, tokens, [2, 3])[:, 2:])
    errors = [
        np.linalg.norm(as_float64(in_parts(model, tokens, [2, 3])[:, 2:]) - wanted)
        for model in (fused, plain)
    ]
    assert 0 < errors[0] < min(errors[1] * 1.1, np.linalg.norm(wanted) * 0.1)
    both = mx.concatenate([tokens, tokens])
    wanted = in_parts(plain, both, [2, 3])
    assert mx.array_equal(in_parts(fused, both, [2, 3]), wanted)
    x = mx.random.normal((1, 2, 64), mx.bfloat16)  # a prompt is computed as before
    read = [model.model.layers[0](x, llama.KVCache(2)) for model in (fused, plain)]
    assert mx.array_equal(*read)


def test_a_fused_model_runs_in_any_thread(kernels):
    model = four_bit_model(True, num_hidden_layers=1)
    tokens = mx.array(random_tokens(WIDE, length=4))
    mx.eval(model.parameters())
    llama.fuse(model)
    logits = []

    def run():
        logits.append(as_float64(in_parts(model, tokens, [2, 3])))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    run()
    assert np.array_equal(*logits)


def test_a_fused_model_is_not_taken_for_one_that_is_gone(kernels, monkeypatch):
    """MLX's cache of compiled functions goes by their addresses. At worst, all are
    the same."""
    traces = {}

    def compiled(function):
        def call(*args):
            numbers = [n for n in args if not isinstance(n, mx.array)]
            key = (function.__name__, *numbers)
            return traces.setdefault(key, function)(*args)

        return call

    monkeypatch.setattr(mx, "compile", compiled)
    models = [four_bit_model(True, num_hidden_layers=2) for _ in range(2)]
    last = models[1].model.layers[1].mlp.down_proj
    last.scales, last.biases = -last.scales, -last.biases
    tokens = mx.array(random_tokens(WIDE, length=3))
    for model in models:
        wanted = as_float64(in_parts(model, tokens, [2]))
        llama.fuse(model)
        got = in_parts(model, tokens, [2])
        assert_close(got, wanted, 0.15)  # bfloat16, rounded elsewhere


def test_a_fused_model_holds_nothing_twice_and_nothing_once_it_is_gone(kernels):
    mx.synchronize()
    before, collecting = mx.get_active_memory(), gc.isenabled()
    gc.disable()
    try:
        large = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 4096}
        model = four_bit_model(tied=False, head_dim=512, **large)
        mx.eval(model.parameters())
        held = mx.get_active_memory()
        llama.fuse(model)
        mx.synchronize()  # what was used last is let go a little later
        assert mx.get_active_memory() < held + 100_000
        del model
        mx.synchronize()
        assert mx.get_active_memory() < before + 100_000
    finally:
        if collecting:
            gc.enable()


def fused_blocks(model: llama.Llama) -> list[bool]:
    """Fuse a model; which of its blocks are fused then."""
    llama.fuse(model)
    return [type(block) is llama.FusedBlock for block in model.model.layers]


def test_what_the_kernels_do_not_take_stays_as_it_is(kernels, monkeypatch):
    assert fused_blocks(four_bit_model(True)) == [True, True]
    assert fused_blocks(four_bit_model(True, attention_bias=True)) == [False, False]
    wide = four_bit_model(True)
    wide.set_dtype(mx.float32)
    assert fused_blocks(wide) == [False, False]
    wide = four_bit_model(True)
    wide.model.layers[0].set_dtype(mx.float32)  # and so the stream of the other
    assert fused_blocks(wide) == [False, False]
    mixed = four_bit_model(True)
    eight = llama.quantized_like(nn.Linear(128, 64, bias=False), 32, 8, "affine")
    mixed.model.layers[1].mlp.down_proj = eight
    mixed.set_dtype(mx.bfloat16)
    assert fused_blocks(mixed) == [True, False]
    mixed = four_bit_model(True)
    groups = llama.quantized_like(nn.Linear(128, 64, bias=False), 64, 4, "affine")
    mixed.model.layers[0].mlp.down_proj = groups
    mixed.set_dtype(mx.bfloat16)
    assert fused_blocks(mixed) == [False, True]
    assert fused_blocks(four_bit_model(True, mode="mxfp4")) == [False, False]
    for there, device in ((True, mx.cpu), (False, mx.gpu)):  # the latter: Metal
        monkeypatch.setattr(mx.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        assert fused_blocks(four_bit_model(True)) == [False, False]


def test_modules_of_other_classes_may_do_something_else_and_stay(kernels):
    other = four_bit_model(True)
    first, second = other.model.layers
    first.__class__ = type("OtherBlock", (llama.TransformerBlock,), {})
    kind = type("OtherLinear", (llama.QuantizedLinear,), {})
    second.mlp.up_proj.__class__ = kind
    assert fused_blocks(other) == [False, False]
    other = four_bit_model(True)
    first, second = other.model.layers
    first.self_attn.__class__ = type("OtherAttention", (llama.Attention,), {})
    second.input_layernorm.__class__ = type("OtherNorm", (nn.RMSNorm,), {})
    assert fused_blocks(other) == [False, False]
    other.model.layers[1] = nn.Identity()
    assert fused_blocks(other) == [False, False]
