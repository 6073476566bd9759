"""Llama in one file: run Llama-family models with Apple's MLX.

    python llama.py info 8b             what a model is, and whether it fits here
    python llama.py inspect MODEL       what a model folder holds, and what is wrong
    python llama.py chat MODEL          talk to it; --help lists the options

MODEL is a folder in Hugging Face's layout, or org/name in the local Hugging Face cache;
without one it is the small storyteller in stories/.
Runs on Metal, and on MLX's CPU and CUDA builds. Nothing is ever fetched or executed.

How to read it. The file is a stack of numbered sections; each uses only sections above
it, never below. Read down for the parts, or start at 6 (Transformer) and look up what
it uses.

How to lift a piece. Copy the imports, the section, and the sections on its "uses:"
line; nothing else is needed, and "uses: none" means imports only. Importing runs no
code. test_llama.py keeps this true: it executes every section alone with just those.

Symbols (shapes are written like (B, H, L, Dh))
    B    batch size                      D    width of the residual stream, hidden_size
    L    tokens in this call             F    width of the MLP, intermediate_size
    S    tokens attended to, offset + L  V    size of the vocabulary, vocab_size
    H    query heads                     Hkv  key/value heads, num_key_value_heads
    Dh   width of a head, head_dim       G    weights that share a scale, group_size

Sections                 uses            Sections                 uses
    1  Configuration     none                8  Loading           1-7
    2  Safetensors       1                   9  Samplers          none
    3  Quantized layers  none                10 Generation        none
    4  Rotary embedding  none                11 Kernels           1, 3-6
    5  KV cache          none                12 Tensor parallel   1-8, 11
    6  Transformer       1, 4, 5             13 Streaming         1-12
    7  Tokenizer         1                   14 Command line      1-13

References
    [1] Llama 3, arXiv:2407.21783        [5] SwiGLU, arXiv:2002.05202
    [2] RoPE, arXiv:2104.09864           [6] top-p, arXiv:1904.09751
    [3] GQA, arXiv:2305.13245            [7] YaRN, arXiv:2309.00071
    [4] RMSNorm, arXiv:1910.07467        [8] SentencePiece, arXiv:1808.06226
    [9] Megatron-LM, arXiv:1909.08053

MIT License; see LICENSE. A copied section needs only this line and a link.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
#     "mlx>=0.32.4; sys_platform != 'linux'",
#     "safetensors>=0.8.0",
#     "tiktoken>=0.14.0",
# ]
# ///

import argparse
import base64
import codecs
import collections
import contextlib
import copy
import difflib
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import queue
import re
import signal
import socket
import statistics
import sys
import threading
import time
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, TextIO, get_args

import mlx.core as mx
import safetensors
import tiktoken
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

# -----------------------------------------------------------------------------
# 1. Configuration
# The numbers that define a model, under the names of Hugging Face's config.json, so
# that loading needs no translation table. What cannot be honoured is refused here.
# uses: none
# -----------------------------------------------------------------------------


# Parsed, a value takes up to 120 bytes, of 3 in the file, and a character up to 8: a
# file could be made to swell forty-fold. So both its bytes and its values have a limit,
# above what models need; for a tokenizer's, also so much for each token (Llama 3's has
# 9 values and 60 to 160 bytes).
JSON_BYTES, JSON_VALUES = 5_000_000, 100_000
BYTES_PER_TOKEN, VALUES_PER_TOKEN = 200, 12


def read_bounded(path: Path, limit: int) -> bytes:
    """Return what is in a file. Raises ValueError if it has more bytes than `limit`."""
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path}: {size:,} bytes, wanted at most {limit:,}")
    return path.read_bytes()


def parse_json(data: bytes, limit: int, source: object) -> dict:
    """Return the JSON object in bytes.

    Raises ValueError naming the source if they hold none, or more values than `limit`,
    which are counted before they are made.
    """
    values = sum(map(data.count, (b",", b":", b"[", b"{")))
    if values > limit:
        raise ValueError(f"{source}: {values:,} values, wanted at most {limit:,}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: wanted a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path, *, tokens: int = 0) -> dict:
    """Return the JSON object in a file, which may describe a vocabulary of `tokens`.

    Raises ValueError if it holds none, or more than belongs to a model.
    """
    data = read_bounded(path, JSON_BYTES + tokens * BYTES_PER_TOKEN)
    return parse_json(data, JSON_VALUES + tokens * VALUES_PER_TOKEN, path)


# What config.json may say where it is not a matter of size; the first is the usual.
SUPPORTED = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu", "swish", None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
}

# type of a field: (in words, whether a value is of it)
KINDS = {
    bool: ("true or false", lambda v: type(v) is bool),
    int: ("a positive integer", lambda v: type(v) is int and 0 < v < 2**31),
    float: ("a positive number", lambda v: type(v) in (int, float) and 0 < v < 2**31),
    dict: ("an object", lambda v: type(v) is dict),
}


def rotary_settings(config: dict) -> dict:
    """Return rope_scaling and, if given, rope_theta, from either layout of config.json:
    side by side, or both in the rope_parameters of transformers 5.

    Raises ValueError naming the key and the value that cannot be honoured.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    # An object within is for layers of one type; a partial factor, for part of Dh.
    if type(rope) is not dict or dict in map(type, rope.values()):
        raise ValueError(f"{key} must be an object of numbers, got {rope!r:.80}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{key}: partial_rotary_factor must be 1, got {rope!r:.200}")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))  # new, old spelling
    rope = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    scaling = None if kind == "default" else rope | {"rope_type": kind}
    return {"rope_scaling": scaling} | ({} if theta is None else {"rope_theta": theta})


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a Llama. Fields are config.json's keys; sizes count elements."""

    hidden_size: int  # D, width of the residual stream
    intermediate_size: int  # F, width of the MLP's inner layer
    num_hidden_layers: int
    num_attention_heads: int  # H, query heads
    vocab_size: int  # V, rows of the embedding; may exceed the tokenizer's ids
    num_key_value_heads: int | None = None  # Hkv; None means H, no grouping
    head_dim: int | None = None  # Dh; None means D / H
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048  # longest context of the training, tokens
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: dict | None = None  # how they are stretched; see section 4
    rope_traditional: bool = False  # rotate neighbours instead of halves
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False  # biases on gate, up and down
    tie_word_embeddings: bool = False  # the head is the embedding, transposed
    quantization: dict | None = None  # group_size, bits, mode, and layers' own entries

    def __post_init__(self):
        wrong = []
        for entry in fields(self):
            value, optional = getattr(self, entry.name), get_args(entry.type)
            wanted, fits = KINDS[optional[0] if optional else entry.type]
            if not (fits(value) or (optional and value is None)):
                wrong.append(f"{entry.name} must be {wanted}, got {value!r:.80}")
        if wrong:
            raise ValueError("; ".join(wrong))
        H = self.num_attention_heads
        Hkv, Dh = self.num_key_value_heads or H, self.head_dim or self.hidden_size // H
        object.__setattr__(self, "num_key_value_heads", Hkv)
        object.__setattr__(self, "head_dim", Dh)
        if H % Hkv:
            raise ValueError(f"num_key_value_heads must divide {H} heads, got {Hkv}")
        # Rotary embedding turns pairs, and no attention kernel has wider heads.
        if Dh % 2 or not 0 < Dh <= 1024:
            raise ValueError(f"head_dim must be even and at most 1024, got {Dh}")
        if H * Dh >= 2**31:
            raise ValueError(f"{H} heads of head_dim {Dh} are too many")

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        """Return the arguments that a config.json describes.

        Raises ValueError naming the keys and values that this file cannot honour.
        """
        config = {"quantization": config.get("quantization_config")} | config
        wrong = [
            f"{key} must be {' or '.join(map(json.dumps, known))}"
            f", got {config.get(key)!r:.80}"
            for key, known in SUPPORTED.items()
            if config.get(key) not in known
        ]
        values = {entry.name: config.get(entry.name) for entry in fields(cls)}
        values = {name: value for name, value in values.items() if value is not None}
        required = (entry.name for entry in fields(cls) if entry.default is MISSING)
        wrong += [f"{name} is missing" for name in required if name not in values]
        if wrong:
            raise ValueError("; ".join(wrong))
        values |= rotary_settings(config)
        args = cls(**values)
        # Llama 1 and 2 leave rope_theta out and mean 10000. A Llama 3 without it has
        # lost it, and would read well for a page before falling apart.
        if "rope_theta" not in values and args.vocab_size >= 128_000:
            raise ValueError("rope_theta is missing; a Llama 3 vocabulary needs it")
        return args


