"""Tests of what a CPU of Linux gains by: OpenBLAS in MLX, matrices laid out by columns,
packed ones unpacked, and products that all cores share."""

import ast
import collections
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.support import (
    HERE,
    STORIES,
    USER,
    WIDE,
    assert_close,
    command,
    filled,
    in_parts,
    needs_exact_counts,
    on_the_cpu,
    quantize,
    random_folder,
    random_tokens,
    speed_once,
    with_extras,
)

pytest_plugins = ["tests.fixtures"]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux alone")


def nbytes(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def packed_model(group_size=32, bits=8, mode="affine", **changes):
    """One whose every matrix is packed, with biases wherever a family has them."""
    config = WIDE | {"model_type": "qwen2"} | changes
    model = with_extras(llama.Llama(llama.ModelArgs.from_dict(config)), config)
    mx.random.seed(0)
    for path, layer in llama.dense_layers(model):
        packed = mx.quantize(layer.weight, group_size, bits, mode)
        if "bias" in layer:
            layer.bias = mx.random.normal(layer.bias.shape)
        layer = llama.quantized_like(layer, group_size, bits, mode)
        layer.update(dict(zip(("weight", "scales", "biases"), packed)))
        model.update_modules(tree_unflatten([(path, layer)]))
    return model


def packed_layers(model):
    return [m for m in model.modules() if isinstance(m, llama.QuantizedMatrix)]


def by_columns(layer):
    """Whether a dense matrix in float32 lies in memory column by column."""
    return memoryview(layer.weight).strides == (4, 4 * layer.weight.shape[0])


@pytest.fixture
def openblas(monkeypatch):
    """Have llama.py find OpenBLAS; what it then does is right with any BLAS."""
    monkeypatch.setattr(llama, "has_openblas", lambda: True)


# -----------------------------------------------------------------------------
# The library
# -----------------------------------------------------------------------------

# In place of OpenBLAS: every product of matrices is a matrix of 42.
STUB = """
extern "C" const char* openblas_get_config() { return ""; }
extern "C" void cblas_sgemm(int, int, int, int rows, int columns, int, float,
    const float*, int, const float*, int, float, float* out, int stride) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) out[r * stride + c] = 42;
}
"""

# Prints whether llama.py finds OpenBLAS, and what MLX says is 4.
PRODUCT = """
import llama
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(llama.has_openblas(), (mx.ones((4, 4)) @ mx.ones((4, 4)))[0, 0].item())
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.cpp").write_text(STUB)
    library = folder / "libopenblas.so.0"
    options = ["-shared", "-fPIC", str(folder / "stub.cpp"), "-o", str(library)]
    subprocess.run([compiler, *options], check=True)
    return library


def product(program=PRODUCT, **environment):
    """What a program prints that imports llama.py with these variables set."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HERE,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


@on_linux
def test_mlx_multiplies_with_the_openblas_of_the_system(stub):
    assert product(LD_LIBRARY_PATH=stub.parent) == "True 42.0"


@on_linux
def test_mlx_multiplies_with_the_openblas_that_a_package_brings(stub, tmp_path):
    """If the system's cannot be loaded; neither is missed if there is none."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libopenblas.so.0").write_bytes(b"no library")
    assert product(LD_LIBRARY_PATH=broken) == "False 4.0"
    place = tmp_path / "packages" / "cmeel.prefix" / "lib"
    place.mkdir(parents=True)
    shutil.copy(stub, place)
    others = os.environ.get("PYTHONPATH", "")
    packages = f"{tmp_path / 'packages'}{os.pathsep}{others}"
    assert product(LD_LIBRARY_PATH=broken, PYTHONPATH=packages) == "True 42.0"


@on_linux
@pytest.mark.parametrize("first", ["import mlx.core", "import sys; sys.platform = 'x'"])
def test_no_openblas_is_loaded_after_mlx_nor_elsewhere_than_on_linux(stub, first):
    """After MLX it would only seem to be used."""
    program = f"{first}\n{PRODUCT}"
    assert product(program, LD_LIBRARY_PATH=stub.parent) == "False 4.0"


@pytest.mark.parametrize(
    "file",
    sorted(
        [HERE / "test_llama.py", *HERE.glob("tests/*.py"), *HERE.glob("*/bench.py")]
    ),
    ids=lambda file: file.name,
)
def test_whoever_imports_llama_and_mlx_imports_llama_first(file):
    """Or it would be tested, or measured, with the slower BLAS."""
    found = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module.partition(".")[0])
    before = found[: found.index("llama")] if "llama" in found else []
    assert not {"mlx", "mlx_lm", "tests"} & {*before}


@on_linux
def test_these_tests_run_with_the_blas_that_a_user_gets():
    assert product("import llama; print(llama.has_openblas())") == str(
        llama.has_openblas()
    )


# -----------------------------------------------------------------------------
# Matrices in memory
# -----------------------------------------------------------------------------


@on_the_cpu
def test_dense_matrices_are_laid_out_by_columns():
    model, tokens = filled(WIDE), mx.array(random_tokens(WIDE))
    wanted, names = np.array(model(tokens)), [*dict(model.named_modules())]
    before = {id(module) for module in model.modules()}
    llama.lay_out_by_columns(model)
    assert {id(module) for module in model.modules()} == before
    assert [*dict(model.named_modules())] == names
    assert all(by_columns(layer) for _, layer in llama.dense_layers(model))
    assert_close(model(tokens), wanted, 1e-5)
    assert_close(in_parts(model, tokens, (1, 2, 9)), wanted, 1e-5)


@on_the_cpu
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_in_16_bits_matrices_stay_row_by_row(dtype):
    """They are not multiplied by a BLAS, and MLX's own products gain nothing."""
    model = filled(WIDE)
    model.set_dtype(dtype)
    llama.lay_out_by_columns(model)
    for _, layer in llama.dense_layers(model):
        _rows, columns = layer.weight.shape
        assert memoryview(layer.weight.view(mx.uint16)).strides == (2 * columns, 2)


FORMATS = [(64, 4, "affine"), (32, 8, "affine"), (32, 4, "mxfp4"), (32, 8, "mxfp8")]


@on_the_cpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", [*FORMATS, (16, 4, "nvfp4")])
def test_an_unpacked_model_gives_what_the_packed_one_gives(form, tied):
    tokens = mx.array(random_tokens(WIDE))
    model = packed_model(*form, tie_word_embeddings=tied)
    wanted, names = np.array(model(tokens)), [*dict(model.named_modules())]
    predicted = 4 * llama.parameter_count(model)
    llama.dequantize(model)
    assert packed_layers(model) == []
    assert [*dict(model.named_modules())] == names
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    assert nbytes(model) == predicted == 4 * llama.parameter_count(model)
    assert_close(model(tokens), wanted, 1e-5)
    assert_close(in_parts(model, tokens, (1, 2, 9)), wanted, 1e-5)


@needs_exact_counts
@on_the_cpu
def test_no_more_than_the_unpacked_model_is_in_memory_while_it_is_made():
    """The packed matrices go one by one as the unpacked ones come."""
    model = packed_model(num_hidden_layers=8)
    mx.eval(model.parameters())
    largest = max(4 * layer.scales.size * 32 for layer in packed_layers(model))
    before, packed = mx.get_active_memory(), nbytes(model)
    mx.reset_peak_memory()
    llama.dequantize(model)
    more, wanted = mx.get_peak_memory() - before, nbytes(model) - packed
    assert 0.9 * wanted < mx.get_active_memory() - before  # there, not only promised
    assert more < wanted + 2 * largest < nbytes(model)


# -----------------------------------------------------------------------------
# Products that all cores share
# -----------------------------------------------------------------------------


@pytest.fixture
def three_cores(monkeypatch):
    """Three cores, each worth waking for the matrices of a small model."""
    monkeypatch.setattr(llama.sys, "platform", "linux")
    found = lambda _: {0, 1, 2}
    monkeypatch.setattr(llama.os, "sched_getaffinity", found, raising=False)
    monkeypatch.setattr(llama, "WORTH_A_CORE", 1000)
    monkeypatch.setattr(llama, "LARGE_FOR_CPU", 1000)


def spread_layers(model):
    return [m for m in model.modules() if isinstance(m, llama.SpreadLinear)]


def dense_model(tied):
    model = filled(WIDE | {"tie_word_embeddings": tied, "attention_bias": True})
    for name, array in tree_flatten(model.parameters()):
        if name.endswith(".bias"):  # which are zeros, and would not be missed
            model.update(tree_unflatten([(name, mx.random.normal(array.shape))]))
    return model


@on_the_cpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", [None, *FORMATS])
def test_a_spread_model_gives_what_the_whole_gives(form, tied, three_cores):
    tokens = mx.array(random_tokens(WIDE, length=40))
    model = packed_model(*form, tie_word_embeddings=tied) if form else dense_model(tied)
    wanted, size = np.array(model(tokens)), nbytes(model)
    vectors = np.array(model.model.embed_tokens(tokens).astype(mx.float32))
    llama.spread_products(model, dense=not form)
    assert {len(layer.parts) for layer in spread_layers(model)} == {3}
    assert len(spread_layers(model)) == 7 * len(model.model.layers) + 2 - tied
    assert nbytes(model) == size
    llama.lay_out_by_columns(model)
    if not form:
        assert all(by_columns(layer) for _, layer in llama.dense_layers(model))
    found = model.model.embed_tokens(tokens).astype(mx.float32)
    assert np.array_equal(np.array(found), vectors)
    for _ in range(8):  # three threads at once: it must be right every time
        assert_close(model(tokens), wanted, 1e-5)
        assert_close(in_parts(model, tokens, (1, 2, 9, 39)), wanted, 1e-5)


@on_the_cpu
def test_each_part_of_a_product_is_computed_in_a_stream_of_its_own(
    three_cores, monkeypatch
):
    used, stream = [], mx.stream
    layer = llama.nn.Linear(100, 100)
    model = llama.nn.Sequential(layer)
    llama.spread_products(model, dense=True)
    [spread] = spread_layers(model)
    spy = lambda one: used.append(one) or stream(one)
    monkeypatch.setattr(mx, "stream", spy)
    assert spread(mx.ones((1, 100))).shape == (1, 100)
    assert len(used) == len({id(one) for one in used}) == 3


@on_the_cpu
def test_a_spread_model_works_in_other_threads_than_the_one_that_made_it(three_cores):
    model, tokens = packed_model(), mx.array(random_tokens(WIDE))
    wanted = np.array(model(tokens))
    mx.eval(model.parameters())
    llama.spread_products(model, dense=True)
    found = []

    def compute():
        found.append(np.array(model(tokens)))
        mx.clear_streams()

    for _ in range(3):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join(60)
    for logits in found:
        assert_close(logits, wanted, 1e-5)
    assert len(found) == 3


@on_the_cpu
@pytest.mark.parametrize(
    ("there", "changes", "wanted"),
    [
        (False, {}, {"dense", "packed"}),
        (True, {}, {"packed"}),  # OpenBLAS spreads the others by itself
        (False, {"platform": "darwin"}, set()),
        (False, {"cores": 1}, set()),
        (False, {"WORTH_A_CORE": 10**6}, set()),
        (False, {"LARGE_FOR_CPU": 10**6}, set()),
        (False, {"ranks": 2}, set()),
    ],
)
def test_which_products_are_spread(there, changes, wanted, three_cores, monkeypatch):
    monkeypatch.setattr(llama, "has_openblas", lambda: there)
    if "platform" in changes:
        monkeypatch.setattr(llama.sys, "platform", changes["platform"])
    if "cores" in changes:
        monkeypatch.setattr(llama.os, "sched_getaffinity", lambda _: {5})
    for name in changes.keys() & {"WORTH_A_CORE", "LARGE_FOR_CPU"}:
        monkeypatch.setattr(llama, name, changes[name])
    found = set()
    for name, model in (("dense", filled(WIDE)), ("packed", packed_model())):
        group = one(changes["ranks"]) if "ranks" in changes else None
        llama.accelerate(model, group, keep_packed=True)
        if spread_layers(model):
            found.add(name)
    assert found == wanted


@on_the_cpu
def test_the_built_in_model_computes_as_part_one_has_it():
    """Its matrices are too small to be worth a second core."""
    with llama.Engine(STORIES) as engine:
        assert spread_layers(engine._worker.model) == []


@needs_exact_counts
@on_the_cpu
def test_no_second_copy_of_a_dense_model_is_in_memory_while_it_is_spread(three_cores):
    model = filled(WIDE | {"num_hidden_layers": 8})
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    llama.spread_products(model, dense=True)
    llama.lay_out_by_columns(model)
    # The size of a part is rounded up, and what a thread leaves may go a little later.
    assert mx.get_active_memory() - before < nbytes(model) / 4
    assert mx.get_peak_memory() - before < nbytes(model) / 4


# -----------------------------------------------------------------------------
# What is unpacked, and when
# -----------------------------------------------------------------------------


@on_the_cpu
def test_a_dense_model_is_laid_out_whatever_the_blas(monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(llama, "has_openblas", functools.partial(bool, there))
        llama.accelerate(model := filled(WIDE))
        assert all(by_columns(layer) for _, layer in llama.dense_layers(model))


@on_the_cpu
def test_the_speed_that_info_promises_is_that_of_this_layout(monkeypatch):
    seen, lay_out = [], llama.lay_out_by_columns
    monkeypatch.setattr(
        llama, "lay_out_by_columns", lambda layer: seen.append(layer) or lay_out(layer)
    )
    assert llama.reading_speed(16) > 0
    [stack] = seen
    layers = [layer for _, layer in llama.dense_layers(stack)]
    assert all(map(by_columns, layers))
    # More than a CPU's cache holds, or it would promise what no model reaches.
    assert sum(layer.weight.nbytes for layer in layers) > 32e6


@on_the_cpu
@pytest.mark.parametrize(
    ("bits", "there", "spread"), [(16, False, 16), (16, True, 0), (4, True, 16)]
)
def test_the_speed_that_info_promises_is_that_of_all_cores(
    bits, there, spread, three_cores, monkeypatch
):
    seen = []
    monkeypatch.setattr(llama, "lay_out_by_columns", seen.append)
    monkeypatch.setattr(llama, "has_openblas", lambda: there)
    assert llama.reading_speed(bits) > 0
    assert len(spread_layers(seen[0])) == spread


@on_the_cpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_speed_that_info_promises_is_of_all_bytes_that_are_read(bits, monkeypatch):
    """A clock of one second a look: what is left is the size of the weights."""
    clock = itertools.count()
    monkeypatch.setattr(llama.time, "perf_counter", lambda: next(clock))
    weights = 16 * 768 * 768
    assert llama.reading_speed(bits) == weights * {16: 4, 8: 1.125, 4: 0.625}[bits]


@on_the_cpu
@pytest.mark.parametrize("there", [True, False])
def test_a_packed_model_is_unpacked_where_openblas_makes_up_for_it(monkeypatch, there):
    monkeypatch.setattr(llama, "has_openblas", lambda: there)
    tokens, model = mx.array(random_tokens(WIDE)), packed_model()
    wanted = np.array(model(tokens))
    llama.accelerate(model)
    assert bool(packed_layers(model)) == (not there)
    assert all(by_columns(layer) for _, layer in llama.dense_layers(model))
    assert_close(model(tokens), wanted, 1e-5)


def one(n=1):
    """A group of n ranks."""
    group = collections.namedtuple("Group", ["rank", "size"])
    return group(lambda: 0, lambda: n)


@on_the_cpu
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"group": one()}, True),
        ({"group": one(2)}, False),
        ({"dtype": mx.bfloat16}, False),
        ({"dtype": None}, False),  # what the file holds
        ({"packed": False}, False),
        ({"spare": -1}, False),
        ({"device": mx.gpu}, False),
        ({"blas": False}, False),
    ],
)
def test_what_a_model_must_be_to_be_unpacked(monkeypatch, changes, wanted):
    given = {"dtype": mx.float32, "group": None, "packed": True, "spare": 0}
    given |= {"device": mx.cpu, "blas": True} | changes
    model = packed_model() if given["packed"] else filled(WIDE)
    memory = 12 * llama.parameter_count(model) + given["spare"]
    monkeypatch.setattr(llama, "machine_memory", lambda: memory)
    monkeypatch.setattr(llama, "has_openblas", lambda: given["blas"])
    monkeypatch.setattr(mx, "default_device", lambda: given["device"])
    assert llama.dequantizes(model, given["dtype"], given["group"]) == wanted