def llama3_args(
    D: int, F: int, layers: int, H: int, *, scaling: float = 8.0, **other: int
) -> ModelArgs:
    """Return the arguments of a Llama 3.x: what all its sizes share, and these."""
    rope = {"rope_type": "llama3", "factor": scaling, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    shared = {"vocab_size": 128_256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    shared |= {"max_position_embeddings": 131_072, "rope_theta": 500_000.0}
    return ModelArgs(D, F, layers, H, rope_scaling=rope, **shared, **other)


# The published shapes: 8b, 70b and 405b of Llama 3.1 [1, table 3], 1b and 3b of 3.2.
PRESETS = {
    "1b": llama3_args(2048, 8192, 16, 32, scaling=32.0, tie_word_embeddings=True),
    "3b": llama3_args(3072, 8192, 28, 24, scaling=32.0, tie_word_embeddings=True),
    "8b": llama3_args(4096, 14336, 32, 32),
    "70b": llama3_args(8192, 28672, 80, 64),
    "405b": llama3_args(16384, 53248, 126, 128),
}


# -----------------------------------------------------------------------------
# 2. Safetensors
# Weights are memory-mapped and handed to MLX in place: on Metal, where CPU and GPU
# share memory, an aligned tensor is used where the file lies, without a copy. The
# format: 8 bytes of header length, a JSON header, then the tensors end to end.
# uses: 1
# -----------------------------------------------------------------------------

# What checkpoints and MLX's converter write, by safetensors' names.
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
DTYPES |= {"U32": mx.uint32, "U8": mx.uint8, "I32": mx.int32, "I64": mx.int64}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from byte `start` of `file`.

    Of a rank's columns of a larger matrix, the rows begin `stride` bytes apart.
    """

    name: str
    dtype: str  # safetensors' name, a key of DTYPES
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    stride: int | None = None

    @property
    def adoptable(self) -> bool:
        """Whether MLX can view it in place: it must start at a multiple of its item
        size, which the format does not promise and MLX's own writer does not keep."""
        return self.stride is None and self.start % DTYPES[self.dtype].size == 0


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights, in order of their names.

    Those that model.safetensors.index.json names, else model.safetensors; stray files
    beside them are not read. Raises FileNotFoundError if one is missing, ValueError
    for a name that is not a plain file name: an index must not point elsewhere.
    """
    index, weight_map = folder / "model.safetensors.index.json", None
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map must be an object that names files")
        for name in weight_map.values():
            if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
                wanted = "wanted plain names that end in .safetensors"
                raise ValueError(f"{index}: {wanted}, got {name!r:.80}")
    names = sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).exists()]:
        found = f"no {', '.join(missing)}; download incomplete?"
        raise FileNotFoundError(f"{folder}: {found}")
    return [folder / name for name in names]


def split_header(file: Path) -> tuple[bytes, dict]:
    """Return the bytes before the tensors of a safetensors file, and their JSON, which
    may grow with the file, as a session's does. Raises ValueError naming the file."""
    size, unsound = file.stat().st_size, f"{file}: not a safetensors file"
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        if prefix == b"version ":  # https://git-lfs.github.com/spec/v1
            raise ValueError(f"{file}: a git-lfs pointer, no weights; run git lfs pull")
        length, limit = int.from_bytes(prefix, "little"), 2_000_000 + size // 10
        if length > limit:
            wanted = f"a header of at most {limit:,} bytes, got {length:,}"
            raise ValueError(f"{unsound}: wanted {wanted}")
        header = stream.read(length)
    return prefix + header, parse_json(header, JSON_VALUES + size // 100, unsound)


def read_header(file: Path) -> list[TensorInfo]:
    """Return what a safetensors file holds, in order of offset, without its data.

    The safetensors package judges the header. Its parser is fuzzed, but its readers
    need NumPy; so it is given the header alone. Of a sound one it then has one thing to
    say, that the data is "not fully covered"; the file's size is checked here.
    Raises ValueError naming the file if it is not sound.
    """
    header, entries = split_header(file)
    try:
        safetensors.deserialize(header)
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing: ")
        if "not fully covered" not in reason:
            raise ValueError(f"{file}: not a safetensors file: {reason:.200}") from None
    tensors, size, end = [], file.stat().st_size, len(header)
    entries.pop("__metadata__", None)
    for name, entry in sorted(entries.items(), key=lambda e: e[1]["data_offsets"]):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in DTYPES or any(n >= 2**31 for n in shape):
            wanted = f"wanted {', '.join(DTYPES)}, sizes below 2**31"
            got = f"{name} has dtype {dtype}, shape {list(shape)}"
            raise ValueError(f"{file}: {got}; {wanted}")
        start, end = (len(header) + offset for offset in entry["data_offsets"])
        tensors.append(TensorInfo(name, dtype, shape, file, start, end - start))
    if end != size:
        raise ValueError(f"{file}: truncated or edited? {size} bytes, wanted {end}")
    return tensors


def list_tensors(
    folder: Path, problems: list[Exception] | None = None
) -> dict[str, TensorInfo]:
    """Return every tensor of a folder by name, in the order in which they lie.

    Raises ValueError for an unsound file, and for a name that stands in two files;
    given a list of problems, adds the errors to it and goes on with the next file.
    """
    tensors = {}
    for file in weight_files(folder):
        try:
            for info in read_header(file):
                if info.name in tensors:
                    both = f"{tensors[info.name].file.name} and {file.name}"
                    raise ValueError(f"{folder}: {info.name} is in both {both}")
                tensors[info.name] = info
        except (OSError, ValueError) as error:
            if problems is None:
                raise
            problems.append(error)
    return tensors


def map_tensors(tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, mx.array]]:
    """Yield each tensor as an array over the mapping of its file.

    On Metal the array is the mapped memory itself; elsewhere MLX makes a copy.
    subtle: adopted pages are read-only, and MLX may put the result of an operation
    into the buffer of an input that nothing else refers to. Keep a reference to the
    array for as long as anything computes from it.
    """
    file = None
    for info in tensors:
        if info.file != file:
            file = info.file
            with open(file, "rb") as stream:
                view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            view = memoryview(view)
        dtype, stop = DTYPES[info.dtype], info.start + info.nbytes
        # Only whole pages can be adopted: start at the page, skip what precedes. CUDA
        # adopts nothing, and a kernel failed there on a tensor within a buffer
        # ("misaligned address"), so each begins one of its own.
        start = info.start - info.start % mmap.PAGESIZE
        data, skip = view[start:stop], (info.start - start) // dtype.size
        if not info.adoptable or mx.cuda.is_available():
            rows = 1 if info.stride is None else info.shape[0]
            starts = (info.start + n * (info.stride or 0) for n in range(rows))
            parts = (view[at : at + info.nbytes // rows] for at in starts)
            data, skip = memoryview(b"".join(parts)), 0
        # Counted in items, since MLX counts to 2**31 and large tensors have more bytes.
        array = mx.asarray(data.cast({1: "B", 2: "H", 4: "I", 8: "Q"}[dtype.size]))
        yield info, array[skip:].view(dtype).reshape(info.shape)


# -----------------------------------------------------------------------------
# 3. Quantized layers
# Linear and embedding whose weights are stored in a few bits each. Groups of G
# neighbours in a row share a scale and, in affine mode, a bias: w = scale * q + bias.
# Decoding reads every weight once per token, so a quarter of the bytes can mean four
# times the speed.
# uses: none
# -----------------------------------------------------------------------------

# mode: (group sizes, bits), of what mx.quantized_matmul offers
QUANTIZATION_MODES = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def check_quantization(group_size: int, bits: int, mode: str) -> None:
    """Raise ValueError if MLX has no kernel for the settings."""
    sizes, widths = QUANTIZATION_MODES.get(mode, ((), ()))
    if group_size not in sizes or bits not in widths:
        got = f"group_size {group_size}, bits {bits}, mode {mode!r}"
        raise ValueError(f"cannot quantize with {got}; known: {QUANTIZATION_MODES}")


class QuantizedMatrix(nn.Module):
    """A packed matrix (rows, columns) of zeros, to be filled; base of the two layers.

    weight: (rows, columns * bits / 32) uint32, the first element in the lowest bits.
    scales, and biases in affine mode: (rows, columns / G).
    Raises ValueError if MLX has no kernel for the settings, or G does not divide.
    """

    def __init__(self, rows: int, columns: int, group_size: int, bits: int, mode: str):
        super().__init__()
        check_quantization(group_size, bits, mode)
        if columns % group_size:
            raise ValueError(f"group_size {group_size} must divide {columns} columns")
        self.group_size, self.bits, self.mode = group_size, bits, mode
        groups = (rows, columns // group_size)
        self.weight = mx.zeros((rows, columns * bits // 32), mx.uint32)
        self.scales = mx.zeros(groups, mx.float32 if mode == "affine" else mx.uint8)
        if mode == "affine":
            self.biases = mx.zeros(groups)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x W^T for x (..., columns), unpacking W on the fly."""
        packed = self["weight"], self["scales"], self.get("biases")
        # On CUDA it takes less time to unpack all of W first, once x has many rows:
        # 128, measured on an H200.
        many = x.ndim > 2 and x.size >= 128 * x.shape[-1]
        if many and mx.cuda.is_available():
            whole = mx.dequantize(*packed, self.group_size, self.bits, self.mode)
            return x @ whole.T
        settings = True, self.group_size, self.bits, self.mode  # True: transposed
        return mx.quantized_matmul(x, *packed, *settings)


class QuantizedLinear(QuantizedMatrix):
    """nn.Linear over a packed matrix: (..., columns) -> (..., rows)."""

    def __call__(self, x: mx.array) -> mx.array:
        x = self.as_linear(x)
        return x + self["bias"] if "bias" in self else x


class QuantizedEmbedding(QuantizedMatrix):
    """nn.Embedding over a packed matrix: ids (...) -> (..., columns)."""

    def __call__(self, tokens: mx.array) -> mx.array:
        packed = (self.weight, self.scales, self.get("biases"))
        rows = (part if part is None else part[tokens] for part in packed)
        return mx.dequantize(*rows, self.group_size, self.bits, self.mode)


def dense_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, layer) of every Linear and Embedding of a model."""
    kinds = (nn.Linear, nn.Embedding)
    return [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]


def quantized_like(
    layer: nn.Module, group_size: int, bits: int, mode: str
) -> QuantizedMatrix:
    """Return the quantized counterpart of a Linear or Embedding, all zeros."""
    kind = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedEmbedding
    quantized = kind(*layer.weight.shape, group_size, bits, mode)
    if "bias" in layer:
        quantized.bias = layer.bias
    return quantized


def quantize(
    model: nn.Module, *, group_size: int = 64, bits: int = 4, mode: str = "affine"
) -> None:
    """Replace in place every Linear and Embedding whose columns G divides.

    The others stay as they are, which is also what MLX's converter does.
    Raises ValueError if MLX has no kernel for the settings.
    """
    check_quantization(group_size, bits, mode)
    layers = dense_layers(model)
    while layers:  # one by one, and each is let go: never two copies of all
        path, layer = layers.pop()
        if layer.weight.shape[1] % group_size == 0:
            quantized = quantized_like(layer, group_size, bits, mode)
            packed = mx.quantize(layer.weight, group_size, bits, mode)
            quantized.update(dict(zip(("weight", "scales", "biases"), packed)))
            mx.eval(quantized.parameters())
            model.update_modules(tree_unflatten([(path, quantized)]))


# -----------------------------------------------------------------------------
# 4. Rotary embedding
# Position enters attention as a rotation [2]: pair i of a head turns by
# position * theta**(-2i / Dh), so a dot product of two heads sees only the distance
# between them. Long-context models slow the slow pairs down ("scaling").
# uses: none
# -----------------------------------------------------------------------------


def scaling_number(scaling: dict, key: str, default: float | None = None) -> float:
    """Return a number of rope_scaling. Raises ValueError if it is not positive."""
    value = default if scaling.get(key) is None else scaling[key]
    if type(value) not in (int, float) or not 0 < value < 2**31:
        raise ValueError(f"rope_scaling: {key} must be positive, got {value!r:.80}")
    return value


def ramp(x: float, low: float, high: float) -> float:
    """Return 0 below low, 1 above high, and what lies on the line between."""
    return min(max((x - low) / (high - low), 0.0), 1.0)


def llama3_frequencies(frequencies: list[float], scaling: dict) -> list[float]:
    """Return frequencies with the slow pairs slowed down by `factor`.

    Pairs that turn more than high_freq_factor times within the original context keep
    their pace, those that turn less than low_freq_factor times are slowed down, and
    between the two the pace is interpolated.  Source: [1], Meta's apply_scaling.
    """
    factor = scaling_number(scaling, "factor")
    low = scaling_number(scaling, "low_freq_factor")
    high = scaling_number(scaling, "high_freq_factor")
    context = scaling_number(scaling, "original_max_position_embeddings")
    if low >= high:
        raise ValueError(f"rope_scaling: low_freq_factor {low} must be below {high}")
    keep = [ramp(context * f / (2 * math.pi), low, high) for f in frequencies]
    return [f * (k + (1 - k) / factor) for f, k in zip(frequencies, keep)]


def yarn_frequencies(
    frequencies: list[float], theta: float, max_position: int, scaling: dict
) -> tuple[list[float], float]:
    """Return frequencies slowed down as YaRN does, and the factor on attention.

    As llama3, but the ramp is linear in the index of the pair, between the pairs that
    turn beta_fast and beta_slow times; and queries and keys are scaled.
    Source: [7] section 3, as Hugging Face's modeling_rope_utils has it.
    """
    number, half = functools.partial(scaling_number, scaling), len(frequencies)
    factor = number("factor")
    context = number("original_max_position_embeddings", max_position)
    # The index (of 2 * half) whose pair turns `beta` times within the context.
    low, high = (
        half * math.log(context / (beta * 2 * math.pi)) / math.log(theta)
        for beta in (number("beta_fast", 32), number("beta_slow", 1))
    )
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    slow = [ramp(i, low, high if high != low else low + 0.001) for i in range(half)]
    slowed = [f * (1 - s + s / factor) for f, s in zip(frequencies, slow)]
    if scaling.get("attention_factor") is not None:
        return slowed, number("attention_factor")
    log, ratio = 0.1 * math.log(max(factor, 1.0)), ("mscale", "mscale_all_dim")
    if all(map(scaling.get, ratio)):
        over, under = (number(key) * log + 1 for key in ratio)
        return slowed, over / under
    return slowed, log + 1


def rope_frequencies(
    head_dim: int, theta: float, max_position: int, scaling: dict | None = None
) -> tuple[list[float], float]:
    """Return the radians per position of each of the Dh / 2 pairs, and a factor.

    The factor multiplies queries and keys alike; only YaRN has one other than 1.
    scaling: config.json's rope_scaling, with rope_type linear, llama3 or yarn.
    Raises ValueError for another type, or a number that is missing.  Source: [2] eq. 15
    """
    if theta <= 1:
        raise ValueError(f"rope_theta must be above 1, got {theta}")
    frequencies = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    kind = "default" if scaling is None else scaling.get("rope_type")
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        factor = scaling_number(scaling, "factor")
        return [frequency / factor for frequency in frequencies], 1.0
    if kind == "llama3":
        return llama3_frequencies(frequencies, scaling), 1.0
    if kind == "yarn":
        return yarn_frequencies(frequencies, theta, max_position, scaling)
    wanted = "default, linear, llama3 or yarn"
    raise ValueError(f"rope_type must be {wanted}, got {kind!r:.80}")


class RoPE:
    """Rotate queries or keys (B, heads, L, Dh) by the positions offset .. offset + L-1.

    traditional: pairs are neighbours (0, 1), (2, 3), as in [2]; otherwise halves,
    (0, Dh/2), (1, Dh/2 + 1), which is how Hugging Face stores Llama's q and k.
    Angles are float32, so at position 131071 they are good to 0.01 radians.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        max_position: int = 2048,
        scaling: dict | None = None,
        traditional: bool = False,
    ):
        frequencies, factor = rope_frequencies(head_dim, theta, max_position, scaling)
        # Dot products of queries and keys carry the factor twice.
        self.score_factor = factor**2
        # mx.fast.rope divides positions by its table. Made of numbers, it is not lazy:
        # a lazy array could be evaluated only in the thread that made it.
        periods = mx.array([1 / f for f in frequencies], mx.float32)
        self.options = {"dims": head_dim, "traditional": traditional, "freqs": periods}

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return mx.fast.rope(x, base=None, scale=1.0, offset=offset, **self.options)


# -----------------------------------------------------------------------------
# 5. KV cache
# Keys and values of past tokens, in buffers allocated once: decoding then writes one
# slot per layer instead of recomputing, or re-allocating, the whole past.
# uses: none
# -----------------------------------------------------------------------------


class KVCache:
    """The past of one attention layer, at most `capacity` tokens.

    Has mlx-lm's contract (`offset`, `update_and_fetch`, `trim`), so it can be used
    there too. The buffers, (B, Hkv, capacity, Dh), appear with the first tokens,
    whose shape and dtype they take; their length is a multiple of 256, as MLX's fused
    attention on CUDA wants it.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 token, got {capacity}")
        self.capacity = capacity
        self.offset = 0  # tokens held
        self.keys = self.values = None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append L tokens; return all keys and values so far.

        keys, values: (B, Hkv, L, Dh) -> (B, Hkv, offset + L, Dh), views of the buffers.
        Raises ValueError if they do not fit: a cache never drops what it holds.
        """
        end = self.offset + keys.shape[2]
        if end > self.capacity:
            found = f"{end} tokens, capacity {self.capacity}"
            raise ValueError(f"the context is full: {found}")
        if self.keys is None:
            B, Hkv, _, Dh = keys.shape
            shape = (B, Hkv, -(-self.capacity // 256) * 256, Dh)
            self.keys = mx.zeros(shape, keys.dtype)
            self.values = mx.zeros(shape, values.dtype)
        # MLX arrays are values, but an update of one that nothing else will read is
        # done in its memory. Nothing here may keep the old array alive.
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def trim(self, n: int) -> int:
        """Forget the last n tokens; return n. Their slots are written over later."""
        if not 0 <= n <= self.offset:
            raise ValueError(f"n must be in [0, {self.offset}], got {n}")
        self.offset -= n
        return n

    @property
    def state(self) -> list[mx.array]:
        """The buffers, to be evaluated; empty before the first tokens."""
        return [] if self.keys is None else [self.keys, self.values]


# -----------------------------------------------------------------------------
# 6. Transformer
# Llama 3 [1]: blocks of attention and MLP, each reading the residual stream x through
# a norm [4] and adding to it. Attributes carry the checkpoint's names.
# uses: 1, 4, 5
# -----------------------------------------------------------------------------


FEW_ROWS, LONG = 16, 128  # tokens: at most, of drafts; at least, of a prompt
LARGE = 32_000_000  # bytes of a layer's cache, at least


class Attention(nn.Module):
    """Grouped-query attention [3]: H / Hkv query heads share a key/value head.

    softmax(Q K^T / sqrt(Dh)) V over the past and this call's tokens, x (B, L, D). One
    token each may come as (B, D): MLX flattens what is no matrix before a dense
    product, and shapes it back.
    """

    def __init__(self, args: ModelArgs, rope: RoPE):
        super().__init__()
        D, H, Hkv = args.hidden_size, args.num_attention_heads, args.num_key_value_heads
        self.n_heads, self.n_kv_heads = H, Hkv
        self.scale = args.head_dim**-0.5 * rope.score_factor
        self.rope = rope
        bias = args.attention_bias
        self.q_proj = nn.Linear(D, H * args.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, Hkv * args.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, Hkv * args.head_dim, bias=bias)
        self.o_proj = nn.Linear(H * args.head_dim, D, bias=bias)

    def split(self, x: mx.array, heads: int) -> mx.array:
        """Return (B, L, heads * Dh), or (B, heads * Dh), as (B, heads, L, Dh)."""
        if x.ndim == 2:  # the order is the same where L is 1: nothing to transpose
            return x.reshape(x.shape[0], heads, 1, -1)
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Return (B, H, L, Dh), a mean of values for each query.

        "causal" lines the last query up with the last key: query i of L sees the S - L
        tokens before this call and 0 .. i of its own. One query sees all.
        """
        L, S = queries.shape[2], keys.shape[2]
        mask = "causal" if L > 1 else None
        if not (1 < L <= FEW_ROWS and mx.cuda.is_available()):
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=self.scale, mask=mask
            )
        # cuDNN takes some 60 ms to plan for every new pair of L and S. Only for one
        # query over a KVCache does the plan of the last token serve again.
        rows = (
            self.attend(queries[:, :, n : n + 1], keys[:, :, :end], values[:, :, :end])
            for n, end in enumerate(range(S - L + 1, S + 1))
        )
        return mx.concatenate([*rows], axis=2)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        queries = self.split(self.q_proj(x), self.n_heads)
        keys = self.split(self.k_proj(x), self.n_kv_heads)
        values = self.split(self.v_proj(x), self.n_kv_heads)

        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset), self.rope(keys, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        attended = self.attend(queries, keys, values)
        if x.ndim == 3:
            attended = attended.swapaxes(1, 2)
        return self.o_proj(attended.reshape(*x.shape[:-1], -1))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


# One kernel instead of three; the CPU backend would run a compiler to make it.
fused_swiglu = mx.compile(swiglu, shapeless=True)


class MLP(nn.Module):
    """SwiGLU [5]: down(silu(gate(x)) * up(x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, F, bias = args.hidden_size, args.intermediate_size, args.mlp_bias
        self.gate_proj = nn.Linear(D, F, bias=bias)
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        on_cpu = mx.default_device() == mx.cpu
        activation = swiglu if on_cpu else fused_swiglu
        return self.down_proj(activation(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, rope: RoPE):
        super().__init__()
        D, eps = args.hidden_size, args.rms_norm_eps
        self.self_attn = Attention(args, rope)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(D, eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """The stack without its head: tokens (B, L) -> (B, L, D), (B, D) where L is 1."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        # One table of frequencies serves all layers.
        rope = RoPE(
            args.head_dim,
            args.rope_theta,
            args.max_position_embeddings,
            args.rope_scaling,
            args.rope_traditional,
        )
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [
            TransformerBlock(args, rope) for _ in range(args.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self._halfway = mx.array(0)  # x there, of the last token; _: no parameter

    def __call__(
        self, tokens: mx.array, cache: list[KVCache] | None = None
    ) -> mx.array:
        # An embedding in mxfp4 has no dtype of its own: the norms set the stream's.
        x = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        if tokens.shape[1] == 1:
            x = x[:, 0]
        # A graph holds what it makes until it is through: so a long part of a prompt
        # is computed in a graph for each layer, launched one in advance.
        prompt = cache is not None and x.ndim == 3 and tokens.size >= LONG
        # And what it reads: the next token would copy the cache instead of writing into
        # it. So where that is large, a token is computed in two halves, and neither is
        # launched before the same half of the last token is through.
        large = cache and sum(array.nbytes for array in cache[0].state) >= LARGE
        half, before = len(self.layers) // 2, x
        cache = cache or [None] * len(self.layers)
        for n, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            if prompt:
                mx.async_eval(x)
                mx.eval(before)
                before = x
            elif large and n == half:
                mx.eval(self._halfway)
                mx.async_eval(x)
                mx.eval(tokens)  # they are what the second half of the last gave
                self._halfway = x
            x = layer(x, layer_cache)
        return self.norm(x)


class Llama(nn.Module):
    """A Llama: token ids in, logits out.

    New weights are random and lazy: no memory is used until they are evaluated.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model = LlamaModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        tokens: mx.array,
        cache: list[KVCache] | None = None,
        *,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Return the logits that follow each token, unnormalised.

        tokens: (B, L) int32. cache: one KVCache per layer, continued in place; None
        starts from nothing. logits_to_keep: only the last n positions, since the head
        is the largest matrix and prefill needs its last row alone; None keeps all.
        Returns (B, L or n, V) in the dtype of the weights.
        """
        one = tokens.shape[1] == 1
        x = self.model(tokens, cache)
        if logits_to_keep is not None and not one:
            x = x[:, x.shape[1] - logits_to_keep :]
        head = self.lm_head if "lm_head" in self else self.model.embed_tokens.as_linear
        return head(x)[:, None] if one else head(x)

    def make_cache(self, capacity: int) -> list[KVCache]:
        """Return an empty cache for `capacity` tokens, one per layer."""
        return [KVCache(capacity) for _ in self.model.layers]


# -----------------------------------------------------------------------------
# 7. Tokenizer
# Text to ids and back. Byte-pair encoding is tiktoken's; what is written here turns
# the three kinds of vocabulary into its ranks, streams text out of ids, and writes
# conversations down. Control tokens enter by id alone: no text can become one.
# uses: 1
# -----------------------------------------------------------------------------

# How byte-level vocabularies split text before they merge: GPT-2's way, and Llama 3's.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tiktoken's regular expressions overflow their stack on a run of some 500,000 spaces,
# so longer runs than this are cut; and a regular expression of 500,000 characters takes
# minutes to compile, so a longer one than this is refused.
LONGEST_RUN, LONGEST_SPLIT = 65_536, 500
MOST_TOKENS = 262_144  # a larger vocabulary is not read
EMPTY = 2**31  # the rank of b"": a split that matches no text asks tiktoken for it
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Vocabulary:
    """What tiktoken needs, and what its ranks mean."""

    ranks: dict[bytes, int]
    split: str  # regular expression of the pieces that are merged, one by one
    ids: list[tuple[int, ...]]  # of a rank; several for a part of a character
    text: dict[int, bytes]  # of an id
    space: str = " "  # what a space is written as
    # Where a space goes before a text: "always"; where it is "missing"; where it is
    # missing at the "start" of a conversation; None, never.
    prefix: str | None = None
    form: str | None = None  # Unicode normal form


def split_pattern(pre_tokenizer: dict) -> str:
    """Return one regular expression that splits as a byte-level pre_tokenizer does.

    Raises ValueError for what it cannot express, rather than guess: a wrong split would
    only show as slightly worse text.
    """
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    first, last = steps[0], {"add_prefix_space": False, "use_regex": True} | steps[-1]
    kinds = [last["add_prefix_space"], last["use_regex"]]
    kinds += [step.get("type") for step in steps]
    if kinds == [False, True, "ByteLevel"]:
        return GPT2_SPLIT
    if kinds == [False, True, "Digits", "ByteLevel"]:
        # Digits are cut out first, so text ends before one as at its end.
        digits = r"\p{N}" if first.get("individual_digits") else r"\p{N}+"
        rest = GPT2_SPLIT.replace(r"| ?\p{N}+", "")
        return digits + "|" + rest.replace(r"(?!\S)", r"(?![^\s\p{N}])")
    # Both its matches and the text between them must become pieces, none be dropped.
    wanted = {"Isolated": False, "Removed": True}.get(first.get("behavior"))
    whole = wanted is first.get("invert", False)
    if kinds == [False, False, "Split", "ByteLevel"] and whole:
        pattern = first["pattern"]
        regex = pattern.get("Regex", re.escape(pattern.get("String", "")))
        size, counts = len(regex), len(re.findall(r"\{\d", regex))
        if size > LONGEST_SPLIT or counts > 2:  # compiled, these swell
            found = f"{size:,} characters and {counts} counted repeats"
            raise ValueError(f"the split's {found} are too many")
        # tiktoken would drop the text between: a run of what begins no match.
        return f"{regex}|(?:(?!{regex})(?s:.))+"
    raise ValueError(f"unknown pre_tokenizer {json.dumps(pre_tokenizer):.200}")


def byte_level(spec: dict, vocab: dict[str, int], merged: list[str]) -> Vocabulary:
    """Return the vocabulary of a byte-level tokenizer.json (Llama 3, GPT-2, SmolLM2).

    Ids need not be ranks: special tokens may come first. So ranks are made anew, 256
    bytes and then what the merges make, in order.
    """
    # Printable bytes are written as themselves, the others as U+0100 and up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {b: b for b in printable} | {256 + n: b for n, b in enumerate(others)}
    pieces = [chr(code) for code in byte_of] + merged
    if missing := [piece for piece in pieces[:256] if piece not in vocab]:
        raise ValueError(f"the vocabulary lacks the bytes {missing}")
    if spec["model"].get("ignore_merges"):
        pieces += sorted(vocab, key=vocab.get)  # also whole words that no merge makes
    ids = {p.translate(byte_of).encode("latin-1"): vocab[p] for p in pieces}
    form = (spec.get("normalizer") or {}).get("type")
    if form not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"unknown normalizer {form!r:.80}")
    return Vocabulary(
        ranks={piece: n for n, piece in enumerate(ids)},
        split=split_pattern(spec.get("pre_tokenizer") or {}),
        ids=[(i,) for i in ids.values()],
        text={i: piece for piece, i in ids.items()},
        form=form,
    )


def byte_fallback(spec: dict, vocab: dict[str, int], merged: list[str]) -> Vocabulary:
    """Return the vocabulary of a SentencePiece-style tokenizer.json [8] (Llama 2).

    Characters are merged, not bytes, and one that is not in the vocabulary becomes its
    bytes' tokens <0xNN>. As ranks: the bytes; the beginnings of multi-byte characters,
    so that a character's bytes join before all else; the characters; the merges.
    """
    byte_ids = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
    if None in byte_ids:
        raise ValueError(f"the vocabulary lacks <0x{byte_ids.index(None):02X}>")
    characters = [piece.encode() for piece in vocab if len(piece) == 1]
    pieces = [bytes([b]) for b in range(256)]
    pieces += [c[:end] for c in characters for end in range(2, len(c))]
    pieces += characters + [piece.encode() for piece in merged]
    ranks = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    known = {piece.encode(): (i,) for piece, i in vocab.items()}
    ids = [known.get(piece) or tuple(byte_ids[b] for b in piece) for piece in ranks]
    text = {i: piece.replace(SPACE, " ").encode() for piece, i in vocab.items()}
    text |= {i: bytes([b]) for b, i in enumerate(byte_ids)}
    # Spaces are replaced by a normalizer, or since tokenizers 0.15 by Metaspace.
    normalizer, split = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not split and steps in ([prepend, replace], [replace]):
        prefix, words = "always" if prepend in steps else None, False
    elif not normalizer and split.get("replacement") == SPACE:
        rules = {"always": "missing", "first": "start", "never": None}
        prefix, words = rules[split["prepend_scheme"]], split.get("split", True)
    else:
        found = f"normalizer {normalizer!r:.200} and pre_tokenizer {split!r:.200}"
        raise ValueError(f"unknown {found}")
    pattern = f"{SPACE}[^{SPACE}]*|[^{SPACE}]+" if words else r"(?s:.+)"
    return Vocabulary(ranks, pattern, ids, text, SPACE, prefix)


def read_vocabulary(spec: dict) -> Vocabulary:
    """Return the vocabulary that a tokenizer.json describes.

    Raises ValueError for what is inconsistent or unknown.
    """
    model, vocab = spec["model"], spec["model"]["vocab"]
    # "a b" before tokenizers 0.20, ["a", "b"] since
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(map(model.get, extras)):
        raise ValueError(f"wanted plain BPE, got type {model.get('type')!r:.80}")
    if not merges:
        raise ValueError("no merges")
    merged = [left + right for left, right in merges]
    if unknown := {*itertools.chain(*merges), *merged}.difference(vocab):
        raise ValueError(f"merges of {min(unknown)!r:.80}, not in the vocabulary")
    ids = set(vocab.values())
    if len(ids) < len(vocab) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("the ids of the vocabulary must be whole numbers, each once")
    kind = byte_fallback if model.get("byte_fallback") else byte_level
    return kind(spec, vocab, merged)


# The control tokens behind the ranks of Meta's tokenizer.model: their places among 256.
LLAMA3_TOKENS = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|eom_id|>": 8}
LLAMA3_TOKENS |= {"<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eot_id|>": 9}


def rank_file(file: Path, tokens: int) -> tuple[Vocabulary, list[dict], str]:
    """Return the vocabulary, the added tokens and the name of the first token of Meta's
    tokenizer.model: lines of base64 and rank."""
    lines = read_bounded(file, 40 * tokens).splitlines()
    try:
        pairs = map(bytes.split, lines)
        text = {int(rank): base64.b64decode(token) for token, rank in pairs}
    except ValueError:
        wanted = "wanted lines of base64 and rank; a SentencePiece model is not read"
        raise ValueError(f"{file}: {wanted}, it needs its tokenizer.json") from None
    ranks, size = {token: rank for rank, token in text.items()}, len(lines)
    if sorted(ranks.values()) != list(range(size)):
        raise ValueError(f"{file}: wanted the ranks 0 to {size - 1}, each once")
    places = LLAMA3_TOKENS.items()
    added = [{"content": t, "id": size + n, "special": True} for t, n in places]
    ids = [(rank,) for rank in range(size)]
    return Vocabulary(ranks, LLAMA3_SPLIT, ids, text), added, "<|begin_of_text|>"


def read_tokenizer(
    folder: Path, tokens: int
) -> tuple[Vocabulary, list[dict], str | None]:
    """Return a folder's vocabulary, its added tokens, as tokenizer.json has them, and
    the one that is put before every text, if any. tokens: how many there may be."""
    file, ranks = folder / "tokenizer.json", folder / "tokenizer.model"
    if not file.exists():
        if not ranks.exists():
            names = "no tokenizer.json and no tokenizer.model"
            raise FileNotFoundError(f"{folder}: {names}")
        return rank_file(ranks, tokens)
    spec = read_json(file, tokens=tokens)
    post = spec.get("post_processor") or {}
    parts = [step.get("single") for step in post.get("processors", [post])]
    starts = [part[0].get("SpecialToken") for part in parts if part]
    first = next((start["id"] for start in starts if start), None)
    return read_vocabulary(spec), spec.get("added_tokens") or [], first


@dataclass(frozen=True)
class ChatFormat:
    """How a family of models writes a conversation down.

    {} is a message's content. Names of control tokens, {bos} and {eos} become ids,
    everything else is text. Source: the families' published Jinja templates.
    """

    user: str
    assistant: str  # after `reply`
    reply: str = ""  # what asks for one
    system: str = "{}"
    system_in: str | None = None  # the "first" or "last" user message; None: its own
    default_system: str | None = None  # where the conversation has none
    date: str | None = None  # what {date} becomes; None means today
    bos: bool = False  # one at the very start
    strip: tuple[str, ...] = ()  # roles whose contents lose the white space around


ROLES = ("system", "user", "assistant")


def by_role(turn: str, **other) -> ChatFormat:
    """Return the format that writes all messages alike, {role} being whose it is."""
    system, user, assistant = (turn.replace("{role}", role) for role in ROLES)
    reply, end = assistant.split("{}")
    return ChatFormat(user, "{}" + end, reply, system, **other)


LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{}<|eot_id|>"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
MISTRAL = {"system": "{}\n\n", "bos": True}
CHAT_FORMATS = {
    "llama3": by_role(LLAMA3, bos=True, strip=ROLES),
    # Every exchange of Llama 2 opens with a BOS, as a document of its own.
    "llama2": ChatFormat(
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        system_in="first",
        user="{bos}[INST] {} [/INST]",
        assistant=" {} {eos}",
        strip=ROLES,
    ),
    "chatml": by_role("<|im_start|>{role}\n{}<|im_end|>\n"),
    "zephyr": by_role("<|{role}|>\n{}{eos}\n"),
    "mistral": ChatFormat("[INST] {} [/INST]", "{}{eos}", system_in="first", **MISTRAL),
    "mistral-v3": ChatFormat(
        "[INST] {}[/INST]",
        " {}{eos}",
        system_in="last",
        strip=("assistant",),
        **MISTRAL,
    ),
}
CHAT_FORMATS["llama3.1"] = replace(
    CHAT_FORMATS["llama3"],
    system=LLAMA3.replace("{role}", "system").replace("{}", DATES + "{}"),
    default_system="",
)

# What the template of a family has in its text; the first that fits is it.
FAMILIES = {
    "llama3.1": ("<|start_header_id|>", "Cutting Knowledge Date"),
    "llama3": ("<|start_header_id|>",),
    "chatml": ("<|im_start|>",),
    "zephyr": ("<|assistant|>", "eos_token"),
    "llama2": ("<<SYS>>",),
    "mistral": ("'[INST] ' + message['content'] + ' [/INST]'",),
    "mistral-v3": ("'[INST] ' + message['content'] + '[/INST]'",),
}


def recognise_format(template: str) -> tuple[str | None, ChatFormat | None]:
    """Return the name and the format of a Jinja chat template, (None, None) if unknown.

    Templates are never run: what tells the families apart is looked for in their text.
    """
    template = template.replace('"', "'").replace("\\n", "\n")
    known = (n for n, marks in FAMILIES.items() if all(m in template for m in marks))
    if (name := next(known, None)) is None:
        return None, None
    changes = {"bos": "bos_token" in template and name != "llama2"}
    fixed = re.search(r"date_string = '(\d\d? \w{3} \d{4})'", template)
    if fixed and "strftime_now" not in template:
        changes["date"] = fixed[1]
    if own := re.search(r"<\|im_start\|>system\n([^'{}]+)<\|im_end\|>", template):
        changes["default_system"] = own[1]
    if name == "mistral" and "eos_token + ' '" in template:  # 7B-Instruct-v0.1
        changes["assistant"] = "{}{eos} "
    return name, replace(CHAT_FORMATS[name], **changes)


def read_format(folder: Path, settings: dict) -> tuple[str | None, ChatFormat | None]:
    """Return the name and the format of a folder's chat template.

    (None, None) if it has none, ("unknown", None) if it is not known.
    """
    jinja, file = settings.get("chat_template"), folder / "chat_template.jinja"
    if file.exists():
        jinja = read_bounded(file, JSON_BYTES).decode()
    if isinstance(jinja, list):  # several, by name
        jinja = {entry["name"]: entry["template"] for entry in jinja}["default"]
    if jinja is None:
        return None, None
    name, chat_format = recognise_format(jinja)
    return name or "unknown", chat_format


def arrange(messages: list[dict], chat: ChatFormat) -> list[tuple[str, str]]:
    """Return a conversation as (role, content), with the system text in its place.

    Raises ValueError unless it is one: a system message at most first, the user last.
    """
    turns = [(message.get("role"), message.get("content")) for message in messages]
    roles = [role for role, _ in turns]
    for n, (role, content) in enumerate(turns):
        if role not in ROLES or (role == "system" and n):
            wanted = "system (first only), user or assistant"
            raise ValueError(f"message {n}: role must be {wanted}, got {role!r:.80}")
        if not isinstance(content, str):
            raise ValueError(f"message {n}: content must be text, got {content!r:.80}")
    if roles[-1:] != ["user"]:
        raise ValueError(f"the last message must be the user's, got roles {roles}")
    system = turns.pop(0)[1] if roles[0] == "system" else chat.default_system
    if chat.system_in is None:
        return turns if system is None else [("system", system), *turns]
    if any(role != ROLES[1 + n % 2] for n, (role, _) in enumerate(turns)):
        raise ValueError(f"user and assistant must alternate, got roles {roles}")
    if system is not None:
        n = 0 if chat.system_in == "first" else -1
        turns[n] = ("user", chat.system.replace("{}", system, 1) + turns[n][1])
    return turns


class TextStream:
    """Turn ids into text as they come: whole characters only, each exactly once.

    A character split over tokens appears with its last byte; bytes that never become
    one appear as U+FFFD. Special ids, and ids that no token has, are no text.
    """

    def __init__(self, text: Mapping[int, bytes], drop_space: bool):
        self._text, self._drop_space = text, drop_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        encoded = self._text.get(token, b"")
        if self._drop_space and encoded:
            encoded, self._drop_space = encoded.removeprefix(b" "), False
        return self._decoder.decode(encoded)

    def close(self) -> str:
        """Return what is left of an unfinished character."""
        return self._decoder.decode(b"", True)


def tokenizer_settings(folder: Path, template: str | None) -> dict:
    """Return Tokenizer's arguments, gathered from the files of a folder."""
    paths = [folder / f"{name}.json" for name in ("config", "generation_config")]
    config, generation = (read_json(path) if path.exists() else {} for path in paths)
    # No more tokens are read than the weights have room for, were they an embedding
    # with rows of 16 bytes.
    weights = [file for file in folder.glob("*.safetensors") if file.is_file()]
    rows = sum(file.stat().st_size for file in weights) // 16 or MOST_TOKENS
    tokens = min(rows, config.get("vocab_size", rows), MOST_TOKENS)
    path = folder / "tokenizer_config.json"
    settings = read_json(path, tokens=tokens) if path.exists() else {}
    vocabulary, added, first = read_tokenizer(folder, tokens)
    special = {token["content"]: token["id"] for token in added}
    named = (settings.get("bos_token", first), settings.get("eos_token"))
    bos, eos = (special.get(t["content"] if isinstance(t, dict) else t) for t in named)
    bos, stops = config.get("bos_token_id") if bos is None else bos, [eos]
    for ids in (config.get("eos_token_id"), generation.get("eos_token_id")):
        stops += ids if isinstance(ids, list) else [ids]
    stops = [i for i in stops if i is not None]
    ids = [*special.values(), *stops, 0 if bos is None else bos]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"token ids must be whole numbers, got {ids!r:.200}")
    size, rows = max(vocabulary.text) + 1, config.get("vocab_size", math.inf)
    if size > rows:
        raise ValueError(f"the tokenizer has {size} ids, the model {rows}")
    own = read_format(folder, settings) if template is None else None
    template, chat_format = own or (template, CHAT_FORMATS[template])
    return {
        "vocabulary": vocabulary,
        "special_tokens": special,
        "visible": [t["content"] for t in added if not t.get("special")],
        "bos": bos,
        "eos": stops[0] if stops else None,
        "stop_tokens": stops,
        "adds_bos": settings.get("add_bos_token", first is not None),
        "template": template,
        "chat_format": chat_format,
        "source": str(folder),
    }


# Names that end a reply wherever they are control tokens: folders often name only one
# of the ids that their model was trained to stop with.
STOP_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
STOP_NAMES += ("<|im_end|>", "<|endoftext|>", "</s>")

# What, in a chat format, is a control token. Mistral's [INST] is one since version 3.
CONTROL = re.compile(
    r"(<\|(?:start_header_id|end_header_id|eot_id|im_start|im_end)\|>"
    r"|\[/?INST\]|\{bos\}|\{eos\})"
)


@dataclass(eq=False)
class Tokenizer:
    """Text to ids and back, and conversations to ids."""

    vocabulary: Vocabulary
    special_tokens: dict[str, int]  # added tokens, by their text
    visible: Iterable[str] = ()  # those of them that are text: "<think>", say
    bos: int | None = None
    eos: int | None = None
    stop_tokens: Iterable[int] = ()  # end a reply; joined by all of STOP_NAMES
    adds_bos: bool = False  # before a text on its own
    template: str | None = None  # name of the chat format; None for a base model
    chat_format: ChatFormat | None = None
    source: str = "this tokenizer"  # in messages

    def __post_init__(self):
        special, own = self.special_tokens, self.vocabulary
        self.stop_tokens = {*self.stop_tokens}
        self.stop_tokens |= {special[name] for name in STOP_NAMES if name in special}
        self.bos_prefix = [self.bos] if self.adds_bos and self.bos is not None else []
        self._text = own.text | dict.fromkeys(special.values(), b"")
        self._text |= {special[name]: name.encode() for name in self.visible}
        ranks = own.ranks | {b"": EMPTY}
        self._bpe = tiktoken.Encoding(
            "llama.py", pat_str=own.split, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, template: str | None = None
    ) -> "Tokenizer":
        """Return the tokenizer of a model folder, without touching its weights.

        template: a name in CHAT_FORMATS, used whatever the folder says.
        Raises FileNotFoundError or ValueError naming the file at fault.
        """
        folder = Path(folder)
        if template not in (None, *CHAT_FORMATS):
            names = ", ".join(CHAT_FORMATS)
            raise ValueError(f"template must be one of {names}, got {template!r:.80}")
        try:
            return cls(**tokenizer_settings(folder, template))
        except ValueError as error:
            where = f"{folder}: tokenizer files: "
            where = "" if str(error).startswith(str(folder)) else where
            raise ValueError(f"{where}{error}") from None
        except (AttributeError, LookupError, TypeError) as error:
            # A part of another type than it should be; which one, the error says.
            raise ValueError(f"{folder}: tokenizer files: {error!r}") from error

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Return the ids of ordinary text: never a special id, and no BOS.

        first: whether the text begins a document; SentencePiece-style vocabularies
        put a space before it then, so that its first word is a word like any other.
        """
        own = self.vocabulary
        text = unicodedata.normalize(own.form, text) if own.form else text
        text = text.replace(" ", own.space)
        missing = own.prefix == "always" or not text.startswith(own.space)
        if first and text and own.prefix is not None and missing:
            text = own.space + text
        cuts = [0]
        for run in re.finditer(r"\s+", text):
            cuts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
        parts = [text[start:end] for start, end in zip(cuts, [*cuts[1:], None])]
        # In a thread: nothing can stop a regular expression that takes for ever.
        outcome, seconds = queue.SimpleQueue(), 3 + len(text) / 100_000
        threading.Thread(target=self._rank, args=(parts, outcome), daemon=True).start()
        try:
            ranks = outcome.get(timeout=seconds)
        except queue.Empty:
            ranks = ValueError(f"it takes longer than {seconds:.1f} s")
        if isinstance(ranks, ValueError):
            raise ValueError(f"{self.source}: the split fails: {ranks}")
        return [i for rank in ranks for i in own.ids[rank]]

    def _rank(self, parts: list[str], outcome: queue.SimpleQueue) -> None:
        """Put the ranks of parts of a text, or what is wrong, into outcome."""
        # encode_ordinary panics, which Rust prints, where encode raises.
        split = functools.partial(self._bpe.encode, disallowed_special=())
        try:
            ranks = [*itertools.chain(*map(split, parts))]
            outcome.put(ValueError("it matches no text") if EMPTY in ranks else ranks)
        except ValueError as error:
            outcome.put(error)

    def encode_chat(
        self,
        messages: list[dict[str, str]],
        *,
        replies: Mapping[str, list[int]] | None = None,
    ) -> list[int]:
        """Return the ids of a whole conversation, up to where the reply begins.

        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...], a
        system message at most first, the user's last. replies: the ids that the model
        wrote for a content, taken as they are: encoded anew, the same text could get
        other ids than the cache holds.
        Raises ValueError for messages out of order, or where no format is known.
        """
        chat, replies = self.require_format(), replies or {}
        date = chat.date or time.strftime("%d %b %Y")
        # Parts are text or ids. None: a reply begins here, and what precedes it is
        # encoded on its own, exactly as when the reply had not been written.
        parts = [[self.bos]] if chat.bos and self.bos is not None else []
        for role, content in arrange(messages, chat):
            before, after = getattr(chat, role).split("{}")
            if role == "assistant":
                parts += [*self._parts(chat.reply), None]
                if content in replies:
                    parts += [replies[content], *self._parts(after.lstrip(" "))]
                    continue
            content = content.strip() if role in chat.strip else content
            before = before.replace("{date}", date)
            parts += [*self._parts(before), content, *self._parts(after)]
        return self._join([*parts, *self._parts(chat.reply)])

    def require_format(self) -> ChatFormat:
        """Return the chat format. Raises ValueError if there is none."""
        if self.chat_format is not None:
            return self.chat_format
        base = "is a base model, it has no chat template"
        found = "has a chat template that is not known here" if self.template else base
        advice = f"use --raw, or --template with one of {', '.join(CHAT_FORMATS)}"
        raise ValueError(f"{self.source} {found}: {advice}")

    def _parts(self, text: str) -> list[str | list[int]]:
        """Return a piece of a chat format as text, and ids of control tokens."""
        ids = self.special_tokens | {"{bos}": self.bos, "{eos}": self.eos}
        parts = CONTROL.split(text)
        for n in range(1, len(parts), 2):
            if ids.get(parts[n]) is not None:
                parts[n] = [ids[parts[n]]]
            elif not parts[n].startswith("["):
                raise ValueError(f"the chat format needs {parts[n]}: not in vocabulary")
        return parts

    def _join(self, parts: list[str | list[int] | None]) -> list[int]:
        """Return the ids of parts, the text between two ids encoded as one."""
        ids, text, first = [], "", True
        for part in [*parts, []]:
            if isinstance(part, str):
                text += part
                continue
            at_start = not ids if self.vocabulary.prefix == "start" else first
            ids += self.encode(text, first=at_start) + (part or [])
            text, first = "", part is not None
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special ids, and ids of no token, are no text."""
        stream = self.stream(drop_space=True)
        return "".join(map(stream.add, ids)) + stream.close()

    def stream(self, *, drop_space: bool) -> TextStream:
        """Return a decoder for ids as they come.

        drop_space: take away the space that SentencePiece-style vocabularies put
        before a text; not wanted where the ids continue one.
        """
        return TextStream(self._text, drop_space and self.vocabulary.prefix is not None)


# -----------------------------------------------------------------------------
# 8. Loading
# From a folder to a model ready to run: find it, build the modules that its files
# describe, check every tensor before reading any, then map them in.
# uses: 1-7
# -----------------------------------------------------------------------------


def find_folder(model: str | Path) -> Path:
    """Return the folder of a model: a path, or org/name in the Hugging Face cache.

    The cache is where huggingface_hub puts it: HF_HUB_CACHE, else hub/ in HF_HOME,
    else huggingface/hub in XDG_CACHE_HOME or ~/.cache. Nothing is fetched.
    Raises FileNotFoundError that says how to get it.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists():
        raise FileNotFoundError(f"{model}: a file, wanted the folder that it is in")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        found = "no such folder, and not of the form org/name"
        if model in PRESETS:
            found = "a shape without weights; info knows it, and --measure runs it"
        raise FileNotFoundError(f"{model}: {found}")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    repo = hub / f"models--{str(model).replace('/', '--')}"
    if (main := repo / "refs" / "main").is_file():
        snapshot = repo / "snapshots" / main.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    there = [path.name[8:].replace("--", "/") for path in hub.glob("models--*")]
    near = ", ".join(difflib.get_close_matches(str(model), there, 3, 0.5))
    found = f"no such folder, and not in {hub}" + (near and f", which has {near}")
    raise FileNotFoundError(f"{model}: {found}; to get it: hf download {model}")


def build_model(args: ModelArgs, tensors: Mapping[str, TensorInfo]) -> Llama:
    """Return the modules for these tensors, without their weights.

    The files decide: a head among them is used, else the embedding serves; a layer is
    quantized if it has scales, as config.json's quantization says, which may hold an
    entry of its own for it. Raises ValueError naming the layer that cannot be built.
    """
    model = Llama(replace(args, tie_word_embeddings="lm_head.weight" not in tensors))
    usual, swaps = args.quantization or {}, []
    for path, layer in dense_layers(model):
        if f"{path}.scales" not in tensors:
            continue
        own = usual[path] if isinstance(usual.get(path), dict) else usual
        if not own:
            raise ValueError(f"{path} has scales, but config.json no quantization")
        settings = {"group_size": 64, "bits": 4, "mode": "affine"}
        settings = {key: own.get(key, settings[key]) for key in settings}
        try:
            swaps.append((path, quantized_like(layer, **settings)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
    model.update_modules(tree_unflatten(swaps))
    return model


# What a file may hold where a model has an array of a dtype.
STORED_AS = {mx.float32: ("F32", "F16", "BF16"), mx.uint32: ("U32",), mx.uint8: ("U8",)}


def mismatches(model: Llama, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return how tensors differ from what a model wants, one line for each kind."""
    wanted = dict(tree_flatten(model.parameters()))
    # Old checkpoints carry the rotary frequencies, which are computed here.
    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    shapes = []
    for name in sorted(found & wanted.keys()):
        info, shape = tensors[name], wanted[name].shape
        if info.shape != shape or info.dtype not in STORED_AS[wanted[name].dtype]:
            want = f"{'/'.join(STORED_AS[wanted[name].dtype])} {list(shape)}"
            shapes.append(f"{name} is {info.dtype} {list(info.shape)}, wanted {want}")
    kinds = {
        "missing": sorted(wanted.keys() - found),
        "unexpected": sorted(found - wanted.keys()),
        "not as config.json says": shapes,
    }
    return [
        f"{len(names)} tensors {kind}: "
        f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"
        for kind, names in kinds.items()
        if names
    ]


def examine(
    folder: Path, problems: list[Exception] | None = None
) -> tuple[Llama | None, dict[str, TensorInfo]]:
    """Return a folder's model without its weights, and its tensors. Reads no weight.

    Raises the first that is wrong; given a list of problems, adds all that is wrong to
    it, and the model is None where config.json cannot be honoured.
    """
    found = [] if problems is None else problems
    model, tensors, config = None, {}, folder / "config.json"
    try:
        tensors = list_tensors(folder, found)
    except (OSError, ValueError) as error:
        found.append(error)
    try:
        if not config.exists():
            raise FileNotFoundError(f"{folder}: no config.json")
        args = ModelArgs.from_dict(read_json(config))
        # A module for each of a billion layers would take all memory: not begun.
        if (layers := args.num_hidden_layers) > max(len(tensors), 1000):
            there = f"there are {len(tensors)} tensors"
            raise ValueError(f"num_hidden_layers is {layers}, {there}")
        model = build_model(args, tensors)
        if not found and (wrong := mismatches(model, tensors)):
            found.append(ValueError(f"{folder}: {'; '.join(wrong)}"))
    except OSError as error:
        found.append(error)
    except ValueError as error:
        where = "" if str(config) in str(error) else f"{config}: "
        found.append(ValueError(f"{where}{error}"))
    if found and problems is None:
        raise found[0]
    return model, tensors


def default_dtype() -> mx.Dtype | None:
    """Return what to compute in: None, which is what the files hold, on a GPU. MLX's
    CPU backend multiplies packed matrices many times faster in float32 than in 16 bits.
    """
    return mx.float32 if mx.default_device() == mx.cpu else None


def read_weights(
    model: Llama,
    tensors: Mapping[str, TensorInfo],
    *,
    dtype: mx.Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Give a model its weights, mapped in and evaluated; options: see load_model."""
    dtype, wanted = dtype or default_dtype(), dict(tree_flatten(model.parameters()))
    wanted = [info for info in tensors.values() if info.name in wanted]
    done, total, weights = 0, sum(info.nbytes for info in wanted), []
    for info, mapped in map_tensors(wanted):
        packed = info.dtype in ("U32", "U8")
        array = mapped if packed or dtype is None else mapped.astype(dtype)
        # Evaluated one by one, or a cast would hold both copies of all weights; while
        # `mapped` is still referred to, or the cast could be written into the file's
        # pages; and now, since a lazy array is bound to the thread that made it.
        mx.eval(array)
        weights.append((info.name, array))
        done += info.nbytes
        if progress is not None:
            progress(done, total)
    model.load_weights(weights)


def load_model(
    folder: str | Path,
    *,
    dtype: mx.Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Llama:
    """Return a folder's model, its weights mapped in and evaluated.

    dtype: of activations, and of weights that are not packed; None: default_dtype.
    progress: called with bytes done and in all.
    Raises FileNotFoundError or ValueError that names the file at fault.
    """
    model, tensors = examine(Path(folder))
    read_weights(model, tensors, dtype=dtype, progress=progress)
    return model


def load(
    folder: str | Path, *, dtype: mx.Dtype | None = None
) -> tuple[Llama, Tokenizer]:
    """Return the model and the tokenizer of a folder, or of org/name.

    They may be used in another thread than this one, but in one at a time.
    Raises FileNotFoundError or ValueError that names the file at fault.
    """
    folder = find_folder(folder)
    return load_model(folder, dtype=dtype), Tokenizer.from_folder(folder)


def memory_of(tensors: Iterable[TensorInfo], item_size: int) -> int:
    """Return the bytes that tensors take loaded; item_size: of what is not packed."""
    return sum(
        t.nbytes if t.dtype in ("U32", "U8") else math.prod(t.shape) * item_size
        for t in tensors
    )


DEFAULT_CONTEXT = 8192  # tokens, of a model that can have as many


def kv_bytes_per_token(args: ModelArgs, item_size: int) -> int:
    """Return the bytes that one token takes in the cache: a key and a value a layer."""
    heads = args.num_hidden_layers * args.num_key_value_heads
    return 2 * heads * args.head_dim * item_size


def recommended_memory() -> int | None:
    """Return the bytes that Metal lets one process keep on the GPU, None elsewhere."""
    if not mx.metal.is_available():
        return None
    return mx.device_info()["max_recommended_working_set_size"]


def machine_memory() -> int:
    """Return the bytes that a model can use here."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return recommended_memory() or mx.device_info().get("total_memory") or physical


def require_memory(weights: int, cache: int) -> str | None:
    """Return a warning if weights and cache, in bytes, nearly fill what Metal allows.

    Raises ValueError if they do not fit this machine.
    """
    needed, there, limit = weights + cache, machine_memory(), recommended_memory()
    parts = f"{weights / 1e9:.2f} GB of weights and {cache / 1e9:.2f} GB of cache"
    if needed > there:
        advice = "--ctx (of info: --prompt-tokens) sets the size of the cache"
        if weights > there:
            advice = "quantized weights need less (of info, a preset's: --bits 4)"
        raise ValueError(f"{parts} do not fit {there / 1e9:.2f} GB of memory; {advice}")
    if limit is None or needed < 0.9 * limit:
        return None
    advice = f"sudo sysctl iogpu.wired_limit_mb={needed // 1_000_000 + 4000}"
    return f"{parts}, of {limit / 1e9:.2f} GB that Metal recommends; if slow: {advice}"


@contextlib.contextmanager
def wired_memory(nbytes: int) -> Iterator[None]:
    """Keep a model of `nbytes`, weights and cache, in wired memory within the block.

    macOS may otherwise page a large model out between tokens, which makes it many
    times slower; wiring more than needed takes memory from everything else. So: what
    is needed and 2 GB, at most what Metal recommends. Does nothing elsewhere.
    """
    limit = recommended_memory()
    before = limit and mx.set_wired_limit(min(limit, nbytes + 2_000_000_000))
    try:
        yield
    finally:
        if limit:
            mx.synchronize()  # nothing may be running that counts on it
            mx.set_wired_limit(before)


# -----------------------------------------------------------------------------
# 9. Samplers
# From logits to a token. Each filter maps logprobs to logprobs, -inf where a token is
# ruled out; Sampler composes them in the order that Hugging Face's generate has:
# repetition penalty, temperature, top-k, top-p, min-p.
# uses: none
# -----------------------------------------------------------------------------


def apply_repetition_penalty(
    logits: mx.array, seen: mx.array, penalty: float
) -> mx.array:
    """Return logits (B, V) with those of seen tokens (B, V) moved down.

    Divided by the penalty where positive, multiplied where negative.
    Source: CTRL, arXiv:1909.05858, section 4.1.
    """
    moved = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(seen, moved, logits)


def apply_top_k(logprobs: mx.array, k: int) -> mx.array:
    """Return logprobs (B, V) of the k likeliest tokens; ties with the last stay."""
    if k >= logprobs.shape[-1]:
        return logprobs
    at = mx.argpartition(-logprobs, k - 1, axis=-1)[:, k - 1 : k]
    least = mx.take_along_axis(logprobs, at, axis=-1)
    return mx.where(logprobs < least, -mx.inf, logprobs)


def apply_top_p(logprobs: mx.array, p: float) -> mx.array:
    """Return logprobs (B, V) of the fewest likeliest tokens that hold p together [6].

    A token stays while those before it hold less than p, so the likeliest always does.
    """
    descending = -mx.sort(-logprobs, axis=-1)
    probs = mx.softmax(descending, axis=-1)
    before = mx.cumsum(probs, axis=-1) - probs
    kept = (before < p) | (before == 0)  # the first, however small p is
    last = mx.where(kept, descending, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(logprobs < last, -mx.inf, logprobs)


def apply_min_p(logprobs: mx.array, p: float) -> mx.array:
    """Return logprobs (B, V) of the tokens with p times the likeliest's probability.

    Source: arXiv:2407.01082.
    """
    least = logprobs.max(axis=-1, keepdims=True) + math.log(p)
    return mx.where(logprobs < least, -mx.inf, logprobs)


# option: (least, is that allowed, greatest)
INTERVALS = {
    "temperature": (0, True, 1e9),
    "top_k": (1, True, 2**31 - 1),
    "top_p": (0, False, 1),
    "min_p": (0, False, 1),
    "repetition_penalty": (0, False, 1e9),
}


def check_sampling(**options: float | None) -> None:
    """Raise ValueError, naming interval and value, for an option outside of it."""
    for name, value in options.items():
        least, closed, greatest = INTERVALS[name]
        inside = type(value) in (int, float) and least <= value <= greatest
        inside = inside and (closed or value > least)
        inside = inside and (name != "top_k" or value == int(value))
        if value is not None and not inside:
            interval = f"{'[' if closed else '('}{least}, {greatest:.0f}]"
            kind = ", a whole number" if name == "top_k" else ""
            raise ValueError(f"{name} must be in {interval}{kind}, got {value!r:.80}")


def new_seed() -> int:
    """Return a seed that no other call returns, short enough to be typed again."""
    return int.from_bytes(os.urandom(4), "little")


@dataclass(kw_only=True)
class Sampler:
    """A function from logits (B, V) to tokens (B,), lazy like any MLX code.

    Its state is a key, split for every token, and which tokens were seen; both appear
    on first use, in the thread that samples. A copy goes on from where it was made.
    Raises ValueError with the interval and the value for an option outside it.
    """

    temperature: float = 0.6  # 0 is greedy, the likeliest token
    top_k: int | None = None  # at least 1; None turns a filter off
    top_p: float | None = 0.9  # in (0, 1], as min_p
    min_p: float | None = None
    repetition_penalty: float | None = None  # above 1 discourages what was seen
    seed: int | None = None  # the same draws the same tokens; None draws anew
    prompt: Sequence[int] = ()  # seen before the tokens sampled, for the penalty
    key: mx.array | None = field(default=None, init=False)
    seen: mx.array | None = field(default=None, init=False)  # (B, V), bool

    def __post_init__(self):
        check_sampling(**{name: getattr(self, name) for name in INTERVALS})
        self.seed = new_seed() if self.seed is None else self.seed

    def __call__(self, logits: mx.array) -> mx.array:
        # 16-bit cumulative sums would misjudge the tail, so float32 from here on.
        logits = logits.astype(mx.float32)
        if self.repetition_penalty is not None:
            logits = self.penalize(logits)
        if self.temperature < 1e-30:  # 0, or what float32 cannot divide by
            token = mx.argmax(logits, axis=-1)
        else:
            token = self.draw(logits)
        if self.seen is not None:
            self.seen = self.seen | (mx.arange(logits.shape[-1]) == token[:, None])
        return token

    def penalize(self, logits: mx.array) -> mx.array:
        if self.seen is None:
            self.seen = mx.zeros(logits.shape, mx.bool_)
            if len(self.prompt):
                self.seen[:, mx.array(self.prompt)] = True
        return apply_repetition_penalty(logits, self.seen, self.repetition_penalty)

    def draw(self, logits: mx.array) -> mx.array:
        # Less a constant that no filter minds: they compare, or normalise themselves.
        logprobs = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        if self.top_k is not None:
            logprobs = apply_top_k(logprobs, int(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p is not None:
            logprobs = apply_min_p(logprobs, self.min_p)
        if self.key is None:
            self.key = mx.random.key(self.seed)
        self.key, now = mx.random.split(self.key)
        return mx.random.categorical(logprobs, key=now)


make_sampler = Sampler  # the name that mlx-lm has for it


# -----------------------------------------------------------------------------
# 10. Generation
# Two phases: prefill reads the prompt, many tokens at a time, and decode writes one
# token after another. Works with any model that has the call and the cache of 6.
# uses: none
# -----------------------------------------------------------------------------


def require_numbers(logits: mx.array) -> None:
    """Raise ValueError if logits have no greatest number: NaN, or infinity, in weights
    or from overflow would otherwise go on as noise for ever."""
    if not mx.isfinite(logits.max()).item():
        advice = "`inspect --check` finds NaN in the files, --dtype float32 may help"
        raise ValueError(f"the model's output is not a number; {advice}")


def default_prefill_step() -> int:
    """Return how many tokens to read at a time here.

    A step cannot be interrupted: a CPU takes seconds for a long one, and gains nothing.
    CUDA gains, since there a step costs some 25 ms of launches whatever its length.
    """
    if mx.default_device() == mx.cpu:
        return 32
    return 2048 if mx.cuda.is_available() else 512


def prefill(
    model: Callable,
    prompt: Sequence[int],
    cache: list,
    *,
    step: int,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> mx.array | None:
    """Return the logits (1, V) that follow a prompt, read into the cache.

    step: tokens read at a time; memory grows with it. progress: called with the tokens
    read, and in all. cancelled: asked before each step; returns None then, and the
    cache holds the steps that were done.
    """
    for at in range(0, len(prompt), step):
        if cancelled is not None and cancelled():
            return None
        tokens = mx.array(prompt[at : at + step])[None]
        logits = model(tokens, cache, logits_to_keep=1)[:, -1]
        # MLX computes what is asked for: the cache, so not the head of every step.
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if progress is not None:
            progress(min(at + step, len(prompt)), len(prompt))
    return logits


class Lookup:
    """Drafts of what comes next: the n tokens that followed when the last 8 (or n, if
    that is less) occurred before. So copying, which much of writing is, is foreseen
    without a second model, and text that repeats nothing is left in peace.

    Source: github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, n: int, ids: Iterable[int] = ()):
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.n, self.same, self.ids = n, min(n, 8), []
        self.after = {}  # the last ids, as a tuple: where, in ids, what followed begins
        self.accepted = 0  # drafts that the model agreed with
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append ids to the text."""
        for token in ids:
            self.after[tuple(self.ids[-self.same :])] = len(self.ids)
            self.ids.append(token)

    def drafts(self) -> list[int]:
        """Return n ids, or none; if fewer followed, they are taken to repeat."""
        at = self.after.get(tuple(self.ids[-self.same :]), len(self.ids))
        following = self.ids[at : at + self.n]
        return [*itertools.islice(itertools.cycle(following), self.n)]


class Step(NamedTuple):
    """A pass over one token and drafts of those that follow it, launched."""

    drafts: list[int]
    sampled: mx.array  # (1, 1 + len(drafts)), what follows each
    samplers: list[Callable]  # the sampler's state after each
    logits: mx.array  # (1, V) after the last


def launch(
    model: Callable,
    token: mx.array,
    drafts: list[int],
    cache: list,
    sampler: Callable[[mx.array], mx.array],
) -> Step:
    """Return the step that reads token (1, 1) and drafts, without waiting for it."""
    tokens = token
    if drafts:
        tokens = mx.concatenate([token, mx.array([drafts], token.dtype)], axis=1)
    rows = tokens.shape[1]
    logits, sampled, samplers = model(tokens, cache, logits_to_keep=rows), [], []
    for row in range(rows):
        sampler = copy.copy(sampler)  # its state, for when later rows are rejected
        sampled.append(sampler(logits[:, row]))
        samplers.append(sampler)
    sampled = (mx.concatenate(sampled) if drafts else sampled[0])[None]
    mx.async_eval(sampled)
    return Step(drafts, sampled, samplers, logits[:, -1])


def agreed(step: Step, cache: list) -> list[int]:
    """Wait for a step; return the ids to keep, and take rejected drafts back.

    A draft is right where the sampler picked it too; what was picked after it holds.
    """
    (values,) = step.sampled.tolist()
    right = (draft == value for draft, value in zip(step.drafts, values))
    kept = values[: 1 + sum(itertools.takewhile(bool, right))]
    for layer in cache if len(kept) < len(values) else ():
        layer.trim(len(values) - len(kept))
    return kept


def passes(
    model: Callable,
    logits: mx.array,
    cache: list,
    sampler: Callable[[mx.array], mx.array],
    lookup: Lookup | None,
    limit: int,
) -> Iterator[list[int]]:
    """Yield what each pass of the model adds, one id or more; the first from logits.

    Drafts are read together with the token before them, and kept while the sampler, run
    on the model's own logits, picks the same: the text is what it would be without
    them. Ends when the cache would hold more than `limit` tokens.
    """
    step = Step([], sampler(logits)[None], [sampler], logits)
    mx.async_eval(step.sampled)
    for count in itertools.count(1):
        ahead, room = None, limit - cache[0].offset
        if not step.drafts and room > 0:
            # Whatever the one token is, it is kept: the step that reads it is launched
            # before it is known, so that Python works while the device does. The first
            # draft is a guess of it; those to check in its step come after that.
            drafts = lookup.drafts()[1:room] if lookup else []
            ahead = launch(model, step.sampled, drafts, cache, step.samplers[0])
        kept = agreed(step, cache)
        yield kept
        if lookup:
            lookup.extend(kept)
            lookup.accepted += len(kept) - 1
        last, room = len(kept) - 1, limit - cache[0].offset
        if step.drafts and room > 0:
            token, sampler = step.sampled[:, last : last + 1], step.samplers[last]
            drafts = lookup.drafts()[: room - 1]
            ahead = launch(model, token, drafts, cache, sampler)
        if ahead is None:
            return
        step = ahead
        if count % 256 == 0:
            require_numbers(step.logits)
            mx.clear_cache()  # buffers of past sizes would pile up


def decode(
    model: Callable,
    logits: mx.array,
    cache: list,
    sampler: Callable[[mx.array], mx.array],
    lookup: Lookup | None,
    max_tokens: int | None,
    stop_tokens: Iterable[int],
    cancelled: Callable[[], bool] | None,
) -> Iterator[int]:
    """Yield one id after another, the first sampled from logits (1, V).

    The arguments, and what it returns in the end, are those of generate.
    """
    end = cache[0].offset  # of what the cache is to hold
    last = end + (math.inf if max_tokens is None else max_tokens)
    limit = min(cache[0].capacity, last - 1)  # the last token is not read
    try:
        for kept in passes(model, logits, cache, sampler, lookup, limit):
            for value in kept:
                if value in stop_tokens:
                    return "stop"
                end += 1
                yield value
                if end == last:
                    return "length"
            if cancelled is not None and cancelled():
                return "cancelled"
        return "context"
    finally:
        for layer in cache:  # the step that was launched ahead is not wanted
            layer.trim(max(layer.offset - end, 0))


def generate(
    model: Callable,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = None,
    sampler: Callable[[mx.array], mx.array] | None = None,
    cache: list | None = None,
    lookup: Lookup | None = None,
    stop_tokens: Iterable[int] = (),
    prefill_step: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[int]:
    """Yield the ids that continue a prompt, each as soon as it is known.

    prompt: at least one id. max_tokens: None goes on until something else ends it.
    sampler: logits (1, V) -> (1,); None is greedy. cache: what precedes the prompt, is
    continued in place; None makes one. stop_tokens: ids that end the text, not yielded.
    prefill_step, progress, cancelled: see prefill. lookup: drafts tokens, from what it
    holds, the prompt, and the tokens themselves; None does not.
    Returns, as a generator does, why it ended: "stop", "length" (max_tokens),
    "context" (the cache is full) or "cancelled". However it ends, the cache then holds
    the prompt and what was yielded, except perhaps the last token: its offset tells.
    Raises ValueError if the prompt is empty or does not fit the cache, and if the model
    computes no numbers: asked of the first token, and of one in 256.
    """
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, got {max_tokens}")
    if prefill_step is not None and prefill_step < 1:
        raise ValueError(f"prefill_step must be at least 1, got {prefill_step}")
    if cache is None:
        longest = model.args.max_position_embeddings
        longest = longest if max_tokens is None else len(prompt) + max_tokens
        cache = model.make_cache(max(longest, 1))
    room = cache[0].capacity - cache[0].offset
    if not 0 < len(prompt) <= room:
        wanted = f"1 to {room} tokens, what the context has left"
        raise ValueError(f"the prompt must have {wanted}, got {len(prompt)}")
    steps = {"step": prefill_step or default_prefill_step(), "progress": progress}
    logits = prefill(model, prompt, cache, **steps, cancelled=cancelled)
    if logits is None:
        return "cancelled"
    if max_tokens == 0:
        return "length"
    require_numbers(logits)
    sampler = sampler or functools.partial(mx.argmax, axis=-1)
    if lookup is not None:
        lookup.extend(prompt)
    ends = max_tokens, frozenset(stop_tokens), cancelled
    return (yield from decode(model, logits, cache, sampler, lookup, *ends))


# -----------------------------------------------------------------------------
# 11. Kernels
# Decoding a 4-bit model on CUDA, where MLX's matrix-vector product uses a fifth of the
# memory's bandwidth. This one uses up to half, and takes along the norm before it, and
# the addition or SwiGLU after it: a layer is four products and attention. Never on
# Metal or the CPU.
# uses: 1, 3-6
# -----------------------------------------------------------------------------

# A block of threads multiplies x by eight rows: neighbours, or four of gate and the
# same four of up. A row is chunks of 32 weights, 16 bytes; a thread takes every 128th,
# of all eight rows, so that eight loads are under way at once, and x is read once for
# them. A nibble q becomes a float by one instruction: the bytes 0x43 (the highest), q,
# 0, 0 are 128 + q. 128 times the sum of x is taken off again. Sums are float32.
MATVEC = r"""
constexpr int ROWS = 8, WARPS = 4;
struct alignas(16) Eight { __nv_bfloat16 at[8]; };  // loaded at once
const int rows = weight_shape[1], K = 8 * weight_shape[2], chunks = K / 32;
const int groups = scales_shape[2];
const bool swiglu = weight_shape[0] == 2, norm = gain_shape[0] > 1;
const int own = swiglu ? ROWS / 2 : ROWS, first = blockIdx.x * own;  // rows of y
float total[ROWS + 1] = {};  // the last one: of the squares of x
for (int c = threadIdx.x; c < chunks; c += 32 * WARPS) {
  uint4 packed[ROWS];
  __nv_bfloat16 scale[ROWS], bias[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int up = r >= own, row = up * rows + min(first + r - up * own, rows - 1);
    packed[r] = __ldcs((const uint4*)weight + row * chunks + c);
    scale[r] = scales[row * groups + c * groups / chunks];
    bias[r] = biases[row * groups + c * groups / chunks];
  }
  float dot[ROWS] = {}, sum = 0;
  #pragma unroll  // or packed would go to memory
  for (int j = 0; j < 4; ++j) {
    const Eight xs = ((const Eight*)x)[4 * c + j];
    const Eight gains = norm ? ((const Eight*)gain)[4 * c + j] : xs;
    float v[8];
    for (int i = 0; i < 8; ++i) {
      v[i] = xs.at[i];
      if (norm) total[ROWS] += v[i] * v[i], v[i] *= float(gains.at[i]);
      sum += v[i];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < 8; ++i) {
        const unsigned q = (&packed[r].x)[j] >> 4 * (i % 2) & 0x0F0F0F0F;
        const unsigned bits = __byte_perm(q, 0x43000000, 0x7044 + 0x100 * (i / 2));
        dot[r] += v[i] * __uint_as_float(bits);
      }
  }
  for (int r = 0; r < ROWS; ++r)
    total[r] += float(scale[r]) * (dot[r] - 128 * sum) + float(bias[r]) * sum;
}
__shared__ float sums[WARPS][ROWS + 1];
for (int r = 0; r <= ROWS; ++r) {
  for (int n = 16; n > 0; n /= 2) total[r] += __shfl_xor_sync(0xFFFFFFFF, total[r], n);
  sums[threadIdx.x / 32][r] = total[r];
}
__syncthreads();
auto whole = [&](int r) { return sums[0][r] + sums[1][r] + sums[2][r] + sums[3][r]; };
const int r = threadIdx.x;
if (r < own && first + r < rows) {
  const float factor = norm ? rsqrtf(whole(ROWS) / K + float(gain[K])) : 1;  // eps
  float v = factor * whole(r);
  if (swiglu) v *= factor * whole(own + r) / (1 + expf(-v));
  y[first + r] = v + (residual_shape[1] > 1 ? float(residual[first + r]) : 0);
}
"""


def fused_linear(
    *layers: QuantizedLinear, norm: nn.RMSNorm | None = None, parts: int = 1
) -> Callable[..., mx.array]:
    """Return a function of x, as many numbers as W has columns, and of a residual in
    the shape of the result, which may be left out; all in bfloat16.

    It gives W norm(x) + residual, (1, rows), where W has the rows of all layers; of two
    parts, silu(first norm(x)) * second norm(x) + residual, (1, rows / 2). subtle: call
    that function inside mx.compile; a graph built anew costs more than it saves.
    """
    names, packed = ["x", "weight", "scales", "biases", "gain", "residual"], []
    *starts, rows = itertools.accumulate(len(layer.weight) for layer in layers)
    for name in names[1:4]:
        whole = mx.concatenate([layer[name] for layer in layers])
        for layer, view in zip(layers, mx.split(whole, starts)):
            layer[name] = view  # nothing is held twice
        packed.append(whole.reshape(parts, -1, whole.shape[-1]))
    # subtle: eps goes with the gain. Arrays of up to 8 bytes MLX keeps in the host's
    # memory, and blocks would wait longer for one than they compute.
    gain = none = mx.array([[0]], mx.bfloat16)  # never read: its shape says so
    if norm is not None:
        gain = mx.concatenate([norm.weight, mx.array([norm.eps], mx.bfloat16)])
    mx.eval(packed, gain, layers)  # a lazy view could be used in this thread alone
    kernel = mx.fast.cuda_kernel("matvec", names, ["y"], MATVEC)
    return lambda x, residual=none: kernel(
        inputs=[x, *packed, gain, residual],
        grid=(-(-rows // 8) * 128, 1, 1),  # ROWS for 32 * WARPS threads
        threadgroup=(128, 1, 1),
        output_shapes=[(1, rows // parts)],
        output_dtypes=[mx.bfloat16],
    )[0]


class FusedBlock(TransformerBlock):
    """A block with the modules of another, which decodes through the kernel."""

    made = itertools.count()

    def __init__(self, block: TransformerBlock):
        nn.Module.__init__(self)  # TransformerBlock's would make modules
        dict.update(self, block)
        attention, mlp = block.self_attn, block.mlp
        norm = block.post_attention_layernorm
        H, Hkv = attention.n_heads, attention.n_kv_heads
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        qkv = fused_linear(*projections, norm=block.input_layernorm)
        gate_up = fused_linear(mlp.gate_proj, mlp.up_proj, norm=norm, parts=2)
        o, down = fused_linear(attention.o_proj), fused_linear(mlp.down_proj)

        def before(_: int, x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            heads = attention.split(qkv(x), H + 2 * Hkv)
            turned, values = mx.split(heads, [H + Hkv], axis=1)
            return *mx.split(attention.rope(turned, offset), [H], axis=1), values

        def after(_: int, x: mx.array, attended: mx.array) -> mx.array:
            x = o(attended, x)
            return down(gate_up(x), x)

        # subtle: MLX finds what it has compiled by a function's address, and of several
        # threads not all forget it with the function. A number is never used again.
        number = next(self.made)
        self.before = functools.partial(mx.compile(before), number)
        self.after = functools.partial(mx.compile(after), number)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        if cache is None or x.shape[:-1] != (1,):
            return super().__call__(x, cache)
        # An array, since mx.compile would trace the piece anew for each number.
        queries, keys, values = self.before(x, mx.array(cache.offset))
        keys, values = cache.update_and_fetch(keys, values)
        return self.after(x, self.self_attn.attend(queries, keys, values))


def fuse(model: Llama) -> None:
    """Have a model in bfloat16 decode its 4-bit blocks through the kernel; CUDA only.

    To be called when the weights are in place: later changes reach prefill alone. What
    reads more than one token at a time, or without a cache, is computed as before, and
    so are blocks with modules of other kinds, which may do something else.
    """
    on_cuda = mx.cuda.is_available() and mx.default_device() == mx.gpu
    dtypes = {array.dtype for _, array in tree_flatten(model.parameters())}
    if not on_cuda or dtypes - {mx.bfloat16, mx.uint32, mx.uint8}:
        return
    kinds = {TransformerBlock, Attention, MLP, nn.RMSNorm, QuantizedLinear}
    for n, block in enumerate(blocks := model.model.layers):
        modules = block.modules()
        layers = [m for m in modules if isinstance(m, QuantizedLinear)]
        settings = {(m.bits, m.mode, "bias" in m, m.group_size) for m in layers}
        four_bit = [setting[:3] for setting in settings] == [(4, "affine", False)]
        if four_bit and {*map(type, modules)} == kinds:
            blocks[n] = FusedBlock(block)


# -----------------------------------------------------------------------------
# 12. Tensor parallel
# One model on several machines. Every rank, a process of the group, holds a share of
# each layer, cut as in Megatron-LM [9]; two sums over all ranks a layer make it whole.
# MLX's own mx.distributed carries them: nothing here opens a connection.
# uses: 1-8, 11
# -----------------------------------------------------------------------------

Group = mx.distributed.Group


class SummedLinear(nn.Module):
    """A linear layer cut by columns: x W^T is the sum of what the ranks compute."""

    def __init__(self, layer: nn.Module, group: Group):
        super().__init__()
        self.group, self.layer = group, layer
        if "bias" in layer:  # it belongs to the sum, not to each part
            self.bias = layer.pop("bias")

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.distributed.all_sum(self.layer(x), group=self.group)
        return x + self.bias if "bias" in self else x


def finish_rank(model: Llama, group: Group | None) -> None:
    """Put the sums into a rank's model: one after attention, one after the MLP.

    To be called when the weights are in place. A rank alone has nothing to sum; its
    layers are fused instead, which would leave no room for a sum.
    """
    if group is None or group.size() == 1:
        fuse(model)
        return
    for block in model.model.layers:
        block.self_attn.o_proj = SummedLinear(block.self_attn.o_proj, group)
        block.mlp.down_proj = SummedLinear(block.mlp.down_proj, group)


def rank_args(args: ModelArgs, n: int) -> ModelArgs:
    """Return the shape of what each of n ranks runs: its heads, its part of F.

    Raises ValueError if n does not divide them.
    """
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {name: getattr(args, name) for name in names}
    if any(size % n for size in sizes.values()):
        parts = "{} heads, {} key/value heads and an MLP of {}".format(*sizes.values())
        raise ValueError(f"{n} ranks cannot share {parts} evenly")
    return replace(args, **{name: size // n for name, size in sizes.items()})


def rank_share(
    model: Llama, tensors: Mapping[str, TensorInfo], group: Group | None
) -> tuple[Llama, dict[str, TensorInfo]]:
    """Return what this rank runs of a model, without weights, and where these lie.

    q, k, v, gate and up are cut by rows, which are outputs; o and down, which take
    those in, by columns; the rest is whole. A packed matrix is cut between groups.
    Raises ValueError if the ranks cannot share it. group: None is a rank alone.
    """
    if group is None:
        return model, tensors
    model, share = build_model(rank_args(model.args, group.size()), tensors), {}
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    for name, info in tensors.items():
        shape = shapes.get(name, info.shape)
        if shape != info.shape:  # then one axis is n times as long in the file
            nbytes, stride = info.nbytes // group.size(), None
            step = nbytes
            if shape[0] == info.shape[0]:  # some columns: a part of each row
                stride, step = info.nbytes // shape[0], nbytes // shape[0]
            at = info.start + group.rank() * step
            info = replace(info, shape=shape, start=at, nbytes=nbytes, stride=stride)
        share[name] = info
    return model, share


def load_rank(folder: str | Path, group: Group | None, **options) -> Llama:
    """Return a rank's share of a folder's model, which is all that it reads.

    It takes tokens, and gives logits, as the whole does; all ranks must call it with
    the same tokens. Its cache is that of its own heads. options: see load_model.
    """
    model, tensors = rank_share(*examine(Path(folder)), group)
    read_weights(model, tensors, **options)
    finish_rank(model, group)
    return model


def broadcast(group: Group, message: list) -> list:
    """Return on every rank the list, for JSON, that rank 0 gives."""
    data = json.dumps(message).encode() if message and group.rank() == 0 else b""
    length = mx.distributed.all_sum(mx.array([len(data)]), group=group).item()
    if length == 0:  # an empty list, as mostly: one sum is enough
        return []
    data = mx.array(list(data or bytes(length)), mx.uint8)
    return json.loads(bytes(mx.distributed.all_sum(data, group=group).tolist()))


def cancelled_by_any(
    group: Group, stop: Callable[[], bool], tokens: Sequence[int]
) -> Callable[[], bool]:
    """Return a `cancelled` for generate: whether a rank wants to stop, alike on all.

    tokens: those sampled so far. Each call gives the answer to the call before: its own
    is a sum that the device computes after the step that was launched ahead.
    It raises RuntimeError if the ranks have sampled different tokens.
    """
    asked = []  # the sums over all ranks on their way, and the token of this one

    def cancelled() -> bool:
        last = tokens[-1] if tokens else 0
        answer = mx.distributed.all_sum(mx.array([int(stop()), last]), group=group)
        mx.async_eval(answer)
        asked.append((answer, last))
        if len(asked) == 1:
            return False
        answer, last = asked.pop(0)
        wanted, total = answer.tolist()
        if total != last * group.size():
            raise RuntimeError(f"not all ranks have sampled the token {last}")
        return wanted > 0

    return cancelled


def lost(number: int) -> bool:
    """Return whether a file descriptor is no connection, or one that the other side has
    ended. Takes nothing from it."""
    try:
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as connection:
            return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # nothing to take at the moment


def connections() -> set[int]:
    """Return the file descriptors of this process's connections."""
    return {number for number in map(int, os.listdir("/dev/fd")) if not lost(number)}


def watch(ring: Iterable[int], rank: int) -> None:
    """End this process when a connection of MLX's ring has ended.

    The ring raises an error only where it is waiting for the other rank just then. A
    step that was launched ahead would wait for ever, and this process with it.
    """
    while not any(map(lost, ring)):
        time.sleep(0.5)
    time.sleep(2)  # to end by itself, as it does when all is done
    if callable(signal.getsignal(signal.SIGTERM)):
        # It may be waiting for a line to be typed, on a terminal that it must restore.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(1)
    text = f"rank {rank}: the connection to another rank was lost"
    print(f"llama.py: error: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def join_ranks() -> Group | None:
    """Return the group of ranks that mlx.launch, or mpirun, has started this process
    as one of, when all are there; None for a process of its own.

    Call it in the main thread. From then on Ctrl-C is rank 0's to take, and other
    signals end the process at once, but for rank 0 at a terminal.
    """
    if os.environ.keys().isdisjoint({"MLX_RANK", "OMPI_COMM_WORLD_RANK"}):
        return None
    # No handler of Python's is called while MLX waits: now for the others, and in the
    # end perhaps for one that has died.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    before, group = connections(), mx.distributed.init(strict=True)
    if "MLX_HOSTFILE" in os.environ:  # a ring; other backends see to theirs
        ring = connections() - before
        threading.Thread(target=watch, args=(ring, group.rank()), daemon=True).start()
    if group.rank() > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        for number, handler in zip(numbers, handlers):
            if number == signal.SIGINT or os.isatty(0):
                signal.signal(number, handler)
    return group


# -----------------------------------------------------------------------------
# 13. Streaming
# An actor: one thread owns everything of MLX, whose arrays and streams belong to the
# thread that made them, and the outside exchanges ids and strings with it through
# queues. So an interface never blocks, and any thread may ask.
# uses: 1-12
# -----------------------------------------------------------------------------


@dataclass
class Stats:
    """What a reply took. Speeds in tokens/s, memory in bytes."""

    prompt_tokens: int = 0  # of the whole conversation
    reused_tokens: int = 0  # of these, already in the cache
    generation_tokens: int = 0
    accepted_tokens: int = 0  # of these, drafts of prompt lookup that were right
    time_to_first_token_s: float = 0.0  # from the request on
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    context_used: int = 0  # tokens in the cache
    context: int = 0  # tokens it can hold
    peak_memory: int = 0
    finish_reason: str = ""  # stop, length, context, cancelled or error
    ranks: int = 1  # processes that share the model


class Progress(NamedTuple):
    """How far the worker is: bytes of weights, or tokens of a prompt."""

    done: int
    total: int


@dataclass
class Piece:
    """Text, and the ids that it is made of."""

    text: str = ""
    ids: list[int] = field(default_factory=list)


@dataclass
class Request:
    """What the worker is to do; options are generate's, sampling is make_sampler's."""

    ids: list[int]
    options: dict
    sampling: dict
    lookup: int  # tokens to draft, 0 for none
    drop_space: bool  # see Tokenizer.stream
    # What comes of it: Progress and Pieces, in the end Stats or an error.
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.perf_counter)

    def told(self) -> list:
        """Return what the other ranks are told, which make their own of it."""
        return [self.ids, self.options, self.sampling, self.lookup, self.drop_space]

    def finish(self, outcome: "Stats | Exception") -> None:
        """Send the last event, twice: a Ctrl-C can strike whoever waits for it between
        taking it and using it, and to wait for another would be for ever."""
        self.events.put(outcome)
        self.events.put(outcome)


class Reply(Iterator[str]):
    """The pieces of a reply, as an iterator of str; Engine makes it.

    taken: the Piece of all that was taken so far. stats: a Stats once the iterator has
    ended. An error in the worker is raised here. A reply that is dropped is cancelled.
    """

    def __init__(self, request: Request, progress: Callable[[int, int], None] | None):
        self.taken, self.stats = Piece(), None
        self._request, self._progress = request, progress
        weakref.finalize(self, request.stopped.set)

    @property
    def text(self) -> str:
        return self.taken.text

    def cancel(self) -> None:
        """Stop the reply. Iterating on yields no more text, and ends when it has."""
        self._request.stopped.set()

    def __next__(self) -> str:
        while self.stats is None:
            event = self._request.events.get()
            if isinstance(event, Exception):
                self.stats = Stats(finish_reason="error")
                raise event
            if isinstance(event, Stats):
                self.stats = event
            elif isinstance(event, Progress):
                if self._progress is not None:
                    self._progress(*event)
            elif not self._request.stopped.is_set():
                # Only what was taken counts: the worker may be ahead, and the next
                # turn must go on from what the reader of this one has seen.
                self.taken.text += event.text
                self.taken.ids += event.ids
                if event.text:
                    return event.text
        raise StopIteration


def checksum(array: mx.array) -> int:
    """Return the CRC-32 of an array's bytes."""
    return zlib.crc32(memoryview(array.view(mx.uint8)))


def fingerprint(folder: Path) -> str:
    """Return what tells a model from another: a hash of its settings, the list of its
    tensors, and the first bytes of each."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for info in list_tensors(folder).values():
        digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
        with open(info.file, "rb") as stream:
            stream.seek(info.start)
            digest.update(stream.read(min(info.nbytes, 1024)))
    return digest.hexdigest()


def are_ids(value: object) -> bool:
    return type(value) is list and all(type(i) is int and 0 <= i < 2**31 for i in value)


def rebuilt(kind: type, values: dict) -> object:
    """Return a Piece or Stats from what JSON kept of one. Raises TypeError if it is of
    another one, or a value is of another type than the default."""
    made, usual = kind(**values), kind()
    for entry in fields(kind):
        value, wanted = getattr(made, entry.name), type(getattr(usual, entry.name))
        if type(value) is not wanted or (wanted is list and not are_ids(value)):
            found = f"wanted {wanted.__name__}, got {value!r:.80}"
            raise TypeError(f"{entry.name}: {found}")
    return made


def read_session(file: Path) -> dict:
    """Return what a session file holds beside the cache. Raises ValueError if none."""
    found = "not a session of llama.py"
    try:
        metadata = split_header(file)[1]["__metadata__"]
        session = json.loads(metadata["session"])
        ids, notes, sums = session["ids"], session["notes"], session["checksums"]
        if zlib.crc32(metadata["session"].encode()) != int(metadata["crc32"]):
            found = "the conversation is damaged"
        elif type(notes) is type(sums) is dict and are_ids(ids):
            return session
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError):
        pass
    raise ValueError(f"{file}: {found}")


TICK = 0.05  # seconds; how often ranks with nothing to do meet


class Worker(threading.Thread):
    """The thread that loads a model and serves requests, one after another."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        context: int | None,
        group: Group | None,
        **options,
    ):
        super().__init__(name="llama worker", daemon=True)
        self.folder, self.tokenizer, self.context = folder, tokenizer, context
        self.group, self.options, self.failure = group, options, None
        self.events = queue.SimpleQueue()  # of the load: Progress; ModelArgs or error
        self.requests = queue.SimpleQueue()  # Request or function; None to end
        self.closing = threading.Event()

    def run(self) -> None:
        try:
            self.load(**self.options)
            with wired_memory(self.nbytes):
                while (request := self.next_request()) is not None:
                    if not isinstance(request, Request):
                        request()
                        continue
                    try:
                        self.serve(request)
                    except Exception as error:  # its asker's; the next may do better
                        self.forget()
                        request.finish(error)
                        if self.group and not isinstance(error, ValueError):
                            raise  # a ValueError all have; after others, ranks differ
                    request = None  # what it holds is not needed until the next
        except Exception as error:
            self.failure = error
            self.events.put(error)
        finally:
            # What a thread leaves running when it ends can abort the process.
            self.model = self.cache = None
            mx.clear_streams()

    def next_request(self) -> "Request | Callable | None":
        """Return what is to be done next: on every rank what rank 0 is asked."""
        while self.group:
            request, told = None, []
            if self.group.rank() > 0:
                time.sleep(TICK)
            else:
                with contextlib.suppress(queue.Empty):
                    request = self.requests.get(timeout=TICK)
                    told.append(request and request.told())
            # Also when there is nothing to do: ranks that wait for one another in MLX
            # take a core each, and that one has gone is found only where they meet.
            for asked in broadcast(self.group, told):
                if asked and self.group.rank() > 0:
                    request = Request(*asked)
                return request
        return self.requests.get()

    def load(self, dtype: mx.Dtype | None, prefill_step: int | None) -> None:
        model, tensors = examine(self.folder)
        args, longest = model.args, model.args.max_position_embeddings
        if self.context is None:
            self.context = min(longest, DEFAULT_CONTEXT)
        if not 1 <= self.context <= longest:
            wanted = f"[1, {longest}], what the model was made for"
            raise ValueError(f"the context must be in {wanted}, got {self.context}")
        model, tensors = rank_share(model, tensors, self.group)
        item_size = (dtype or default_dtype() or mx.bfloat16).size
        cache = self.context * kv_bytes_per_token(model.args, item_size)
        weights = memory_of(tensors.values(), item_size)
        self.warning, self.nbytes = require_memory(weights, cache), weights + cache
        read_weights(model, tensors, dtype=dtype, progress=self.report)
        finish_rank(model, self.group)
        self.model, self.prefill_step = model, prefill_step
        self.forget()
        self.events.put(args)

    def report(self, done: int, total: int) -> None:
        self.events.put(Progress(done, total))
        if self.closing.is_set():
            raise RuntimeError("the engine was closed while loading")

    def forget(self) -> None:
        self.cache, self.cached = self.model.make_cache(self.context), []

    def reuse(self, ids: list[int]) -> int:
        """Trim the cache to the ids that a prompt begins with; return their number."""
        # One id at least must be left to be read, for its logits.
        same = (a == b for a, b in zip(self.cached, ids[:-1]))
        reused = sum(itertools.takewhile(bool, same))
        for layer in self.cache:
            layer.trim(layer.offset - reused)
        return reused

    def unwanted(self, request: Request) -> bool:
        return request.stopped.is_set() or self.closing.is_set()

    def tokens_of(
        self, request: Request, reused: int, lookup: Lookup | None, given: list[int]
    ) -> Iterator[int]:
        """Return what generates a reply, which is the same on all ranks; `given`: where
        the ids that it yields are to be put."""
        cancelled = functools.partial(self.unwanted, request)
        if self.group:
            cancelled = cancelled_by_any(self.group, cancelled, given)
        return generate(
            self.model,
            request.ids[reused:],
            cache=self.cache,
            lookup=lookup,
            prefill_step=self.prefill_step,
            progress=lambda *step: request.events.put(Progress(*step)),
            cancelled=cancelled,
            sampler=make_sampler(**request.sampling, prompt=request.ids),
            **request.options,
        )

    def serve(self, request: Request) -> None:
        """Answer a request: Pieces as they come, then Stats."""
        started, ids = time.perf_counter(), request.ids
        mx.reset_peak_memory()
        reused, tokens = self.reuse(ids), []
        stream = self.tokenizer.stream(drop_space=request.drop_space)
        lookup = Lookup(request.lookup, ids[:reused]) if request.lookup else None
        generation = self.tokens_of(request, reused, lookup, tokens)
        times, piece = [started], Piece()
        try:
            while True:
                tokens.append(next(generation))
                times.append(time.perf_counter())
                piece.ids.append(tokens[-1])
                piece.text += stream.add(tokens[-1])
                if piece.text:
                    request.events.put(piece)
                    piece = Piece()
        except StopIteration as end:
            reason = end.value
        offset = self.cache[0].offset
        self.cached = (ids + tokens)[:offset]
        piece.text += stream.close()
        request.events.put(piece)
        first = times[1] if tokens else started
        elapsed = times[-1] - first
        stats = Stats(
            prompt_tokens=len(ids),
            reused_tokens=reused,
            generation_tokens=len(tokens),
            accepted_tokens=lookup.accepted if lookup else 0,
            time_to_first_token_s=first - request.submitted,
            prefill_tps=(len(ids) - reused) / (first - started) if tokens else 0.0,
            decode_tps=(len(tokens) - 1) / elapsed if elapsed else 0.0,
            context_used=offset,
            context=self.context,
            peak_memory=mx.get_peak_memory(),
            finish_reason=reason,
            ranks=self.group.size() if self.group else 1,
        )
        request.finish(stats)

    def save(self, file: Path, notes: dict, tokens: int | None) -> None:
        """Write the cache, what it holds and notes to a file, whole or not at all."""
        arrays, held = {}, len(self.cached[:tokens])
        for n, layer in enumerate(self.cache if held else []):
            arrays[f"{n}.keys"] = mx.contiguous(layer.keys[..., :held, :])
            arrays[f"{n}.values"] = mx.contiguous(layer.values[..., :held, :])
        session = {
            "fingerprint": fingerprint(self.folder),
            "checksums": {name: checksum(array) for name, array in arrays.items()},
            "ids": self.cached[:held],
            "notes": notes,
        }
        text = json.dumps(session)
        metadata = {"session": text, "crc32": str(zlib.crc32(text.encode()))}
        if not file.parent.is_dir():
            raise FileNotFoundError(f"{file.parent}: no such folder")
        # Under another name until it is on the disk: a crash leaves the last one.
        draft = file.with_name(f".{file.name}.{os.getpid()}.safetensors")
        try:
            mx.save_safetensors(str(draft), arrays, metadata)
            with open(draft, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(draft, file)
        except RuntimeError as error:  # MLX's, of a full disk, say
            raise OSError(f"{file} cannot be written: {error}") from None
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def restore(self, file: Path) -> dict:
        """Fill the cache from a file that `save` wrote; see Engine.restore."""
        infos = read_header(file)
        session = read_session(file)
        ids, held = session["ids"], len(session["ids"])
        if session.get("fingerprint") != fingerprint(self.folder):
            raise ValueError(f"{file}: a session with another model than {self.folder}")
        if held > self.context:
            found = f"{held} tokens, context {self.context}"
            raise ValueError(f"{file}: {found}; see --ctx")
        arrays = {}
        for info, array in map_tensors(infos):
            if checksum(array) != session["checksums"].get(info.name):
                raise ValueError(f"{file}: damaged at {info.name}")
            arrays[info.name] = array
        self.forget()
        args, dtype = self.model.args, self.model.model.norm.weight.dtype
        wanted = (1, args.num_key_value_heads, held, args.head_dim)
        for n, layer in enumerate(self.cache if held else []):
            keys, values = arrays.get(f"{n}.keys"), arrays.get(f"{n}.values")
            if keys is None or values is None or {keys.shape, values.shape} != {wanted}:
                raise ValueError(f"{file}: damaged: layer {n} is not {wanted}")
            layer.update_and_fetch(keys.astype(dtype), values.astype(dtype))
            mx.eval(layer.state)
        self.cached = ids
        return session["notes"]


def put_result(task: Callable, answer: queue.SimpleQueue) -> None:
    """Run a task; pass on what it returns, or raises."""
    try:
        answer.put(task())
    except Exception as error:
        answer.put(error)


def default_sampling(folder: Path) -> dict[str, float]:
    """Return make_sampler's options as generation_config.json has them.

    Where it is silent: temperature 0.6 and top_p 0.9, as Meta's Llama 3 has it.
    Raises ValueError naming the file if it has one out of range.
    """
    file = folder / "generation_config.json"
    config = read_json(file) if file.exists() else {}
    options = {name: config.get(name) for name in INTERVALS}
    # 0 is how that file spells a filter turned off.
    options = {k: v for k, v in options.items() if v or (v == 0 and k == "temperature")}
    if config.get("do_sample") is False:
        options["temperature"] = 0.0
    options = {"temperature": Sampler.temperature, "top_p": Sampler.top_p} | options
    try:
        check_sampling(**options)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return options


def shut_down(worker: Worker) -> None:
    """End a worker: cancel what it does and wait until it is gone."""
    if not worker.group or worker.group.rank() == 0:  # which tells the others
        worker.closing.set()
    worker.requests.put(None)
    if worker is threading.current_thread():  # where garbage may be collected
        return
    while worker.is_alive():
        with contextlib.suppress(KeyboardInterrupt):  # it ends with the step it is in
            worker.join()


class Engine(contextlib.AbstractContextManager):
    """A model and a worker thread that answers with it; a context manager.

    model: a folder or org/name. tokenizer: None is the folder's. context: tokens of
    cache, allocated once; None is the model's longest, at most 8192. dtype: see
    load_model. prefill_step: see prefill; None is default_prefill_step(). progress:
    called with the bytes loaded, and in all. group: ranks that share the model, from
    join_ranks; rank 0 is asked, the others answer with it until it closes its engine.
    Returns when the model is loaded; raises what Tokenizer.from_folder and load_model
    raise.

    Attributes: tokenizer, args (a ModelArgs), context, defaults (make_sampler's
    options where a request gives none), warning (about memory, or None).
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        context: int | None = None,
        dtype: mx.Dtype | None = None,
        prefill_step: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        group: Group | None = None,
    ):
        folder = find_folder(model)
        self.tokenizer = tokenizer or Tokenizer.from_folder(folder)
        self.defaults = default_sampling(folder)
        self._taken = collections.deque(maxlen=256)  # the Piece of each past reply
        self._lock = threading.Lock()
        options = {"dtype": dtype, "prefill_step": prefill_step}
        self._worker = Worker(folder, self.tokenizer, context, group, **options)
        # Also when the engine is dropped, and at exit: a thread that is still in MLX
        # when the interpreter goes makes the process abort.
        self._shut_down = weakref.finalize(self, shut_down, self._worker)
        self._worker.start()
        try:
            while isinstance(event := self._worker.events.get(), Progress):
                if progress is not None:
                    progress(*event)
            if isinstance(event, Exception):
                raise event
        except BaseException:
            self.close()
            raise
        self.args, self.context = event, self._worker.context
        self.warning = self._worker.warning

    def chat(self, messages: list[dict[str, str]], **options) -> Reply:
        """Return at once with the reply to a conversation, to be iterated over.

        messages: see Tokenizer.encode_chat. An assistant's message that is the text of
        an earlier Reply stands for the very ids, so the cache is reused up to there.
        options: those of `submit`.
        """
        replies = {piece.text: piece.ids for piece in list(self._taken) if piece.text}
        ids = self.tokenizer.encode_chat(messages, replies=replies)
        return self.submit(ids, **options)

    def complete(self, text: str, **options) -> Reply:
        """Return at once with what continues a text, with no chat format; as `chat`."""
        ids = self.tokenizer.bos_prefix + self.tokenizer.encode(text)
        return self.submit(ids, drop_space=False, **options)

    def submit(
        self,
        ids: list[int],
        *,
        drop_space: bool = True,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        lookup: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Reply:
        """Return at once with the reply to ids.

        max_tokens: None goes on to the end of the turn, or of the context. Sampling:
        see make_sampler; None is the folder's default. lookup: tokens drafted at a
        time, see Lookup; 0 is off, None is 15 on a GPU, off on a CPU. progress: called,
        by whoever iterates, with the tokens of the prompt read, and in all. drop_space:
        see Tokenizer.stream.
        Raises ValueError for options out of range or a prompt that does not fit,
        RuntimeError if the engine is closed.
        """
        self._require_room(ids)
        if lookup is None:  # reading 16 tokens takes a CPU 16 times as long as one
            lookup = 0 if mx.default_device() == mx.cpu else 15
        for name, value in (("max_tokens", max_tokens), ("lookup", lookup)):
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given |= {"min_p": min_p, "repetition_penalty": repetition_penalty}
        given = {name: value for name, value in given.items() if value is not None}
        sampling = self.defaults | given
        check_sampling(**sampling)
        sampling["seed"] = new_seed() if seed is None else seed
        options = {"max_tokens": max_tokens}
        options["stop_tokens"] = sorted(self.tokenizer.stop_tokens)
        request = Request(ids, options, sampling, lookup, drop_space)
        reply = Reply(request, progress)
        with self._lock:  # nothing may be asked after the worker's last request
            self._require_worker()
            self._taken.append(reply.taken)
            self._worker.requests.put(request)
        return reply

    def save(self, file: str | Path, notes: dict, *, tokens: int | None = None) -> None:
        """Write the conversation to a file: cache, ids, and notes, which JSON can hold.

        tokens: how many of the cache's, from its beginning; None is all of them.
        The file appears whole or not at all, whatever happens meanwhile.
        """
        task = functools.partial(self._worker.save, Path(file), notes, tokens)
        self._on_worker(task)

    def restore(self, file: str | Path) -> dict:
        """Fill the cache from a file that `save` wrote; return its notes.

        Raises OSError, or ValueError if it is no such file, is damaged, does not fit
        the context, or was written with another model.
        """
        return self._on_worker(functools.partial(self._worker.restore, Path(file)))

    def _require_room(self, ids: list[int]) -> None:
        if not 0 < len(ids) <= self.context:
            wanted = f"1 to {self.context} tokens, got {len(ids)}"
            advice = f"--ctx sets the limit, up to {self.args.max_position_embeddings}"
            raise ValueError(f"the prompt must have {wanted}; {advice}")
        size = self.args.vocab_size
        if unknown := [i for i in ids if not 0 <= i < size]:
            raise ValueError(f"the prompt has id {unknown[0]}, the model {size} ids")

    def _require_worker(self) -> None:
        worker = self._worker
        if not self._shut_down.alive or worker.failure:
            raise RuntimeError("the engine is closed")
        if worker.group and worker.group.rank() > 0:
            raise RuntimeError("only rank 0 can be asked; the others follow")

    def _on_worker(self, task: Callable) -> dict | None:
        """Have the worker do a task, after what it was asked before; return what the
        task returns, or raise what it raises."""
        answer = queue.SimpleQueue()
        if self._worker.group:
            raise ValueError("a session is kept by one rank, which has the whole cache")
        with self._lock:
            self._require_worker()
            self._worker.requests.put(functools.partial(put_result, task, answer))
        if isinstance(result := answer.get(), Exception):
            raise result
        return result

    def remember(self, piece: Piece) -> None:
        """Let `chat` use these ids for an assistant's message that is this text."""
        self._taken.append(piece)

    def close(self) -> None:
        """End the worker, cancelling what it does, and wait for it. Idempotent."""
        with self._lock:
            self._shut_down()

    def __exit__(self, *_exception) -> None:
        self.close()
        if self._worker.failure:  # which a rank other than 0 has no reply to tell
            raise self._worker.failure


# -----------------------------------------------------------------------------
# 14. Command line
# info, inspect and chat. The model's text goes to stdout, everything else to stderr,
# and escapes only to a terminal; what comes from a model or a file is made printable.
# uses: 1-13
# -----------------------------------------------------------------------------

FLOATS = ("float32", "float16", "bfloat16")  # of --dtype

# Characters that move the cursor, repaint lines or reorder text: the C0 and C1 controls
# but newline and tab, DEL, and the bidirectional overrides.
CONTROLS = [*range(9), *range(11, 32), *range(127, 160)]
CONTROLS += [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
UNPRINTABLE = {code: repr(chr(code))[1:-1] for code in CONTROLS}


def printable(text: str) -> str:
    """Return text with its control characters spelled out: ESC becomes \\x1b."""
    return text.translate(UNPRINTABLE)


def styled(stream: TextIO) -> bool:
    """Return whether escape sequences may be written to a stream."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    """Return whether colours are wanted on a stream: https://no-color.org."""
    return styled(stream) and not os.environ.get("NO_COLOR")


def note(text: str) -> None:
    """Print a line about what goes on, dim where colour is wanted."""
    text = printable(text)
    if coloured(sys.stderr):
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def complain(error: Exception, who: str = "") -> None:
    """Print an error as one line; one of the system's without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        about = "" if error.filename is None else f"{error.filename}: "
        text = about + error.strerror
    line = printable(" ".join(text.split()))
    print(f"llama.py: error: {who}{line}", file=sys.stderr, flush=True)


class ProgressLine:
    """A line on a terminal that says how far something is, if it takes a moment."""

    def __init__(self, label: str):
        self.label, self.started, self.shown = label, time.monotonic(), False

    def __call__(self, done: int, total: int) -> None:
        if styled(sys.stderr) and time.monotonic() - self.started > 0.5:
            line = f"\r{self.label} {100 * done // max(total, 1)} %\x1b[K"
            print(line, end="", file=sys.stderr, flush=True)
            self.shown = True

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = False


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Print rows of a name and a text, aligned; a name only where it changes."""
    before = None
    for name, text in rows:
        print(printable(f"{'' if name == before else name:11} {text}"))
        before = name


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def choose_folder(model: str | None) -> Path:
    """Return the folder of MODEL; without one, of the model beside this file."""
    if model is not None:
        return find_folder(model)
    folder = Path(__file__).resolve().parent / "stories"
    if not (folder / "config.json").exists():
        example = "llama.py chat mlx-community/Llama-3.2-1B-Instruct-4bit"
        wanted = f"give a folder or org/name, as in: {example}"
        raise FileNotFoundError(f"no MODEL: {wanted}")
    return folder


def weight_bytes(model: Llama, bits: int, item_size: int = 2) -> int:
    """Return the bytes of a model's weights, quantized to bits if these are under 16.

    As MLX's converter does it: groups of 64, each with a scale and a bias. item_size:
    bytes of what is not packed.
    """
    total = 0
    for _, array in tree_flatten(model.parameters()):
        packed = bits < 16 and array.ndim == 2 and array.shape[1] % 64 == 0
        groups = array.size // 64
        size = array.size * bits // 8 + 2 * groups * item_size
        total += size if packed else array.size * item_size
    return total


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of copying on this device."""
    on_cpu = mx.default_device() == mx.cpu
    array = mx.zeros(2**23 if on_cpu else 2**27)
    mx.eval(array)
    best, copies = math.inf, 1 if on_cpu else 8  # several, as a launch takes its time
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(copies):
            array = array + 1
        mx.eval(array)
        best = min(best, time.perf_counter() - started)
    return 2 * array.nbytes * copies / best


def reading_speed(bits: int) -> float:
    """Return the bytes of weights per second that products with a vector read here."""
    side, dtype = 8192, mx.bfloat16
    if mx.default_device() == mx.cpu:
        side, dtype = 768, mx.float32
    layer = nn.Linear(side, side, bias=False)
    layer.set_dtype(dtype)
    layer = layer if bits == 16 else layer.to_quantized(64, bits)
    mx.eval(layer.parameters())
    nbytes = sum(array.nbytes for _, array in tree_flatten(layer.parameters()))
    best = math.inf
    for _ in range(3):
        vectors = [mx.ones((1, side), dtype) for _ in range(4)]
        started = time.perf_counter()
        mx.eval([layer(vector) for vector in vectors])
        best = min(best, time.perf_counter() - started)
    return len(vectors) * nbytes / best


def verdict(
    weights: int, cache: int, longest: int, memory: int, speed: float
) -> tuple[int, str]:
    """Return the longest context that fits, and in words whether a model does.

    weights: bytes, all read for every token, at speed. cache: bytes a token.
    """
    context = max(0, min((memory - weights) // cache, longest))
    if context == 0:
        return 0, f"does not fit, {gigabytes(weights)} in memory"
    usual = weights + cache * min(longest, DEFAULT_CONTEXT)
    word = "fits" if usual <= 0.8 * memory else "tight"
    rate = f"up to {speed / weights:,.1f} tokens/s"
    return context, f"{word}, context {context:,}, {rate}"


PARTS = {  # where parameters are, by what their names contain
    ".mlp.": "MLP",
    ".self_attn.": "attention",
    "embed_tokens": "vocabulary",
    "lm_head": "vocabulary",
}


def describe(model: str | None) -> dict:
    """Return what `info` tells of a preset or a model."""
    args, stored, folder = PRESETS.get(model), None, None
    # In memory: the CPU computes in float32, so all that is not packed doubles.
    item_size = 4 if mx.default_device() == mx.cpu else 2
    if args is None:
        try:
            folder = choose_folder(model)
        except FileNotFoundError as error:
            presets = f"{model} is none of {', '.join(PRESETS)}"
            raise FileNotFoundError(f"{presets}; {error}") from None
        skeleton, tensors = examine(folder)
        args, stored = skeleton.args, sum(info.nbytes for info in tensors.values())
    dense, parts = Llama(args), collections.Counter()
    for name, array in tree_flatten(dense.parameters()):
        parts[next((PARTS[k] for k in PARTS if k in name), "norms")] += array.size
    cache, memory = kv_bytes_per_token(args, item_size), machine_memory()
    longest, verdicts = args.max_position_embeddings, {}
    for bits in (16, 8, 4):
        size = weight_bytes(dense, bits, item_size)
        verdicts[bits] = verdict(size, cache, longest, memory, reading_speed(bits))
    return {
        "model": model or "stories",
        "folder": folder and str(folder),
        "config": asdict(args),
        "parameters": parts.total(),
        "parameters_of": dict(parts.most_common()),
        "weight_bytes": {bits: weight_bytes(dense, bits) for bits in verdicts},
        "stored_bytes": stored,
        "kv_bytes_per_token": cache,
        "memory_bytes": memory,
        "device": mx.default_device().type.name,
        "longest_context": {bits: context for bits, (context, _) in verdicts.items()},
        "verdict": {bits: words for bits, (_, words) in verdicts.items()},
    }


def random_model(args: ModelArgs, bits: int | None) -> Llama:
    """Return a model of random weights, in 16 bits (on a CPU in float32) or quantized.

    The largest are made first: what that takes besides is less than what is still to
    come, so the peak is the model itself.
    """
    model, dtype = Llama(args), default_dtype() or mx.bfloat16
    layers = sorted(dense_layers(model), key=lambda entry: -entry[1].weight.size)
    block = mx.random.randint(0, 256, (65_536,), mx.uint8).view(mx.uint32)
    for path, layer in layers:
        rows, columns = layer.weight.shape
        if bits and columns % 64 == 0:
            layer = quantized_like(layer, 64, bits, "affine")
            scale, words = 2 / (2**bits * math.sqrt(columns)), layer.weight.size
            packed = mx.tile(block, -(-words // block.size))[:words]
            layer.weight = packed.reshape(rows, -1)
            layer.scales = mx.full(layer.scales.shape, scale, dtype)
            layer.biases = layer.scales * -(2.0 ** (bits - 1))
            model.update_modules(tree_unflatten([(path, layer)]))
        else:
            layer.set_dtype(dtype)
        mx.eval(layer.parameters())
    model.set_dtype(dtype)  # the norms
    mx.eval(model.parameters())
    return model


def measure(model: Llama, prompt_tokens: int, generation_tokens: int) -> dict:
    """Return how fast a model is here: medians of three runs, after one to warm up.

    Greedy, over a prompt of random ids. Speeds in tokens/s, gbps in 1e9 bytes of
    weights read a second, bandwidth_share of what copying reaches, peak_gb meanwhile.
    """
    sizes = {name: array.nbytes for name, array in tree_flatten(model.parameters())}
    embedding = sum(n for name, n in sizes.items() if "embed_tokens" in name)
    # Of an embedding that is not the head too, a token reads one row.
    read = sum(sizes.values()) - (embedding if "lm_head" in model else 0)
    ids = mx.random.randint(0, model.args.vocab_size, (prompt_tokens,)).tolist()
    progress, bandwidth, runs = ProgressLine("measuring"), copy_bandwidth(), []
    options, each = {"max_tokens": generation_tokens}, prompt_tokens + generation_tokens
    mx.reset_peak_memory()
    for before in range(0, 4 * each, each):
        options["progress"] = lambda n, _, before=before: progress(before + n, 4 * each)
        started, times = time.perf_counter(), []
        for _ in generate(model, ids, cache=model.make_cache(each), **options):
            times.append(time.perf_counter())
            options["progress"](prompt_tokens + len(times), each)
        first, last = times[0] - started, times[-1] - times[0]
        runs.append((first, (generation_tokens - 1) / last))
    progress.clear()
    first, decode_tps = (statistics.median(values) for values in zip(*runs[1:]))
    return {
        "prompt_tokens": prompt_tokens,
        "generation_tokens": generation_tokens,
        "prefill_tps": prompt_tokens / first,
        "decode_tps": decode_tps,
        "time_to_first_token_s": first,
        "gbps": read * decode_tps / 1e9,
        "bandwidth_share": read * decode_tps / bandwidth,
        "weights_gb": sum(sizes.values()) / 1e9,
        "active_gb": mx.get_active_memory() / 1e9,
        "peak_gb": mx.get_peak_memory() / 1e9,
    }


def measured(options: argparse.Namespace, found: dict) -> dict:
    """Return what `measure` says of a preset, with random weights, or a model."""
    args = ModelArgs(**found["config"])
    total = options.prompt_tokens + options.generation_tokens
    if total > args.max_position_embeddings:
        wanted = f"at most {args.max_position_embeddings}, what the model was made for"
        raise ValueError(f"prompt and generation have {total} tokens, wanted {wanted}")
    group, item_size = options.group, (default_dtype() or mx.bfloat16).size
    args = rank_args(args, group.size() if group else 1)
    cache = total * kv_bytes_per_token(args, item_size)
    if found["folder"] is None:
        size = weight_bytes(Llama(args), options.bits or 16, item_size)
        require_memory(size, cache)
        model = random_model(args, options.bits)
    else:
        model, tensors = rank_share(*examine(Path(found["folder"])), group)
        require_memory(memory_of(tensors.values(), item_size), cache)
        progress = ProgressLine("loading")
        read_weights(model, tensors, progress=progress)
        progress.clear()
    finish_rank(model, group)
    return measure(model, options.prompt_tokens, options.generation_tokens)


def measured_rows(name: str, device: str, found: dict) -> list[tuple[str, str]]:
    """Return what was measured as rows of a table, the last one to paste elsewhere."""
    first = "{generation_tokens} tokens, the first after {time_to_first_token_s:.2f} s"
    numbers = "{weights_gb:.2f} | {prefill_tps:,.1f} | {decode_tps:,.1f} | {gbps:,.1f}"
    share = f"{100 * found['bandwidth_share']:.0f} % of what copying reaches here"
    peak, end = (gigabytes(1e9 * found[key]) for key in ("peak_gb", "active_gb"))
    rows = [
        ("prefill", "{prefill_tps:,.1f} tokens/s, {prompt_tokens} tokens"),
        ("decode", "{decode_tps:,.1f} tokens/s, " + first),
        ("reads", "{gbps:,.1f} GB/s of weights, " + share),
        ("peak", f"{peak}, {end} at the end"),
        ("as a row", "| {name} | {device} | " + numbers + " | {peak_gb:.2f} |"),
    ]
    values = found | {"name": name, "device": device}
    return [(label, text.format(**values)) for label, text in rows]


def bars(sizes: dict[str, int]) -> Iterator[str]:
    """Yield names, their shares of the sum in percent, and those as bars."""
    for name, size in sizes.items():
        share = 100 * size / sum(sizes.values())
        if share >= 1:
            yield f"{name:10} {share:3.0f} % {round(share / 2) * '#'}"


def info_rows(found: dict) -> list[tuple[str, str]]:
    """Return what `describe` and `measured` have found, as rows of a table."""
    args, kv = ModelArgs(**found["config"]), found["kv_bytes_per_token"]
    usual = min(args.max_position_embeddings, DEFAULT_CONTEXT)
    scaling = (args.rope_scaling or {"rope_type": "no"})["rope_type"]
    head = "the embedding" if args.tie_word_embeddings else "a matrix of its own"
    heads = f"{args.num_attention_heads} heads on {args.num_key_value_heads}"
    rows = [
        ("model", found["model"]),
        *([("folder", found["folder"])] if found["folder"] else []),
        ("layers", f"{args.num_hidden_layers} of width {args.hidden_size:,}"),
        ("attention", f"{heads} key/value heads of {args.head_dim}"),
        ("MLP", f"SwiGLU of width {args.intermediate_size:,}"),
        ("vocabulary", f"{args.vocab_size:,} tokens; the head is {head}"),
        ("positions", f"{args.max_position_embeddings:,} tokens"),
        ("rotary", f"theta {args.rope_theta:,.0f}, {scaling} scaling"),
        ("parameters", f"{found['parameters']:,}"),
        *(("of these", text) for text in bars(found["parameters_of"])),
        ("cache", f"{kv:,} bytes a token, {gigabytes(kv * usual)} for {usual:,}"),
        ("memory here", f"{gigabytes(found['memory_bytes'])}, {found['device']}"),
    ]
    if found["stored_bytes"] is not None:
        rows.append(("stored", gigabytes(found["stored_bytes"])))
    for bits, nbytes in found["weight_bytes"].items():
        words = found["verdict"][bits]
        rows.append(("weights", f"{bits:2} bits {gigabytes(nbytes):>9}: {words}"))
    if "measured" in found:
        name = Path(found["model"]).name
        rows += measured_rows(name, found["device"], found["measured"])
        if (ranks := found["measured"]["ranks"]) > 1:
            rows.append(("ranks", f"{ranks}; bytes are those of one"))
    return rows


def cmd_info(options: argparse.Namespace) -> int:
    """Print what a preset or a model is, what it needs, and what fits here."""
    found = describe(options.model)
    if options.bits and (found["folder"] or not options.measure):
        options.usage("--bits is for --measure of one of " + ", ".join(PRESETS))
    if options.measure:
        mx.random.seed(0)  # all ranks read the same ids
        found["measured"] = measured(options, found)
        found["measured"]["ranks"] = options.group.size() if options.group else 1
    if options.group and options.group.rank() > 0:
        return 0  # rank 0 tells it
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print_table(info_rows(found))
    return 0


def not_finite(tensors: Iterable[TensorInfo]) -> Iterator[ValueError]:
    """Yield an error for each tensor that holds NaN or infinity; reads all data."""
    for info, array in map_tensors(tensors):
        if not mx.issubdtype(array.dtype, mx.floating):
            continue
        if bad := mx.sum(~mx.isfinite(array)).item():
            values = f"{bad} of {array.size} values of {info.name}"
            yield ValueError(f"{info.file}: {values} are NaN or infinite")


def layer_kinds(model: Llama) -> dict[str, int]:
    """Return how many layers there are of each name and quantization."""
    kinds = collections.Counter()
    for path, layer in model.named_modules():
        name = path.split(".")[-1]
        if isinstance(layer, QuantizedMatrix):
            how = f"{layer.mode}, {layer.bits} bits, group_size {layer.group_size}"
            kinds[f"{name}: {how}"] += 1
        elif isinstance(layer, (nn.Linear, nn.Embedding)):
            kinds[f"{name}: not quantized"] += 1
    return dict(kinds)


def inspection(folder: Path, check: bool) -> dict:
    """Return what `inspect` tells of a folder; check: look at every value too."""
    problems, tokenizer, sampling = [], None, {}
    model, tensors = examine(folder, problems)
    try:
        sampling = default_sampling(folder)
    except (OSError, ValueError) as error:
        problems.append(error)
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except (OSError, ValueError) as error:
        problems.append(error)
    if check:
        problems += not_finite(tensors.values())
    found = {
        "folder": str(folder),
        "files": {t.file.name: t.file.stat().st_size for t in tensors.values()},
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes}
            for t in tensors.values()
        ],
        "bytes": sum(t.nbytes for t in tensors.values()),
        "adoptable_bytes": sum(t.nbytes for t in tensors.values() if t.adoptable),
        "layers": layer_kinds(model) if model and tensors else {},
        "sampling": sampling,
        "problems": [*dict.fromkeys(map(str, problems))],
    }
    if tokenizer:
        ids = tokenizer.vocabulary.text.keys() | tokenizer.special_tokens.values()
        found |= {
            "tokenizer_size": len(ids),
            "special_tokens": tokenizer.special_tokens,
            "chat_format": tokenizer.template,
            "stop_tokens": sorted(tokenizer.stop_tokens),
        }
    return found


def cmd_inspect(options: argparse.Namespace) -> int:
    """Print what a model folder holds, and all that is wrong with it."""
    found = inspection(choose_folder(options.model), options.check)
    status = 1 if found["problems"] else 0
    if options.json:
        print(json.dumps(found, indent=2))
        return status
    rows = [("folder", found["folder"])]
    for name, size in found["files"].items():
        rows.append(("files", f"{gigabytes(size):>9}  {name}"))
    # The layers of a stack look alike: a row for all tensors that differ in its number.
    groups = collections.defaultdict(list)
    for t in found["tensors"]:
        name = re.sub(r"^(model\.)?(layers\.\d+\.)?", "", t["name"])
        kind = f"{name.removesuffix('.weight')} {t['dtype']} {list(t['shape'])}"
        groups[kind].append(t["bytes"])
    for kind, sizes in sorted(groups.items(), key=lambda group: -sum(group[1])):
        bar = round(8 * sum(sizes) / max(found["bytes"], 1)) * "#"
        text = f"{gigabytes(sum(sizes)):>9} {bar:8} {len(sizes):3} {kind}"
        rows.append(("tensors", text))
    share = 100 * found["adoptable_bytes"] // max(found["bytes"], 1)
    share = f"of which {share} % can be used in place on Metal"
    rows.append(("in all", f"{gigabytes(found['bytes']):>9}  {share}"))
    rows += [("layers", f"{n} {kind}") for kind, n in found["layers"].items()]
    if "tokenizer_size" in found:
        names = {i: text for text, i in found["special_tokens"].items()}
        stops = ", ".join(f"{i} {names.get(i, '')}" for i in found["stop_tokens"])
        chat_format = found["chat_format"] or "none, a base model: chat with --raw"
        size = f"{found['tokenizer_size']:,} ids, {len(names)} of them added"
        rows += [("tokenizer", size), ("chat format", chat_format), ("stops at", stops)]
    sampling = ", ".join(f"{name} {n}" for name, n in found["sampling"].items())
    rows.append(("sampling", sampling))
    rows += [("problem", text) for text in found["problems"] or ["none found"]]
    print_table(rows)
    return status


CHOICES = "/undo and /reset make room"


def early_end(stats: Stats) -> str | None:
    """Return why a reply ended before the model ended it, None if it did not."""
    full = f"the context of {stats.context} tokens is full"
    return {
        "length": f"{stats.generation_tokens} tokens, as --max-tokens says",
        "context": f"{full}; --ctx sets its size",
        "cancelled": "Ctrl-C",
    }.get(stats.finish_reason)


def stats_lines(stats: Stats, seed: int) -> str:
    """Return statistics as lines that fit a terminal."""
    copied = f", {stats.accepted_tokens} looked up" if stats.accepted_tokens else ""
    return (
        f"prompt {stats.prompt_tokens} (reused {stats.reused_tokens}) at "
        f"{stats.prefill_tps:.0f} tokens/s, reply {stats.generation_tokens} at "
        f"{stats.decode_tps:.1f} tokens/s{copied}\nfirst after "
        f"{stats.time_to_first_token_s:.2f} s, context {stats.context_used} of "
        f"{stats.context}, peak {gigabytes(stats.peak_memory)}, seed {seed}"
        + (f", {stats.ranks} ranks" if stats.ranks > 1 else "")
    )


def answer(
    engine: Engine, messages: list[dict], options: argparse.Namespace, seed: int
) -> Reply:
    """Print the reply to a conversation as it comes, and return it.

    Ctrl-C stops it; what was printed by then is the reply.
    """
    progress = ProgressLine("reading the prompt")
    names = (*INTERVALS, "max_tokens", "lookup")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"seed": seed, "progress": progress}
    if options.raw:
        text = "".join(message["content"] for message in messages)
        reply = engine.complete(text, **settings)
    else:
        reply = engine.chat(messages, **settings)
    escape = printable if sys.stdout.isatty() else str
    try:
        for piece in reply:
            progress.clear()
            if not options.json:
                sys.stdout.write(escape(piece))
                sys.stdout.flush()
    except KeyboardInterrupt:
        reply.cancel()
        collections.deque(reply, 0)  # no more text: waits until the worker has stopped
    progress.clear()
    if options.json:
        found = {"text": reply.text, "finish_reason": reply.stats.finish_reason}
        found |= {"seed": seed, "stats": asdict(reply.stats)}
        print(json.dumps(found), flush=True)
    else:
        if not reply.text.endswith("\n"):
            print(flush=True)
        if reason := early_end(reply.stats):
            note(f"[stopped: {reason}]")
    if options.stats:
        note(stats_lines(reply.stats, seed))
    return reply


def whole_number(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number that is at least so large."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            wanted = f"a whole number of at least {least}"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return int(text)

    return parse


def state_folder() -> Path:
    """Return where this program keeps what it remembers of its user, made if absent."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = Path(base, "llama.py")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


class LineEditor:
    """Reads messages from the terminal, with editing, completion and history.

    Without readline, which is not everywhere, it reads lines and does no more.
    """

    def __init__(self, words: Sequence[str]):
        self.words, self.private = words, False
        try:
            import readline
        except ImportError:
            self.readline = None
            return
        self.readline = readline
        paste = "on" if styled(sys.stdout) else "off"  # it takes an escape
        readline.parse_and_bind(f"set enable-bracketed-paste {paste}")
        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims(" ")
        readline.set_completer(self.complete)
        readline.set_auto_history(False)
        with contextlib.suppress(OSError, TypeError, ValueError):  # none, or not ours
            for line in (state_folder() / "history").read_text("utf-8").splitlines():
                readline.add_history(json.loads(line))

    def complete(self, text: str, state: int) -> str | None:
        words = [word for word in self.words if word.startswith(text)]
        if not text.startswith("/"):
            words = [f"{text}\t"]  # a tab of the text: of a paste, say
        return [*words, None][state]

    def remember(self, text: str) -> None:
        """Keep a message, for this user only: the last 1000, a JSON string a line."""
        if self.readline is None or self.private:
            return
        self.readline.add_history(text)
        with contextlib.suppress(OSError, ValueError):  # not ours, or not writable
            file = state_folder() / "history"
            lines = file.read_text("utf-8").splitlines() if file.exists() else []
            lines = [*lines[-999:], json.dumps(text)]
            private = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(private, "w", encoding="utf-8") as stream:
                stream.write("\n".join(lines) + "\n")

    def line(self, prompt: str) -> str:
        """Return a line that is typed after a prompt."""
        if not sys.stdout.isatty():  # then that carries replies alone
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        backend = getattr(self.readline, "__doc__", None) or "libedit"
        if coloured(sys.stdout) and "libedit" not in backend:
            # Between 1 and 2: what takes no room, for GNU readline to reckon with.
            prompt = f"\x01\x1b[2m\x02{prompt}\x01\x1b[0m\x02"
        return input(prompt)

    def read(self) -> str | None:
        """Return a message, or None at Ctrl-D. Ctrl-C clears what was typed.

        Lines between two \"\"\" are one message; so is what is pasted, whatever it is.
        """
        lines = []
        while True:
            try:
                lines.append(self.line("... " if lines else ">>> "))
            except EOFError:
                note("")
                return None
            except KeyboardInterrupt:
                note("\n(Ctrl-D quits)")
                lines = []
                continue
            text = "\n".join(lines)
            block = text.strip().removeprefix('"""')
            if block == text.strip() or "\n" in lines[0]:
                break
            if block.endswith('"""'):
                text = block.removesuffix('"""').strip("\n")
                break
        if text.strip():
            self.remember(text)
        return text


def end_by_signal(number: int, _frame: object) -> None:
    """Handle a signal: unwind, so that the worker stops and the terminal is restored,
    and exit with the status that a shell gives it."""
    raise SystemExit(128 + number)


def counted(turns: list) -> str:
    return "1 turn" if len(turns) == 1 else f"{len(turns)} turns"


class Chat:
    """A conversation: its turns, and on a terminal its commands.

    The commands, which begin with a slash, are the methods named do_; the first line of
    a command's docstring is its help, and says in capitals what it takes.
    """

    def __init__(self, engine: Engine, options: argparse.Namespace, seed: int):
        self.engine, self.options, self.seed = engine, options, seed
        self.system = options.system
        self.turns = []  # (user, Piece, Stats, seed)
        self.attached = []  # texts of files that go into the next message
        names = [name[3:] for name in dir(self) if name.startswith("do_")]
        self.commands = {name: getattr(self, f"do_{name}") for name in names}
        if options.session and Path(options.session).exists():
            self.do_load(options.session)

    def run(self) -> None:
        """Read messages and commands, and answer them, until Ctrl-D."""
        self.editor = LineEditor([f"/{name}" for name in self.commands])
        source = Path(self.engine.tokenizer.source)
        if source.parent.name == "snapshots":  # of the Hugging Face cache
            note(f"{self.options.model}, revision {source.name}")
        keys = "Ctrl-C stops a reply, Ctrl-D quits"
        if self.options.group and not sys.stdin.isatty():
            # mlx.launch passes on what is typed, but not Ctrl-D, and ends at Ctrl-C.
            signal.signal(signal.SIGINT, end_by_signal)
            keys = "Ctrl-C quits"
        note(
            f"context {self.engine.context} tokens, seed {self.seed}, /help for more,"
            f'\n""" around several lines, {keys}'
        )
        while (text := self.editor.read()) is not None:
            try:
                self.take(text)
            except KeyboardInterrupt:  # before or after a reply; that handles its own
                note("")
            except (OSError, RuntimeError, ValueError) as error:
                complain(error)  # the conversation goes on, and can be saved elsewhere

    def take(self, text: str) -> None:
        """Do what a typed text says: a command, or a message to the model."""
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text[1:].strip().partition(" ")
            if name not in self.commands:
                near = difflib.get_close_matches(name, self.commands, 1)
                hint = f"did you mean /{near[0]}?" if near else "/help lists them"
                hint = "Ctrl-D quits" if name in ("bye", "exit", "quit") else hint
                raise ValueError(f"no command /{name}; {hint} (// sends a slash)")
            command, argument = self.commands[name], argument.strip()
            wanted = re.match("[A-Z]*", command.__doc__)[0]
            if argument and not wanted:
                raise ValueError(f"/{name} takes nothing, got {argument!r}")
            if wanted in ("FILE", "PATH") and not argument:
                raise ValueError(f"/{name} wants a {wanted}")
            command(argument)
            if name in ("load", "reset", "set", "system", "undo"):
                self.keep()
        elif text.strip():
            text = text[1:] if text.startswith("//") else text
            self.ask("\n\n".join([*self.attached, text]), self.seed)
            self.attached = []

    def ask(self, text: str, seed: int) -> Reply:
        """Answer a message, and add both to the conversation and its session file."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, piece, *_ in self.turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": piece.text})
        messages.append({"role": "user", "content": text})
        try:
            reply = answer(self.engine, messages, self.options, seed)
        except ValueError as error:  # it does not fit, say
            choices = f"; {CHOICES}" if self.turns else ""
            raise ValueError(f"{error}{choices}") from None
        self.seed = (seed + 1) % 2**64
        self.turns.append((text, reply.taken, reply.stats, seed))
        self.keep()
        used, size = reply.stats.context_used, reply.stats.context
        if used > 0.9 * size:
            note(f"the context is {100 * used // size} % full: {CHOICES}")
        return reply

    def last(self) -> tuple[str, Piece, Stats, int]:
        if not self.turns:
            raise ValueError("the conversation is empty")
        return self.turns[-1]

    def keep(self) -> None:
        """Bring the file of --session up to date."""
        if self.options.session:
            self.save_session(Path(self.options.session))

    def save_session(self, file: Path) -> None:
        notes = {
            "system": self.system,
            "turns": [
                [user, asdict(piece), asdict(stats), seed]
                for user, piece, stats, seed in self.turns
            ],
            "settings": {name: getattr(self.options, name) for name in INTERVALS},
            "seed": self.seed,
        }
        used = self.turns[-1][2].context_used if self.turns else 0
        self.engine.save(file, notes, tokens=used)  # and nothing that was forgotten

    def do_load(self, path: str) -> None:
        """FILE, goes on with the conversation of a session file"""
        file = Path(path).expanduser()
        try:
            notes = self.engine.restore(file)
        except ValueError as error:
            notes = read_session(file)["notes"]  # its text may still be of use
            if not sys.stdin.isatty():
                raise
            complain(error)
            try:
                wanted = input("Read its text anew? [y/N] ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                wanted = "no"
            if wanted not in ("y", "yes"):
                raise ValueError(f"{file} stays as it is") from None
        try:
            turns = [
                (str(user), rebuilt(Piece, piece), rebuilt(Stats, stats), int(seed))
                for user, piece, stats, seed in notes["turns"]
            ]
            settings = {name: notes["settings"][name] for name in INTERVALS}
            check_sampling(**settings)
            system, seed = notes["system"], notes["seed"]
            if type(seed) is not int or not 0 <= seed < 2**64:
                raise TypeError(f"seed: got {seed!r:.80}")
            system = system if system is None else str(system)
        except (KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"{file}: not a conversation: {error!r}") from None
        self.turns, self.seed = turns, seed if self.options.seed is None else self.seed
        self.system = system if self.options.system is None else self.system
        for name, value in settings.items():  # what the command line says goes first
            if getattr(self.options, name) is None:
                setattr(self.options, name, value)
        for _, piece, *_ in turns:
            self.engine.remember(piece)
        note(f"{file}: {counted(turns)}")

    def do_help(self, _: str) -> None:
        """lists these commands"""
        for name, command in self.commands.items():
            note(f"/{name:8} {command.__doc__.splitlines()[0]}")

    def do_system(self, text: str) -> None:
        """TEXT, instructions before the conversation; without TEXT, none"""
        if text and self.options.raw:
            raise ValueError("--raw has no chat format: no place for instructions")
        self.system = text
        note(f"from now on: {text!r}" if text else "no instructions")

    def do_reset(self, _: str) -> None:
        """forgets the conversation, but not the instructions"""
        note(f"{counted(self.turns)} forgotten")
        self.turns, self.attached = [], []

    def do_undo(self, _: str) -> None:
        """forgets a file that waits, else the last message and its reply"""
        if self.attached:
            forgotten = self.attached.pop()
        else:
            forgotten = self.last()[0]
            self.turns.pop()
        note(f"forgotten: {forgotten[:60]!r}")

    def do_retry(self, _: str) -> None:
        """answers the last message again, with the next seed"""
        turn = self.last()
        self.turns.pop()
        try:
            self.ask(turn[0], (turn[3] + 1) % 2**64)
        except (OSError, ValueError):
            self.turns.append(turn)
            raise

    def do_file(self, path: str) -> None:
        """PATH, puts a text file before the next message"""
        try:
            text = Path(path).expanduser().read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text in UTF-8") from None
        attached = [*self.attached, f"{Path(path).name}:\n\n{text}"]
        tokens = len(self.engine.tokenizer.encode("\n\n".join(attached)))
        if tokens >= self.engine.context:
            full = f"context {self.engine.context}; --ctx sets its size"
            raise ValueError(f"{path}: {tokens} tokens with what waits, {full}")
        self.attached = attached
        note(f"{len(text)} characters go before the next message")

    def do_save(self, path: str) -> None:
        """FILE, a new one: a session for /load, or as FILE.md Markdown to read"""
        file = Path(path).expanduser()
        if file.exists():
            raise FileExistsError(f"{file} exists; choose another name")
        if file.suffix != ".md":
            self.save_session(file)
        else:
            parts = [("system", self.system)] if self.system else []
            for user, piece, *_ in self.turns:
                parts += [("user", user), ("assistant", piece.text)]
            text = "\n\n".join(f"## {role}\n\n{content}" for role, content in parts)
            file.write_text(text + "\n", "utf-8")
        note(f"{counted(self.turns)} written to {file}")

    def do_stats(self, _: str) -> None:
        """shows speed and memory of the last reply"""
        note(stats_lines(*self.last()[2:]))

    def do_set(self, text: str) -> None:
        """NAME VALUE, of sampling, max_tokens or seed; without, shows them"""
        name, _, value = text.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        names = (*INTERVALS, "max_tokens")
        usual = {n: self.engine.defaults.get(n, "off") for n in names}
        if not text:
            for n in names:
                given = getattr(self.options, n)
                note(f"{n:18} {usual[n] if given is None else given}")
            note(f"{'seed':18} {self.seed}")
            return
        if name not in (*names, "seed"):
            raise ValueError(f"no option {name}; {', '.join(names)}, seed")
        if name in names and value in ("default", str(usual[name])):
            setattr(self.options, name, None)
            note(f"{name} is {usual[name]}")
            return
        whole = name in ("max_tokens", "seed")
        try:
            number = whole_number(0)(value) if whole else float(value)
        except (argparse.ArgumentTypeError, ValueError):
            wanted = "a whole number of at least 0" if whole else "a number"
            raise ValueError(f"{name} must be {wanted}, got {value!r}") from None
        if not whole:
            check_sampling(**{name: number})
        number = int(number) if name == "top_k" else number
        setattr(self if name == "seed" else self.options, name, number)
        note(f"{name} is {number}")

    def do_context(self, _: str) -> None:
        """shows how full the context is, and what each turn took"""
        size, before = self.engine.context, 0
        for n, (user, _, stats, _) in enumerate(self.turns, 1):
            note(f"turn {n}: {stats.context_used - before} tokens, {user[:40]!r}")
            before = stats.context_used
        for text in self.attached:
            note(f"waits: {text[:40]!r}")
        note(f"{before} of {size} tokens used, {size - before} left")

    def do_private(self, _: str) -> None:
        """keeps what is typed from now on out of the history file"""
        self.editor.private = True
        note("what is typed now stays out of the history")


def read_prompt(options: argparse.Namespace) -> str | None:
    """Return --prompt and what is piped in, as one message; None at a terminal.

    What mlx.launch pipes in is what is typed at its terminal, and does not end.
    """
    if sys.stdin.isatty() or options.group:
        return options.prompt
    try:
        piped = sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8: {error}") from None
    return "\n\n".join(text for text in (options.prompt, piped) if text)


def check_chat(options: argparse.Namespace) -> None:
    """Refuse options that chat cannot honour."""
    try:
        check_sampling(**{name: getattr(options, name) for name in INTERVALS})
    except ValueError as error:
        options.usage(str(error))
    if options.raw and (options.system or options.template):
        options.usage("--raw has no chat format: not with --system or --template")
    if options.session and options.group:
        raise ValueError("--session needs one rank, which has the whole cache")
    if options.session:
        home = Path(options.session).absolute().parent
        if not home.is_dir():  # now, rather than after the first reply
            raise FileNotFoundError(f"{home}: no such folder")


def cmd_chat(options: argparse.Namespace) -> int:
    """Answer one prompt, or talk until Ctrl-D."""
    check_chat(options)
    seed = new_seed() if options.seed is None else options.seed
    follower = options.group and options.group.rank() > 0
    folder = choose_folder(options.model)
    tokenizer = Tokenizer.from_folder(folder, template=options.template)
    if not options.raw:
        tokenizer.require_format()  # now, rather than after loading a large model
    prompt = None if follower else read_prompt(options)
    if prompt == "":
        raise ValueError("the prompt is empty")
    progress = ProgressLine("loading")
    with Engine(
        folder,
        tokenizer=tokenizer,
        context=options.ctx,
        dtype=options.dtype and getattr(mx, options.dtype),
        prefill_step=options.prefill_step,
        progress=None if follower else progress,
        group=options.group,
    ) as engine:
        progress.clear()
        if follower:
            return 0  # when rank 0 has closed its engine
        if engine.warning:
            note(engine.warning)
        chat = Chat(engine, options, seed)
        if prompt is None:
            chat.run()
            return 0
        reply = chat.ask(prompt, chat.seed)
        return 130 if reply.stats.finish_reason == "cancelled" else 0


def build_parser() -> argparse.ArgumentParser:
    """Return a parser whose help is a screen of 24 lines and 80 columns."""
    number, count, size = whole_number(0), whole_number(1), whole_number(2)
    where = "a folder, or org/name as downloaded; default: stories/"
    # Rows: name and metavar, help; type, default and choices where there are any. None,
    # the default of most, leaves it to the model's folder.
    info = (
        ("--measure", "run it here; a preset with random weights"),
        ("--prompt-tokens N", "of --measure, at least 2; default: 512", size, 512),
        ("--generation-tokens N", "of --measure, at least 2; default: 128", size, 128),
        ("--bits N", "of random weights, 4 or 8; default: 16", int, None, (4, 8)),
    )
    inspect = (("--check", "also look for NaN in all data"),)
    floats = f"{' '.join(FLOATS)}; default: file's, CPU float32"
    formats = f"{', '.join(CHAT_FORMATS)}; default: the model's"
    chat = (
        ("--prompt TEXT", "answer this, with all that is piped in, and end"),
        ("--system TEXT", "instructions before the conversation"),
        ("--session FILE", "go on with this conversation, and keep it there"),
        ("--raw", "continue the text, with no chat format"),
        ("--template NAME", formats, str, None, CHAT_FORMATS),
        ("--max-tokens N", "longest reply, tokens; default: no limit", number),
        ("--temperature T", "[0, inf), 0 is greedy; default: model's or 0.6", float),
        ("--top-k K", "[1, inf), the K likeliest; default: model's or all", int),
        ("--top-p P", "(0, 1], likeliest that hold P; default: model's or 0.9", float),
        ("--min-p P", "(0, 1], of the likeliest's; default: model's or none", float),
        ("--repetition-penalty R", "(0, inf), 1 is none; default: model's or 1", float),
        ("--seed N", "repeats a run exactly; default: a new one", number),
        ("--ctx N", "context, tokens; default: the model's, up to 8192", count),
        ("--lookup N", "tokens to draft, 0 is none; default: 15, on a CPU 0", number),
        ("--prefill-step N", "tokens; default: 512, on CUDA 2048, on a CPU 32", count),
        ("--dtype D", floats, str, None, FLOATS),
        ("--stats", "print speed and memory to stderr"),
    )
    layout = functools.partial(argparse.HelpFormatter, max_help_position=26, width=80)
    parser = argparse.ArgumentParser(
        prog="llama.py",
        description="Run Llama-family models with Apple's MLX.",
        epilog="example: python llama.py chat",
        formatter_class=layout,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, example, text, rows in (
        (cmd_info, "info 8b", "describe a model, and what fits here", info),
        (cmd_inspect, "inspect ./model", "list and check a model folder", inspect),
        (cmd_chat, 'chat ./model --prompt "Hi!"', "talk to a model", chat),
    ):
        name = example.split()[0]
        sub = commands.add_parser(
            name,
            help=text,
            usage=f"llama.py {name} [MODEL] [options]",
            epilog=f"example: python llama.py {example}",
            formatter_class=layout,
            add_help=False,
        )
        sub.set_defaults(run=run, usage=sub.error, group=None)
        option = sub.add_argument_group().add_argument  # one list, without headings
        option("-h", "--help", action="help", help=argparse.SUPPRESS)
        model = f"{', '.join(PRESETS)}, {where}" if rows is info else where
        option("model", nargs="?", metavar="MODEL", help=model)
        for names, text, *rest in (*rows, ("--json", "print JSON instead of text")):
            flag, *metavar = names.split()
            keys = ("metavar", "type", "default", "choices")
            more = dict(zip(keys, (*metavar, *rest))) or {"action": "store_true"}
            option(flag, help=text, **more)
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Do what a command line says; return its exit status, errors told in a line."""
    rank = ""
    try:
        options = build_parser().parse_args(argv)
        if options.run is cmd_chat or "measure" in options and options.measure:
            options.group = group = join_ranks()
            rank = f"rank {group.rank()} of {group.size()}: " if group else ""
        status = options.run(options)
        sys.stdout.flush()
        return status
    except SystemExit as end:  # argparse's, or that of a signal
        return end.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output has gone
        return 0
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        complain(error, rank)
        if rank:
            time.sleep(0.5)  # a launcher ends the others as soon as one has ended
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 1, 2, or 128 and a signal's."""
    for name in ("stdin", "stdout", "stderr"):  # closed by who started us?
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # models speak UTF-8 in any locale
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    status = run(argv)
    try:
        sys.stdout.flush()
    except OSError as error:
        # Nothing more can be written: say so, if it is not that the reader has gone,
        # and let the flush at exit go where it does no harm.
        if not isinstance(error, BrokenPipeError) and status == 0:
            complain(error)
            status = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    for signal_number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(signal_number) is signal.SIG_DFL:  # not under nohup
            signal.signal(signal_number, end_by_signal)
    sys.exit(main())