@on_the_cpu
@pytest.mark.parametrize("why", ["asked", "too large", "in 16 bits"])
def test_what_stays_packed_is_unpacked_for_many_rows(openblas, monkeypatch, why):
    model, tokens = packed_model(), mx.array(random_tokens(WIDE))
    if why == "too large":
        monkeypatch.setattr(llama, "machine_memory", lambda: nbytes(model))
    if why == "in 16 bits":
        model.set_dtype(mx.bfloat16)
    wanted = np.array(model(tokens).astype(mx.float32))
    llama.accelerate(model, keep_packed=why == "asked")
    kinds = {type(layer) for layer in packed_layers(model)}
    assert kinds == {llama.UnpackedLinear, llama.UnpackedEmbedding}
    assert_close(model(tokens), wanted, 0.05 if why == "in 16 bits" else 1e-5)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    """A folder of random weights, packed in 4 bits."""
    folder = random_folder(tmp_path_factory.mktemp("packed"), width=128, context=8192)
    model, _ = llama.load(folder)
    quantize(model, 64, 4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def replied(engine):
    """The statistics of a greedy reply."""
    reply = engine.chat(USER, temperature=0.0, max_tokens=8)
    text = "".join(reply)
    return text, reply.stats


@on_the_cpu
def test_an_engine_unpacks_and_says_so(packed_folder, monkeypatch):
    asked, require = [], llama.require_memory
    monkeypatch.setattr(
        llama,
        "require_memory",
        lambda weights, cache: asked.append(weights) or require(weights, cache),
    )
    texts = []
    for there in (False, True):
        monkeypatch.setattr(llama, "has_openblas", functools.partial(bool, there))
        with llama.Engine(packed_folder) as engine:
            text, stats = replied(engine)
            assert bool(packed_layers(engine._worker.model)) == (not there)
        texts.append(text)
        assert stats.unpacked == there
        assert ("weights unpacked" in llama.stats_lines(stats, 0)) == there
    assert texts[0] == texts[1]
    model, tensors = llama.examine(packed_folder)
    packed = llama.memory_of(tensors.values(), mx.float32)
    assert asked == [packed, 4 * llama.parameter_count(model)]
    dense = filled_sizes(model)
    assert asked[1] == 4 * dense > 3 * packed


def filled_sizes(model):
    """How many weights a model has, by its shape."""
    dense = llama.Llama(model.args)
    return sum(array.size for _, array in tree_flatten(dense.parameters()))


@on_the_cpu
def test_an_engine_of_a_dense_model_has_nothing_unpacked(openblas, tmp_path):
    with llama.Engine(random_folder(tmp_path / "m")) as engine:
        _, stats = replied(engine)
    assert not stats.unpacked and "unpacked" not in llama.stats_lines(stats, 0)


@speed_once
@on_the_cpu
@pytest.mark.parametrize("there", [False, True])
def test_info_counts_what_will_be_in_memory(packed_folder, monkeypatch, capsys, there):
    model, tensors = llama.examine(packed_folder)
    size = 4 * llama.parameter_count(model)
    monkeypatch.setattr(llama, "has_openblas", lambda: there)
    for memory, unpacked in ((3 * size, there), (3 * size - 1, False)):
        monkeypatch.setattr(llama, "machine_memory", functools.partial(int, memory))
        assert llama.main(["info", str(packed_folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        held = size if unpacked else llama.memory_of(tensors.values(), mx.float32)
        room = (memory - held) // found["kv_bytes_per_token"]
        assert found["longest_context"]["4"] == room < 8192
        assert llama.listed("m", packed_folder)["context"] == room


@speed_once
@on_the_cpu
@pytest.mark.parametrize("there", [False, True])
def test_a_measured_model_is_held_as_a_chat_holds_it(
    packed_folder, monkeypatch, capsys, there
):
    asked = []
    monkeypatch.setattr(llama, "has_openblas", lambda: there)
    monkeypatch.setattr(
        llama, "require_memory", lambda weights, cache: asked.append(weights)
    )
    args = llama.examine(packed_folder)[0].args
    monkeypatch.setitem(llama.PRESETS, "1b", args)
    run = ["--measure", "--prompt-tokens", "2", "--generation-tokens", "2", "--json"]
    for model in ([str(packed_folder)], ["1b", "--bits", "4"]):
        assert llama.main(["info", *model, *run]) == 0
        found = json.loads(capsys.readouterr().out)["measured"]
        assert found["weights_gb"] * 1e9 == pytest.approx(asked.pop())
        unpacked = 4e-9 * filled_sizes(llama.Llama(args))
        assert (found["weights_gb"] == pytest.approx(unpacked)) == there


# -----------------------------------------------------------------------------
# A CPU without it
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "platform", "blas", "parameters", "told"),
    [
        (mx.cpu, "linux", False, 50_000_001, True),
        (mx.cpu, "linux", False, 50_000_000, False),
        (mx.cpu, "linux", True, 50_000_001, False),
        (mx.cpu, "darwin", False, 50_000_001, False),
        (mx.gpu, "linux", False, 50_000_001, False),
    ],
)
def test_who_is_told_that_openblas_is_missing(
    monkeypatch, device, platform, blas, parameters, told
):
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(llama, "has_openblas", lambda: blas)
    line = llama.slow_products(parameters)
    assert (line is not None) == told
    assert line is None or line.endswith("apt install libopenblas0")


@on_the_cpu
def test_a_chat_with_a_large_model_says_that_openblas_is_missing(
    packed_folder, monkeypatch, capsys
):
    """Large by its weights, not by the packed words."""
    monkeypatch.setattr(llama, "has_openblas", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    count = filled_sizes(llama.examine(packed_folder)[0])
    words = ["chat", str(packed_folder), "--prompt", "x", "--max-tokens", "1"]
    monkeypatch.setattr(llama, "read_prompt", lambda options: options.prompt)
    for limit, lines in ((count - 1, 1), (count, 0)):
        monkeypatch.setattr(llama, "LARGE_FOR_CPU", limit)
        assert llama.main(words) == 0
        told = capsys.readouterr().err.splitlines()
        assert sum("apt install libopenblas0" in line for line in told) == lines


def test_the_built_in_model_is_too_small_for_it():
    done = command("chat", "--prompt", "Hi!", "--max-tokens", "2")
    assert done.returncode == 0 and b"apt" not in done.stderr
    assert llama.parameter_count(llama.examine(STORIES)[0]) < llama.LARGE_FOR_CPU
