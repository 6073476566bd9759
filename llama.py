"""Llama in one file: run Llama-family models with Apple's MLX.

    python llama.py chat MODEL          talk to a model; --help lists the options
    python llama.py info 8b             what a model is, and whether it fits here
    python llama.py inspect MODEL       what a model folder holds, and what is wrong

MODEL is a folder in Hugging Face's layout, or org/name in the local Hugging Face cache;
without one it is the small storyteller in stories/.
It runs on Metal, and on MLX's CPU and CUDA builds. Nothing is fetched, nothing that a
model folder holds is executed.

How a text goes through this file (the numbers are sections):

    folder --1, 2--> model, whose matrices may be packed (3)
    text --7--> ids --6--> embedding --> blocks of attention (4, 5) and MLP --> logits
    logits --8--> an id, which is shown as text (7) and goes back in (9)

How to read it. Part One, sections 1 to 10, is a complete runner: read it from its
beginning, at one sitting. If the file ended there, it would still run. The other parts
extend it, each for a purpose of its own; each begins with the imports that it adds.
Every section uses only sections above it.

Symbols (shapes are written like (B, H, L, Dh))
    B    batch size                      D    width of the residual stream, hidden_size
    L    tokens given in this call       F    width of the MLP, intermediate_size
    S    tokens attended to, offset + L  V    size of the vocabulary, vocab_size
    H    query heads                     Hkv  key/value heads, num_key_value_heads
    Dh   width of a head, head_dim       G    weights that share a scale, group_size
    offset: the number of tokens that are already in the cache

Part One: the model                      uses
    1  Configuration                     none
    2  Safetensors                       none
    3  Quantized layers                  none
    4  Rotary embedding                  none
    5  KV cache                          none
    6  Transformer                       1-5
    7  Tokenizer                         none
    8  Sampling                          none
    9  Generation                        5
    10 A reply                           1-9
Part Two: every Llama
    11 Families                          1, 4
    12 Chat templates                    none
    13 Other vocabularies                1, 4, 7, 11
    14 The tokenizer of a folder         1, 4, 7, 11-13
    15 Sampling options                  1, 4, 8, 11
    16 This machine                      1, 2
    17 Checked loading                   1-7, 11-14, 16
Part Three: faster
    18 Prompt lookup                     5, 9
    19 Faster products                   1-6
    20 Faster steps                      1-6, 19
    21 The CUDA kernel                   1-6, 19, 20
    22 Tensor parallel                   1-7, 11-14, 16, 17
    23 A model made ready                1-7, 11-14, 16, 17, 19-22
Part Four: streaming
    24 Sessions                          1-7, 11-14, 16, 17
    25 Pieces of a reply                 7, 12
    26 Engine                            1-9, 11-25
Part Five: command line
    27 On a terminal                     none
    28 Info                              1-9, 11-27
    29 Inspect                           1-9, 11-28
    30 Typing                            1-7, 11-14, 16, 17, 24, 27
    31 Chat                              1-9, 11-28, 30
    32 Main                              1-9, 11-31

How to lift a piece. Copy the section, the sections on its "uses:" line, and the imports
on their "needs:" lines; nothing else is needed. "registers:" names tables of sections
above to which a section adds entries. Importing this file starts nothing.
test_llama.py keeps all this true: it runs every section alone, with only those.

References
    [1] Llama 3, arXiv:2407.21783        [5] SwiGLU, arXiv:2002.05202
    [2] RoPE, arXiv:2104.09864           [6] top-p, arXiv:1904.09751
    [3] GQA, arXiv:2305.13245            [7] YaRN, arXiv:2309.00071
    [4] RMSNorm, arXiv:1910.07467        [8] SentencePiece, arXiv:1808.06226
    [9] Megatron-LM, arXiv:1909.08053

MIT License; see LICENSE. A copied section needs only this line and a link to its home.
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

import codecs
import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import mmap
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

# What other programs use; the rest is there to be read, and to be copied.
__all__ = ["Engine", "Reply", "Tokenizer", "generate", "load", "main", "make_sampler"]
__all__ += ["ChatTemplate", "KVCache", "Llama", "ModelArgs", "TensorInfo", "accelerate"]
__all__ += ["join_ranks", "read_header", "read_tensors"]

if __name__ == "__main__":
    # A Ctrl-C while the imports are under way ends the program without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for package in ("mlx", "safetensors", "tiktoken"):
        if importlib.util.find_spec(package) is None:
            sys.exit(
                f"llama.py: error: {sys.executable} has no package {package}; a line "
                "in README.md installs it, and `uv run llama.py` needs no such line"
            )

# On Linux, MLX's CPU build is much faster if OpenBLAS is loaded before it. So the
# imports below must stay below, and other code must import this file before MLX.
# Without OpenBLAS everything still works.
if sys.platform == "linux" and "mlx.core" not in sys.modules:
    for place in ("", *(f"{path}/cmeel.prefix/lib/" for path in sys.path)):
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"{place}libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
            break

import mlx.core as mx
import tiktoken
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

# -----------------------------------------------------------------------------
# Part One: the model. A complete runner: from a folder to a reply, on any device.
# Some functions take more than this part needs, because the other parts use them too.
#
# A language model does one thing. It reads a text that is cut into tokens, which are
# numbered pieces of text. Then it gives every token of its vocabulary a score, called
# its logit: the higher, the likelier this token comes next. Inside, every token is a
# vector of D numbers, the residual stream. A stack of blocks adds to it. In each block,
# attention lets a token take something from the tokens up to it: the token has a query,
# which is compared with the key of every token up to it, and the better the two fit,
# the more of that token's value is added. Then an MLP works on each token alone. Last,
# the output head turns the vector of the last token into logits. Section 10 puts all of
# it together, and follows four words through it: a look at it first shows where this
# goes.
#
# MLX, for readers who know PyTorch. It is lazy: an operation on arrays computes
# nothing, and only notes down what is to be computed. mx.eval(x) computes x and waits
# for it. mx.async_eval(x) starts the computation and does not wait. x.item() computes
# x, waits, and returns a Python number. An nn.Module is a dict of its arrays and
# submodules. So module["weight"] is its weight, and `"bias" in module` asks whether it
# has a bias. tree_flatten turns nested modules into a list of (path, array), with paths
# like "layers.0.mlp.up_proj.weight"; tree_unflatten does the reverse. Nothing records
# gradients unless asked to, and no array has to be moved to a device. Random numbers
# are drawn here with a key that is split and passed on, not by a global generator.
# -----------------------------------------------------------------------------

# -----------------------------------------------------------------------------
# 1. Configuration
# A Llama is a stack of blocks of one shape, and a dozen numbers say what it looks like.
# They are in config.json. The fields below have the names that Hugging Face gives them
# there, so that loading needs no table of translations. The values in brackets are
# those of Llama 3 8B. Multiplied out, they give its 8 billion parameters:
#
#     a block (section 6 says what q, k, v, o, gate, up and down are):
#               q and o for H heads, k and v for Hkv heads, of width Dh each:
#                   D * (2 H + 2 Hkv) * Dh = 4096 * 80 * 128         =  41.9 million
#               gate, up and down of the MLP:
#                   3 * D * F = 3 * 4096 * 14336                     = 176.2 million
#     32 blocks have 6.98 billion; the embedding and the output head, V * D each, have
#     1.05 billion together
#
# uses: none
# needs: dataclass, fields
# -----------------------------------------------------------------------------


@dataclass
class ModelArgs:
    """The shape of a Llama. Fields are config.json's keys."""

    hidden_size: int  # D, width of the residual stream [4096]
    intermediate_size: int  # F, width of the MLP's inner layer [14336]
    num_hidden_layers: int  # blocks in the stack [32]
    num_attention_heads: int  # H, query heads [32]
    vocab_size: int  # V, rows of the embedding; some may be unused [128256]
    num_key_value_heads: int | None = None  # Hkv; None means H, no sharing [8]
    head_dim: int | None = None  # Dh; None means D // H [128]
    rms_norm_eps: float = 1e-6  # keeps a norm from dividing by zero [1e-5]
    max_position_embeddings: int = 2048  # longest context in training, tokens [8192]
    rope_theta: float = 10000.0  # base of the rotary frequencies [500000]
    rope_scaling: dict | None = None  # how the frequencies are lowered [None]
    rope_traditional: bool = False  # which numbers form a pair; see RoPE [False]
    # Whether the output head is the embedding. build_model asks the tensors instead.
    tie_word_embeddings: bool = False  # [False]
    sliding_window: int | None = None  # tokens that a token sees; None: all [None]

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @property
    def longest_context(self) -> int:
        """The longest context, in tokens: as in training, and within the window."""
        longest, window = self.max_position_embeddings, self.sliding_window
        return longest if window is None else min(longest, window)

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        """Return the shape that a config.json describes. Other keys are ignored, and a
        value of null means the default."""
        values = {entry.name: config.get(entry.name) for entry in fields(cls)}
        return cls(**{name: v for name, v in values.items() if v is not None})


# -----------------------------------------------------------------------------
# 2. Safetensors
# A file of weights has three parts: 8 bytes with the length of the header; the header,
# which is JSON; and the tensors, one after another. A header:
#
#     {"model.norm.weight": {"dtype": "BF16", "shape": [4096],
#                            "data_offsets": [0, 8192]}, ...}
#
# The file is not read but mapped into memory: the operating system brings in a page of
# it when the page is first touched, and may drop the page, since it can read it from
# the file again. On a Mac, where CPU and GPU share one memory, MLX can adopt the mapped
# pages as an array. Then the GPU computes from the very pages of the file: nothing is
# copied, and a model that was used a moment ago is ready at once, because its pages are
# still in memory. (This holds for a tensor that starts at a multiple of its item size,
# and is not cast to another dtype.) A GPU with memory of its own needs one copy, and so
# does MLX's CPU build, which adopts no foreign memory.
#
# To adopt pages is not to read them. The model would then wait for the disk when it
# first runs, and the first prompt would seem slow. So every page is touched here.
# uses: none
# needs: Iterable, Iterator, Path, dataclass, json, mmap, mx
# -----------------------------------------------------------------------------

# What checkpoints and MLX's converter write, keyed by the format's names.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "I32": mx.int32,
    "I64": mx.int64,
}
# A memoryview has no bfloat16. So items of n bytes are first read as whole numbers of n
# bytes, and `view` then gives the array its true type. From n to a memoryview's letter
# for a whole number of n bytes:
MEMORYVIEW_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def adopt(
    mapping: memoryview, start: int, item_size: int, count: int
) -> mx.array | None:
    """Return `count` items from byte `start` on, in place, as whole numbers. Return
    None if MLX cannot use this memory in place. The array keeps the mapping alive.

    Metal adopts only whole pages. So the array begins at the page boundary before
    `start`, and ends at the page boundary behind the items. At the end of the file the
    last page may not be full, and then MLX may have to copy. Slices and views of the
    array copy nothing. The pages can only be read, and MLX, since version 0.32.4, never
    puts a result into the memory of an adopted array.
    """
    page_start, end = start - start % mmap.PAGESIZE, start + count * item_size
    page_end = min(end + (-end % mmap.PAGESIZE), len(mapping))
    # A file may end within an item, and a view of whole numbers must not.
    page_end -= (page_end - page_start) % item_size
    whole_numbers = mapping[page_start:page_end].cast(MEMORYVIEW_FORMATS[item_size])
    try:
        pages = mx.asarray(whole_numbers, copy=False)
    except ValueError:
        return None
    if count:
        # Ask for all of it, since a disk is fast when it knows what comes; then wait
        # for it by reading one byte of each page. The bytes themselves are not used.
        mapping.obj.madvise(mmap.MADV_WILLNEED, page_start, page_end - page_start)
        bytes(mapping[page_start : page_end : mmap.PAGESIZE])
    return pages[(start - page_start) // item_size :][:count]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from byte `start` of `file`."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def adoptable(self) -> bool:
        """Whether MLX can use it where it lies: only if it starts at a multiple of its
        item size. The format does not promise that, nor does MLX's writer see to it."""
        return self.start % DTYPES[self.dtype].size == 0

    def read(self, mapping: memoryview) -> mx.array:
        """Return the tensor as an array over the mapping of its file, or as a copy."""
        dtype = DTYPES[self.dtype]
        array = None
        if self.adoptable:
            array = adopt(mapping, self.start, dtype.size, self.nbytes // dtype.size)
        if array is None:  # not aligned, or not possible on this device
            raw = mapping[self.start : self.start + self.nbytes]
            array = mx.asarray(raw.cast(MEMORYVIEW_FORMATS[dtype.size]))
        return array.view(dtype).reshape(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, by name, in the order of the file."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        start, end = header[name]["data_offsets"]  # counted from the header's end
        shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
        position = 8 + length + start
        tensors[name] = TensorInfo(name, dtype, shape, file, position, end - start)
    return tensors


def map_file(file: Path) -> memoryview:
    """Return the bytes of a file, mapped into memory."""
    with open(file, "rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def read_tensors(
    tensors: Iterable[TensorInfo],
) -> Iterator[tuple[TensorInfo, mx.array]]:
    """Yield each tensor with its array; see TensorInfo.read. Maps each file once."""
    mappings = {}
    for info in tensors:
        if info.file not in mappings:
            mappings[info.file] = map_file(info.file)
        yield info, info.read(mappings[info.file])


# -----------------------------------------------------------------------------
# 3. Quantized layers
# A row of weights is cut into groups of G neighbours. A group is stored as small whole
# numbers q, and two numbers that they share: w = scale * q + bias. In 4 bits, q is one
# of 0 .. 15. A group of four, for example:
#
#     w      -0.30   -0.10    0.02    0.45     scale = (0.45 - -0.30) / 15 = 0.05
#     q          0       4       6      15     bias  = -0.30
#     w'     -0.30   -0.10    0.00    0.45
#
# In 4 bits eight q's share a uint32, the first in the lowest bits: these four are its
# lower half, 0xF640. 64 weights, with a scale and a bias of 16 bits each, take
# 64 * 4 + 2 * 16 = 288 bits. That is 4.5 bits a weight, where bfloat16 takes 16. To
# generate one token a model reads all its weights once, and this reading is most of the
# time that it takes. So weights in 3.6 times fewer bytes give a model that can be 3.6
# times faster, and that fits into a smaller machine.
#
# This format is called affine. mxfp4, mxfp8 and nvfp4 store q as tiny floating-point
# numbers and have no biases. The sizes of a layer's tensors tell its format; no setting
# is needed. (A bias of a group is not the bias of a linear layer, which is added to its
# result.)
# uses: none
# needs: mx, nn
# -----------------------------------------------------------------------------

# Formats without biases, by group size and bits.
FLOAT_MODES = {(32, 4): "mxfp4", (32, 8): "mxfp8", (16, 4): "nvfp4"}


class QuantizedMatrix(nn.Module):
    """A packed matrix (rows, columns). Both layers below are built on it. It holds
    zeros until loading replaces them.

    weight: (rows, columns * bits / 32) uint32. scales, and in affine mode biases:
    (rows, columns / G).
    """

    def __init__(self, rows: int, columns: int, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        groups = (rows, columns // group_size)
        self.weight = mx.zeros((rows, columns * bits // 32), mx.uint32)
        self.scales = mx.zeros(groups, mx.float32 if mode == "affine" else mx.uint8)
        if mode == "affine":
            self.biases = mx.zeros(groups)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x W^T for x (..., columns), unpacking W on the fly."""
        return mx.quantized_matmul(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


class QuantizedLinear(QuantizedMatrix):
    """nn.Linear over a packed matrix: (..., columns) -> (..., rows)."""

    def __call__(self, x: mx.array) -> mx.array:
        x = self.as_linear(x)
        return x + self["bias"] if "bias" in self else x


class QuantizedEmbedding(QuantizedMatrix):
    """nn.Embedding over a packed matrix: ids (...) -> (..., columns)."""

    def __call__(self, tokens: mx.array) -> mx.array:
        biases = self.biases[tokens] if "biases" in self else None
        packed = self.weight[tokens], self.scales[tokens], biases
        return mx.dequantize(*packed, self.group_size, self.bits, self.mode)


def quantized_like(
    layer: nn.Module, group_size: int, bits: int, mode: str
) -> QuantizedMatrix:
    """Return the quantized counterpart of a Linear or an Embedding, all zeros."""
    is_linear = isinstance(layer, nn.Linear)
    layer_class = QuantizedLinear if is_linear else QuantizedEmbedding
    quantized = layer_class(*layer.weight.shape, group_size, bits, mode)
    if "bias" in layer:
        quantized.bias = layer.bias
    return quantized


def quantization_of(
    path: str, weight_count: int, packed_bytes: int, scale_count: int, has_biases: bool
) -> tuple[int, int, str]:
    """Return group size, bits and mode of the packed layer `path`, as its sizes tell.

    Raises ValueError if no format has these sizes.
    """
    bits, rest = divmod(8 * packed_bytes, weight_count)
    if not scale_count or weight_count % scale_count or rest or not 1 <= bits <= 8:
        raise ValueError(
            f"{path}: {weight_count} weights cannot be packed in {packed_bytes} bytes "
            f"and {scale_count} scales"
        )
    group_size = weight_count // scale_count
    if has_biases:
        return group_size, bits, "affine"
    if (group_size, bits) not in FLOAT_MODES:
        raise ValueError(
            f"{path} has no biases, and no format without them has groups of "
            f"{group_size} in {bits} bits"
        )
    return group_size, bits, FLOAT_MODES[group_size, bits]


def dense_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, layer) of every Linear and Embedding of a model."""
    kinds = (nn.Linear, nn.Embedding)
    return [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]


# -----------------------------------------------------------------------------
# 4. Rotary embedding
# Attention compares a query with a key by their dot product, and a dot product does not
# know where in the text the two tokens stand. RoPE [2] rotates both first. It takes the
# Dh numbers of a head as pairs, i = 0 .. Dh / 2 - 1. Each pair is a point in the plane,
# and is turned by the angle position * theta^(-2i / Dh). A rotation changes no length,
# and turning two vectors by the same angle does not change their product. So with R(m),
# the rotation for position m, positions enter the product only as a difference:
#
#     R(m) q . R(n) k  =  q . R(n - m) k
#
# Fast pairs distinguish neighbouring tokens, slow pairs distant ones. In Llama 3, with
# theta 500,000 and Dh 128, pair 0 turns by one radian a token: a full turn takes 2 pi,
# 6.3 tokens. Pair 63 needs 2.6 million tokens for a turn, so it hardly moves within a
# book. A model that was trained on short texts can read longer ones if its slow pairs
# are slowed down further, so that they see no angle that they have not been trained on.
# This is called scaling.
# uses: none
# needs: math, mx
# -----------------------------------------------------------------------------


def llama3_scaling(
    frequencies: list[float], scaling: dict
) -> tuple[list[float], float]:
    """Return the frequencies with the slow pairs slowed down by `factor`, and 1: this
    scaling leaves the attention scores as they are. (YaRN does not.)

    Pairs that turn more than high_freq_factor times within the original context keep
    their pace, those that turn less than low_freq_factor times are slowed down, and
    between the two the pace is interpolated.  Source: [1], Meta's apply_scaling.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    scaled = []
    for frequency in frequencies:
        turns = context * frequency / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(frequency * (keep + (1 - keep) / factor))
    return scaled, 1.0


# From a rope_type to a function of frequencies and config.json's rope_scaling, which
# returns new frequencies, and the factor of the attention scores.
ROPE_SCALINGS = {"llama3": llama3_scaling}


def rope_frequencies(
    head_dim: int, theta: float, scaling: dict | None = None
) -> tuple[list[float], float]:
    """Return the radians per position of each of the Dh / 2 pairs, and the factor of
    the attention scores.  Source: [2] eq. 15."""
    frequencies = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    if scaling is None:
        return frequencies, 1.0
    if scaling["rope_type"] not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise ValueError(f"rope_type must be {known}, got {scaling['rope_type']!r:.80}")
    return ROPE_SCALINGS[scaling["rope_type"]](frequencies, scaling)


class RoPE:
    """Rotate queries or keys (B, heads, L, Dh) by the positions offset .. offset + L-1.

    A pair (x, y) that is turned by the angle a becomes
        (x cos a - y sin a, x sin a + y cos a)
    traditional: a pair is two neighbours, (0, 1), (2, 3), as in [2]; otherwise one of
    each half, (0, Dh/2), (1, Dh/2 + 1), which is how Hugging Face stores Llamas.
    Angles are float32, as in transformers: at the last of 131,072 positions, those of
    Llama 3 are off by up to 0.005, which is 0.3 degrees.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        scaling: dict | None = None,
        traditional: bool = False,
    ):
        frequencies, self.score_factor = rope_frequencies(head_dim, theta, scaling)
        self.head_dim, self.traditional = head_dim, traditional
        # Despite its name, the argument `freqs` of mx.fast.rope takes 1 / frequency.
        # The array is built from Python numbers, so it is not lazy. A lazy array can
        # only be computed by the thread that made it, and one thread may load a model
        # that another one runs.
        self.tokens_per_radian = mx.array([1 / frequency for frequency in frequencies])

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            self.head_dim,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self.tokens_per_radian,
        )


# -----------------------------------------------------------------------------
# 5. KV cache
# No token sees a later one. So its key and value in a layer depend on it and on the
# tokens before it, and stay valid whatever follows: they are computed once and kept,
# the keys already rotated. A new token computes its own query, key and value, and looks
# at all that are kept. Without the cache, token 1,000 would mean computing the 999
# before it again.
#
# The price is memory. A token keeps one key and one value for each layer and key/value
# head: 2 * layers * Hkv * Dh numbers. In Llama 3 8B, with 2 bytes for a number, that is
# 2 * 32 * 8 * 128 * 2 bytes = 131 KB, so 8,192 tokens take 1.07 GB. The buffers are
# allocated once, for the longest context that is wanted. After that, storing a token
# costs the same at every position.
#
# Why `buffer[a:b] = x` copies nothing but x. This line makes `buffer` a new array,
# which MLX notes down as "the old one, with x in it". If nothing else refers to the old
# one when the new one is computed, the new one gets its memory, and MLX writes only x.
# Otherwise MLX copies the whole buffer. So a call of the model must be started, with
# eval or async_eval, before the model is called again. And a caller may use the views
# that the cache returns, but must not keep them, nor any result that still has to be
# computed from them.
# uses: none
# needs: math, mx
# -----------------------------------------------------------------------------


class KVCache:
    """The past of one attention layer: at most `capacity` tokens.

    The names of the methods, and what trim returns, are those of the caches in mlx-lm,
    Apple's package of language models, so that this one can be used there too. The two
    buffers, (B, Hkv, capacity, Dh), appear with the first tokens, whose shape and dtype
    they take. Their length is rounded up to a multiple of 256, which lets CUDA prepare
    its attention once for many lengths of the past.
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
        B, Hkv, L, Dh = keys.shape
        end = self.offset + L
        if end > self.capacity:
            raise ValueError(
                f"the context is full: {end} tokens, capacity {self.capacity}"
            )
        if self.keys is None:
            shape = (B, Hkv, math.ceil(self.capacity / 256) * 256, Dh)
            self.keys = mx.zeros(shape, keys.dtype)
            self.values = mx.zeros(shape, values.dtype)
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def trim(self, n: int) -> int:
        """Forget the last n tokens; return n. Their slots are overwritten later."""
        if not 0 <= n <= self.offset:
            raise ValueError(f"n must be in [0, {self.offset}], got {n}")
        self.offset -= n
        return n

    def is_trimmable(self) -> bool:
        return True

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        """The buffers, None before the first tokens, and how many tokens they hold."""
        return self.keys, self.values, self.offset


def trim_to(cache: list[KVCache], tokens: int) -> None:
    """Forget all but the first tokens in every layer. A layer that holds fewer keeps
    all of them."""
    for layer_cache in cache:
        layer_cache.trim(max(layer_cache.offset - tokens, 0))


# -----------------------------------------------------------------------------
# 6. Transformer
# The residual stream x holds D numbers for each token. It runs through the blocks, and
# each block reads it twice and adds to it twice: attention brings in what other tokens
# know, and the MLP works on each token by itself. What is read goes through a norm
# first: RMSNorm [4] divides a vector by its root mean square, and multiplies each
# number by a weight of its own.
#
# Attention. A token asks with a query, q = Wq x. Every token up to it, itself included,
# answers with a key, k = Wk x, and a value, v = Wv x. The better a key fits the query,
# the more of its value is taken:
#
#     weights = softmax(q . k / sqrt(Dh))        over all tokens up to this one
#     result  = sum of weights * v
#
# This happens H times side by side, in heads of width Dh, each with a matrix of its
# own, though the matrices of all heads are stored as one. The H results are joined, and
# one more matrix, Wo, brings them back to width D. In grouped-query attention [3]
# several query heads share one key/value head. That costs little quality, and the cache
# becomes H / Hkv times smaller: 4 times in Llama 3 8B, 131 KB a token instead of 524
# KB.
#
# The MLP is SwiGLU [5]: `up` computes F numbers, `gate` how much of each is let pass,
# and `down` brings the result back to width D.
# Attributes have the names of the tensors in a checkpoint, so that loading is by name.
# uses: 1-5
# needs: Iterator, Mapping, math, mx, nn, replace, tree_flatten, tree_unflatten
# -----------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention over the past and this call's tokens, x (B, L, D)."""

    def __init__(self, args: ModelArgs, rope: RoPE):
        super().__init__()
        D, H, Hkv = args.hidden_size, args.num_attention_heads, args.num_key_value_heads
        Dh = args.head_dim
        self.n_heads, self.n_kv_heads, self.rope = H, Hkv, rope
        self.scale = Dh**-0.5 * rope.score_factor
        self.q_proj = nn.Linear(D, H * Dh, bias=False)
        self.k_proj = nn.Linear(D, Hkv * Dh, bias=False)
        self.v_proj = nn.Linear(D, Hkv * Dh, bias=False)
        self.o_proj = nn.Linear(H * Dh, D, bias=False)

    def project(
        self, x: mx.array, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries (B, H, L, Dh), keys and values (B, Hkv, L, Dh) of x (B, L, D),
        whose first token is at position `offset`."""
        B, L, _ = x.shape
        # (B, L, heads * Dh) -> (B, heads, L, Dh)
        queries = self.q_proj(x).reshape(B, L, self.n_heads, -1).swapaxes(1, 2)
        keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1).swapaxes(1, 2)
        values = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).swapaxes(1, 2)
        if "q_norm" in self:  # as in Qwen3; build_model adds both norms
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return self.rope(queries, offset), self.rope(keys, offset), values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Return (B, H, L, Dh): for each query a weighted mean of the values it may
        see.

        One call computes softmax(Q K^T / sqrt(Dh)) V. Written out, it would be
            keys, values = each head H / Hkv times in a row: head 0, head 0, head 1, ...
            scores = scale * queries @ keys.swapaxes(2, 3)
            scores = where(position of key > position of query, -inf, scores)
            return softmax(scores, axis=-1) @ values
        The fused call never holds the L x S scores. A token must not see a later one.
        "causal" lines the last query up with the last key: query i of L sees the S - L
        tokens before this call, and tokens 0 .. i of this call. A single query sees
        all.
        """
        mask = "causal" if queries.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.scale, mask=mask
        )

    def merge(self, attended: mx.array) -> mx.array:
        """Return what the heads (B, H, L, Dh) add to the residual stream, (B, L, D)."""
        B, _, L, _ = attended.shape
        return self.o_proj(attended.swapaxes(1, 2).reshape(B, L, -1))

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        queries, keys, values = self.project(x, cache.offset)
        keys, values = cache.update_and_fetch(keys, values)  # now (B, Hkv, S, Dh)
        return self.merge(self.attend(queries, keys, values))


class MLP(nn.Module):
    """SwiGLU [5]: down(silu(gate(x)) * up(x)), where silu(g) = g * sigmoid(g)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, F = args.hidden_size, args.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        return self.down_proj(gate * mx.sigmoid(gate) * self.up_proj(x))


class TransformerBlock(nn.Module):
    """Attention and MLP, each added to the residual stream x (B, L, D)."""

    def __init__(self, args: ModelArgs, rope: RoPE):
        super().__init__()
        D, eps = args.hidden_size, args.rms_norm_eps
        self.self_attn = Attention(args, rope)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(D, eps)
        # The norm before the MLP. Checkpoints call it by what precedes it.
        self.post_attention_layernorm = nn.RMSNorm(D, eps)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """The stack without its head: tokens (B, L) -> (B, L, D)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        # One table of frequencies serves all layers.
        rope = RoPE(
            args.head_dim, args.rope_theta, args.rope_scaling, args.rope_traditional
        )
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [
            TransformerBlock(args, rope) for _ in range(args.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list[KVCache]) -> mx.array:
        # A packed embedding may not have the dtype of the other layers, since its
        # scales may be bytes. The norms always have the dtype of the computation.
        x = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, layer_cache)
        return self.norm(x)


class Llama(nn.Module):
    """A Llama: token ids in, logits out.

    New weights are random and lazy: they use no memory until they are evaluated.
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
        """Return, for each position, the logits of the token that comes next.

        tokens: (B, L) int32. cache: one KVCache per layer, continued in place; None
        starts from nothing. logits_to_keep: return logits for the last n positions
        only; None returns all. What follows a prompt needs those of its last position
        only, and the output head is a large matrix, so this saves much.
        Returns (B, L or n, V) in the dtype of the weights.
        """
        if cache is None:
            cache = self.make_cache(tokens.shape[1])
        x = self.model(tokens, cache)
        if logits_to_keep is not None:
            x = x[:, max(x.shape[1] - logits_to_keep, 0) :]
        if "lm_head" in self:
            return self.lm_head(x)
        return self.model.embed_tokens.as_linear(x)

    def make_cache(self, capacity: int) -> list[KVCache]:
        """Return an empty cache for `capacity` tokens, one per layer.

        Some models let a token see only the last `sliding_window` tokens. This file
        always lets it see all of them, which is the same as long as the context is no
        longer than the window. So ValueError is raised for a longer one.
        """
        window = self.args.sliding_window
        if window is not None and capacity > window:
            raise ValueError(
                f"the context must be at most {window} tokens, the model's sliding "
                f"window, got {capacity}"
            )
        return [KVCache(capacity) for _ in self.model.layers]


def build_model(args: ModelArgs, tensors: Mapping[str, TensorInfo]) -> Llama:
    """Return a model for these tensors, without its weights.

    A checkpoint says what it is made of. The embedding serves as the head if the file
    has no head, a layer is quantized if the file has scales for it and has a bias if
    the file has one, and queries and keys are normalised if there are norms for them.
    So Llama, Mistral, Qwen2 and Qwen3 are one transformer, and need no flags.
    """
    model = Llama(replace(args, tie_word_embeddings="lm_head.weight" not in tensors))
    for number, block in enumerate(model.model.layers):
        if f"model.layers.{number}.self_attn.q_norm.weight" in tensors:
            block.self_attn.q_norm = nn.RMSNorm(args.head_dim, args.rms_norm_eps)
            block.self_attn.k_norm = nn.RMSNorm(args.head_dim, args.rms_norm_eps)
    for path, layer in dense_layers(model):
        if f"{path}.bias" in tensors and isinstance(layer, nn.Linear):
            layer.bias = mx.zeros(layer.weight.shape[0])
        if f"{path}.scales" in tensors:
            settings = quantization_of(
                path,
                weight_count=layer.weight.size,
                packed_bytes=tensors[f"{path}.weight"].nbytes,
                scale_count=math.prod(tensors[f"{path}.scales"].shape),
                has_biases=f"{path}.biases" in tensors,
            )
            packed = quantized_like(layer, *settings)
            # This puts it in the place of the layer.
            model.update_modules(tree_unflatten([(path, packed)]))
    return model


def read_weights(
    model: Llama, tensors: Mapping[str, TensorInfo], dtype: mx.Dtype | None = None
) -> Iterator[int]:
    """Give a model its weights, one after another; yield the bytes read so far.

    It is a generator: whoever iterates over it to the end loads the model. dtype: what
    to compute in; floating-point tensors are cast to it. None keeps what the file
    holds. Each weight is evaluated before the next is read. Otherwise all casts would
    stay pending, and in the end both copies of the model would be in memory. Raises
    ValueError if a weight is missing.
    """
    names = {name for name, _ in tree_flatten(model.parameters())}
    if missing := sorted(names - tensors.keys()):
        raise ValueError(
            f"{len(missing)} tensors are missing: {', '.join(missing[:4])}"
        )
    done = 0
    for info, array in read_tensors(t for t in tensors.values() if t.name in names):
        if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
        mx.eval(array)
        model.load_weights([(info.name, array)], strict=False)
        done += info.nbytes
        yield done


# -----------------------------------------------------------------------------
# 7. Tokenizer
# A model reads and writes ids. Each stands for a token, a piece of text that is
# frequent. Byte-pair encoding finds the tokens of a text. A regular expression first
# cuts the text into words, and each word begins as its bytes. Then neighbouring pieces
# are joined, again and again. Every piece that may be made has a rank, which says how
# early it was learned: the bytes have ranks 0 to 255, and what was learned first
# follows. Of all pairs of neighbours, the one that makes the piece of lowest rank is
# joined, until no pair makes a known piece. With he of rank 256, ll 257, llo 258 and
# hello 259:
#
#     h e l l o  ->  he l l o  ->  he ll o  ->  he llo  ->  hello
#
# Since every byte is a token, every text can be written. The package tiktoken does the
# joining; this section makes its ranks from a tokenizer.json, and turns ids back into
# text. A model writes one token at a time, and a character may be spread over several
# tokens. So the text is held back until a character is whole.
#
# A conversation is written down with control tokens, such as <|eot_id|>, which ends a
# turn. They are put into a prompt as ids, and never made from text: whatever a user
# types or pastes, "<|eot_id|>" becomes the ids of ordinary text. So no text can end a
# turn or begin one.
# uses: none
# needs: Iterable, Mapping, Path, codecs, dataclass, json, tiktoken
# -----------------------------------------------------------------------------

# Control tokens that end a turn or a text. Many models write several of them, and their
# config files often name only one.
STOP_NAMES = ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]


@dataclass(frozen=True)
class Vocabulary:
    """What tiktoken needs, and what its ranks mean."""

    ranks: dict[bytes, int]  # from a piece to its rank; lower ranks are merged first
    split: str  # regular expression that finds the words
    id_of_rank: list[int]
    bytes_of_id: dict[int, bytes]


def byte_letters() -> dict[str, int]:
    """Return the letters that a byte-level tokenizer.json writes bytes with.

    A printable byte is itself, and the others are U+0100 and up: a space is U+0120.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_level(model: dict, split: str) -> Vocabulary:
    """Return the vocabulary in a byte-level tokenizer.json.

    model: the value of its key "model". An id need not equal its rank, since control
    tokens may have the first ids. So ranks are counted anew: 256 bytes, and then what
    the merges make, in their order.
    """
    letters = byte_letters()
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    pieces = [*letters] + [left + right for left, right in merges]
    if model.get("ignore_merges"):  # then also words that no merge makes
        pieces += sorted(model["vocab"], key=model["vocab"].get)
    # A piece that comes twice keeps its first place.
    ids = {}
    for piece in pieces:
        ids[bytes(letters[letter] for letter in piece)] = model["vocab"][piece]
    ranks = {piece: rank for rank, piece in enumerate(ids)}
    bytes_of_id = {token: piece for piece, token in ids.items()}
    return Vocabulary(ranks, split, [*ids.values()], bytes_of_id)


class TextStream:
    """Turn ids into text as they come: whole characters only, each exactly once.

    A character that is spread over tokens appears with its last byte. Bytes that never
    become a character appear as U+FFFD. Control tokens, and ids of no token, give
    nothing.
    """

    def __init__(self, text: Mapping[int, bytes]):
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._text.get(int(token), b""))

    def is_whole(self) -> bool:
        """Return whether the last token ended with a whole character."""
        return not self._decoder.getstate()[0]

    def close(self) -> str:
        """Return what is left of an unfinished character."""
        return self._decoder.decode(b"", True)


class ByteLevelTokenizer:
    """Text to ids and back, and conversations to ids, as Llama 3 has it."""

    def __init__(self, vocabulary: Vocabulary, special_tokens: dict[str, int]):
        self.vocabulary, self.special_tokens = vocabulary, special_tokens
        names = [name for name in STOP_NAMES if name in special_tokens]
        self.stop_tokens = {special_tokens[name] for name in names}
        # Control tokens print nothing. tiktoken is not told of them, so it makes none
        # from any text.
        nothing = dict.fromkeys(special_tokens.values(), b"")
        self._text = vocabulary.bytes_of_id | nothing
        self._bpe = tiktoken.Encoding(
            "llama.py",
            pat_str=vocabulary.split,
            mergeable_ranks=vocabulary.ranks,
            special_tokens={},
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "ByteLevelTokenizer":
        """Return the tokenizer of a folder whose tokenizer.json is Llama 3's kind."""
        spec = json.loads((folder / "tokenizer.json").read_bytes())
        split = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        return cls(byte_level(spec["model"], split), special)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text: never a control token."""
        # tiktoken also has encode_ordinary. It is not used, since only `encode` raises
        # ValueError for a text that the regular expression cannot split, such as a
        # million spaces.
        ranks = self._bpe.encode(text, disallowed_special=())
        return [self.vocabulary.id_of_rank[rank] for rank in ranks]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return a conversation as Llama 3 was trained to read it, up to the reply.

        messages: [{"role": "system", "user" or "assistant", "content": text}, ...]. A
        message is written, without the white space around its content, as
            <|start_header_id|>role<|end_header_id|>, two line breaks, content<|eot_id|>
        and the header of the reply comes last.
        """
        control = self.special_tokens

        def header(role: str) -> list[int]:
            name = self.encode(role)
            return [control["<|start_header_id|>"], *name, control["<|end_header_id|>"]]

        ids = [control["<|begin_of_text|>"]]
        for message in messages:
            ids += header(message["role"])
            ids += self.encode("\n\n" + message["content"].strip())
            ids.append(control["<|eot_id|>"])
        return [*ids, *header("assistant"), *self.encode("\n\n")]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; control tokens, and unknown ids, give none."""
        stream = self.stream()
        return "".join(map(stream.add, ids)) + stream.close()

    def stream(self) -> TextStream:
        """Return a decoder for ids as they come."""
        return TextStream(self._text)


# -----------------------------------------------------------------------------
# 8. Sampling
# The model gives every token of the vocabulary a logit; softmax makes probabilities of
# them. Always taking the likeliest token is called greedy, and tends to repeat itself.
# So a token is drawn, but not from all: a vocabulary has 100,000 tokens that are wrong,
# and even if each of them is very unlikely, together they would be drawn quite often.
# Of four tokens with the probabilities
#
#     0.5   0.3   0.15   0.05
#
# top-k 2 keeps the first two. top-p 0.9 keeps the smallest set of likeliest tokens
# whose sum reaches 0.9: 0.5 and 0.3 are not enough, so three. min-p 0.2 keeps those
# that have at least 0.2 times the highest probability, 0.2 * 0.5 = 0.1: three again. A
# temperature divides the logits. One of 0.5 doubles them, which squares the
# probabilities: after normalising they are 0.68, 0.25, 0.06 and 0.01. So below 1 the
# likely becomes likelier.
#
# Each filter takes and returns the logarithms of probabilities, logprobs. They need not
# be normalised: adding one number to all of them changes nothing. A token that is ruled
# out gets -inf. The order is that of Hugging Face's `generate`: repetition
# penalty, temperature, top-k, top-p and min-p. The draw uses a key that is split for
# every token, so the same seed draws the same tokens.
# uses: none
# needs: Sequence, dataclass, field, math, mx, os
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
    index = mx.argpartition(-logprobs, k - 1, axis=-1)[:, k - 1 : k]
    threshold = mx.take_along_axis(logprobs, index, axis=-1)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def apply_top_p(logprobs: mx.array, p: float) -> mx.array:
    """Return logprobs (B, V) of the smallest set of likeliest tokens whose
    probabilities reach p together [6]; tokens as likely as the last one stay, too.

    A token stays if all likelier tokens together have a probability below p. Nothing is
    likelier than the first, so the first always stays.
    """
    descending = -mx.sort(-logprobs, axis=-1)
    probs = mx.softmax(descending, axis=-1)
    mass_before = mx.cumsum(probs, axis=-1) - probs
    # A p too small for float32 becomes 0; the first token stays even then.
    kept = (mass_before < p) | (mass_before == 0)
    # The smallest that is kept is the threshold.
    threshold = mx.where(kept, descending, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def apply_min_p(logprobs: mx.array, p: float) -> mx.array:
    """Return logprobs (B, V) of tokens with at least p times the highest probability.

    Source: arXiv:2407.01082.
    """
    threshold = logprobs.max(axis=-1, keepdims=True) + math.log(p)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def new_seed() -> int:
    """Return a random seed, short enough to be typed again."""
    return int.from_bytes(os.urandom(4), "little")


@dataclass(kw_only=True)
class Sampler:
    """A function from logits (B, V) to tokens (B,), lazy like any MLX code.

    Its state is a key, which is split for every token, and which tokens were seen. Both
    are made on first use, in the thread that samples.
    """

    temperature: float = 0.6  # 0 is greedy, the likeliest token
    # None turns these off, and so does what config files write for it.
    top_k: int | None = None  # 0 and -1 are off
    top_p: float | None = 0.9  # 0 and 1 are off
    min_p: float | None = None  # 0 is off
    repetition_penalty: float | None = None  # over 1 discourages; 0 and 1 are off
    seed: int | None = None  # the same seed draws the same tokens; None takes a new one
    prompt: Sequence[int] = ()  # seen before the tokens sampled, for the penalty
    key: mx.array | None = field(default=None, init=False)
    seen: mx.array | None = field(default=None, init=False)  # (B, V), bool

    def __post_init__(self):
        self.seed = new_seed() if self.seed is None else self.seed

    def __call__(self, logits: mx.array) -> mx.array:
        # 16-bit cumulative sums would misjudge the tail, so float32 from here on.
        logits = logits.astype(mx.float32)
        if self.repetition_penalty not in (None, 0, 1):
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
        # Subtract the maximum first: a shift changes no probability, avoids overflow.
        logprobs = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        if self.top_k not in (None, 0, -1):
            logprobs = apply_top_k(logprobs, int(self.top_k))
        if self.top_p not in (None, 0, 1):
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p not in (None, 0):
            logprobs = apply_min_p(logprobs, self.min_p)
        if self.key is None:
            self.key = mx.random.key(self.seed)
        self.key, draw_key = mx.random.split(self.key)
        return mx.random.categorical(logprobs, key=draw_key)


# -----------------------------------------------------------------------------
# 9. Generation
# A reply is made in two phases. Prefill reads the prompt: its tokens are known, so many
# go through the model at once, and the weights are read once for all of them. Decode
# generates one token after another, since each depends on the one before, and reads all
# weights for each. So prefill is limited by arithmetic, and decode by memory bandwidth:
# Llama 3 8B in 4 bits reads 4.2 GB for a token, so a machine that reads 400 GB/s writes
# at most 95 tokens/s.
#
# Decode is one step ahead. Calling the model and the sampler takes a millisecond or two
# of Python, and only describes a step. The logits of prefill give token 1; from then on
# step n reads token n - 1 and makes token n. It can be described and launched before
# Python knows which token n - 1 is, while the GPU still computes that one. Only then
# does Python wait for token n - 1, and yield it:
#
#     Python   describe 2 | wait for 1, yield it | describe 3 | wait for 2, yield it |
#     GPU        step 1             |         step 2          |         step 3
#
# Only these calls make the loaded model compute:
#     mx.eval, of the caches after each step of prefill
#     require_numbers, of the last logits of a prompt, and later now and then
#     mx.async_eval, which starts a step of decode
#     token.item(), which waits for it
#
# Prefill and decode are generators, so whoever calls them can report progress, or stop,
# between two steps. They work with any model that is called like the one of section 6,
# and has caches like those of section 5.
# uses: 5
# needs: Callable, Collection, Iterable, Iterator, Sequence, itertools, mx
# -----------------------------------------------------------------------------


class NotANumber(ValueError):
    """The model computes NaN or infinity, from its weights or by an overflow."""


def require_numbers(logits: mx.array) -> None:
    """Compute logits, and raise NotANumber if the greatest of them is not finite."""
    if not mx.isfinite(logits.max()).item():
        raise NotANumber("the model's output is not a number")


def checked_ids(prompt: Iterable[int], size: int) -> list[int]:
    """Return the ids of a prompt as a list.

    Raises TypeError for a text in their place, and ValueError for an id that is not in
    a vocabulary of this size: MLX does not check it, and would read foreign memory.
    """
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        raise TypeError(f"the prompt must be a list of ids, got {prompt!r:.80}")
    ids = [*prompt]
    for token in ids:
        if not hasattr(token, "__index__") or not 0 <= token < size:
            raise ValueError(f"the prompt has id {token!r:.80}, the model {size} ids")
    return [int(token) for token in ids]


def require_count(name: str, value: int, least: int) -> None:
    """Raise ValueError unless a value is a whole number and at least so large."""
    if not hasattr(value, "__index__") or value < least:
        wanted = f"a whole number of at least {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r:.80}")


def greedy(logits: mx.array) -> mx.array:
    """Return the likeliest tokens (B,) of logits (B, V)."""
    return mx.argmax(logits, axis=-1)


def prefill(
    model: Callable, prompt: Sequence[int], cache: list, step: int = 512
) -> Iterator[tuple[int, mx.array | None]]:
    """Read a prompt into a cache; yield, after each step, how many tokens are read, and
    after the last the logits (1, V) that follow them.

    step: tokens read at a time; the memory that is needed grows with it.
    """
    for start in range(0, len(prompt), step):
        tokens = mx.array(prompt[start : start + step])[None]
        logits = model(tokens, cache, logits_to_keep=1)[:, -1]
        # This computes the caches only. The end of the last block and the output head
        # are not needed for that. They are computed if decode asks for the logits.
        mx.eval([layer_cache.state for layer_cache in cache])
        mx.clear_cache()  # frees MLX's spare buffers, and does not touch the KV cache
        done = min(start + step, len(prompt))
        # Logits of earlier steps are not passed on. They are not computed, and refer to
        # buffers of the KV cache, which the next step would then have to copy.
        yield done, logits if done == len(prompt) else None


def decode(
    model: Callable,
    logits: mx.array,
    cache: list,
    sampler: Callable[[mx.array], mx.array],
    max_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yield one id after another, the first sampled from logits (1, V).

    The generator's return value, which `reason = yield from decode(...)` gives, says
    why it ended: "stop" (a stop token, which is not yielded), "length" (max_tokens) or
    "context" (the cache is full). However it ends, the cache then holds what it held
    before, followed by the yielded ids. Only the last id is missing after "length" and
    "context", because the model has not read it.
    """
    if max_tokens == 0:
        return "length"
    require_numbers(logits)
    held, capacity = cache[0].offset, cache[0].capacity
    token = sampler(logits)
    mx.async_eval(token)
    try:
        for count in itertools.count(1):
            full = cache[0].offset == capacity  # no slot is left for this token
            last = full or count == max_tokens
            if not last:  # launch the step that reads this token, then ask what it is
                logits = model(token[:, None], cache, logits_to_keep=1)[:, -1]
                next_token = sampler(logits)
                mx.async_eval(next_token)
            token_id = token.item()
            if token_id in stop_tokens:
                return "stop"
            held += 1
            yield token_id
            if last:
                return "length" if count == max_tokens else "context"
            if count % 256 == 0:
                require_numbers(logits)
                mx.clear_cache()  # buffers of past sizes would pile up
            token = next_token
    finally:
        trim_to(cache, held)  # undo the step launched ahead, if there is one


def generate(
    model: Callable,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = None,
    sampler: Callable[[mx.array], mx.array] = greedy,
    cache: list | None = None,
    stop_tokens: Collection[int] = (),
    prefill_step: int = 512,
) -> Iterator[int]:
    """Read a prompt, and return an iterator over the ids that continue it.

    The prompt is read before this returns, so that its errors are raised here, and not
    by the first `next`.
    prompt: at least one id. max_tokens: None goes on until something else ends it.
    sampler: logits (1, V) -> (1,). cache: holds what precedes the prompt, and is
    continued in place; None makes one. stop_tokens: ids that end the text, not yielded.
    prefill_step: see prefill. How it ends: see decode.
    Raises ValueError if the prompt is empty or does not fit the cache, for other
    arguments out of range, and if the model computes no numbers.
    """
    prompt = checked_ids(prompt, model.args.vocab_size)
    require_count("prefill_step", prefill_step, 1)
    if max_tokens is not None:
        require_count("max_tokens", max_tokens, 0)
    if cache is None:
        capacity = model.args.longest_context
        if max_tokens is not None:
            capacity = len(prompt) + max_tokens
        cache = model.make_cache(max(capacity, 1))
    room = cache[0].capacity - cache[0].offset
    if not 0 < len(prompt) <= room:
        raise ValueError(
            f"the prompt must have 1 to {room} tokens, what the context has left, got "
            f"{len(prompt)}"
        )
    for _done, logits in prefill(model, prompt, cache, prefill_step):
        pass  # progress could be reported here
    return decode(model, logits, cache, sampler, max_tokens, stop_tokens)


# -----------------------------------------------------------------------------
# 10. A reply
# All of it at once: from a folder and a conversation to the text of a reply.
#
#     for piece in answer(Path("stories"), [{"role": "user", "content": "Hi!"}]):
#         print(piece, end="", flush=True)
#
# It reads one file of weights and trusts the folder; Part Two reads shards, and checks.
# It loads the model for each reply; the engine of Part Four keeps it, and the cache.
#
# What it does, seen on a shorter text, "Tom went to the", with the model in stories/,
# which has 5 blocks, D 256, H 8, Hkv 4, Dh 32 and V 2048:
#
#     ids      917, 418, 269, 267: Tom, went, to, the       (the spaces belong to them)
#     x        (1, 4, 256), four rows of the embedding
#     a block  queries (1, 8, 4, 32); keys and values (1, 4, 4, 32), kept in its cache;
#              what attention and the MLP add leaves x (1, 4, 256)
#     logits   (1, 2048), of what follows "the": park 9.1, store 7.8, house 6.8
#     softmax  park 0.42, store 0.11, house 0.04, ...
#
# Say that " park" is drawn, id 486. Then it goes in alone: x is (1, 1, 256), and its
# query meets the keys of all five.
# uses: 1-9
# needs: Callable, Iterator, Path, json, mx
# -----------------------------------------------------------------------------


def answer(
    folder: Path,
    messages: list[dict[str, str]],
    *,
    dtype: mx.Dtype | None = None,
    max_tokens: int = 512,
    sampler: Callable[[mx.array], mx.array] | None = None,
) -> Iterator[str]:
    """Yield the text that a model of Llama 3's kind replies to a conversation.

    messages: see ByteLevelTokenizer.encode_chat. dtype: see read_weights. max_tokens,
    sampler: see generate; None is a Sampler with its defaults.
    """
    args = ModelArgs.from_dict(json.loads((folder / "config.json").read_bytes()))
    tensors = read_header(folder / "model.safetensors")
    model = build_model(args, tensors)
    for _bytes in read_weights(model, tensors, dtype):
        pass  # progress could be reported here
    tokenizer = ByteLevelTokenizer.from_folder(folder)
    ids, stream = tokenizer.encode_chat(messages), tokenizer.stream()
    sampler, stop_tokens = sampler or Sampler(), tokenizer.stop_tokens
    for token in generate(
        model, ids, max_tokens=max_tokens, sampler=sampler, stop_tokens=stop_tokens
    ):
        yield stream.add(token)
    yield stream.close()


# -----------------------------------------------------------------------------
# Part Two: every Llama. What other folders need, and what is wrong with a folder.
# -----------------------------------------------------------------------------

import ast
import base64
import collections
import difflib
import functools
import operator
import re
import unicodedata
from collections import ChainMap
from datetime import datetime
from types import FunctionType
from typing import NamedTuple, get_args

import safetensors

# -----------------------------------------------------------------------------
# 11. Families
# Llama, Mistral, Qwen2 and Qwen3 are one transformer, and their files say the same in
# slightly different words. Part One takes a config.json as it is. Here it is checked
# first: the size of a file is limited, a key that is left out gets what its family
# means by that, settings must have the right type and range, and what cannot be
# honoured is an error that names the key and the value. Some layers of these families
# let a token see only a window, the tokens right before it; within the first window
# that makes no difference, so the context is limited to it. Two more scalings join
# those of section 4: linear, and YaRN [7]. The two layouts of rotary settings are read
# as one. Llama 3.1 has the first of these, and transformers 5 writes the second:
#
#     "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8, ...}
#     "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8, ...}
#
# uses: 1, 4
# needs: Iterator, Path, difflib, fields, get_args, json, math
# registers: ROPE_SCALINGS
# -----------------------------------------------------------------------------

JSON_BYTES = 1_000_000  # of a file without a vocabulary; real ones have up to 300 KB


def refuse_pointer(path: Path, data: bytes) -> None:
    """Raise ValueError if a file begins as what git-lfs leaves in the place of one."""
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a git-lfs pointer, not the file; run git lfs pull")


def read_bounded(path: Path, limit: int) -> bytes:
    """Return what is in a file. Raises ValueError if it has more bytes than `limit`, or
    is none, since a device or a pipe need not end, or stands for one of git-lfs."""
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path}: {size:,} bytes, wanted at most {limit:,}")
    data = path.read_bytes()
    refuse_pointer(path, data)
    return data


def read_json(path: Path, limit: int = JSON_BYTES) -> dict:
    """Return the JSON object in a file of at most `limit` bytes; an absent file is {}.

    Parsing can turn 3 bytes of JSON into 120 bytes of objects, so the limit on a file
    limits the memory that it can take to 40 times as much.
    Raises ValueError naming the file if it holds something else.
    """
    if not path.exists():
        return {}
    data = read_bounded(path, limit)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value


# What it means that config.json leaves a key out, where ModelArgs does not say so.
# Source: transformers 5.24, its configuration_llama.py and so on.
LLAMA_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
MISTRAL_DEFAULTS = {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILY_DEFAULTS = {
    "llama": LLAMA_DEFAULTS,
    "mistral": LLAMA_DEFAULTS | MISTRAL_DEFAULTS,
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128},
}

# Settings that are not sizes, and the values that are accepted; None: may be absent.
SUPPORTED = {
    "model_type": tuple(FAMILY_DEFAULTS),
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "attention_bias": (False, True, None),
    "mlp_bias": (False, True, None),
    "use_sliding_window": (False, True, None),
    "is_causal": (True, None),
}

# type of a field: (in words, whether a value is of it)
KINDS = {
    bool: ("true or false", lambda v: type(v) is bool),
    int: ("a positive integer below 2**31", lambda v: type(v) is int and 0 < v < 2**31),
    float: ("a positive number", lambda v: type(v) in (int, float) and 0 < v < 1e30),
    dict: ("an object", lambda v: type(v) is dict),
}

ORIGINAL_CONTEXT = "original_max_position_embeddings"


def linear_scaling(
    frequencies: list[float], scaling: dict
) -> tuple[list[float], float]:
    """Return all frequencies slowed down by `factor`, and factor 1."""
    return [frequency / scaling["factor"] for frequency in frequencies], 1.0


def yarn_scaling(frequencies: list[float], scaling: dict) -> tuple[list[float], float]:
    """Return frequencies slowed down as YaRN does, and the factor of the scores.

    As in llama3, but the change of pace is linear in the index of the pair, from the
    one that turns beta_fast times within the original context to the one that turns
    beta_slow times. Source: [7] section 3, as Hugging Face's modeling_rope_utils has
    it.
    """
    half, factor = len(frequencies), scaling["factor"]
    context, theta = scaling[ORIGINAL_CONTEXT], scaling["rope_theta"]

    def index(turns: float) -> float:  # of the pair that turns so often in the context
        return half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index(scaling["beta_fast"]), index(scaling["beta_slow"])
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = high - low if high != low else 0.001
    slowed = []
    for pair, frequency in enumerate(frequencies):
        slow = min(max((pair - low) / width, 0.0), 1.0)
        slowed.append(frequency * (1 - slow + slow / factor))
    if "attention_factor" in scaling:
        return slowed, scaling["attention_factor"] ** 2  # of queries and of keys
    growth = 0.1 * math.log(max(factor, 1.0))
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        over, under = scaling["mscale"], scaling["mscale_all_dim"]
        return slowed, ((over * growth + 1) / (under * growth + 1)) ** 2
    return slowed, (growth + 1) ** 2


ROPE_SCALINGS["linear"] = linear_scaling
ROPE_SCALINGS["yarn"] = yarn_scaling

# rope_type: the numbers that it must have.
SCALING_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT),
    "yarn": ("factor", "beta_fast", "beta_slow", "rope_theta", ORIGINAL_CONTEXT),
}
OPTIONAL_NUMBERS = ("attention_factor", "mscale", "mscale_all_dim")  # of yarn
ZERO_IS_ABSENT = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def check_scaling(scaling: dict) -> None:
    """Raise ValueError unless rope_scaling has a known type, and its numbers."""
    kind = scaling["rope_type"]
    if type(kind) is not str or kind not in SCALING_NUMBERS:
        raise ValueError(
            f"rope_type must be default, linear, llama3 or yarn, got {kind!r:.80}"
        )
    optional = [key for key in OPTIONAL_NUMBERS if key in scaling]
    for key in (*SCALING_NUMBERS[kind], *optional):
        value = scaling.get(key)
        # Below 1e-9 a formula may divide by a number that float64 rounds to zero.
        if type(value) not in (int, float) or not 1e-9 < value < 1e30:
            raise ValueError(f"rope_scaling: {key} must be positive, got {value!r:.80}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        raise ValueError(f"rope_scaling: low_freq_factor {low} must be below {high}")


def rotary_settings(config: dict) -> dict:
    """Return rope_scaling and, if given, rope_theta, from either layout of config.json:
    side by side, or both in the rope_parameters of transformers 5.

    Where there are both, rope_scaling counts, and nothing in rope_parameters: somebody
    has added it. That is how transformers reads it.
    Raises ValueError naming the key and the value that cannot be honoured.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    # An object within is for layers of one type; a partial factor, for part of Dh.
    if type(rope) is not dict or dict in map(type, rope.values()):
        raise ValueError(f"{key} must be an object of numbers, got {rope!r:.80}")
    rope = {name: value for name, value in rope.items() if value is not None}
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{key}: partial_rotary_factor must be 1, got {rope!r:.200}")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    settings = {} if theta is None else {"rope_theta": theta}
    kind = rope.get("rope_type", rope.get("type", "default"))  # new, old spelling
    if kind == "default":
        return settings | {"rope_scaling": None}
    scaling = {name: rope[name] for name in rope if name not in ("rope_theta", "type")}
    scaling["rope_type"] = kind
    if kind in ("llama3", "yarn"):
        usual = scaling.get(ORIGINAL_CONTEXT, config.get("max_position_embeddings"))
        scaling[ORIGINAL_CONTEXT] = config.get(ORIGINAL_CONTEXT) or usual
    if kind == "yarn":
        given = {k: v for k, v in scaling.items() if v or k not in ZERO_IS_ABSENT}
        theta = theta or ModelArgs.rope_theta
        scaling = {"beta_fast": 32, "beta_slow": 1} | given | {"rope_theta": theta}
    check_scaling(scaling)
    return settings | {"rope_scaling": scaling}


def check_args(args: ModelArgs) -> None:
    """Raise ValueError for sizes that no Llama has, or that do not fit together."""
    H, Hkv, Dh = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    if H % Hkv:
        raise ValueError(f"num_key_value_heads must divide {H} heads, got {Hkv}")
    # Rotary embedding turns pairs, and no attention kernel has wider heads.
    if Dh % 2 or not 0 < Dh <= 1024:
        raise ValueError(f"head_dim must be even and at most 1024, got {Dh}")
    if H * Dh >= 2**31:
        raise ValueError(f"{H} heads of head_dim {Dh} are too many")
    if args.rope_theta <= 1:
        raise ValueError(f"rope_theta must be above 1, got {args.rope_theta}")


def other_type(config: dict) -> str:
    """Return what else to say of a model_type that is not known."""
    if "text_config" in config or "vision_config" in config:
        return ", a model of more than text"
    name = str(config.get("model_type"))[:80].lower()
    near = difflib.get_close_matches(name, FAMILY_DEFAULTS, 1)
    return f"; the nearest is {json.dumps(near[0])}" if near else ""


def foreign_settings(config: dict) -> Iterator[str]:
    """Yield what says that a config.json is of another kind of model or of weights."""
    for key, known in SUPPORTED.items():
        if (value := config.get(key)) not in known:
            wanted = " or ".join(map(json.dumps, known))
            more = other_type(config) if key == "model_type" else ""
            yield f"{key} must be {wanted}, got {value!r:.80}{more}"
    older = config.get("compression_config")  # of compressed-tensors
    packed = config.get("quantization") or config.get("quantization_config") or older
    method = packed.get("quant_method") if type(packed) is dict else None
    if method is not None and not config.get("quantization"):
        yield (
            f"quantization_config: quant_method is {method!r:.80}, wanted weights that "
            "are not quantized, or as MLX's converter quantizes them"
        )


def wrong_types(settings: dict) -> Iterator[str]:
    """Yield which settings have the wrong type, or are out of range."""
    for entry in fields(ModelArgs):
        value, optional = settings.get(entry.name), get_args(entry.type)
        wanted, fits = KINDS[optional[0] if optional else entry.type]
        if value is not None and not fits(value):
            yield f"{entry.name} must be {wanted}, got {value!r:.80}"


def window_of(config: dict) -> object:
    """Return how many tokens a token sees in some layer; None: all, in every layer.

    All layers of a Mistral have the window. Those of a Qwen have it if layer_types says
    so, or without layer_types from max_window_layers on; those of a Llama only if
    layer_types says so. use_sliding_window may turn it off.
    Raises ValueError naming the key and the value that cannot be honoured.
    """
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    known = ["full_attention", "sliding_attention"]
    if types is not None:
        listed = type(types) is list and len(types) == layers
        if not listed or any(kind not in known for kind in types):
            wanted = f"must name {layers} layers of {' or '.join(known)}"
            raise ValueError(f"layer_types {wanted}, got {types!r:.80}")
    first = config.get("max_window_layers", layers)
    if type(first) is not int:
        raise ValueError(f"max_window_layers must be a whole number, got {first!r:.80}")
    family = config["model_type"]
    if family == "mistral":
        some = True
    elif types is not None:
        some = "sliding_attention" in types
    else:
        some = first < layers and family in ("qwen2", "qwen3")
    some = some and config.get("use_sliding_window") is not False
    return config.get("sliding_window") if some else None


def read_args(config: dict) -> ModelArgs:
    """Return the shape that a config.json describes.

    Raises ValueError naming the keys and values that this file cannot honour.
    """
    # null leaves a key out, but for two keys where it is a value of its own: as many
    # key/value heads as query heads, and no window.
    null = ("num_key_value_heads", "sliding_window")
    given = {k: v for k, v in config.items() if v is not None or k in null}
    family = str(config.get("model_type"))
    config = FAMILY_DEFAULTS.get(family, LLAMA_DEFAULTS) | given
    # What these two say depends on other keys.
    others = config | {"sliding_window": None, "rope_scaling": None}
    if wrong := [*foreign_settings(config), *wrong_types(others)]:
        raise ValueError("; ".join(wrong))
    settings = {"sliding_window": window_of(config)} | rotary_settings(config)
    if wrong := [*wrong_types(settings)]:
        raise ValueError("; ".join(wrong))
    args = ModelArgs.from_dict(config | settings)
    check_args(args)
    # Llama 1 and 2 leave rope_theta out and mean 10000. A Llama 3 without it has
    # lost it, and would read well for a page before falling apart.
    lost = "rope_theta" not in settings and family == "llama"
    if lost and args.vocab_size >= 128_000:
        raise ValueError("rope_theta is missing; a Llama 3 vocabulary needs it")
    return args


# -----------------------------------------------------------------------------
# 12. Chat templates
# A family of models has its own way of writing a conversation down, and publishes it as
# a template in Jinja, a language for web pages. Text outside of tags is printed as it
# stands, {{ }} prints a value, {% %} holds a statement, and {# #} a comment:
#
#     {% for message in messages %}
#     {{ '<|' + message.role + '|>' }}
#     {{ message.content | trim }}
#     {% endfor %}
#
# A template comes with a model, so it may come from anyone, and is never run as a
# program. Translation writes it down in the words of Python, each in a line of its own,
#
#     for (v_message) in [0 for (v_message) in (v_messages)]:
#         ('<|' << v_message.v_role << '|>')
#         '\n'
#         (v_message.v_content.f_trim)
#         '\n'
#
# so that Python's own parser reads it: ast.parse makes a tree of loops, sums and names
# of it, and runs nothing. Rendering walks over the tree. It knows some twenty kinds of
# node, and values of a few kinds: nothing in a template can reach into Python. And it
# pays for each step, so that no template takes much time or memory.
#
# What a template prints is more than text: <|user|> may be a control token above, but
# must stay text if a user typed it. So each character of a Text knows who wrote it, the
# template or one of the messages, through sums, slices, trim, split and the like. Only
# what the template wrote may become a control token. With the template above,
#
#     ChatTemplate(source).render([{"role": "user", "content": "<|user|>"}], {})
#
# gives a Text of three runs: <|user|> and a line break, which the template wrote; then
# <|user|>, of message 0; then a line break, of the template again.
# uses: none
# needs: Callable, ChainMap, FunctionType, Iterator, Mapping, NamedTuple, Sequence, ast,
#     contextlib, datetime, itertools, json, operator, re
# -----------------------------------------------------------------------------

# Who may have written a character; message i is i.
UNKNOWN, TEMPLATE = -2, -1
TEMPLATE_MARK = chr(2 + TEMPLATE)  # in Text.marks
# Such a role is the template's own word: templates build '<|' + role + '|>'.
FIXED_ROLES = ("system", "developer", "user", "assistant", "model", "tool", "ipython")

# Bounds, far above what published templates need.
LONGEST_TEMPLATE = 60_000  # characters
LONGEST_TAG = 1_000  # words
DEEPEST_TEMPLATE = 40  # tags inside tags, or brackets inside brackets
DEEPEST = 150  # nodes inside nodes, in a rendering
LONGEST_TEXT = 10_000_000  # characters
LARGEST = 10**100  # of whole numbers


class TemplateError(ValueError):
    """A template does not parse, does not work, or needs what is not known here."""


class RaisedByTemplate(TemplateError):
    """A template refuses a conversation, in its own words."""


def one_line(text: str) -> str:
    """Return the beginning of a message as one line that can be printed."""
    line = " ".join(text[:1000].split())[:300]
    return "".join(c if c.isprintable() else "?" for c in line)


def check_size(size: int) -> None:
    if size > LONGEST_TEXT:
        raise ValueError(f"a text may have {LONGEST_TEXT:,} characters, not {size:,}")


class Text(str):
    """A string that knows who wrote each of its characters.

    marks: a string of the same length; chr(2 + writer) stands for a writer. A method
    that is not defined here is str's own, and returns a str, whose writer is unknown.
    So a method that is missing here can only lose trust, never gain it.
    """

    __slots__ = ("marks",)

    def __new__(cls, text: str, marks: str):
        self = super().__new__(cls, text)
        self.marks = marks
        return self

    @classmethod
    def by(cls, writer: int, text: str) -> "Text":
        return cls(text, chr(2 + writer) * len(text))

    @classmethod
    def of(cls, text: str) -> "Text":
        """Return a Text as it is, and another string as written by unknown ones."""
        if not isinstance(text, str):
            raise TypeError
        return text if isinstance(text, Text) else cls.by(UNKNOWN, text)

    def runs(self) -> Iterator[tuple[str, int]]:
        """Yield the text in pieces of one writer each, as (piece, writer)."""
        start = 0
        for mark, same in itertools.groupby(self.marks):
            end = start + len(list(same))
            yield super().__getitem__(slice(start, end)), ord(mark) - 2
            start = end

    def __getitem__(self, index) -> "Text":
        return Text(super().__getitem__(index), self.marks[index])

    def __iter__(self) -> Iterator["Text"]:
        return map(self.__getitem__, range(len(self)))

    def __add__(self, other: str) -> "Text":
        return Text(super().__add__(other), self.marks + Text.of(other).marks)

    def join(self, pieces) -> "Text":
        pieces = [Text.of(piece) for piece in pieces]
        check_size(sum(map(len, pieces)) + len(self) * len(pieces))
        return Text(super().join(pieces), self.marks.join([p.marks for p in pieces]))

    def split(self, sep=None, maxsplit=-1) -> list["Text"]:
        pieces, end = [], 0
        for piece in super().split(sep, maxsplit):
            # Without a separator, white space of any length lies between two pieces.
            start = self.find(piece, end) if sep is None else end
            end = start + len(piece)
            pieces.append(Text(piece, self.marks[start:end]))
            end += len(sep or "")
        return pieces

    def replace(self, old: str, new: str, count: int = -1, /) -> "Text":
        old, new = Text.of(old), Text.of(new)
        marks, end, pieces = [], 0, super().split(old, count)
        check_size(len(self) + (len(new) - len(old)) * (len(pieces) - 1))
        for piece in pieces:
            marks.append(self.marks[end : end + len(piece)])
            end += len(piece) + len(old)
        return Text(str(new).join(pieces), new.marks.join(marks))

    def lstrip(self, characters: str | None = None, /) -> "Text":
        return self[len(self) - len(super().lstrip(few(characters))) :]

    def rstrip(self, characters: str | None = None, /) -> "Text":
        return self[: len(super().rstrip(few(characters)))]

    def strip(self, characters: str | None = None, /) -> "Text":
        return self.lstrip(characters).rstrip(characters)

    def lower(self) -> "Text":
        return self.recased(super().lower())

    def upper(self) -> "Text":
        return self.recased(super().upper())

    def title(self) -> "Text":
        return self.recased(super().title())

    def capitalize(self) -> "Text":
        return self.recased(super().capitalize())

    def recased(self, text: str) -> "Text":
        # A few letters become two; then nobody knows which came from where.
        return Text(text, self.marks) if len(text) == len(self) else Text.of(text)


NOTHING = Text("", "")


def few(characters: str | None) -> str | None:
    # str.strip looks for each character of a text among all of these.
    if characters is not None and len(characters) > 100:
        raise ValueError("strip takes at most 100 characters")
    return characters


class Undefined:
    """What a name or a key without a value gives: false, and printed as nothing."""

    def __init__(self, name: str):
        self.name = name

    def __eq__(self, other) -> bool:
        return isinstance(other, Undefined)

    def __hash__(self) -> int:
        return 0

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator:
        return iter(())

    def __repr__(self) -> str:
        return "Undefined"


def defined(value):
    """Return a value that something is to be done with."""
    if isinstance(value, Undefined):
        raise ValueError(f"{value.name:.80} is undefined")
    return value


class Fields:
    """A value with named parts, as `loop`."""

    def __init__(self, /, **names):
        self.names = names


class Namespace(Fields):
    """Variables that outlive a round: {% set ns.found = true %} sets one."""


class Break(Exception):
    """A loop ends."""


class Continue(Exception):
    """A round of a loop ends."""


# First, a template becomes a Python program.


class Word(NamedTuple):
    kind: str  # number, name, text, sign, bracket or end
    value: str
    at: int  # its place in the template
    inner: list["Word"]  # what stands in a bracket


TAG = re.compile(r"\{([{%#])([-+]?)")
# -%}, -}} and -#} eat the white space that follows; %} and #} eat one line break.
END = {
    "{": re.compile(r"-\}\}\s*|\}\}"),
    "%": re.compile(r"\+%\}|-%\}\s*|%\}\n?"),
    "#": re.compile(r"\+#\}|-#\}\s*|#\}\n?"),
}
BLANKS = re.compile(r"\s*")
# A number after a dot is an index: [[1, 2]].0.1 is 2.
WORD = re.compile(
    r"""(?P<number>(?<=\.)[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)
    | (?P<name>[A-Za-z_][A-Za-z_0-9]*)
    | (?P<text>'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")
    | (?P<sign>//|\*\*|[=!<>]=|[-+*/%~<>=.,:|])
    | (?P<bracket>[(\[{])""",
    re.DOTALL | re.VERBOSE,
)
BRACKETS = {"(": ")", "[": "]", "{": "}"}
# Words of both languages. All others are names, and get a prefix, v_.
OPERATORS = ("and", "or", "not", "in", "is", "if", "else")
CONSTANTS = {"true": "True", "false": "False", "none": "None"}
CONSTANTS |= {word: word for word in CONSTANTS.values()}
# In Jinja ~ binds tighter than + and -; in Python + does so than << and >>.
SUMS = {"+": "<<", "-": ">>", "~": "+"}
# Names that no template can write: a block's text, and what an `if` without else gives.
BLOCK, ELSE = "v_0text", "v_0else"
# Tags of Jinja that no chat template has been seen to need, with an end and without.
NOT_KNOWN_TAGS = ("autoescape", "block", "call", "with")
NOT_KNOWN_COMMANDS = ("extends", "from", "import", "include")
# What may follow a test and is no argument of it.
NO_ARGUMENT = ("and", "or", "else", "(")
# Where Jinja reads -x|f and x|f.a otherwise than Python reads -x.f and x.f.a.
UNCLEAR = (("-", "|"), ("-", "is"), ("|", "."), ("|", "["))


class Translation:
    """A template as a Python program, one word a line.

    lines: the program. places: where in the template the word of each line stands.
    """

    def __init__(self, source: str):
        self.source, self.lines, self.places = source, [], []
        self.opened = [("", False)]  # tags without an end yet: (name, is it in a loop?)
        at = 0
        while tag := TAG.search(source, at):
            self.data(at, self.trimmed(at, tag))
            at = self.tag(tag)
        self.data(at, source[at:])
        if len(self.opened) > 1:
            raise self.error(at, f"wanted end{self.opened[-1][0]}, got the end")

    def error(self, at: int, words: str) -> TemplateError:
        line = self.source.count("\n", 0, at) + 1
        column = at - self.source.rfind("\n", 0, at)
        return TemplateError(one_line(f"line {line}, column {column}: {words}"))

    def parse(self) -> list[ast.stmt]:
        """Return the program's statements, as Python's own parser finds them."""
        try:
            tree = ast.parse("\n".join(self.lines))
        except SyntaxError as error:
            line = min(error.lineno or 1, len(self.lines))
            raise self.error(self.places[line - 1], "this does not parse") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = Text.by(TEMPLATE, node.value)
        return tree.body

    def data(self, at: int, text: str) -> None:
        if text:
            self.statement(at, ascii(text))

    def trimmed(self, at: int, tag: re.Match) -> str:
        """Return the text from `at` to a tag, without the white space the tag eats."""
        text = self.source[at : tag.start()]
        if tag[2] == "-":
            return text.rstrip()
        line = text[text.rfind("\n") + 1 :]
        whole = len(line) < len(text) or at == 0 or self.source[at - 1] == "\n"
        if whole and line.isspace() and tag[1] != "{" and tag[2] != "+":
            return text[: len(text) - len(line)]
        return text

    def tag(self, tag: re.Match) -> int:
        """Translate a tag, and return where it ends."""
        kind, at = tag[1], tag.start()
        if kind == "#":
            if end := END["#"].search(self.source, tag.end()):
                return end.end()
            raise self.error(at, "wanted #}, got the end")
        words, end = self.words(tag.end(), END[kind])
        if kind == "%":
            self.command(at, words)
        else:
            self.statement(at, "(", words, ")")
        return end

    def words(self, at: int, end: re.Pattern, depth: int = 0) -> tuple[list[Word], int]:
        """Return the words up to an end, and where that ends."""
        if depth > DEEPEST_TEMPLATE:
            raise self.error(at, "brackets are nested too deeply")
        words = []
        while True:
            at = BLANKS.match(self.source, at).end()
            if found := end.match(self.source, at):
                return words, found.end()
            word = WORD.match(self.source, at)
            if word is None:
                raise self.error(at, "this is no word of the language")
            inner, start, at = [], at, word.end()
            if word[0] in BRACKETS:
                closing = re.compile(re.escape(BRACKETS[word[0]]))
                inner, at = self.words(at, closing, depth + 1)
            words.append(Word(word.lastgroup, word[0], start, inner))

    def write(self, at: int, *parts: str | list[Word]) -> None:
        """Write words of Python, and expressions of Jinja, in lines of their own."""
        for part in parts:
            if isinstance(part, str):
                self.lines.append(part)
                self.places.append(at)
            else:
                self.expression(part, at)
                at = self.places[-1]

    def statement(self, at: int, first: str, *parts: str | list[Word]) -> None:
        start = len(self.lines)
        self.write(at, " " * (len(self.opened) - 1) + first, *parts)
        if len(self.lines) - start > LONGEST_TAG:
            raise self.error(at, f"a tag may have {LONGEST_TAG:,} words")

    def command(self, at: int, words: list[Word]) -> None:
        """Translate what stands in {% %}."""
        name, rest = (words[0].value, words[1:]) if words else ("", [])
        outer, in_loop = self.opened[-1]
        equals = index_of("=", rest)
        if outer and name == f"end{outer}" and not rest:
            self.opened.pop()
        elif name in ("break", "continue") and in_loop and not rest:
            self.statement(at, name)
        elif name in NOT_KNOWN_COMMANDS:
            self.statement(at, f"v_0{name}")  # as is said if it is evaluated
        elif name == "set" and equals is not None:
            self.statement(at, "(", rest[:equals], ") = (", rest[equals + 1 :], ")")
        else:
            header = self.header(at, name, outer, rest)
            in_loop = name == "for" or (in_loop and name in ("if", "set", "filter"))
            if name in ("elif", "else"):
                self.opened.pop()
                name, in_loop = outer, self.opened[-1][1]
            self.statement(at, *header)
            self.opened.append((name, in_loop))
            if len(self.opened) > DEEPEST_TEMPLATE:
                raise self.error(at, "tags are nested too deeply")
            self.statement(at, "pass")

    def header(self, at: int, name: str, outer: str, rest: list[Word]) -> Sequence:
        """Return how Python's statement begins for a tag that has an end."""
        if name in ("if", "elif") and index_of("if", rest) is None:
            if name == "if" or outer == "if":
                return f"{name} (", rest, "):"
        elif name == "else" and outer in ("if", "for") and not rest:
            return ("else:",)
        elif name == "for":
            return self.loop(at, rest)
        elif name == "macro" and len(rest) == 2:
            return f"def v_{self.name(rest[0])}(", rest[1].inner or "", "):"
        elif name == "set":  # to what the block prints
            n = index_of("|", rest)
            filters = "" if n is None else rest[n:]
            return f"with ({BLOCK}", filters, ") as (", rest[:n], "):"
        elif name == "filter":
            return f"with ({BLOCK}", [Word("sign", "|", at, []), *rest], "):"
        elif name == "generation" and not rest:
            return (f"with ({BLOCK}):",)
        elif name in NOT_KNOWN_TAGS:
            return (f"with (v_0{name}):",)  # as is said if it is evaluated
        raise self.error(at, f"the tag {name:.80} is not known in this place")

    def loop(self, at: int, words: list[Word]) -> Sequence:
        """Return how a loop begins: over a list of what passes its `if`, in Python."""
        if words and words[-1].value == "recursive":
            words.pop()
        n = index_of("in", words)
        if n is None or any(word.value in (".", "loop") for word in words[:n]):
            raise self.error(at, "wanted: for name in values")
        target, values = words[:n], words[n + 1 :]
        start = ["for (", target, ") in [0 for (", target, ") in ("]
        if (n := index_of("if", values)) is not None:
            return *start, values[:n], ") if (", values[n + 1 :], ")]:"
        return *start, values, ")]:"

    def expression(self, words: list[Word], at: int) -> None:
        """Translate an expression, where Jinja's differs from Python's.

        x | trim          x.f_trim            An attribute binds as tightly in Python as
        x is none         x.t_none            filters and tests do in Jinja.
        x is not in y     x.n_in(y)
        a + b ~ c         a << b + c
        a if b            a if b else v_0else
        """
        if not words:
            raise self.error(at, "wanted a value")
        end = Word("end", "", words[-1].at + len(words[-1].value), [])
        words = [*words, end, end]  # two, since after a dot one is read as the name
        n, ifs, after_value, last = 0, 0, False, ""  # ifs: how many have no else
        while words[n].kind != "end":
            kind, value, at, inner = words[n]
            n += 1
            if (last, value) in UNCLEAR:
                raise self.error(at, f"{value} needs brackets around what precedes it")
            if value in ("|", "is"):
                last, n = "|", self.filter_or_test(words, n)
            elif value == ".":
                member, n = words[n], n + 1
                index = member.kind == "number"
                self.write(
                    at, f"[{member.value}]" if index else f".v_{self.name(member)}"
                )
            elif kind == "bracket":
                after_value = True
                self.write(at, value, inner or "", BRACKETS[value])
            elif kind != "sign" and value not in OPERATORS:
                after_value = True
                self.write(at, self.python(words[n - 1]))
            else:
                if value in (",", ":"):
                    self.write(at, f"else {ELSE} " * ifs)
                    ifs = 0
                ifs += {"if": 1, "else": -1}.get(value, 0)
                self.write(at, SUMS.get(value, value) if after_value else value)
                last = "-" if value in ("+", "-") and not after_value else ""
                after_value = False
        self.write(words[n].at, f"else {ELSE} " * ifs)

    def filter_or_test(self, words: list[Word], n: int) -> int:
        """Translate what follows | or is; return where it ends."""
        prefix = ".f_" if words[n - 1].value == "|" else ".t_"
        if prefix == ".t_" and words[n].value == "not":
            prefix, n = ".n_", n + 1
        at, end = words[n].at, n + 1
        self.write(at, prefix + self.name(words[n]))
        word = words[end]
        takes_it = word.kind not in ("sign", "end") and word.value not in NO_ARGUMENT
        if takes_it and prefix != ".f_":
            end += 1
            while words[end].value in (".", "[", "("):
                end += 2 if words[end].value == "." else 1
            self.write(at, "(", words[n + 1 : end], ")")
        return end

    def name(self, word: Word) -> str:
        if word.kind != "name":
            raise self.error(
                word.at, f"wanted a name, got {word.value or 'the end':.80}"
            )
        return word.value

    def python(self, word: Word) -> str:
        """Return a value as it is written in Python."""
        if word.kind == "name":
            return CONSTANTS.get(word.value, f"v_{word.value}")
        if word.kind == "number":
            return word.value
        try:
            return ascii(unescaped(word.value[1:-1]))
        except ValueError:
            raise self.error(word.at, "this text holds a wrong escape") from None


def unescaped(text: str) -> str:
    """Return a text with its escapes, which are Python's, done."""

    def known(escape: re.Match) -> str:
        # A backslash that means nothing stays. Python would warn about it.
        means = escape[1] in "01234567xuUN\\'\"abfnrtv\n"
        return escape[0] if means else "\\" + escape[0]

    text = text.encode("ascii", "backslashreplace").decode()
    text = re.sub(r"\\(.)", known, text, flags=re.DOTALL)
    return text.encode().decode("unicode-escape")


def index_of(value: str, words: list[Word]) -> int | None:
    """Return the index of the first such word that is in no bracket."""
    return next((n for n, word in enumerate(words) if word.value == value), None)


# What can be done with values. Filters and tests get the Rendering first, and then the
# value that stands before them. A bare TypeError says that the values do not fit.


def product(left, right):
    if not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
        raise TypeError
    if abs(left * right) > LARGEST:
        raise ValueError("a product is too large")
    return left * right


def remainder(left, right):
    if isinstance(left, str):  # Python's % would fill in a form
        raise TypeError
    return left % right


SIGNS = {
    ast.LShift: operator.add,  # Jinja's +
    ast.RShift: operator.sub,  # Jinja's -
    ast.Mult: product,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: remainder,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


def pick(run: "Rendering", value, path):
    """Return value.a.b for the path "a.b"; a number in it is an index."""
    if not isinstance(path, str):
        return run.item(value, path)
    for part in path.split("."):
        value = run.item(value, int(part) if part.isdecimal() else part)
    return value


def filter_map(run, values, *args, attribute=None, default=None):
    def change(item):
        if args:
            return run.use(FILTERS, args[0], item, *args[1:])
        found = pick(run, item, attribute)
        missing = isinstance(found, Undefined) and default is not None
        return default if missing else found

    return iter([change(item) for item in run.items(values or ())])


def choose(run, values, path, test: tuple, keep: bool) -> Iterator:
    """Return the values, or those with something at a path, that pass a test: its name
    and arguments; without one, that are true. Return the others if not `keep`."""
    chosen = []
    for item in run.items(values or ()):
        value = item if path is None else pick(run, item, path)
        passes = run.use(TESTS, test[0], value, *test[1:]) if test else value
        if bool(passes) is keep:
            chosen.append(item)
    return iter(chosen)


def filter_join(run, values, separator=NOTHING, attribute=None):
    items = run.items(values)
    if attribute is not None:
        items = [pick(run, item, attribute) for item in items]
    return run.text(separator).join([run.text(item) for item in items])


def filter_default(run, value, other=NOTHING, boolean=False):
    return other if isinstance(value, Undefined) or (boolean and not value) else value


def filter_last(run, values):
    if isinstance(values, Iterator):
        raise TypeError
    return [Undefined("the last item"), *run.items(values)][-1]


def filter_replace(run, value, old, *args) -> Text:
    text = run.text(value)
    run.pay_for_pieces(text, old)
    return text.replace(old, *args)


def filter_title(run, value):
    words = re.split(r"([-\s({\[<]+)", run.text(value))
    text = "".join(word[:1].upper() + word[1:].lower() for word in words)
    return run.text(value).recased(text)


def filter_tojson(run, value, ensure_ascii=False):
    run.weigh(value)
    return Text.of(json.dumps(value, ensure_ascii=ensure_ascii))


FILTERS = {
    "capitalize": lambda run, value: run.text(value).capitalize(),
    "count": lambda run, value: len(value),
    "d": filter_default,
    "default": filter_default,
    "first": lambda run, value: [*run.items(value), Undefined("the first item")][0],
    "int": lambda run, value: int(value),
    "join": filter_join,
    "last": filter_last,
    "length": lambda run, value: len(value),
    "list": lambda run, value: run.items(value),
    "lower": lambda run, value: run.text(value).lower(),
    "map": filter_map,
    "reject": lambda run, values, *test: choose(run, values, None, test, False),
    "rejectattr": lambda run, values, at, *test: choose(run, values, at, test, False),
    "replace": filter_replace,
    "select": lambda run, values, *test: choose(run, values, None, test, True),
    "selectattr": lambda run, values, at, *test: choose(run, values, at, test, True),
    "string": lambda run, value: run.text(value),
    "title": filter_title,
    "tojson": filter_tojson,
    "trim": lambda run, value, *args: run.text(value).strip(*args),
    "upper": lambda run, value: run.text(value).upper(),
}
LISTS = (list, tuple, dict, range)
VIEWS = tuple(type(view) for view in ({}.keys(), {}.values(), {}.items()))
SIZED = (str, *LISTS, *VIEWS)
TESTS = {
    "boolean": lambda run, value: isinstance(value, bool),
    "defined": lambda run, value: not isinstance(value, Undefined),
    "false": lambda run, value: value is False,
    "in": lambda run, value, other: run.compare(ast.In, value, other),
    "iterable": lambda run, value: isinstance(value, (*SIZED, Undefined, Iterator)),
    "mapping": lambda run, value: isinstance(value, dict),
    "none": lambda run, value: value is None,
    "number": lambda run, value: isinstance(value, (int, float)),
    "sequence": lambda run, value: isinstance(value, (str, *LISTS, Undefined)),
    "string": lambda run, value: isinstance(value, str),
    "true": lambda run, value: value is True,
    "undefined": lambda run, value: isinstance(value, Undefined),
}
TESTS |= dict.fromkeys(
    ("==", "eq", "equalto"), lambda run, a, b: run.compare(ast.Eq, a, b)
)
TESTS |= dict.fromkeys(("!=", "ne"), lambda run, a, b: run.compare(ast.NotEq, a, b))
TEXT_METHODS = (
    "capitalize endswith find index join lower lstrip replace rstrip split startswith "
    "strip title upper"
)
METHODS = {
    str: {name: getattr(Text, name) for name in TEXT_METHODS.split()},
    dict: {name: getattr(dict, name) for name in ("get", "items", "keys", "values")},
}


def global_range(run, *bounds) -> range:
    numbers = range(*bounds)
    if len(numbers) > 100_000:  # Jinja's bound
        raise ValueError("a range may hold 100,000 numbers")
    return numbers


def global_raise_exception(run, message):
    raise RaisedByTemplate(one_line(run.text(message)))


def global_strftime_now(run, form) -> Text:
    if len(form) > 100:
        raise ValueError("the form of a date may have 100 characters")
    return Text.of(datetime.now().strftime(form))


GLOBALS = {
    "namespace": lambda run, /, **names: Namespace(**names),
    "raise_exception": global_raise_exception,
    "range": global_range,
    "strftime_now": global_strftime_now,
}
# What Jinja knows under these names, no chat template uses.
NOT_KNOWN = ("caller", "cycler", "dict", "joiner", "kwargs", "self", "varargs")


# Second, a walk over the program's tree.


class Rendering:
    """A walk over the tree of a template: its variables, its output, and its cost.

    Values are texts, numbers, lists and the like, Undefined, Fields, and functions,
    which get the Rendering first. What can be done with them is in the tables above.
    """

    def __init__(self, template: Translation, variables: dict, steps: int):
        self.template, self.steps, self.depth = template, steps, 0
        self.scope, self.output = ChainMap({}, variables), []

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise ValueError("the template works too long, or writes too much")

    def pay(self, value) -> None:
        """Pay for a value: a step, and more for its size."""
        self.spend(1 + len(value) // 16 if isinstance(value, SIZED) else 1)

    def pay_for_pieces(self, text: str, sought: str | None) -> None:
        """Pay for the pieces between what is sought in a text, or its words; one takes
        the time of some four steps."""
        found = str.count(text, sought) if sought else len(str.split(text))
        self.spend(4 * found)

    def weigh(self, value) -> None:
        """Pay for all that a value holds, as often as it can be reached.

        A list may hold another one twice, which holds another one twice, and so on: it
        is small, but printing or comparing it would never end.
        """
        waiting = [(value, 0)]
        while waiting:
            value, depth = waiting.pop()
            self.pay(value)
            if isinstance(value, (list, tuple, dict, *VIEWS)):
                if depth == 20:
                    raise ValueError("lists are nested too deeply")
                self.spend(len(value))
                inner = [*value, *value.values()] if isinstance(value, dict) else value
                waiting += [(item, depth + 1) for item in inner]
            elif not isinstance(value, (str, int, float, range, Undefined, type(None))):
                raise TypeError

    def items(self, value) -> list:
        """Return what a loop over a value meets."""
        if isinstance(value, SIZED):
            self.spend(len(value))
        elif not isinstance(value, (Undefined, Iterator)):
            raise TypeError
        return list(value)

    def text(self, value) -> Text:
        """Return a value as it is printed."""
        if isinstance(value, Text):
            return value
        self.weigh(value)
        return Text.of("" if isinstance(value, Undefined) else str(value))

    def use(self, table: dict[str, Callable], name: str, value, *args, **options):
        """Return what a filter or a test gives for a value."""
        if not isinstance(name, str) or name not in table:
            raise ValueError(f"{self.text(name):.80} is not known here")
        self.pay(value)
        return table[name](self, value, *args, **options)

    def compare(self, sign: type, left, right) -> bool:
        if sign in (ast.In, ast.NotIn) and isinstance(right, Iterator):
            found = any(self.compare(ast.Eq, item, left) for item in right)
            return found if sign is ast.In else not found
        self.weigh(left)
        self.weigh(right)
        return COMPARISONS[sign](left, right)

    def attribute(self, value, name: str):
        """Return value.name: what a mapping holds under that name."""
        if isinstance(value, Fields):
            return value.names.get(name, Undefined(name))
        # Jinja finds Python's own attributes before a mapping's keys, and a macro has
        # some that are Jinja's.
        kind = str if isinstance(value, str) else type(defined(value))
        if callable(value) or hasattr(kind, name):
            raise ValueError(f"{name:.80} is not known here")
        missing = Undefined(name)
        return value.get(name, missing) if isinstance(value, dict) else missing

    def item(self, value, key):
        """Return value[key]; without such a key, value.key."""
        self.spend(1)
        if isinstance(key, slice):
            return value[key]
        self.weigh(key)
        if isinstance(value, (str, *LISTS)):
            with contextlib.suppress(TypeError, LookupError):
                return value[key]
        if isinstance(key, str):
            return self.attribute(value, key)
        if isinstance(defined(value), FunctionType):
            raise TypeError
        return Undefined("an item")

    def visit(self, node: ast.AST):
        """Return the value of an expression, or do what a statement says: what the
        method for this kind of node does, as in ast.NodeVisitor."""
        self.depth += 1
        try:
            if self.depth > DEEPEST:
                raise ValueError("the template calls itself too deeply")
            kind = type(node).__name__
            if not hasattr(self, f"visit_{kind}"):
                raise ValueError(f"{kind} is not known here")
            value = getattr(self, f"visit_{kind}")(node)
            self.pay(value)
            return value
        except TemplateError:
            raise
        except ValueError as error:
            raise self.error(node, str(error)) from None
        except (TypeError, LookupError, ArithmeticError, AttributeError):
            raise self.error(node, "these values do not fit") from None
        finally:
            self.depth -= 1

    def error(self, node: ast.AST, words: str) -> TemplateError:
        at = self.template.places[node.lineno - 1]
        return self.template.error(at, f"{words}: {self.template.source[at : at + 40]}")

    def variable(self, name: str):
        if name in self.scope:
            return self.scope[name]
        if name in NOT_KNOWN or (name[0] == "0" and name != ELSE[2:]):
            raise ValueError(f"{name.lstrip('0')} is not known here")
        return Undefined(name.lstrip("0"))

    def visit_Constant(self, node: ast.Constant):
        return node.value

    def visit_Name(self, node: ast.Name):
        return self.variable(node.id[2:])

    def visit_List(self, node: ast.List) -> list:
        return [self.visit(item) for item in node.elts]

    def visit_Tuple(self, node: ast.Tuple) -> tuple:
        return tuple([self.visit(item) for item in node.elts])

    def visit_Subscript(self, node: ast.Subscript):
        return self.item(self.visit(node.value), self.visit(node.slice))

    def visit_Attribute(self, node: ast.Attribute):
        """Return value.name, or what a filter or a test gives for the value."""
        value = self.visit(node.value)
        if node.attr.startswith("v_"):
            return self.attribute(value, node.attr[2:])
        return self.filter_or_test(node.attr, value)

    def visit_Call(self, node: ast.Call):
        """Return what value.name(...), a filter, a test or a function gives."""
        function = node.func
        if not isinstance(function, ast.Attribute):
            function = self.visit(function)
            args, options = self.arguments(node)
            return self.call(function, *args, **options)
        value, name = self.visit(function.value), function.attr
        args, options = self.arguments(node)
        if not name.startswith("v_"):
            return self.filter_or_test(name, value, *args, **options)
        name = name[2:]
        methods = METHODS.get(str if isinstance(value, str) else type(value), {})
        if name in methods:
            return self.method(methods[name], value, *args, **options)
        return self.call(self.attribute(value, name), *args, **options)

    def arguments(self, node: ast.Call) -> tuple[list, dict]:
        values = []
        for arg in node.args:
            if isinstance(arg, ast.Starred):
                values += self.items(self.visit(arg.value))
            else:
                values.append(self.visit(arg))
        return values, {o.arg[2:]: self.visit(o.value) for o in node.keywords}

    def filter_or_test(self, word: str, value, /, *args, **options):
        """word: f_ and a filter's name; t_ and a test's; n_ where `not` precedes it."""
        prefix, name = word[:2], word[2:]
        if prefix == "f_":
            return self.use(FILTERS, name, value, *args, **options)
        return self.use(TESTS, name, value, *args, **options) is (prefix == "t_")

    def method(self, method: Callable, owner, /, *args, **options):
        args = [self.items(a) if isinstance(a, Iterator) else a for a in args]
        self.weigh([*args, *options.values()])
        if method in (Text.replace, Text.split):
            self.pay_for_pieces(owner, args[0] if args else options.get("sep"))
        return method(owner, *args, **options)

    def call(self, function, /, *args, **options):
        if not isinstance(defined(function), FunctionType):
            raise TypeError
        return function(self, *args, **options)

    def visit_BoolOp(self, node: ast.BoolOp):
        stop = isinstance(node.op, ast.Or)
        for part in node.values:
            value = self.visit(part)
            if bool(value) is stop:
                break
        return value

    def visit_Compare(self, node: ast.Compare) -> bool:
        left = self.visit(node.left)
        for sign, part in zip(node.ops, node.comparators):
            right = self.visit(part)
            result = self.compare(type(sign), left, right)
            if not result:
                break
            left = right
        return result

    def visit_IfExp(self, node: ast.IfExp):
        return self.visit(node.body if self.visit(node.test) else node.orelse)

    def visit_UnaryOp(self, node: ast.UnaryOp):
        return SIGNS[type(node.op)](self.visit(node.operand))

    def visit_BinOp(self, node: ast.BinOp):
        left, right = self.visit(node.left), self.visit(node.right)
        if isinstance(node.op, ast.Add):  # Jinja's ~
            return self.text(left) + self.text(right)
        return SIGNS[type(node.op)](defined(left), defined(right))

    def visit_Slice(self, node: ast.Slice) -> slice:
        bounds = (node.lower, node.upper, node.step)
        return slice(*[bound and self.visit(bound) for bound in bounds])

    def visit_Dict(self, node: ast.Dict) -> dict:
        result = {}
        for key, value in zip(node.keys, node.values):
            name = key and self.visit(key)
            if not isinstance(name, (str, int, float)):
                raise ValueError("a key must be a text or a number")
            result[name] = self.visit(value)
        return result

    def visit_Expr(self, node: ast.Expr) -> None:
        value = node.value
        # Printed, the filter safe changes nothing. Elsewhere it is not known here,
        # since Jinja escapes for HTML what is added to a safe text.
        if isinstance(value, ast.Attribute) and value.attr == "f_safe":
            value = value.value
        self.output.append(self.text(self.visit(value)))

    def visit_If(self, node: ast.If) -> None:
        self.run(node.body if self.visit(node.test) else node.orelse)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope[node.name[2:]] = macro(node.args, node.body, self.scope)

    def visit_Break(self, node: ast.Break) -> None:
        raise Break

    def visit_Continue(self, node: ast.Continue) -> None:
        raise Continue

    def visit_Pass(self, node: ast.Pass) -> None:
        pass

    def visit_Assign(self, node: ast.Assign) -> None:
        self.assign(node.targets[0], self.visit(node.value))

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def capture(self, body: list[ast.stmt], scope: ChainMap) -> Text:
        """Return what statements print that have variables of their own."""
        outside = self.scope, self.output
        self.scope, self.output = scope, []
        self.run(body)
        text = NOTHING.join(self.output)
        self.scope, self.output = outside
        return text

    def visit_With(self, node: ast.With) -> None:
        """Print what statements print, after its filters, or set a variable to it."""
        block, text = node.items[0], self.capture(node.body, self.scope.new_child())
        outside = self.scope
        self.scope = outside.new_child({BLOCK[2:]: text})
        value = self.visit(block.context_expr)
        self.scope = outside
        if block.optional_vars is None:
            self.output.append(self.text(value))
        else:
            self.assign(block.optional_vars, value)

    def assign(self, target: ast.expr, value) -> None:
        match target:
            case ast.Name(name):
                self.scope[name[2:]] = value
            case ast.Tuple(targets):
                values = self.items(value)
                if len(values) != len(targets):
                    raise ValueError(f"wanted {len(targets)} values, got {len(values)}")
                for part, item in zip(targets, values):
                    self.assign(part, item)
            case ast.Attribute(ast.Name(owner), name) if name.startswith("v_"):
                fields = self.variable(owner[2:])
                if not isinstance(fields, Namespace):
                    raise ValueError("only a namespace has parts that can be set")
                fields.names[name[2:]] = value
            case _:
                raise ValueError("nothing can be assigned to this")

    def visit_For(self, node: ast.For) -> None:
        """Run `for target in [0 for target in values if condition]`."""
        source, scope, output = node.iter.generators[0], self.scope, self.output
        items = self.items(self.visit(source.iter))

        def begin_round(item) -> None:
            self.scope, self.output = scope.new_child(), output
            self.assign(node.target, item)

        def passes(item) -> bool:
            begin_round(item)
            return self.visit(source.ifs[0])

        if source.ifs:
            parts = ast.walk(source.ifs[0])
            names = [part.id[2:] for part in parts if isinstance(part, ast.Name)]
            if any(isinstance(scope.get(name), Namespace) for name in names):
                # Jinja asks before each round, and the one before may have set it.
                raise ValueError("a loop's condition cannot read a namespace here")
            items = [item for item in items if passes(item)]
        completed = False
        for n, item in enumerate(items):
            begin_round(item)
            self.scope["loop"] = loop_fields(items, n)
            try:
                self.run(node.body)
                completed = True
            except Continue:
                pass
            except Break:
                break
        self.scope, self.output = scope.new_child(), output
        # Jinja does this also if every round was ended by break or continue.
        if not completed:
            self.run(node.orelse)
        self.scope = scope


def loop_fields(items: list, n: int) -> Fields:
    """Return the value of `loop` in round n."""
    rest = len(items) - n - 1
    names = {"index": n + 1, "index0": n, "revindex": rest + 1, "revindex0": rest}
    names |= {"first": n == 0, "last": rest == 0, "length": len(items)}
    names |= {"depth": 1, "depth0": 0}
    names |= {"previtem": items[n - 1]} if n > 0 else {}
    names |= {"nextitem": items[n + 1]} if rest > 0 else {}
    return Fields(cycle=lambda run, *values: values[n % len(values)], **names)


def macro(parameters: ast.arguments, body: list[ast.stmt], scope: ChainMap) -> Callable:
    """Return a function that gives what the body prints."""
    names = [parameter.arg[2:] for parameter in parameters.args]
    defaults = dict(zip(reversed(names), reversed(parameters.defaults)))

    def call(run: Rendering, /, *args, **options) -> Text:
        given = dict(zip(names, args))
        if len(args) > len(names) or not options.keys() <= {*names} - given.keys():
            raise ValueError(f"the macro takes {', '.join(names) or 'nothing'}")
        given |= options
        outside, run.scope = run.scope, scope.new_child()
        for name in names:
            if name in given:
                run.scope[name] = given[name]
            elif name in defaults:
                run.scope[name] = run.visit(defaults[name])
            else:
                run.scope[name] = Undefined(name)
        text = run.capture(body, run.scope)
        run.scope = outside
        return text

    return call


class ChatTemplate:
    """A chat template, parsed once."""

    def __init__(self, source: str):
        """Raises TemplateError, with line and column, for what does not parse."""
        if len(source) > LONGEST_TEMPLATE:
            size, most = len(source), LONGEST_TEMPLATE
            raise TemplateError(
                f"a template may have {most:,} characters, not {size:,}"
            )
        source = source.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
        try:
            self._translation = Translation(source)
            self._statements = self._translation.parse()
        except (RecursionError, MemoryError):
            raise TemplateError("the template is nested too deeply") from None

    def render(
        self,
        messages: list[dict],
        names: Mapping[str, str],
        *,
        add_generation_prompt: bool = True,
        **variables,
    ) -> Text:
        """Return a conversation as the template writes it.

        messages: [{"role": text, "content": text or list, ...}, ...]. names: texts that
        count as the template's own, such as bos_token. variables: what else a template
        may ask for, such as enable_thinking; their texts have no known writer.
        Raises RaisedByTemplate where the template does, TemplateError for what fails.
        """
        own = [own_value(message, n) for n, message in enumerate(messages)]
        values = GLOBALS | {"tools": None, "documents": None}
        values |= {name: own_value(value, UNKNOWN) for name, value in variables.items()}
        values |= {name: Text.by(TEMPLATE, text) for name, text in names.items()}
        values |= {"messages": own, "add_generation_prompt": add_generation_prompt}
        # Some templates look at each character, some at each pair of messages.
        characters = sum(len(str(message)) for message in messages)
        steps = 200_000 + 2_000 * len(messages) + 20 * characters
        run = Rendering(self._translation, values, steps)
        try:
            return run.capture(self._statements, run.scope)
        except RecursionError:
            raise TemplateError("the template calls itself too deeply") from None


def own_value(value, writer: int, depth: int = 0):
    """Return a value from outside as templates see it: its texts know their writer."""
    if depth > 15:
        raise ValueError("a message is nested too deeply")
    if isinstance(value, str):
        return Text.by(writer, value)
    if isinstance(value, (list, tuple)):
        return [own_value(item, writer, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        own = {
            Text.by(UNKNOWN, key): own_value(item, writer, depth + 1)
            for key, item in value.items()
        }
        if depth == 0 and own.get("role") in FIXED_ROLES:
            own["role"] = Text.by(TEMPLATE, own["role"])
        return own
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"a message cannot hold a value like this {type(value).__name__}")


# Templates by name, for models that come without one. START takes the system message
# from a conversation, LLAMA3_TURNS writes the others, and TURN begins a turn where user
# and assistant must alternate.
START = """{% set system, turns = none, messages %}
{% if messages[0].role == 'system' %}
{% set system, turns = messages[0].content, messages[1:] %}
{% endif %}
"""
TURN = """{% for message in turns %}
{% if message.role != ['user', 'assistant'][loop.index0 % 2] %}
{{ raise_exception('user and assistant must alternate') }}
{% elif message.role == 'user' %}
"""
LLAMA3_TURNS = """
{%- for message in turns %}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = START + r"{% set system = '' if system is none else system + '\n\n' %}"
MISTRAL += "{{ bos_token }}" + TURN
BUILT_IN = {
    # Part One writes this one by hand; the ids are the same.
    "llama3": "{% set turns = messages %}{{ bos_token }}" + LLAMA3_TURNS,
    "llama3.1": START
    + """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: {{ strftime_now('%d %b %Y') }}

{{ (system or '') | trim }}<|eot_id|>"""
    + LLAMA3_TURNS,
    "llama2": START
    + r"""{% if system is not none %}
{% set system = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' %}
{% endif %}
"""
    + TURN
    + """{% set content = (system or '' if loop.first) ~ message.content %}
{{ bos_token }}[INST] {{ content | trim }} [/INST]
{%- else %}
{{ ' ' + message.content | trim + ' ' + eos_token }}
{%- endif %}
{% endfor %}""",
    "chatml": """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "zephyr": """{% for message in messages %}
<|{{ message.role }}|>
{{ message.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}""",
    "mistral": MISTRAL
    + """[INST] {{ (system if loop.first) ~ message.content }} [/INST]
{%- else %}
{{ message.content + eos_token }}
{%- endif %}
{% endfor %}""",
    "mistral-v3": MISTRAL
    + """[INST] {{ (system if loop.last) ~ message.content }}[/INST]
{%- else %}
{{ ' ' + message.content | trim + eos_token }}
{%- endif %}
{% endfor %}""",
}


# -----------------------------------------------------------------------------
# 13. Other vocabularies
# Section 7 reads Llama 3's kind of vocabulary. Others cut a text into words in another
# way, or in several steps; merge characters instead of bytes (SentencePiece [8], Llama
# 2 and Mistral); put a space before a text; or lack some bytes. A text gets the ids
# that Hugging Face's tokenizers give it:
#
#     it is normalised -> it is cut into words -> the letters of each word are merged
#
# In Mistral's letters a space is one of them, so "Hi <s>" is the word ▁Hi▁<s>. Its
# merges give ▁Hi, ▁<, s and >.
#
# A byte-level vocabulary writes each byte as a letter, so its words have letters like
# any other's, and one way of merging serves all. What a file asks for is read exactly,
# or refused by its name: a wrong split would only show as slightly worse text.
# uses: 1, 4, 7, 11
# needs: Callable, Iterable, Mapping, NamedTuple, Path, Sequence, base64, dataclass,
#     field, functools, itertools, json, operator, re, tiktoken, unicodedata
# -----------------------------------------------------------------------------

# First, what a vocabulary is: how a text becomes words of letters, and pieces text.

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space as this
ANY_TEXT = "(?s:.+)"  # a text as one word
NO_RANK = 2**31

# A step of a pre_tokenizer makes smaller pieces of a piece of a text.
Cut = Callable[[str], list[str]]

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class Decoder(NamedTuple):
    """How pieces become text again."""

    letters: Mapping[str, int]  # the byte that each stands for; {}: they are characters
    replaced: Sequence[tuple[str, str]] = ((SPACE, " "),)
    byte_tokens: bool = True  # <0x0A> is a byte
    # Which spaces are taken away at the start of a text: "one"; "all" of the first
    # token; or none.
    drops: str | None = None

    def text(self, piece: str) -> bytes:
        """Return the text of a piece."""
        if self.letters:  # a byte-level vocabulary may spell a control token as it is
            known = self.letters.keys() >= {*piece}
            return bytes(map(self.letters.get, piece)) if known else piece.encode()
        for old, new in self.replaced:
            piece = piece.replace(old, new)
        byte = BYTE_TOKEN.fullmatch(piece) if self.byte_tokens else None
        return bytes.fromhex(byte[1]) if byte else piece.encode()


BYTE_LEVEL = Decoder(byte_letters())


@dataclass(frozen=True)
class SpelledVocabulary(Vocabulary):
    """A vocabulary of words of letters, and how a text becomes such words."""

    prepend: str = ""  # what the normalizer puts before it
    normalizer: Sequence[Callable[[str], str]] = ()  # its other steps
    steps: Sequence[Cut] = ()  # how it is cut into words
    space: str = " "  # what a space is written as
    # Where a space is put before a text: "missing": unless the text begins with one;
    # "start": as "missing", but only at the start of a document; None: nowhere.
    adds_space: str | None = None
    letters: frozenset[str] = frozenset()
    # Other letters become the tokens of their bytes. Without such tokens they are left
    # out, so that what stands beside them is merged.
    byte_ids: Sequence[int] = ()
    # Words that are not merged, with their ids.
    at_once: Mapping[str, int] = field(default_factory=dict)
    lacking: bytes = b""  # of a byte-level vocabulary: the bytes without a letter
    decoder: Decoder = BYTE_LEVEL

    def normalize(self, text: str, prefix: bool = True) -> str:
        """Return a text in the form that the vocabulary was made from.

        prefix: whether to put before it what the normalizer puts before a text.
        """
        text = self.prepend + text if text and prefix else text
        for step in self.normalizer:
            text = step(text)
        return text

    def cut(self, text: str, add_space: bool) -> list[str]:
        """Return the words of a normalised text.

        add_space: whether one may be put before it, if it begins with none.
        """
        # Half of a character that UTF-16 writes as two is no character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = text.replace(" ", self.space)
        missing = add_space and not text.startswith(self.space)
        if missing and self.adds_space is not None:
            text = self.space + text
        words = [text]
        for step in self.steps:
            words = [part for word in words for part in step(word) if part]
        return words


# Second, from a tokenizer.json to a vocabulary: how it splits, and what it merges.

# How a text is cut into words: GPT-2's way, Llama 3's, and SentencePiece's, which
# writes a space as a letter of its own. PUNCTUATION is one character.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE_SPLIT = f"{SPACE}[^{SPACE}]*|[^{SPACE}]+"
PUNCTUATION = r"[\p{P}$+<=>^`|~]"

MOST_TOKENS = 262_144  # a larger vocabulary is not read
BYTES_PER_TOKEN = 200  # in a tokenizer.json; Llama 3's has 60 to 160
LONGEST_SPLIT, MOST_STEPS = 1_000, 20  # characters of an expression, and steps
MOST_WORK = 10_000_000  # steps to merge pieces one by one; Llama 3 needs 100,000

# The regular expressions that are read: up to twelve rows of characters. They mean the
# same to `re` and to Hugging Face's tokenizers; and since only the last two of a row
# repeat, their time grows at most with the square of a text's length.
CHAR = r"(?:\\[^\w\s<>]|\\[rnt]|&(?!&)|~(?!~)|\|(?!\|)|[^\\\[\]&~|-])"
CATEGORY = r"\\s|\\p\{(?:[LMNPSZ]|L[ultmo]|M[nce]|N[dlo])\}"
CHAR_CLASS = rf"\[\^?(?:{CHAR}(?:-{CHAR})?|{CATEGORY})+\]"
ATOM = rf"(?:{CHAR_CLASS}|{CATEGORY}|\\[^\w\s<>]|\\[rnt]|[^\\\[\](){{}}|?*+^$.])"
REPEATED = rf"{ATOM}(?:[*+]|\{{\d(?:,\d)?\}})"
CONTRACTIONS = (
    r"(?:\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)|'\(\?i?:\[sdmt\]\|ll\|ve\|re\))"
)
BRANCH = (
    rf"(?:(?:{ATOM}\?)?{ATOM}*(?:{REPEATED}){{0,2}}(?:{CONTRACTIONS}\?)?"
    rf"|\\s\+(?:\(\?!\\S\)|\$)|{CONTRACTIONS})"
)
READABLE = re.compile(rf"{BRANCH}(?:\|{BRANCH}){{0,11}}")
# The one with a class within a class (Viking), which `re` does not know.
NESTED = {r" ?[^(\s|[.,!?…。，、।۔،])]+": r" ?[^(\s|.,!?…。，、।۔،)]+"}


# Many texts have no character from here on. For them, the expressions below are made
# without such characters, since to find all letters there are takes 0.2 seconds.
RARE = 0x250


@functools.cache
def characters_of(escape: str, end: int = 0x110000) -> str:
    r"""Return the characters before `end` that an escape, as \p{L}, stands for, as they
    are spelled in a class of a regular expression.

    tiktoken's engine knows them: it drops what an expression does not match. Python's
    own Unicode is older.
    """
    planes = range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    every = tiktoken.Encoding(
        "escape", pat_str=f"{escape}+", mergeable_ranks=ranks, special_tokens={}
    )
    codes = itertools.chain.from_iterable(planes)
    text = "".join(map(chr, itertools.islice(codes, end)))
    ids = every.encode(text, disallowed_special=())
    spans, numbered = [], enumerate(map(ord, every.decode(ids)))
    for _, run in itertools.groupby(numbered, lambda item: item[1] - item[0]):
        codes = [code for _, code in run]
        spans.append(f"{re.escape(chr(codes[0]))}-{re.escape(chr(codes[-1]))}")
    # A class must not be empty: then it has the last character, which is none.
    return "".join(spans) or chr(0x10FFFF)


@functools.lru_cache
def compile_split(regex: str, end: int = 0x110000) -> re.Pattern:
    r"""Return a readable expression as a group for `re`, which has no \p{L}. It holds
    for texts of characters before `end`."""
    outside = rf"({CHAR_CLASS}|\\[^psS])|(\\p\{{\w+\}}|\\s)"
    regex = regex.replace(r"(?!\S)", r"(?![^\s])")
    regex = re.sub(outside, lambda found: found[1] or f"[{found[2]}]", regex)
    inside = r"(\\[^ps])|(\\p\{\w+\}|\\s)"
    spell_out = lambda found: found[1] or characters_of(found[2], end)
    return re.compile(f"({re.sub(inside, spell_out, regex)})", re.MULTILINE)


class Split(NamedTuple):
    """An expression of READABLE that texts are split by."""

    regex: str

    def pattern(self, text: str) -> re.Pattern:
        rare = max(text, default="") >= chr(RARE)
        return compile_split(self.regex, 0x110000 if rare else RARE)

    def split(self, text: str) -> list[str]:
        return self.pattern(text).split(text)

    def findall(self, text: str) -> list[str]:
        return self.pattern(text).findall(text)


def read_split(pattern: dict) -> Split:
    """Return what a folder splits at.

    Raises ValueError for an expression whose meaning, or whose time, is not sure.
    """
    if "String" in pattern:
        regex, readable = re.escape(pattern["String"]), True
    else:
        regex = NESTED.get(pattern["Regex"], pattern["Regex"])
        readable = len(regex) <= LONGEST_SPLIT and READABLE.fullmatch(regex)
    try:
        compiled = Split(regex).pattern("") if readable else None
    except re.error:  # a range that goes backwards
        compiled = None
    if compiled is None:
        raise ValueError(f"unknown split: {regex!r:.80}")
    if compiled.fullmatch(""):
        raise ValueError(f"the split {pattern!r:.80} matches no text")
    return Split(regex)


LETTER_OF = {byte: letter for letter, byte in byte_letters().items()}


def spell(text: str | bytes) -> list[str]:
    """Return a text as one word, whose letters stand for its bytes."""
    encoded = text.encode() if isinstance(text, str) else text
    return [encoded.decode("latin-1").translate(LETTER_OF)]


def leaves(whole: dict | None, key: str) -> list[dict]:
    """Return the steps of a part of a tokenizer.json, also those of a Sequence within a
    Sequence. key: where a Sequence has its steps."""
    steps, waiting = [], [whole] if whole else []
    while waiting:
        step = waiting.pop()
        if key in step:
            waiting += reversed(step[key])
        else:
            steps.append(step)
    return steps


def read_step(step: dict) -> list[Cut]:
    """Return what a step of a pre_tokenizer does. Raises ValueError for what is not
    known."""
    kind, behavior = step.get("type"), step.get("behavior", "Isolated")
    if kind == "ByteLevel":
        words = step.get("use_regex", True)
        return [Split(GPT2_SPLIT).split, spell] if words else [spell]
    if kind == "Metaspace" and step["replacement"] == SPACE:
        return [Split(SPACE_SPLIT).split] if step.get("split", True) else []
    if kind == "Digits":
        each = step["individual_digits"]
        return [Split(r"\p{N}" if each else r"\p{N}+").split]
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        repeated = "+" if behavior == "Contiguous" else ""
        return [Split(PUNCTUATION + repeated).split]
    if kind == "Split" and behavior in ("Isolated", "Removed"):
        found = read_split(step["pattern"])
        if behavior == "Isolated":
            return [found.split]
        if step.get("invert"):  # what is between two matches is removed
            return [found.findall]
    raise ValueError(f"unknown pre_tokenizer {json.dumps(step):.200}")


def prepend_scheme(metaspace: dict) -> str:
    """Return where a Metaspace puts a space. Older files have add_prefix_space."""
    usual = "always" if metaspace.get("add_prefix_space", True) else "never"
    return metaspace.get("prepend_scheme", usual)


def read_pre_tokenizer(spec: dict) -> dict:
    """Return what a tokenizer.json's pre_tokenizer does, as fields of a
    SpelledVocabulary."""
    steps, space, adds_space = [], " ", None
    whole = spec.get("pre_tokenizer")
    parts = leaves(whole, "pretokenizers")
    if len(parts) > MOST_STEPS:
        raise ValueError(f"{len(parts)} steps of splitting, wanted up to {MOST_STEPS}")
    for n, step in enumerate(parts):
        steps += read_step(step)
        spaces = step["type"] == "Metaspace"
        if n and (spaces or step.get("add_prefix_space")):
            raise ValueError(f"unknown pre_tokenizer {json.dumps(whole):.200}")
        if spaces:
            schemes = {"always": "missing", "first": "start", "never": None}
            adds_space = schemes[prepend_scheme(step)]
            space = SPACE
        elif step.get("add_prefix_space"):
            adds_space = "missing"
    return {"steps": steps, "space": space, "adds_space": adds_space}


def read_normalizer(spec: dict) -> dict:
    """Return what a tokenizer.json's normalizer does, as fields of a SpelledVocabulary.

    Raises ValueError for what is not known.
    """
    prepend, steps = "", []
    for step in leaves(spec.get("normalizer"), "normalizers"):
        kind, before, new = step.get("type"), step.get("prepend"), step.get("content")
        old = (step.get("pattern") or {}).get("String")
        # The oldest files leave the type out.
        if kind in ("Prepend", None) and isinstance(before, str) and not steps:
            prepend = before + prepend
        elif kind in ("Replace", None) and old and type(old) is type(new) is str:
            steps.append(operator.methodcaller("replace", old, new))
        elif kind in ("NFC", "NFD", "NFKC", "NFKD"):
            steps.append(functools.partial(unicodedata.normalize, kind))
        else:
            raise ValueError(f"unknown normalizer {json.dumps(step):.200}")
    return {"prepend": prepend, "normalizer": steps}


# The types of the steps of a decoder, in their order: of a byte-level vocabulary, and
# of another. Fuse makes one text of all pieces, and Strip takes a space from it.
BYTE_DECODER = re.compile("ByteLevel (Fuse )?(Strip )?")
DECODER = re.compile("(Replace )*(Metaspace )?(ByteFallback )?(Fuse (Strip )?)?")


def read_decoder(spec: dict, letters: Mapping[str, int], spaced: bool) -> Decoder:
    """Return the decoder of a tokenizer.json. letters: see Decoder.

    spaced: whether a space may be put before a text; without a decoder, it is taken
    away again.
    Raises ValueError for what is not known, or does not fit the vocabulary.
    """
    whole = spec.get("decoder")
    if not whole:
        return Decoder(letters, drops="one" if spaced else None)
    steps = leaves(whole, "decoders")
    kinds = "".join(f"{step.get('type')} " for step in steps)
    known = (BYTE_DECODER if letters else DECODER).fullmatch(kinds)
    replaced, drops = [], None
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern") or {}
        if kind == "Replace":
            old, new = pattern.get("String", ""), step["content"]
            known = known and len(old) >= len(new)  # so that no piece grows
            replaced.append((old, new))
        elif kind == "Metaspace":
            replaced.append((step["replacement"], " "))
            drops = None if prepend_scheme(step) == "never" else "all"
        elif kind == "Strip":
            start = step["start"]
            known = known and step["content"] == " " and not step["stop"] and start < 2
            drops = "one" if start else None
    if not known:
        raise ValueError(
            f"unknown decoder for this vocabulary: {json.dumps(whole):.300}"
        )
    return Decoder(letters, replaced, "ByteFallback" in kinds, drops)


class Merging:
    """The pieces that the merges of a tokenizer.json arrive at.

    The file names pairs that may be joined. tiktoken knows only pieces: it joins any
    two neighbours that make one, and takes a word that is a piece at once. Both do the
    same if every piece is one that merging its own letters arrives at. For while no
    merge crosses the ends of a stretch of letters, the stretch is merged as if it stood
    alone; so two neighbours that make a piece are always those of its last merge.

    With the merges "b c", "a b" and "ab c", abc becomes a bc: nothing arrives at abc.

    made: from every such piece to the rank and the two parts of its last merge; of a
    letter, -1 and the letter.
    """

    def __init__(self, letters: Iterable[str], pairs: Sequence[tuple[str, str]]):
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.made = {letter: (-1, letter, letter) for letter in letters}
        for (left, right), rank in self.ranks.items():
            new = left + right not in self.made
            known = new and left in self.made and right in self.made
            if known and not self.crossed(left, right):
                self.made[left + right] = rank, left, right
        # What is left is little: what no text makes, or has a part of a higher rank.
        others = {left + right for left, right in self.ranks} - self.made.keys()
        if sum(len(piece) ** 2 for piece in others) > MOST_WORK:
            raise ValueError(f"{len(others):,} pieces that no merges may arrive at")
        for piece in others:
            parts = self.last_parts(piece)
            if parts in self.ranks:
                self.made[piece] = self.ranks[parts], *parts

    def crossed(self, left: str, right: str) -> bool:
        """Return whether a merge across the boundary of two parts precedes theirs.

        It undoes the merges of both parts, the newest first. At each moment it looks at
        the two pieces that touch at the boundary.
        """
        left_rank, _, left_half = self.made[left]
        right_rank, right_half, _ = self.made[right]
        while left_rank >= 0 or right_rank >= 0:
            if left_rank > right_rank:
                rank, left = left_rank, left_half
                left_rank, _, left_half = self.made[left]
            else:  # of two pairs of one rank, the left one is merged first
                rank, right = right_rank + 1, right_half
                right_rank, right_half, _ = self.made[right]
            if self.ranks.get((left, right), rank) < rank:
                return True
        return False

    def last_parts(self, piece: str) -> tuple[str, ...]:
        """Return what merging makes of the letters of a piece, down to two parts."""
        parts = [*piece]
        while len(parts) > 2:
            pairs = [*itertools.pairwise(parts)]
            pair = min(pairs, key=lambda pair: self.ranks.get(pair, NO_RANK))
            if pair not in self.ranks:
                break
            at = pairs.index(pair)
            parts[at : at + 2] = [pair[0] + pair[1]]
        return (*parts,)

    def pieces(self) -> list[str]:
        """Return the pieces in the order of their ranks."""
        return sorted(self.made, key=lambda piece: self.made[piece][0])


def rank_letters(
    letters: Iterable[str], pieces: Iterable[str], vocab: Mapping[str, int]
) -> tuple[dict[bytes, int], list[int | None]]:
    """Return ranks that merge letters instead of bytes, and the id of each rank.

    The ranks are: the bytes; the beginnings of letters of several bytes, so that the
    bytes of a letter join before all else; the letters; the pieces. The id of a byte or
    a beginning is None, if it is no token.
    """
    encoded = [letter.encode() for letter in letters]
    ordered = [bytes([byte]) for byte in range(256)]
    ordered += [c[:end] for c in encoded for end in range(2, len(c))]
    ordered += encoded + [piece.encode() for piece in pieces]
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(ordered))}
    ids = {piece.encode(): i for piece, i in vocab.items()}
    return ranks, [ids.get(piece) for piece in ranks]


def read_merges(model: dict) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer.json's model.

    Raises ValueError for what is inconsistent or unknown.
    """
    kind = model.get("type") or "BPE"  # the oldest files leave it out
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"wanted plain BPE, got {key} {model[key]!r:.80}")
    if kind != "BPE":
        raise ValueError(f"wanted plain BPE, got type {kind!r:.80}")
    vocab, ids = model["vocab"], {*model["vocab"].values()}
    whole = all(type(i) is int and 0 <= i < NO_RANK for i in ids)
    if len(ids) < len(vocab) or not whole:
        raise ValueError("the ids of the vocabulary must be whole numbers, each once")
    merges = []
    for merge in model["merges"]:
        if merge[:9] == "#version:":
            continue
        # "a b" before tokenizers 0.20, ["a", "b"] since
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or not vocab.keys() >= {*pair, pair[0] + pair[1]}:
            raise ValueError(
                f"wanted merges of two pieces, all known, got {merge!r:.80}"
            )
        merges.append(pair)
    if not merges or len({*merges}) < len(merges):
        raise ValueError("wanted merges, each once")
    return merges


def read_vocabulary(spec: dict) -> SpelledVocabulary:
    """Return the vocabulary that a tokenizer.json describes.

    Letters stand for bytes (Llama 3, GPT-2, Qwen); or they are characters, and one that
    is not in the vocabulary becomes its bytes' tokens <0xNN> (Llama 2, Mistral).
    Raises ValueError for what is inconsistent or unknown.
    """
    model, vocab = spec["model"], spec["model"]["vocab"]
    merges = read_merges(model)
    spelling = read_normalizer(spec) | read_pre_tokenizer(spec)
    known = byte_letters() if spell in spelling["steps"] else {}
    spaced = spelling["adds_space"] is not None or spelling["prepend"] != ""
    decoder = read_decoder(spec, known, spaced)
    if known:
        letters, byte_ids = known, []
        lacking = bytes(letters[letter] for letter in letters if letter not in vocab)
        if lacking and (model.get("byte_fallback") or model.get("unk_token")):
            unknown = {key: model.get(key) for key in ("byte_fallback", "unk_token")}
            raise ValueError(f"bytes that no token has, and for them {unknown!r:.200}")
    elif model.get("byte_fallback"):
        letters, lacking = [piece for piece in vocab if len(piece) == 1], b""
        byte_ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
        if None in byte_ids:
            raise ValueError(f"the vocabulary lacks <0x{byte_ids.index(None):02X}>")
    else:
        known = json.dumps(spec.get("pre_tokenizer"))
        raise ValueError(f"unknown pre_tokenizer {known:.200}, without byte_fallback")
    letters = [letter for letter in letters if letter in vocab]
    ranks, ids = rank_letters(letters, Merging(letters, merges).pieces(), vocab)
    return SpelledVocabulary(
        ranks,
        ANY_TEXT,
        ids,
        {i: decoder.text(piece) for piece, i in vocab.items()},
        letters=frozenset(letters),
        byte_ids=byte_ids,
        decoder=decoder,
        at_once=vocab if model.get("ignore_merges") else {},
        lacking=lacking,
        **spelling,
    )


# The control tokens behind the ranks of Meta's tokenizer.model: their places among 256.
LLAMA3_TOKENS = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|eom_id|>": 8}
LLAMA3_TOKENS |= {"<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eot_id|>": 9}
LLAMA3_RANKS = 128_000


def rank_file(file: Path, tokens: int) -> tuple[SpelledVocabulary, list[dict]]:
    """Return the vocabulary of Meta's tokenizer.model, which has lines of base64 and
    rank, and its added tokens; the first of them begins a text."""
    lines, text = read_bounded(file, 40 * tokens).splitlines(), {}
    try:
        for token, rank in map(bytes.split, lines):
            text[int(rank)] = base64.b64decode(token)
    except ValueError:
        raise ValueError(
            f"{file}: wanted lines of base64 and rank; a SentencePiece model is not "
            "read, it needs its tokenizer.json"
        ) from None
    size = len(lines)
    vocab = {spell(text[rank])[0]: rank for rank in sorted(text)}
    if [*vocab.values()] != [*range(size)]:
        raise ValueError(f"{file}: wanted the ranks 0 to {size - 1}, each once")
    if size != LLAMA3_RANKS:  # such a file does not say how it splits
        raise ValueError(
            f"{file}: wanted the {LLAMA3_RANKS:,} ranks of Llama 3, got {size:,}; "
            "other models need their tokenizer.json"
        )
    places = LLAMA3_TOKENS.items()
    added = [{"content": t, "id": size + n, "special": True} for t, n in places]
    letters, steps = byte_letters(), (Split(LLAMA3_SPLIT).split, spell)
    ranks, ids = rank_letters(letters, vocab, vocab)
    vocabulary = SpelledVocabulary(
        ranks, ANY_TEXT, ids, text, steps=steps, letters=frozenset(letters)
    )
    return vocabulary, added


# -----------------------------------------------------------------------------
# 14. The tokenizer of a folder
# Every folder adds tokens to its vocabulary: control tokens, and whole words. They are
# found first, and the text between them goes through section 13. So with Mistral 7B,
# whose template (section 12) wrote <s> and whose user typed "Hi <s>":
#
#     parts     <s>    which the template wrote      Hi <s>    which is text
#     words                                          ▁Hi▁<s>   a space is a letter
#     merged                                         ▁Hi  ▁<  s  >
#     ids       1                                    15359, 523, 28713, 28767
#
# With them a folder's tokenizer is whole: `Tokenizer`, at the end, makes ids of texts
# and conversations, and texts of ids.
# uses: 1, 4, 7, 11-13
# needs: Collection, Iterable, Iterator, Mapping, NamedTuple, Path, Sequence, functools,
#     itertools, re, unicodedata
# registers: STOP_NAMES
# -----------------------------------------------------------------------------

# Of other families, and of other Llamas.
STOP_NAMES += [
    "<|eot|>",
    "<|eom|>",
    "<|EOT|>",
    "<|end|>",
    "<|im_end|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<end_of_turn>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
]

# What Unicode calls white space. Python takes \x1c to \x1f for blanks as well.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
WHITE_SPACE += "".join(map(chr, range(0x2000, 0x200B)))


class AddedToken(NamedTuple):
    """A token that is found in a text before the text is cut into words.

    special: it is a control token. lstrip, rstrip: it takes the white space before it,
    or behind it. single_word: only where no letter or digit stands beside it.
    normalized: it is looked for in the normalised text, and in its normalised form.
    """

    content: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def looks_like_control(content: str) -> bool:
    """Return whether some character of a word is no letter, digit, mark, underscore or
    blank: then a template may mean it as a control token, as it means <think>."""
    return any(
        unicodedata.category(character)[0] not in "LMN"
        and not character.isspace()
        and character not in ("_", SPACE)
        for character in content
    )


NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def parts_of_tokens(settings: dict) -> dict[str, str | dict]:
    """Return the tokens that have a part by its name: bos_token and its like, and those
    of a model, as image_token."""
    usual = dict.fromkeys(f"{name}_token" for name in NAMED_TOKENS)
    named = {
        key: value
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, (str, dict))
    }
    extra = settings.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    if named.keys() <= usual.keys():  # else it does not count, as transformers has it
        named |= settings.get("model_specific_special_tokens") or {}
    return {name: token for name, token in (usual | named).items() if token}


def named_tokens(settings: dict) -> dict[str, dict]:
    """Return the tokens that tokenizer_config.json gives a part, by their content, each
    with its fields. They are control tokens."""
    values = [*parts_of_tokens(settings).values()]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        values += [] if isinstance(more, dict) else more
    tokens = [{"content": v} if isinstance(v, str) else v for v in values if v]
    return {token["content"]: token for token in tokens if token["content"]}


def read_added(
    folder: Path, declared: list[dict], vocab: Mapping[str, int], settings: dict
) -> list[AddedToken]:
    """Return the tokens that the files of a folder add to its vocabulary.

    declared: those of tokenizer.json. As transformers has it, their fields may be
    others in tokenizer_config.json, added_tokens.json has only ids, and a token that
    has a part without being declared is added behind all others. vocab: the ids of the
    vocabulary, {} if its tokens have no spelling; then the ids of the files are taken.
    """
    entries = {token["content"]: token for token in declared}
    others = read_json(folder / "added_tokens.json")
    others = {content: {"id": i} for content, i in others.items()}
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        content = token["content"]
        if content in entries:
            entries[content] = token | {"id": entries[content]["id"]}
        else:
            others[content] = token | {"id": int(i)}
    for content, token in sorted(others.items(), key=lambda item: item[1]["id"]):
        entries.setdefault(content, token)
    named = named_tokens(settings)
    if vocab:
        for content, token in named.items():
            entries.setdefault(content, token)
    found, following = [], len(vocab)
    for content, entry in entries.items():
        if not content:
            continue
        special = bool(entry.get("special")) or content in named
        flags = [bool(entry.get(key)) for key in ("lstrip", "rstrip", "single_word")]
        normalized = bool(entry.get("normalized", not special))
        if not vocab:
            token_id = entry["id"]
        elif content in vocab:
            token_id = vocab[content]
        else:  # Hugging Face counts on behind the vocabulary, whatever the files say
            token_id, following = following, following + 1
        found.append(AddedToken(content, token_id, special, *flags, normalized))
    return found


def stands_alone(text: str, start: int, end: int) -> bool:
    """Return whether no letter or digit stands beside a part of a text."""
    beside = text[max(start - 1, 0) : start] + text[end : end + 1]
    letters = characters_of(r"\w")
    return not re.search(f"[{letters}]", beside)


def text_of_word(word: AddedToken, vocabulary: SpelledVocabulary) -> bytes:
    """Return what an added word is printed as: the form in which it is found."""
    form, decoder = word.content, vocabulary.decoder
    form = vocabulary.normalize(form) if word.normalized else form
    text = decoder.text(form)
    # Of a byte-level vocabulary, "é" is the letter of half a character.
    half = decoder.letters and text != text.decode("utf-8", "ignore").encode()
    return form.encode() if half else text


class TokenTable:
    """Added tokens, to be found in texts: at the leftmost place, the longest there."""

    def __init__(self, tokens: Mapping[str, AddedToken]):
        """tokens: by what is looked for."""
        self.tokens = {text: token for text, token in tokens.items() if text}
        self.sizes = sorted({len(text) for text in self.tokens}, reverse=True)
        firsts = "".join({re.escape(text[0]) for text in self.tokens})
        self.firsts = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def longest(self, text: str, start: int, end: int) -> str:
        """Return the longest of what is looked for that begins at `start` and does not
        pass `end`; "" if there is none."""
        for size in self.sizes:
            name = text[start : start + size]
            if start + size <= end and name in self.tokens:
                return name
        return ""

    def split(
        self, text: Text, control: Collection[str]
    ) -> Iterator[tuple[AddedToken | None, int, int]]:
        """Yield the parts of a text in their order: (token, or None for text, start,
        end). control: the contents of those that only a template can write."""
        plain, marks, done, at = str(text), text.marks, 0, 0
        while found := self.firsts.search(plain, at):
            start = found.start()
            name = self.longest(plain, start, len(plain))
            at = start + max(len(name), 1)
            others = marks[start:at].lstrip(TEMPLATE_MARK)
            if name and self.tokens[name].content in control and others:
                # If another text makes the template's token a longer one, the token
                # that the template wrote still counts.
                name = self.longest(plain, start, at - len(others))
                if TEMPLATE_MARK in marks[start:at]:
                    at = start + max(len(name), 1)
            if not name:
                continue
            token, end = self.tokens[name], at
            if token.single_word and not stands_alone(plain, start, end):
                continue
            if token.lstrip:
                start = done + len(plain[done:start].rstrip(WHITE_SPACE))
            if token.rstrip:
                end = len(plain) - len(plain[end:].lstrip(WHITE_SPACE))
            if start >= end:  # white space that the token before took
                continue
            if done < start:
                yield None, done, start
            yield token, start, end
            done = end
        if done < len(plain):
            yield None, done, len(plain)


# The tokenizer of a folder.

LONGEST_WORD = 100  # of those whose ids are remembered


class SpacedStream(TextStream):
    """A stream that takes spaces away from the first text: the one that it begins with,
    or all of them."""

    started = False

    def __init__(self, text: Mapping[int, bytes], drops: str = "one"):
        super().__init__(text)
        self._drops = drops

    def add(self, token: int) -> str:
        encoded = self._text.get(int(token), b"")
        if encoded and not self.started:
            self.started = True
            if self._drops == "all":
                encoded = encoded.replace(b" ", b"")
            encoded = encoded.removeprefix(b" ")
        return self._decoder.decode(encoded)


def read_prefix(spec: dict) -> list[int]:
    """Return the ids that the post_processor of a tokenizer.json puts before a text.

    What it puts behind a text is left out: a model is to go on with the text.
    """
    for step in leaves(spec.get("post_processor"), "processors"):
        parts = step.get("single") or []
        before = itertools.takewhile(lambda part: "SpecialToken" in part, parts)
        names = [part["SpecialToken"]["id"] for part in before]
        if names:
            return [i for name in names for i in step["special_tokens"][name]["ids"]]
        if "cls" in step:  # as BERT's and RoBERTa's have it: text and id
            return [step["cls"][1]]
    return []


def read_tokenizer(
    folder: Path, tokens: int, settings: dict
) -> tuple[SpelledVocabulary, list[AddedToken], list[int]]:
    """Return a folder's vocabulary, its added tokens, and the ids that are put before
    every text.

    tokens: how many there may be. settings: what tokenizer_config.json says.
    """
    file, ranks = folder / "tokenizer.json", folder / "tokenizer.model"
    if file.exists():
        spec = read_json(file, JSON_BYTES + tokens * BYTES_PER_TOKEN)
        prefix = read_prefix(spec)
        vocab, declared = spec["model"]["vocab"], spec.get("added_tokens") or []
        vocabulary = read_vocabulary(spec)
    elif ranks.exists():
        vocabulary, declared = rank_file(ranks, tokens)
        prefix = [declared[0]["id"]]
        vocab = {}
    else:
        raise FileNotFoundError(f"{folder}: no tokenizer.json and no tokenizer.model")
    return vocabulary, read_added(folder, declared, vocab, settings), prefix


# What a folder may leave out, since Hugging Face's class of tokenizers has it.
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END_OF_TEXT = "<|endoftext|>"
USUAL_NAMES = {
    "LlamaTokenizer": LLAMA_NAMES,
    "CodeLlamaTokenizer": LLAMA_NAMES,
    "GPT2Tokenizer": dict.fromkeys(LLAMA_NAMES, END_OF_TEXT),
    "Qwen2Tokenizer": dict.fromkeys(
        ("eos_token", "unk_token", "pad_token"), END_OF_TEXT
    ),
}


def token_names(settings: dict) -> dict[str, str]:
    """Return what chat templates call control tokens, from tokenizer_config.json: from
    bos_token and the like to a token's text."""
    named = parts_of_tokens(settings).items()
    texts = {k: v["content"] if isinstance(v, dict) else v for k, v in named}
    return {k: text for k, text in texts.items() if text and isinstance(text, str)}


def ends_of_texts(
    folder: Path, names: dict[str, str], prefix: list[int], ids_of: Mapping[str, int]
) -> tuple[int | None, list[int]]:
    """Return the id of the token that begins a text, or None, and the ids of those that
    end one. The tokenizer's files name them; the model's files have their ids.

    names: see token_names. prefix: see read_tokenizer. ids_of: from the contents of
    added tokens.
    Raises ValueError for what is no id.
    """
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    bos, eos = (ids_of.get(names.get(name)) for name in ("bos_token", "eos_token"))
    starts = [i for i in (bos, *prefix, config.get("bos_token_id")) if i is not None]
    bos, ends = starts[0] if starts else None, [eos]
    for ids in (config.get("eos_token_id"), generation.get("eos_token_id")):
        ends += ids if isinstance(ids, list) else [ids]
    ends = [i for i in ends if i is not None]
    for i in (*ids_of.values(), *ends, *starts):
        if type(i) is not int or not 0 <= i < NO_RANK:
            raise ValueError(f"token ids must be whole numbers, got {i!r:.200}")
    return bos, ends


def read_template(folder: Path, settings: dict) -> str | None:
    """Return a folder's chat template, None if it has none.

    settings: its tokenizer_config.json.
    """
    template, file = settings.get("chat_template"), folder / "chat_template.jinja"
    if file.exists():
        return read_bounded(file, JSON_BYTES).decode("utf-8-sig")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template


class NoTemplate(ValueError):
    """A conversation cannot be written down for a model."""


def check_conversation(messages: list[dict]) -> None:
    """Raise ValueError unless these are messages, of which the last is the user's, and
    TypeError if they are no list of dicts."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        wanted = 'a list of {"role": ..., "content": ...}'
        raise TypeError(f"messages must be {wanted}, got {messages!r:.80}")
    for n, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"message {n}: role must be system, user or assistant, got {role!r:.80}"
            )
        if not isinstance(content, str):
            raise ValueError(f"message {n}: content must be text, got {content!r:.80}")
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["user"]:
        raise ValueError(f"the last message must be the user's, got roles {roles}")


class Tokenizer(ByteLevelTokenizer):
    """Text to ids and back, for every kind of vocabulary, and conversations to ids, as
    a model's template has them.

    added: the tokens that are found in a text before it is cut into words. Those that
    are special, or end a reply, are control tokens: special_tokens, by their contents.
    The others are words. bos: an id, None if there is none. stop_tokens: end a reply,
    besides those of STOP_NAMES; the first is eos. bos_prefix: what a text on its own
    begins with. rows: how many ids the model knows. template: how conversations are
    written down, in Jinja; None for a base model. token_names: from what templates call
    control tokens (bos_token) to their text. source: whose it is, in messages.
    """

    def __init__(
        self,
        vocabulary: SpelledVocabulary,
        added: Iterable[AddedToken] = (),
        *,
        bos: int | None = None,
        stop_tokens: Sequence[int] = (),
        bos_prefix: Sequence[int] = (),
        rows: int = NO_RANK,
        template: str | None = None,
        token_names: Mapping[str, str] = {},
        source: str = "this tokenizer",
    ):
        ends = {token.id for token in added if token.content in STOP_NAMES}
        ends |= {*stop_tokens}
        control = [token for token in added if token.special or token.id in ends]
        names = {token.content: token.id for token in control}
        super().__init__(vocabulary, names)
        self.bos, self.eos = bos, stop_tokens[0] if stop_tokens else None
        self.template, self.token_names = template, token_names
        self.source, self.rows = source, rows
        self.stop_tokens |= ends
        self.bos_prefix = [*bos_prefix]
        # A word beyond the rows of a model is no word to it.
        words = [t for t in added if t.content not in names and t.id < rows]
        self.added_words = {token.content: token.id for token in words}
        self._text |= {token.id: text_of_word(token, vocabulary) for token in words}
        # If two have the same normalised form, the control token counts.
        known = words + control
        self._raw = TokenTable({t.content: t for t in known if not t.normalized})
        self._normalized = TokenTable(
            {vocabulary.normalize(t.content): t for t in known if t.normalized}
        )
        self._control = {*names.values()}
        self._word_ids = functools.lru_cache(100_000)(self._encode_word)
        if after := self.written_after_a_reply():
            self.end_replies_with(after)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, template: str | None = None
    ) -> "Tokenizer":
        """Return the tokenizer of a model folder, without touching its weights.

        template: a name in BUILT_IN, used whatever the folder says.
        Raises FileNotFoundError or ValueError naming the file at fault.
        """
        folder = Path(folder)
        if template not in (None, *BUILT_IN):
            names = ", ".join(BUILT_IN)
            raise ValueError(f"template must be one of {names}, got {template!r:.80}")
        try:
            return cls._read(folder, template)
        except ValueError as error:
            where = f"{folder}: tokenizer files: "
            where = "" if str(error).startswith(str(folder)) else where
            raise ValueError(f"{where}{error}") from None
        except (AttributeError, LookupError, TypeError) as error:
            # A part of another type than it should be; which one, the error says.
            raise ValueError(f"{folder}: tokenizer files: {error!r}") from error

    @classmethod
    def _read(cls, folder: Path, template: str | None) -> "Tokenizer":
        """Return the tokenizer that the files of a folder describe."""
        rows = read_json(folder / "config.json").get("vocab_size")
        rows = rows if type(rows) is int and rows > 0 else MOST_TOKENS
        tokens = min(rows, MOST_TOKENS)
        limit = JSON_BYTES + tokens * BYTES_PER_TOKEN
        settings = read_json(folder / "tokenizer_config.json", limit)
        older = read_json(folder / "special_tokens_map.json")
        is_new = "added_tokens_decoder" in settings  # then it has the last word
        settings = older | settings if is_new else settings | older
        vocabulary, added, prefix = read_tokenizer(folder, tokens, settings)
        if (size := max(vocabulary.bytes_of_id) + 1) > rows:
            raise ValueError(f"the tokenizer has {size} ids, the model {rows}")
        ids_of = {token.content: token.id for token in added}
        kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
        usual = USUAL_NAMES.get(kind, {})
        # A vocabulary of another kind may have this class too; it lacks some of them.
        if ids_of.keys() >= {*usual.values()}:
            settings = usual | settings
        names = token_names(settings)
        bos, ends = ends_of_texts(folder, names, prefix, ids_of)
        if template is None:
            template = read_template(folder, settings)
        else:  # which needs its tokens, also where a folder does not name them
            template = BUILT_IN[template]
            texts, eos = {t.id: t.content for t in added}, ends[0] if ends else None
            own = {"bos_token": texts.get(bos), "eos_token": texts.get(eos)}
            names = {name: text for name, text in own.items() if text} | names
        return cls(
            vocabulary,
            added,
            bos=bos,
            stop_tokens=ends,
            bos_prefix=prefix,
            rows=rows,
            template=template,
            token_names=names,
            source=str(folder),
        )

    def encode(
        self, text: str, *, first: bool = True, control: Collection[str] = ()
    ) -> list[int]:
        """Return the ids of a text, without BOS.

        What is in a str is ordinary text, and never becomes a control token. In a Text,
        a control token is found where a template wrote all of it. The text between two
        tokens is encoded as one, whoever wrote it.
        first: whether the text begins a document; SentencePiece-style vocabularies put
        a space before it then, so that its first word is a word like any other.
        control: the contents of words that count as control tokens here.
        Raises TypeError for what is no text, and ValueError for a control token that
        the model does not know.
        """
        if not isinstance(text, str):
            raise TypeError(f"wanted a text to encode, got {text!r:.80}")
        ids, control = [], self.special_tokens.keys() | {*control}
        for token, piece, add_space in self._parts(Text.of(text), first, control):
            if token is None:
                for word in self.vocabulary.cut(piece, add_space):
                    # The words of a text come again; a text that is one word does not.
                    short = len(word) <= LONGEST_WORD
                    ids += self._word_ids(word) if short else self._encode_word(word)
            elif token.id < self.rows:
                ids.append(token.id)
            else:
                raise ValueError(
                    f"{self.source}: {token.content!r:.80} has the id {token.id}, the "
                    f"model {self.rows:,} ids"
                )
        return ids

    def _parts(
        self, text: Text, first: bool, control: Collection[str]
    ) -> Iterator[tuple[AddedToken | None, str, bool]]:
        """Yield the parts of a text: (token, its text, _) or (None, a normalised text,
        whether a space is to be put before it)."""
        for token, start, end in self._raw.split(text, control):
            part = text[start:end]
            if token is not None:
                yield token, part, False
                continue
            part = self._normalize(part, first or start > 0)
            for token, at, stop in self._normalized.split(part, control):
                begins = start == at == 0
                add_space = first if begins else self.vocabulary.adds_space == "missing"
                yield token, str(part)[at:stop], add_space

    def _normalize(self, text: Text, prefix: bool) -> Text:
        """Return a text normalised; prefix: see SpelledVocabulary.normalize.

        Where characters of two writers combine into one, the writer of all is unknown.
        """
        whole, parts = self.vocabulary.normalize(str(text), prefix), []
        if whole == text:
            return text
        if not self._normalized.tokens:  # then nobody will ask who wrote it
            return Text.of(whole)
        for run, writer in text.runs():
            part = self.vocabulary.normalize(run, prefix and not parts)
            parts.append(Text.by(writer, part))
        joined = NOTHING.join(parts)
        return joined if joined == whole else Text.of(whole)

    def _encode_word(self, word: str) -> list[int]:
        """Return the ids of a word of letters."""
        at_once = self.vocabulary.at_once.get(word)
        ids = self._merge(word) if at_once is None else [at_once]
        if self._control.isdisjoint(ids):
            return ids
        # A text that spells a control token: letter by letter it is none.
        return [i for letter in word for i in self._merge(letter)]

    def _merge(self, word: str) -> list[int]:
        """Return the ids of what the merges make of a word."""
        own, ids = self.vocabulary, []
        if not own.byte_ids:
            word = "".join(letter for letter in word if letter in own.letters)
        for known, run in itertools.groupby(word, own.letters.__contains__):
            part = "".join(run)
            if known:
                ids += super().encode(part)
            else:
                ids += [own.byte_ids[byte] for byte in part.encode()]
        return ids

    def written_words(self, text: Text) -> set[str]:
        """Return the contents of added words which a template wrote in a text: they are
        control tokens in it, whatever their fields say. White space and ordinary words
        stay text."""
        signs = {*filter(looks_like_control, self.added_words)}
        if not signs:
            return set()
        control = self.special_tokens.keys() | self.added_words.keys()
        found = {
            token.content for token, _, _ in self._parts(text, True, control) if token
        }
        return found & signs

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; control tokens, and ids of no token, are no text."""
        stream = self.stream(drop_space=True)
        return "".join(map(stream.add, ids)) + stream.close()

    def stream(self, *, drop_space: bool = False) -> TextStream:
        """Return a decoder for ids as they come.

        drop_space: take away the space that SentencePiece-style vocabularies put
        before a text, as the decoder does; not wanted where the ids continue one.
        """
        if drop_space and self.vocabulary.decoder.drops:
            return SpacedStream(self._text, self.vocabulary.decoder.drops)
        return super().stream()

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The template, parsed. Raises NoTemplate if there is none, and TemplateError
        if it does not parse."""
        if self.template is None:
            why = f"{self.source} is a base model, it has no chat template"
            file = Path(self.source, "tokenizer_config.json")
            if file.parent.is_dir() and not file.exists():
                why = f"no {file}, where a chat template would be; download incomplete?"
            raise NoTemplate(why)
        return ChatTemplate(self.template)

    def render(self, messages: list[dict[str, str]], **variables) -> Text:
        """Return a conversation as the template writes it; see ChatTemplate.render.

        Raises NoTemplate if no template can write it, and ValueError in the template's
        own words if it refuses this conversation.
        """
        try:
            return self.chat_template.render(messages, self.token_names, **variables)
        except RaisedByTemplate as error:
            raise ValueError(f"{self.source}: chat template: {error}") from None
        except TemplateError as error:
            raise NoTemplate(f"{self.source}: chat template: {error}") from None

    def encode_chat(
        self,
        messages: list[dict[str, str]],
        *,
        replies: Mapping[str, list[int]] = {},
        **variables,
    ) -> list[int]:
        """Return the ids of a whole conversation, up to where the reply begins.

        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...], the
        user's last. replies: the ids that the model wrote for a content. Where the
        template writes the whole content they are taken as they are: encoded anew, the
        same text could get other ids than the cache holds. variables: what else the
        template may ask for, as enable_thinking.
        Raises ValueError for messages that are none, or that the template refuses, and
        NoTemplate where no template can write them.
        """
        check_conversation(messages)
        prompt = self.render(messages, **variables)
        return self.encode_prompt(prompt, messages, replies)

    def encode_prompt(
        self, prompt: Text, messages: list[dict], replies: Mapping[str, list[int]]
    ) -> list[int]:
        """Return the ids of a conversation that is rendered; see encode_chat."""
        control = self.written_words(prompt)

        def encode(start: int, end: int | None) -> list[int]:
            return self.encode(prompt[start:end], first=start == 0, control=control)

        ids, at, end = [], 0, 0
        for run, writer in prompt.runs():
            start, end = end, end + len(run)
            message = messages[writer] if writer >= 0 else {}
            if message == {"role": "assistant", "content": run} and run in replies:
                # What precedes a reply is encoded as when it had not been written.
                ids += encode(at, self.reply_start(prompt, start, replies[run]))
                ids += replies[run]
                at = end
        return ids + encode(at, None)

    def reply_start(self, prompt: str, start: int, ids: list[int]) -> int:
        """Return where a reply's ids begin in a prompt, whose text begins at `start`: a
        space before it belongs to them, if they begin with one that is not printed."""
        stream = self.stream()
        with_space = "".join(map(stream.add, ids)) + stream.close()
        own_space = self.decode(ids) != with_space and prompt[start - 1 : start] == " "
        return start - 1 if own_space else start

    def end_replies_with(self, token: AddedToken) -> None:
        """Make a token, such as an added word, a control token that ends a reply."""
        self.special_tokens[token.content] = token.id
        self.added_words.pop(token.content, None)
        self._text[token.id] = b""
        self._control.add(token.id)
        self.stop_tokens.add(token.id)

    def written_after_a_reply(self) -> AddedToken | None:
        """Return the control token that the template writes right after a reply, if
        any; see written_words."""
        reply = {"role": "assistant", "content": "!"}
        talk = [{"role": "user", "content": "?"}, reply]
        try:
            prompt = self.render(talk, add_generation_prompt=False)
        except ValueError:
            return None
        last = prompt.marks.rfind(Text.by(1, "!").marks)
        if last < 0:  # the template leaves the reply out
            return None
        after = prompt[last + 1 :]
        control = self.special_tokens.keys() | self.added_words.keys()
        for token, text, _ in self._parts(after, True, control):
            name = token.content if token else ""
            if name in self.special_tokens or looks_like_control(name):
                return token
            if text.strip(" "):
                break
        return None


# -----------------------------------------------------------------------------
# 15. Sampling options
# What a user, or a folder's generation_config.json, may ask of the sampler: each option
# has an interval, and what is outside of it is refused with both. What else a
# generation_config.json may hold, and has no effect here, is named. For example:
#
#     generation_config.json     {"temperature": 0.7, "top_k": 40, "num_beams": 4}
#     options of the sampler     temperature 0.7, top_k 40, and the usual top_p 0.9
#     named, without effect      num_beams
#
# uses: 1, 4, 8, 11
# needs: Path
# -----------------------------------------------------------------------------

INTERVALS = {  # from an option to its minimum and its maximum
    "temperature": (0, 1e9),
    "top_k": (-1, 1e9),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 1e9),
}


def interval(name: str) -> str:
    """Return an option's interval as it is written, [0, 1] for instance."""
    least, greatest = INTERVALS[name]
    greatest = "1e9" if greatest == 1e9 else greatest
    return f"[{least}, {greatest}]"


def check_sampling(**options: float | None) -> None:
    """Raise ValueError, naming interval and value, for an option outside of it."""
    for name, value in options.items():
        if value is None:
            continue
        least, greatest = INTERVALS[name]
        inside = type(value) in (int, float) and least <= value <= greatest
        if inside and name == "top_k":
            inside = value == int(value)
        if not inside:
            kind = ", a whole number" if name == "top_k" else ""
            raise ValueError(
                f"{name} must be in {interval(name)}{kind}, got {value!r:.80}"
            )


def typed_number(name: str, text: str, least: int = 0) -> float:
    """Return the number that is typed for an option. Those of sampling have intervals,
    the others are whole numbers of at least `least`.

    Raises ValueError for any other text.
    """
    if name in INTERVALS:
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {text!r}") from None
        if name == "top_k" and number.is_integer():
            number = int(number)
        check_sampling(**{name: number})
        return number
    if not text.isdecimal() or not least <= int(text) < 2**63:
        wanted = f"a whole number in [{least}, 2**63)"
        raise ValueError(f"{name} must be {wanted}, got {text!r}")
    return int(text)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that MLX makes no key of random numbers from."""
    if not hasattr(seed, "__index__") or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed!r:.80}")


class CheckedSampler(Sampler):
    """A Sampler of options that were checked.

    Raises ValueError with the interval and the value for an option outside of it.
    """

    def __post_init__(self):
        check_sampling(**{name: getattr(self, name) for name in INTERVALS})
        if self.temperature is None:  # the others may be None, which turns them off
            raise ValueError("temperature must be a number, got None; 0 is greedy")
        super().__post_init__()
        check_seed(self.seed)


make_sampler = CheckedSampler  # generate(..., sampler=make_sampler(temperature=0.0))


# What else generation_config.json may have, with the value that changes nothing; an
# empty one never does. Lengths are left out: a chat has no limit of its own.
WITHOUT_EFFECT = {"num_beams": 1, "guidance_scale": 1, "typical_p": 1}
WITHOUT_EFFECT |= dict.fromkeys(("no_repeat_ngram_size", "penalty_alpha"), 0)
WITHOUT_EFFECT |= dict.fromkeys(("min_new_tokens", "min_length"), 0)
WITHOUT_EFFECT |= dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), 0)
WITHOUT_EFFECT |= dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"))
WITHOUT_EFFECT |= dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"))
WITHOUT_EFFECT |= dict.fromkeys(("bad_words_ids", "sequence_bias", "stop_strings"))
WITHOUT_EFFECT |= dict.fromkeys(("exponential_decay_length_penalty", "top_h"))


def without_effect(folder: Path) -> list[str]:
    """Return the keys of generation_config.json that would change what transformers
    writes, and change nothing here."""
    config = read_json(folder / "generation_config.json")
    given = [(key, config.get(key)) for key in WITHOUT_EFFECT]
    nothing = (None, "", [], {})
    return [k for k, v in given if v not in nothing and v != WITHOUT_EFFECT[k]]


def default_sampling(folder: Path) -> dict[str, float | None]:
    """Return make_sampler's options as generation_config.json has them.

    Where it is silent: temperature 0.6 and top_p 0.9, as Meta's Llama 3 has it.
    Raises ValueError naming the file if it has one out of range.
    """
    file = folder / "generation_config.json"
    config = read_json(file)
    given = {name: config[name] for name in INTERVALS if config.get(name) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0.0
    usual = {"temperature": Sampler.temperature, "top_p": Sampler.top_p}
    options = usual | given
    try:
        check_sampling(**options)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return options


# -----------------------------------------------------------------------------
# 16. This machine
# What is best here: in which numbers to compute, how many tokens to read at a time, how
# many to draft, how long a context to allow. And what there is: memory, and on a CPU a
# fast library of matrix products, OpenBLAS.
#
#                           computes in           tokens at a time     drafts
#     Metal                 what the files hold                512          7
#     CUDA                  what the files hold               2048         15
#     CPU, with OpenBLAS    float32                            128          0
#     CPU, without          float32                             24          0
#
# uses: 1, 2
# needs: Iterable, Mapping, ctypes, math, mx, os, sys
# -----------------------------------------------------------------------------


def default_dtype() -> mx.Dtype | None:
    """Return what to compute in: None, which is what the files hold, on a GPU. MLX's
    CPU backend multiplies packed matrices many times faster in float32 than in 16 bits.
    """
    return mx.float32 if mx.default_device() == mx.cpu else None


def chosen_dtype(wanted: mx.Dtype | None) -> mx.Dtype | None:
    """Return what to compute in: what is wanted, or the default_dtype of this machine.
    Raises ValueError for what is no dtype of floating-point numbers."""
    if wanted is None:
        return default_dtype()
    if not isinstance(wanted, mx.Dtype) or not mx.issubdtype(wanted, mx.floating):
        raise ValueError(f"dtype must be floating, as mlx.core.float16, got {wanted!r}")
    return wanted


def has_openblas() -> bool:
    """Return whether OpenBLAS computes the matrix products of this CPU.

    MLX's wheel for CPUs on Linux carries the reference BLAS, whose products take twenty
    to a hundred times as long. MLX calls OpenBLAS instead if the names of this are
    visible when MLX is loaded; the imports of this file see to it.
    """
    return hasattr(ctypes.CDLL(None), "openblas_get_config")


def holds_dequantized(nbytes: int) -> bool:
    """Return whether this machine is to hold a packed model dequantized: on a CPU where
    OpenBLAS makes up for it, if its `nbytes` in float32 are a third of the memory.
    """
    on_cpu = mx.default_device() == mx.cpu
    return on_cpu and has_openblas() and 3 * nbytes <= machine_memory()


LARGE_FOR_CPU = 50_000_000  # parameters


def slow_products(parameters: int) -> str | None:
    """Return a warning if a large model runs on a CPU of Linux without OpenBLAS."""
    if mx.default_device() != mx.cpu or sys.platform != "linux" or has_openblas():
        return None
    if parameters <= LARGE_FOR_CPU:
        return None
    return "slow without OpenBLAS, which MLX would use here: apt install libopenblas0"


def default_prefill_step() -> int:
    """Return how many tokens to read at a time here.

    A step cannot be interrupted. On a CPU a long one takes seconds, and is no faster
    per token, except that OpenBLAS needs some 128 rows to be at its fastest. On CUDA a
    step costs some 25 ms of launches whatever its length, so long steps are faster.
    """
    if mx.default_device() == mx.cpu:
        return 128 if has_openblas() else 24
    return 2048 if mx.cuda.is_available() else 512


def default_drafts() -> int:
    """Return how many tokens to draft at a time here: none on a CPU, which takes 16
    times as long for 16 tokens as for one. MLX's kernels for Metal that multiply a
    matrix by a vector take up to 8 rows, a token and 7 drafts."""
    if mx.default_device() == mx.cpu:
        return 0
    return 15 if mx.cuda.is_available() else 7


def is_cast(info: TensorInfo, dtype: mx.Dtype | None) -> bool:
    """Return whether a tensor is cast when it is read; dtype: see read_weights."""
    kind = DTYPES[info.dtype]
    return dtype is not None and kind != dtype and mx.issubdtype(kind, mx.floating)


def memory_of(tensors: Iterable[TensorInfo], dtype: mx.Dtype | None) -> int:
    """Return the bytes that tensors take loaded; dtype: see read_weights."""
    return sum(
        math.prod(info.shape) * dtype.size if is_cast(info, dtype) else info.nbytes
        for info in tensors
    )


def adopted_bytes(tensors: Iterable[TensorInfo], dtype: mx.Dtype | None) -> int:
    """Return the bytes of tensors from which a model computes in place, as Metal can;
    dtype: see read_weights."""
    if not mx.metal.is_available() or mx.default_device() == mx.cpu:
        return 0
    in_place = [t for t in tensors if t.adoptable and not is_cast(t, dtype)]
    return sum(info.nbytes for info in in_place)


def cache_item_size(tensors: Mapping[str, TensorInfo], dtype: mx.Dtype | None) -> int:
    """Return the bytes of a number in the cache, which is of the norms' dtype."""
    return (dtype or DTYPES[tensors["model.norm.weight"].dtype]).size


DEFAULT_CONTEXT = 8192  # tokens, of a model that can have as many


def kv_bytes_per_token(args: ModelArgs, item_size: int) -> int:
    """Return the bytes that one token takes in the cache: a key and a value a layer."""
    heads = args.num_hidden_layers * args.num_key_value_heads
    return 2 * heads * args.head_dim * item_size


def machine_memory() -> int:
    """Return the bytes that a model can use here."""
    device = mx.device_info()
    if mx.metal.is_available():
        return device["max_recommended_working_set_size"]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return device.get("total_memory") or physical


def wired_limit() -> int | None:
    """Return the bytes that Metal recommends to keep on the GPU, None elsewhere."""
    return machine_memory() if mx.metal.is_available() else None


def gigabytes(nbytes: float) -> str:
    """Return a size in GB, or in the first unit below that shows two digits of it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size / 10:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} bytes"


class MemoryTooSmall(ValueError):
    """Weights and cache, in bytes, do not fit into `there`."""

    def __init__(self, weights: int, cache: int, there: int):
        self.weights, self.cache, self.there = weights, cache, there
        parts = f"{gigabytes(weights)} of weights and {gigabytes(cache)} of cache"
        super().__init__(f"{parts} do not fit {gigabytes(there)} of memory")


def require_memory(weights: int, cache: int) -> str | None:
    """Return a warning if weights and cache, in bytes, nearly fill what Metal allows.

    Raises MemoryTooSmall if they do not fit this machine.
    """
    needed, there, limit = weights + cache, machine_memory(), wired_limit()
    if needed > there:
        raise MemoryTooSmall(weights, cache, there)
    if limit is None or needed < 0.9 * limit:
        return None
    parts = f"{gigabytes(weights)} of weights and {gigabytes(cache)} of cache"
    advice = f"sudo sysctl iogpu.wired_limit_mb={needed // 1_000_000 + 4000}"
    return f"{parts}, of {gigabytes(limit)} that Metal recommends; if slow: {advice}"


def require_room(parameters: int, weights: int, cache: int) -> list[str]:
    """Return what to warn of before a model is loaded, of memory and of speed.

    weights, cache: bytes. Raises MemoryTooSmall.
    """
    found = require_memory(weights, cache), slow_products(parameters)
    return [text for text in found if text]


def choose_context(args: ModelArgs, wanted: int | None) -> tuple[int, str | None]:
    """Return how many tokens of context a model gets, and a warning if these are more
    than it was made for, or fewer because of its sliding window.

    wanted: None is the longest, at most DEFAULT_CONTEXT.
    Raises ValueError if a token could not see all of it.
    """
    longest, window = args.max_position_embeddings, args.sliding_window
    context = min(args.longest_context, DEFAULT_CONTEXT) if wanted is None else wanted
    most, reason = 2**31 - 1, ""
    if window is not None:
        most, reason = window, ", the model's sliding window"
    if not hasattr(context, "__index__") or not 1 <= context <= most:
        raise ValueError(f"the context must be in [1, {most}]{reason}, got {context!r}")
    if context > longest:
        return context, (
            f"the context is {context} tokens; the model was made for {longest} "
            "(max_position_embeddings)"
        )
    if wanted is None and context == window and window < longest:
        return context, f"the context is {window} tokens{reason}"
    return context, None


# -----------------------------------------------------------------------------
# 17. Checked loading
# From a folder of anyone's making to a model that is ready to run. A folder is found,
# its files are compared with each other, and what is wrong is said before a weight is
# read. Model folders come from strangers, so everything is checked here, and trusted
# after this. Read `load` first, at the end: it is the way through this section.
#
#     a header     "model.norm.weight": {"dtype": "BF16", "shape": [2048], ...}
#     config.json  "hidden_size": 4096
#     examine      raises: 1 tensors not as config.json says: model.norm.weight is BF16
#                  [2048], wanted F32/F16/BF16 [4096]
#
# uses: 1-7, 11-14, 16
# needs: Callable, Iterable, Iterator, Mapping, Path, dataclass, difflib, math, mx, os,
#     re, replace, safetensors, tree_flatten
# -----------------------------------------------------------------------------


def hub_folder() -> Path:
    """Return where huggingface_hub keeps models: HF_HUB_CACHE, else hub/ in HF_HOME,
    else huggingface/hub in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    old_name = os.environ.get("HUGGINGFACE_HUB_CACHE")
    hub = os.environ.get("HF_HUB_CACHE") or old_name or f"{home}/hub"
    return Path(os.path.expandvars(os.path.expanduser(hub)))


def snapshots_of(repo: Path) -> list[Path]:
    """Return the folders that a model's entry in the Hugging Face cache offers: that of
    its branch main, or without one those of all revisions that were downloaded."""
    main, found = repo / "refs" / "main", (repo / "snapshots").glob("*")
    if main.is_file():
        found = [repo / "snapshots" / main.read_text("utf-8", "replace").strip()]
    return sorted(path for path in found if path.is_dir())


# What a folder may hold in the place of model.safetensors.
FOREIGN_FILES = {
    "adapter*": "a LoRA adapter, which is to be merged into its model first",
    "*.gguf": "GGUF, the format of llama.cpp",
    "consolidated*": "the layout of Meta or Mistral, wanted that of Hugging Face",
    "*.bin": "a pickle of PyTorch, which can run code",
    "*.pth": "a pickle of PyTorch, which can run code",
    "*.pt": "a pickle of PyTorch, which can run code",
    "*.h5": "weights of TensorFlow",
    "*.msgpack": "weights of Flax",
    "*.onnx": "ONNX, a format for other programs",
    "openvino*": "the format of OpenVINO",
    "*.npz": "arrays of NumPy, as older converters of MLX wrote them",
    "*-of-*.safetensors": "a shard without model.safetensors.index.json",
    "*.safetensors": "of another name",
}


def foreign_file(files: Iterable[Path]) -> str:
    """Return the name of a file that holds weights in another way, and which way that
    is; "" if there is none."""
    files = sorted(files)
    for pattern, what in FOREIGN_FILES.items():
        for file in files:
            if file.match(pattern):
                return f"{file.name}, {what}"
    return ""


def first_few(names: Iterable[str]) -> str:
    """Return the first four of names in their order, and whether there are more."""
    names = sorted(names)
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)


def missing_weights(folder: Path) -> str:
    """Return why a folder may have no weights, and what is wanted in its place."""
    if other := foreign_file(folder.glob("*")):
        return f"there is {other}"
    below = set()
    for place in ("*", "snapshots/*", "*/snapshots/*"):  # the last two: of a cache
        files = folder.glob(f"{place}/model.safetensors*")
        below |= {str(file.parent.relative_to(folder)) for file in files}
    if below:
        return f"wanted one of its folders: {first_few(below)}"
    cached = folder.match("models--*") or folder.match("snapshots/*")
    if cached or any(folder.glob("config.json")) or any(folder.glob("tokenizer*")):
        return "download incomplete?"
    return "wanted a folder with config.json, model.safetensors and tokenizer.json"


def similar_models(name: str, hub: Path) -> str:
    """Return up to three models of a cache that a name may mean; "" if none is like
    it."""
    there = [path.name[8:].replace("--", "/") for path in hub.glob("models--*")]
    near = [known for known in there if name.lower() in known.lower()]
    near = near or difflib.get_close_matches(name, there, 3, 0.5)
    return ", ".join(sorted(near)[:3])


class NoSuchModel(FileNotFoundError):
    """A name is neither a folder nor one of the Hugging Face cache."""


def find_cached(name: str, hub: Path) -> Path:
    """Return the folder of org/name in a Hugging Face cache; raises as find_folder."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        near = similar_models(name, hub)
        near = f"; {hub} has {near}" if near else ""
        raise NoSuchModel(f"{name}: no such folder, and not of the form org/name{near}")
    entry = hub / f"models--{name.replace('/', '--')}"
    found = snapshots_of(entry)
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(path.name for path in found[:4])
        raise FileNotFoundError(
            f"{name}: {len(found)} revisions in {hub} and none is main, {some}; give "
            f"the folder of one: {found[0]}"
        )
    if entry.is_dir():
        raise FileNotFoundError(
            f"{name}: {entry} does not hold its branch main; to get it: hf download "
            f"{name}"
        )
    near = similar_models(name, hub)
    near = f", which has {near}" if near else ""
    raise FileNotFoundError(
        f"{name}: no such folder, and not in {hub}{near}; to get it: hf download {name}"
    )


def find_folder(model: str | Path) -> Path:
    """Return the folder of a model: a path, or org/name in the Hugging Face cache.

    Nothing is fetched. Raises FileNotFoundError that says how to get it.
    """
    path = Path(model)
    if not path.exists():
        return find_cached(str(model), hub_folder())
    if path.is_dir():
        found = snapshots_of(path)  # if it is a model's entry in the cache
        return found[0] if len(found) == 1 else path
    if path.suffix != ".safetensors" and (other := foreign_file([path])):
        raise FileNotFoundError(f"{model}: this is {other}")
    raise FileNotFoundError(f"{model}: a file, wanted the folder that it is in")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights, in order of their names.

    Those that model.safetensors.index.json names, else model.safetensors; stray files
    beside them are not read. Raises FileNotFoundError if one is missing, ValueError
    for a name that is not a plain file name: an index must not point elsewhere; and
    for both kinds of weights in one folder.
    """
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map must be an object that names files")
        for name in weight_map.values():
            if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
                raise ValueError(
                    f"{index}: wanted plain names that end in .safetensors, got "
                    f"{name!r:.80}"
                )
        names = sorted(set(weight_map.values()))
        # transformers reads this one, mlx-lm what the index names.
        if "model.safetensors" not in names and (folder / "model.safetensors").exists():
            raise ValueError(
                f"{folder}: both model.safetensors and {index.name}, which names "
                f"{first_few(names)}; wanted one of the two"
            )
    if missing := [name for name in names if not (folder / name).exists()]:
        begun = index.exists()
        reason = "download incomplete?" if begun else missing_weights(folder)
        raise FileNotFoundError(f"{folder}: no {first_few(missing)}; {reason}")
    return [folder / name for name in names]


def header_bytes(file: Path) -> bytes:
    """Return what precedes the tensors of a safetensors file: a length, then JSON.

    Raises ValueError naming the file if it is something else.
    """
    size = file.stat().st_size
    if not file.is_file() and not file.is_dir():  # opening a pipe may never end
        raise ValueError(f"{file}: not a regular file")
    with open(file, "rb") as stream:
        refuse_pointer(file, stream.peek(100))
        prefix = stream.read(8)
        # A header may grow with the file, as that of a session does.
        length, limit = int.from_bytes(prefix, "little"), JSON_BYTES + size // 10
        if length > limit:
            raise ValueError(
                f"{file}: not a safetensors file: wanted a header of at most {limit:,} "
                f"bytes, got {length:,}"
            )
        return prefix + stream.read(length)


LARGEST_TENSOR = 2**31 - 2**16  # numbers


def checked_header(file: Path) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, as read_header, once it is found sound.

    The safetensors package judges the header. Its parser is fuzzed, but its readers
    need NumPy; so it is given the header alone. For a sound header its only complaint
    is then that the data is "not fully covered"; the file's size is checked here.
    Raises ValueError naming the file if it is not sound.
    """
    header = header_bytes(file)
    try:
        safetensors.deserialize(header)
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing: ")
        if "not fully covered" not in reason:
            raise ValueError(f"{file}: not a safetensors file: {reason:.200}") from None
    tensors, end, size = read_header(file), len(header), file.stat().st_size
    for info in tensors.values():
        end = info.start + info.nbytes
        # It is read as one row of numbers, which MLX counts in 32 bits, with up to a
        # page before and behind it.
        largest = max(math.prod(info.shape), *info.shape, 0)
        if info.dtype not in DTYPES or largest > LARGEST_TENSOR:
            raise ValueError(
                f"{file}: {info.name} has dtype {info.dtype}, shape {list(info.shape)};"
                f" wanted {', '.join(DTYPES)}, at most {LARGEST_TENSOR} numbers"
            )
    if end != size:
        raise ValueError(f"{file}: truncated or edited? {size} bytes, wanted {end}")
    return tensors


# What a file may hold where a model has an array of a dtype.
STORED_AS = {mx.float32: ("F32", "F16", "BF16"), mx.uint32: ("U32",), mx.uint8: ("U8",)}

# mode: (group sizes, bits), of what mx.quantized_matmul offers
QUANTIZATION_MODES = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def unfit_quantization(model: Llama, settings: dict) -> Iterator[str]:
    """Yield which packed layers cannot be computed, or contradict config.json.

    settings: its quantization, which may hold an entry of its own for a layer's path.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantizedMatrix):
            continue
        sizes, widths = QUANTIZATION_MODES[layer.mode]
        if layer.group_size not in sizes or layer.bits not in widths:
            got = f"group_size {layer.group_size}, bits {layer.bits}, mode {layer.mode}"
            yield f"{path}: cannot compute with {got}; known: {QUANTIZATION_MODES}"
            continue
        own = settings.get(path) if isinstance(settings.get(path), dict) else settings
        for key in ("group_size", "bits", "mode"):
            if own.get(key) not in (None, getattr(layer, key)):
                has = f"{path} has {key} {getattr(layer, key)}"
                yield f"{has}, but config.json says {own[key]!r:.80}"


def wanted_extras(config: dict, args: ModelArgs) -> set[str]:
    """Return the names of the biases and norms that the layers have beside the tensors
    of every family: a Qwen2's, a Qwen3's, and those that config.json asks for."""
    family, extras = config.get("model_type"), []
    if family == "qwen2":
        extras += [f"self_attn.{name}_proj.bias" for name in "qkv"]
    if family == "qwen3":
        extras += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    if family in ("llama", "qwen3") and config.get("attention_bias"):
        extras += [f"self_attn.{name}_proj.bias" for name in "qkvo"]
    if family == "llama" and config.get("mlp_bias"):
        extras += [f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")]
    layers = range(args.num_hidden_layers)
    return {f"model.layers.{n}.{extra}" for n in layers for extra in extras}


def grouped(names: Iterable[str], what: str) -> Iterator[str]:
    """Yield a line that names the first few of some tensors, if there are any."""
    if names := [*names]:
        yield f"{len(names)} tensors {what}: {first_few(names)}"


def mismatches(
    model: Llama, tensors: Mapping[str, TensorInfo], extras: set[str]
) -> Iterator[str]:
    """Yield how tensors differ from what a model wants, one line for each kind.

    extras: see wanted_extras; `build_model` takes them from the tensors.
    """
    arrays = dict(tree_flatten(model.parameters()))
    optional = (".bias", ".q_norm.weight", ".k_norm.weight")
    wanted = {name for name in arrays if not name.endswith(optional)} | extras
    # Old checkpoints carry the rotary frequencies, which are computed here.
    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    shapes = []
    for name in sorted(found & arrays.keys()):
        info, shape = tensors[name], arrays[name].shape
        if info.shape != shape or info.dtype not in STORED_AS[arrays[name].dtype]:
            want = f"{'/'.join(STORED_AS[arrays[name].dtype])} {list(shape)}"
            shapes.append(f"{name} is {info.dtype} {list(info.shape)}, wanted {want}")
    yield from grouped(wanted - found, "missing")
    yield from grouped(found - wanted, "unexpected")
    if any(name.endswith(optional) for name in wanted ^ found):
        yield f"config.json wants {len(extras)} biases and norms in the layers"
    yield from grouped(shapes, "not as config.json says")


def same_data(one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = map_file(one.file)[one.start :], map_file(other.file)[other.start :]
    return left[: one.nbytes] == right[: one.nbytes]


EMBEDDING = "model.embed_tokens"


def untied_head(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Yield which tensors of the head differ from the embedding's, whose copy it should
    be. Reads them."""
    for name in tensors:
        if not name.startswith("lm_head."):
            continue
        other = tensors.get(name.replace("lm_head", EMBEDDING))
        if other is None or not same_data(tensors[name], other):
            yield f"tie_word_embeddings is true, but {name} is not the embedding's"


def read_settings(folder: Path) -> tuple[dict, ModelArgs]:
    """Return a folder's config.json, and the shape that it describes.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder}: no config.json")
    config = read_json(file)
    try:
        return config, read_args(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def require_kind(folder: Path) -> None:
    """Raise what `examine` says of a folder that is another kind of model, as the names
    of its files and config.json tell. It says more than that a tokenizer is missing."""
    weight_files(folder)
    read_settings(folder)


# What tensors of these names, or of names with this in them, belong to.
FOREIGN_TENSORS = {
    "language_model.": "a model of pictures or sound and text",
    "lora_": "a LoRA adapter, which is to be merged into its model first",
    ".experts.": "a mixture of experts",
    ".qweight": "weights that GPTQ or AWQ has quantized",
    "tok_embeddings.": "the layout of Meta or Mistral, wanted that of Hugging Face",
}


def checked_model(
    config: dict, args: ModelArgs, tensors: Mapping[str, TensorInfo]
) -> Llama:
    """Return a model for these tensors, without its weights.

    Raises ValueError if they are not a Llama's, or cannot be computed.
    """
    for part, what in FOREIGN_TENSORS.items():
        if names := [name for name in tensors if part in name]:
            raise ValueError(f"{names[0]} is a tensor of {what}")
    # A module for each of a billion layers would take all memory: not begun. A layer
    # has nine tensors at least.
    if (layers := args.num_hidden_layers) > max(len(tensors) // 9, 1000):
        raise ValueError(
            f"num_hidden_layers is {layers}, there are {len(tensors)} tensors"
        )
    settings = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"quantization must be an object, got {settings!r:.80}")
    try:
        model = build_model(args, tensors)
    except KeyError as error:  # scales without what they scale
        name = error.args[0]
        raise ValueError(f"no {name}, though there are scales for it") from None
    if wrong := [*unfit_quantization(model, settings)]:
        more = f", and {len(wrong) - 1} layers more" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
    return model


def check_folder(
    folder: Path, *, read: bool = True
) -> tuple[Llama | None, dict[str, TensorInfo], list[Exception]]:
    """Return a folder's model without its weights, where these lie, and what is wrong
    with the folder, as far as config.json and its weights tell.

    read: whether the weights may be read too, and not their headers alone. The model is
    None where it cannot be built. A problem is an OSError or a ValueError that names
    the file at fault.
    """
    problems, tensors = [], {}

    def attempt(task: Callable, *arguments: object) -> object:
        try:
            return task(*arguments)
        except (OSError, ValueError) as error:
            problems.append(error)
            return None

    files = attempt(weight_files, folder)
    settings = attempt(read_settings, folder)
    for file in files or ():
        found = attempt(checked_header, file) or {}
        for name in found.keys() & tensors.keys():
            both = f"{tensors[name].file.name} and {file.name}"
            problems.append(ValueError(f"{folder}: {name} is in both {both}"))
        tensors |= found
    if settings is None:
        return None, tensors, problems
    config, args = settings
    if args.tie_word_embeddings and not any(EMBEDDING in name for name in tensors):
        # safetensors writes one of two that share their memory: the first by name.
        names = {name: name.replace("lm_head", EMBEDDING) for name in tensors}
        tensors = {names[n]: replace(t, name=names[n]) for n, t in tensors.items()}
    sound, tied, wrong = not problems, config.get("tie_word_embeddings"), []
    try:
        model = checked_model(config, args, tensors)
    except ValueError as error:
        return None, tensors, [*problems, ValueError(f"{folder}: {error}")]
    if sound:
        differences = [*mismatches(model, tensors, wanted_extras(config, args))]
        wrong += ["; ".join(differences)] if differences else []
        if tied is False and "lm_head" not in model:
            wrong.append("tie_word_embeddings is false, but there is no lm_head.weight")
    if read and tied:
        wrong += untied_head(tensors)
    problems += [ValueError(f"{folder}: {text}") for text in wrong]
    return model, tensors, problems


def examine(folder: str | Path) -> tuple[Llama, dict[str, TensorInfo]]:
    """Return a folder's model without its weights, and its tensors.

    Raises the first of what is wrong with it, an OSError or a ValueError.
    """
    model, tensors, problems = check_folder(Path(folder))
    if problems:
        raise problems[0]
    return model, tensors


GROUP_SIZE = 64  # of what is quantized while it is read, as MLX's converter has it


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """The packed weights, the scales or the biases of a matrix that is quantized while
    it is read.

    The first of the three to be read reads the matrix, quantizes it, and leaves the
    other two in `ready`. So the matrix itself is in memory only for that moment.
    """

    matrix: TensorInfo
    bits: int
    ready: dict[str, mx.array]  # shared by the three, whose names end in its keys

    @property
    def adoptable(self) -> bool:
        return False  # it is computed, and lies in no file

    def read(self, mapping: memoryview) -> mx.array:
        part = self.name.rpartition(".")[2]
        if part not in self.ready:
            arrays = mx.quantize(self.matrix.read(mapping), GROUP_SIZE, self.bits)
            mx.eval(arrays)
            mx.clear_cache()  # or MLX keeps the memory of the matrix for later arrays
            self.ready.update(zip(("weight", "scales", "biases"), arrays))
        return self.ready.pop(part)


def packed_parts(matrix: TensorInfo, bits: int) -> dict[str, PackedInfo]:
    """Return what takes the place of a matrix that is to be quantized, by name."""
    rows, columns = matrix.shape
    path, parts, ready = matrix.name.removesuffix(".weight"), {}, {}
    for part, dtype, width in (
        ("weight", "U32", columns * bits // 32),
        ("scales", matrix.dtype, columns // GROUP_SIZE),
        ("biases", matrix.dtype, columns // GROUP_SIZE),
    ):
        name, nbytes = f"{path}.{part}", rows * width * DTYPES[dtype].size
        place = matrix.file, matrix.start, nbytes
        more = matrix, bits, ready
        parts[name] = PackedInfo(name, dtype, (rows, width), *place, *more)
    return parts


def quantizable(model: Llama) -> set[str]:
    """Return the names of the matrices that can be cut into groups. The others stay
    dense, as MLX's converter leaves them."""
    layers = dense_layers(model)
    fitting = [path for path, m in layers if m.weight.shape[1] % GROUP_SIZE == 0]
    return {f"{path}.weight" for path in fitting}


class AlreadyQuantized(ValueError):
    """Weights that are quantized already were to be quantized."""


def to_quantize(
    model: Llama, tensors: Mapping[str, TensorInfo], bits: int | None
) -> tuple[Llama, Mapping[str, TensorInfo]]:
    """Return a model without its weights, and where these lie, for `read_weights` to
    quantize each matrix as soon as it is read. bits: None leaves all as it is.

    Raises ValueError if the weights are quantized already, or none can be.
    """
    if bits is None:
        return model, tensors
    known, chosen = QUANTIZATION_MODES["affine"][1], quantizable(model)
    if type(bits) is not int or bits not in known:
        raise ValueError(f"bits must be one of {known}, got {bits!r:.80}")
    file = next(iter(tensors.values())).file
    layers = [layer for _, layer in model.named_modules()]
    packed = {layer.bits for layer in layers if isinstance(layer, QuantizedMatrix)}
    if packed:
        there = " and ".join(map(str, sorted(packed)))
        raise AlreadyQuantized(
            f"{file}: the weights are packed already, in {there} bits"
        )
    if not chosen:
        width = model.args.hidden_size
        raise ValueError(
            f"{file}: no matrix can be quantized: wanted a multiple of {GROUP_SIZE} "
            f"columns, got {width}"
        )
    parts = {}
    for name, info in tensors.items():
        parts |= packed_parts(info, bits) if name in chosen else {name: info}
    return build_model(model.args, parts), parts


def load(
    folder: str | Path, *, dtype: mx.Dtype | None = None, bits: int | None = None
) -> tuple[Llama, Tokenizer]:
    """Return the model and the tokenizer of a folder, or of org/name.

    dtype: of activations, and of weights that are not packed; None: default_dtype.
    bits: quantize a dense model while it is read; None takes it as it is.
    They may be used in another thread than this one, but in one at a time.
    Raises FileNotFoundError or ValueError that names the file at fault.
    """
    folder, dtype = find_folder(folder), chosen_dtype(dtype)
    model, tensors = to_quantize(*examine(folder), bits)
    tokenizer = Tokenizer.from_folder(folder)
    require_memory(memory_of(tensors.values(), dtype), 0)
    for _ in read_weights(model, tensors, dtype):
        pass
    return model, tokenizer


# -----------------------------------------------------------------------------
# Part Three: faster. The same replies sooner; nothing above needs any of it.
# -----------------------------------------------------------------------------

import copy

# -----------------------------------------------------------------------------
# 18. Prompt lookup
# A GPU that reads all weights for one token could compute 16 tokens in nearly the same
# time, if it knew them. Much of writing is copying: names, code, what was asked. So
# where the last tokens have occurred before, those that followed then are drafts of
# what follows now. One pass of the model reads them all, and each is kept while the
# sampler, run on the model's own logits, picks the same token. So replies stay the
# same, except where rounding breaks a tie. This loop takes the place of `decode`.
#
#     text       ... 5 6 7 8 9 4 ... 5 6 7
#     drafts                               8 9 4      followed 5 6 7 before
#     one pass over 7 8 9 4 samples        8 9 2 1    what follows each of them
#     kept                                 8 9 2      8 and 9 were right; 1 followed 4
#
# Three tokens for one reading of the weights.
# uses: 5, 9
# needs: Callable, Collection, Iterable, Iterator, NamedTuple, copy, itertools, math, mx
# -----------------------------------------------------------------------------


class Lookup:
    """Drafts of what comes next: the n tokens that followed when the last 8 (or n, if
    that is less) occurred before. Where nothing repeats, it drafts nothing.

    Source: github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, n: int, ids: Iterable[int] = ()):
        require_count("n", n, 1)
        self.n, self.same, self.ids = n, min(n, 8), []
        self.after = {}  # the last ids, as a tuple: where, in ids, what followed begins
        self.passes = 0  # of the model
        self.accepted = 0  # drafts that it agreed with
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


def next_step(
    model: Callable, step: Step, kept: int, drafts: list[int], cache: list, limit: int
) -> Step | None:
    """Return the step that reads the last of the tokens that another keeps, and drafts;
    launched, not waited for. None if the cache may not hold a token more.

    kept: the number of these tokens. limit: the tokens that the cache may hold.
    """
    room = limit - cache[0].offset
    if room <= 0:
        return None
    drafts, sampler = drafts[: room - 1], step.samplers[kept - 1]
    tokens = step.sampled[:, kept - 1 : kept]
    if drafts:
        tokens = mx.concatenate([tokens, mx.array([drafts], tokens.dtype)], axis=1)
    logits, sampled, samplers = model(tokens, cache), [], []
    for row in range(tokens.shape[1]):
        sampler = copy.copy(sampler)  # its state, for when later rows are rejected
        sampled.append(sampler(logits[:, row]))
        samplers.append(sampler)
    sampled = mx.stack(sampled, axis=1) if drafts else sampled[0][None]
    mx.async_eval(sampled)
    return Step(drafts, sampled, samplers, logits[:, -1])


def verify_drafts(step: Step, cache: list) -> list[int]:
    """Wait for a step; return the ids to keep, and trim rejected drafts.

    A draft is right where the sampler picked it too; what it picked after that holds.
    """
    (values,) = step.sampled.tolist()
    right = 0
    while right < len(step.drafts) and step.drafts[right] == values[right]:
        right += 1
    kept = values[: right + 1]
    trim_to(cache, cache[0].offset - len(values) + len(kept))
    return kept


def decode_with_lookup(
    lookup: Lookup,
    model: Callable,
    logits: mx.array,
    cache: list,
    sampler: Callable[[mx.array], mx.array],
    max_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yield and return what `decode` does, checking drafts meanwhile. lookup: holds the
    text so far, and takes in what is added."""
    if max_tokens == 0:
        return "length"
    held = cache[0].offset
    last = held + (math.inf if max_tokens is None else max_tokens)
    limit = min(cache[0].capacity, last - 1)  # the last token is not read
    step = Step([], sampler(logits)[None], [sampler], logits)
    mx.async_eval(step.sampled)
    try:
        while step is not None:
            if lookup.passes % 256 == 0:
                require_numbers(step.logits)
                mx.clear_cache()
            # A step without drafts keeps its one token whatever it is, so the next is
            # launched before that is known. The first draft is then a guess of it.
            if not step.drafts:
                ahead = next_step(model, step, 1, lookup.drafts()[1:], cache, limit)
            kept = verify_drafts(step, cache)
            lookup.passes += 1
            for value in kept:
                if value in stop_tokens:
                    return "stop"
                held += 1
                yield value
                if held == last:
                    return "length"
            lookup.extend(kept)
            lookup.accepted += len(kept) - 1
            if step.drafts:
                ahead = next_step(model, step, len(kept), lookup.drafts(), cache, limit)
            step = ahead
        return "context"
    finally:
        trim_to(cache, held)  # the step that was launched ahead may not be wanted


# -----------------------------------------------------------------------------
# 19. Faster products
# Nearly all time goes into products with the weights. Where many rows of x meet a
# packed matrix, it is unpacked once for all of them; on a CPU once and for good, where
# there is room. A CPU also gains by how weights lie in memory, and by products that all
# its cores share: of a matrix with 2048 rows each of four cores multiplies 512. All of
# this is put into a model by exchanging parts of it, each for one that holds the same
# weights; the loop over the blocks stays as it is.
# uses: 1-6
# needs: Callable, copy, mx, nn, os, sys, tree_flatten, tree_unflatten
# -----------------------------------------------------------------------------


def on_cuda() -> bool:
    """Return whether what is computed here is computed by CUDA."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def as_subclass(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module that holds what this one holds, and computes as `kind` does."""
    other = copy.copy(module)
    other.__class__ = kind
    return other


def many_rows() -> int:
    """Return from how many rows on unpacking a matrix first takes less time."""
    return 128 if on_cuda() else 8


class UnpackedForMany(QuantizedMatrix):
    """A packed matrix that is unpacked once for many rows of x.

    It is unpacked for a few rows too, if a row of weights is a single group: there the
    product of MLX 0.32.4 on CUDA gives wrong numbers.
    """

    def as_linear(self, x: mx.array) -> mx.array:
        rows, one_group = x.size // x.shape[-1], x.shape[-1] == self.group_size
        if rows == 1 or (rows < many_rows() and not one_group):
            return super().as_linear(x)
        packed = self["weight"], self["scales"], self.get("biases")
        whole = mx.dequantize(*packed, self.group_size, self.bits, self.mode)
        return x @ whole.T


class UnpackedLinear(UnpackedForMany, QuantizedLinear):
    """A quantized layer that is unpacked once for many rows."""


class UnpackedEmbedding(UnpackedForMany, QuantizedEmbedding):
    """A quantized embedding that, where it is the head, is unpacked once for many."""


def unpack_for_many(model: Llama) -> None:
    """Have the packed matrices of a model unpacked once for many rows."""
    kinds = {QuantizedLinear: UnpackedLinear, QuantizedEmbedding: UnpackedEmbedding}
    for path, layer in model.named_modules():
        if kind := kinds.get(type(layer)):
            unpacked = as_subclass(layer, kind)
            model.update_modules(tree_unflatten([(path, unpacked)]))


def dequantize(model: Llama) -> None:
    """Replace the packed matrices of a model, for good, by dense ones in float32."""
    modules = model.named_modules()
    while modules:  # popped, so that no list keeps the packed weights alive
        path, layer = modules.pop()
        if not isinstance(layer, QuantizedMatrix):
            continue
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(1, 1, bias="bias" in layer)
        else:
            dense = nn.Embedding(1, 1)
        packed = layer["weight"], layer["scales"], layer.get("biases")
        settings = layer.group_size, layer.bits, layer.mode
        dense.weight = mx.dequantize(*packed, *settings, dtype=mx.float32)
        if "bias" in layer:
            dense.bias = layer.bias
        mx.eval(dense.weight)
        model.update_modules(tree_unflatten([(path, dense)]))


def parameter_count(model: Llama) -> int:
    """Return the number of a model's weights, whether they are packed or not."""
    numbers = sum(array.size for _, array in tree_flatten(model.parameters()))
    for layer in model.modules():
        if isinstance(layer, QuantizedMatrix):
            numbers += layer.scales.size * layer.group_size  # that it stands for
            numbers -= layer.weight.size + layer.scales.size
            numbers -= layer.biases.size if "biases" in layer else 0
    return numbers


# Weights for each core. With 50,000 to 160,000 SmolLM2-135M was equally fast on two
# cores, with 300,000 it was slower.
WORTH_A_CORE = 100_000


class SpreadLinear(nn.Module):
    """A linear layer whose product is spread over the cores of a CPU.

    MLX computes a product on one core, but each stream of operations has a thread of
    its own. So the rows of the matrix are cut into parts, and each has a stream.
    """

    def __init__(self, layer: nn.Module, streams: list):
        super().__init__()
        rows, count = layer.weight.shape[0], len(streams)
        edges = [n * rows // count for n in range(count + 1)]
        self.parts = [copy.copy(layer) for _ in streams]
        for part, start, end in zip(self.parts, edges, edges[1:]):
            for name, array in layer.parameters().items():
                part[name] = array[start:end]
        vars(self)["streams"] = streams  # no parameters

    def spread(self, products: list[Callable], x: mx.array) -> mx.array:
        """Return x W^T, each of its parts computed in a stream."""
        done = []
        for product, stream in zip(products, self.streams):
            with mx.stream(stream):
                done.append(product(x))
        return mx.concatenate(done, axis=-1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.spread(self.parts, x)


class SpreadEmbedding(SpreadLinear):
    """An embedding whose product, where it is the head, is spread over the cores."""

    def as_linear(self, x: mx.array) -> mx.array:
        return self.spread([part.as_linear for part in self.parts], x)

    def __call__(self, tokens: mx.array) -> mx.array:
        vectors, start = 0, 0
        for part in self.parts:
            end = start + part.weight.shape[0]
            there = (tokens >= start) & (tokens < end)
            found = part(mx.where(there, tokens - start, 0))
            vectors += mx.where(there[..., None], found, 0)
            start = end
        return vectors


def spread_products(model: nn.Module, *, dense: bool) -> None:
    """Have products with the packed matrices of a model spread over the cores that
    this process may use, on Linux; dense: those with dense matrices too."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(cores)]
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedMatrix):
            weights = layer.scales.size * layer.group_size
        elif dense and isinstance(layer, (nn.Linear, nn.Embedding)):
            weights = layer.weight.size
        else:
            continue
        count = min(cores, weights // WORTH_A_CORE)
        if count > 1:
            is_linear = isinstance(layer, (nn.Linear, QuantizedLinear))
            kind = SpreadLinear if is_linear else SpreadEmbedding
            layer = kind(layer, streams[:count])
            mx.eval(layer.parameters())  # in this thread, which may not be the next
            model.update_modules(tree_unflatten([(path, layer)]))


def lay_out_by_columns(model: nn.Module) -> None:
    """Have every dense matrix W of a model in float32 lie in memory column by column.

    A BLAS then computes x W^T by adding up columns of W, many numbers at a time. With W
    row by row it multiplies rows with x, and adds up one number after another.
    """
    for _, layer in dense_layers(model):
        if layer.weight.dtype == mx.float32:
            layer.weight = mx.contiguous(layer.weight.T).T
            mx.eval(layer.weight)


# -----------------------------------------------------------------------------
# 20. Faster steps
# Part One describes each step anew, and launches it as a whole. A GPU gains by
# something else in three places:
#   - To decode, it waits for Python. So what is the same for every token is compiled.
#   - cuDNN plans attention anew for every shape. So a few drafts attend over a round
#     number of slots.
#   - A launched step holds the arrays that it makes, and that it reads, until it is
#     through. So a long prompt would take memory for all its layers at once, and over a
#     large cache a step would copy what the last step still reads: they are launched in
#     pieces.
# `arrange_steps`, at the end, says what becomes of a block.
# uses: 1-6, 19
# needs: Callable, functools, itertools, math, mx
# -----------------------------------------------------------------------------

FEW_ROWS = 16  # of drafts, at most


class PaddedAttention(Attention):
    """Attention that reads a few tokens over a multiple of 256 slots of the cache.

    On CUDA, cuDNN takes some 60 ms to plan for every new pair of L and S. So a few
    tokens, as prompt lookup drafts them, are given more keys than there are, and a mask
    hides those that a token must not see. Then a plan serves until S has grown by 256.
    """

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        L = x.shape[1]
        if not 1 < L <= FEW_ROWS:
            return super().__call__(x, cache)
        queries, keys, values = self.project(x, cache.offset)
        cache.update_and_fetch(keys, values)
        S = cache.offset
        slots = math.ceil(S / 256) * 256  # the buffers have a multiple of that
        keys, values = cache.keys[:, :, :slots], cache.values[:, :, :slots]
        seen = mx.arange(slots) <= mx.arange(S - L, S)[:, None]  # (L, slots)
        attended = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.scale, mask=seen
        )
        return self.merge(attended)


NUMBERS = itertools.count()


def compile_apart(function: Callable) -> Callable:
    """Return a function of arrays, compiled, that is never taken for another.

    subtle: MLX finds what it has compiled by a function's address. A thread may keep
    the entry after the function is gone, and a new function may get the address. So
    each gets a number as one more argument, which is never used again.
    """
    compiled = mx.compile(lambda _number, *arrays: function(*arrays))
    return functools.partial(compiled, next(NUMBERS))


class CompiledBlock(TransformerBlock):
    """A block that decodes through two compiled pieces; `of` makes it of another.

    One token keeps a GPU busy for less time than Python takes to describe the step. The
    operations before and after the cache are the same for every token, so MLX notes
    them down once, and fuses those that work element by element. The cache is left out:
    its shapes grow, and each would be noted down anew.
    """

    @classmethod
    def of(cls, block: TransformerBlock) -> "CompiledBlock":
        compiled = as_subclass(block, cls)
        compiled.before, compiled.after = map(compile_apart, cls.pieces(block))
        return compiled

    @staticmethod
    def pieces(block: TransformerBlock) -> tuple[Callable, Callable]:
        """Return functions of (x, offset) and of (x, attended)."""
        attention, mlp = block.self_attn, block.mlp
        norm, other_norm = block.input_layernorm, block.post_attention_layernorm
        H, Hkv = attention.n_heads, attention.n_kv_heads

        # The token is a row (1, D) here. Before a product MLX flattens what is no
        # matrix, and shapes the result back, and each time Python waits a little.
        def before(x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            row = norm(x).squeeze(0)
            queries = attention.q_proj(row).reshape(1, H, 1, -1)
            keys = attention.k_proj(row).reshape(1, Hkv, 1, -1)
            values = attention.v_proj(row).reshape(1, Hkv, 1, -1)
            if "q_norm" in attention:
                queries, keys = attention.q_norm(queries), attention.k_norm(keys)
            return attention.rope(queries, offset), attention.rope(keys, offset), values

        def after(x: mx.array, attended: mx.array) -> mx.array:
            row = x.squeeze(0) + attention.o_proj(attended.reshape(1, -1))
            return (row + mlp(other_norm(row)))[None]

        return before, after

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        if x.shape[:2] != (1, 1):
            return super().__call__(x, cache)
        # An array, since mx.compile would trace the piece anew for each number.
        queries, keys, values = self.before(x, mx.array(cache.offset))
        keys, values = cache.update_and_fetch(keys, values)
        return self.after(x, self.self_attn.attend(queries, keys, values))


@functools.partial(mx.compile, shapeless=True)
def fused_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class FusedMLP(MLP):
    """An MLP with one kernel for SwiGLU instead of three."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(fused_swiglu(self.gate_proj(x), self.up_proj(x)))


LONG = 128  # tokens of a prompt, from which on each block is launched by itself


def large_cache() -> int:
    """Return from how many bytes of a layer's cache on a step is launched in halves.

    From this size on, copying the cache takes a noticeable part of the time of reading
    the weights. On CUDA that was measured; on Metal, which copies ten times slower, and
    of a small model reads a few MB a layer, it is computed.
    """
    return 32_000_000 if mx.cuda.is_available() else 1_000_000


class LaunchedBlock(TransformerBlock):
    """A block, made of another, that calls `launch` with its arguments first."""

    @classmethod
    def of(cls, block: TransformerBlock, launch: Callable) -> "LaunchedBlock":
        launched = as_subclass(block, cls)
        # Not as a module of this one, or all parameters would be there twice.
        vars(launched).update({"block": block, "launch": launch})
        return launched

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        self.launch(x, cache)
        return self.block(x, cache)


class Launcher:
    """What launches the steps of a model of n blocks before their end, in pieces.

    Each block of a long prompt is launched by itself, one in advance of the last. Over
    a large cache a token is launched in two halves, and each half waits until the GPU
    has finished the same half of the last token, so that nothing still reads its cache.
    """

    def __init__(self, blocks: int):
        self.middle, self.end = blocks // 2, blocks - 1
        self.halved = False  # whether this step is launched in two halves
        self.forget()

    def forget(self) -> None:
        """Wait for nothing that was launched so far."""
        # Inputs of blocks: of the block that was launched last, and, in the step of the
        # last token, of the middle and the last block. To wait for end_x is to wait for
        # the whole second half, since MLX signals once per launch.
        self.block_x = self.middle_x = self.end_x = mx.array(0)

    def launch(self, block: int, x: mx.array, cache: KVCache) -> None:
        """Launch what gives a block its input x, or wait for what came before it."""
        long = x.shape[1] >= LONG
        if block == 0:
            large = cache.keys is not None and 2 * cache.keys.nbytes >= large_cache()
            self.halved = large and not long
            if not self.halved:
                self.forget()  # what came before, which may have failed
        if long:
            mx.async_eval(x)
            mx.eval(self.block_x)
            self.block_x = x
        elif self.halved and block == self.end:
            self.end_x = x
        elif self.halved and block == self.middle:
            mx.eval(self.middle_x)
            mx.async_eval(x)
            mx.eval(self.end_x)
            self.middle_x = x


def launch_in_pieces(model: Llama) -> None:
    """Have a step launched before its end, where it is long or the cache is large."""
    blocks = model.model.layers
    launcher = Launcher(len(blocks))
    for n, block in enumerate(blocks):
        launch = functools.partial(launcher.launch, n)
        blocks[n] = LaunchedBlock.of(block, launch)


def arrange_steps(model: Llama) -> None:
    """Put into a model all that a GPU gains by in a step."""
    blocks = model.model.layers
    for n, block in enumerate(blocks):
        if type(block) is TransformerBlock:
            block = blocks[n] = CompiledBlock.of(block)
        if type(block.mlp) is MLP:
            block.mlp = as_subclass(block.mlp, FusedMLP)
        if on_cuda() and type(block.self_attn) is Attention:
            block.self_attn = as_subclass(block.self_attn, PaddedAttention)
    if on_cuda():
        unpack_for_many(model)
    launch_in_pieces(model)


# -----------------------------------------------------------------------------
# 21. The CUDA kernel
# Decoding a 4-bit model on CUDA, where MLX's matrix-vector product uses a fifth of the
# memory's bandwidth. This one uses up to half, and also computes the norm that precedes
# it, and the addition or SwiGLU that follows: so a layer is four launches and
# attention. It is never used on Metal or on a CPU.
# uses: 1-6, 19, 20
# needs: Callable, itertools, mx, nn, tree_flatten
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
  y[first + r] = v + (residual_shape[2] > 1 ? float(residual[first + r]) : 0);
}
"""


def fused_linear(
    *layers: QuantizedLinear, norm: nn.RMSNorm | None = None, parts: int = 1
) -> Callable[..., mx.array]:
    """Return a function of x (1, 1, columns), and of a residual in the shape of the
    result, which may be left out; all in bfloat16.

    It gives W norm(x) + residual, (1, 1, rows), where W has the rows of all layers; of
    two parts, silu(first norm(x)) * second norm(x) + residual, (1, 1, rows / 2).
    subtle: call it inside mx.compile; a graph built anew costs more than it saves.
    """
    names, packed = ["x", "weight", "scales", "biases", "gain", "residual"], []
    *starts, rows = itertools.accumulate(len(layer.weight) for layer in layers)
    for name in names[1:4]:
        whole = mx.concatenate([layer[name] for layer in layers])
        for layer, view in zip(layers, mx.split(whole, starts)):
            layer[name] = view  # nothing is held twice
        packed.append(whole.reshape(parts, -1, whole.shape[-1]))
    # subtle: eps goes with the gain. MLX keeps arrays of up to 8 bytes in the host's
    # memory, and to read one from there takes longer than to compute.
    gain = none = mx.array([[[0]]], mx.bfloat16)  # never read: its shape says so
    if norm is not None:
        gain = mx.concatenate([norm.weight, mx.array([norm.eps], mx.bfloat16)])
    mx.eval(packed, gain, layers)  # a lazy view could be used in this thread alone
    kernel = mx.fast.cuda_kernel("matvec", names, ["y"], MATVEC)
    return lambda x, residual=none: kernel(
        inputs=[x, *packed, gain, residual],
        grid=(-(-rows // 8) * 128, 1, 1),  # ROWS for 32 * WARPS threads
        threadgroup=(128, 1, 1),
        output_shapes=[(1, 1, rows // parts)],
        output_dtypes=[mx.bfloat16],
    )[0]


class FusedBlock(CompiledBlock):
    """A block that decodes through the kernel."""

    @staticmethod
    def pieces(block: TransformerBlock) -> tuple[Callable, Callable]:
        attention, mlp = block.self_attn, block.mlp
        norm = block.post_attention_layernorm
        H, Hkv = attention.n_heads, attention.n_kv_heads
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        qkv = fused_linear(*projections, norm=block.input_layernorm)
        gate_up = fused_linear(mlp.gate_proj, mlp.up_proj, norm=norm, parts=2)
        o, down = fused_linear(attention.o_proj), fused_linear(mlp.down_proj)

        def before(x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            heads = qkv(x).reshape(1, H + 2 * Hkv, 1, -1)
            turned, values = mx.split(heads, [H + Hkv], axis=1)
            return *mx.split(attention.rope(turned, offset), [H], axis=1), values

        def after(x: mx.array, attended: mx.array) -> mx.array:
            x = o(attended, x)
            return down(gate_up(x), x)

        return before, after


def fuse(model: Llama) -> None:
    """Have a model in bfloat16 decode its 4-bit blocks through the kernel; CUDA only.

    To be called when the weights are in place: later changes reach prefill alone. What
    reads more than one token at a time is computed as before, and so are blocks with
    modules of other kinds, which may do something else.
    """
    dtypes = {array.dtype for _, array in tree_flatten(model.parameters())}
    if not on_cuda() or dtypes - {mx.bfloat16, mx.uint32, mx.uint8}:
        return
    kinds = {TransformerBlock, Attention, MLP, nn.RMSNorm, QuantizedLinear}
    for n, block in enumerate(blocks := model.model.layers):
        modules = block.modules()
        layers = [m for m in modules if isinstance(m, QuantizedLinear)]
        settings = {(m.bits, m.mode, "bias" in m) for m in layers}
        one_group_size = len({m.group_size for m in layers}) == 1
        plain = {*map(type, modules)} == kinds and "q_norm" not in block.self_attn
        if plain and one_group_size and settings == {(4, "affine", False)}:
            blocks[n] = FusedBlock.of(block)


# -----------------------------------------------------------------------------
# 22. Tensor parallel
# One model on several machines. Every rank, a process of the group, holds a share of
# each layer, cut as in Megatron-LM [9]; two sums over all ranks a layer make it whole.
# MLX's own mx.distributed carries them: nothing here opens a connection. mlx.launch
# starts the ranks, and ends the others when one fails. Of Llama 3 8B, each of two ranks
# has 16 of the 32 heads, so 2048 of the 4096 rows of q_proj, and the 2048 columns of
# o_proj that meet these heads. What it computes with them is x W^T over half of the
# columns: added to that of the other, it is the whole.
# uses: 1-7, 11-14, 16, 17
# needs: Callable, Mapping, Sequence, dataclass, json, mx, nn, os, replace
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


@dataclass(frozen=True)
class ColumnsInfo(TensorInfo):
    """Some columns of a matrix in a file: the same part of each row. From one part to
    the next it is `stride` bytes."""

    stride: int = 0

    @property
    def adoptable(self) -> bool:
        return False  # its parts are copied together

    def read(self, mapping: memoryview) -> mx.array:
        width, dtype = self.nbytes // self.shape[0], DTYPES[self.dtype]
        starts = [self.start + row * self.stride for row in range(self.shape[0])]
        data = b"".join(mapping[start : start + width] for start in starts)
        array = mx.asarray(memoryview(data).cast(MEMORYVIEW_FORMATS[dtype.size]))
        return array.view(dtype).reshape(self.shape)


def rank_args(args: ModelArgs, n: int) -> ModelArgs:
    """Return the shape of what each of n ranks runs: its heads, its part of F.

    Raises ValueError if n does not divide them.
    """
    H, Hkv = args.num_attention_heads, args.num_key_value_heads
    F = args.intermediate_size
    if H % n or Hkv % n or F % n:
        raise ValueError(
            f"{n} ranks cannot share {H} heads, {Hkv} key/value heads and an MLP of "
            f"{F} evenly"
        )
    return replace(
        args,
        num_attention_heads=H // n,
        num_key_value_heads=Hkv // n,
        intermediate_size=F // n,
    )


# The layers of which a rank has some outputs, and those of which it has some inputs.
CUT_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
CUT_BY_COLUMNS = ("o_proj", "down_proj")


def rank_tensor(info: TensorInfo, rank: int, n: int) -> TensorInfo:
    """Return where the part of a tensor lies that one of n ranks has, perhaps all.

    Raises ValueError if n does not divide it; a packed matrix is cut between groups.
    """
    layer, kind = info.name.split(".")[-2:]
    by_rows = layer in CUT_BY_ROWS
    if not by_rows and (layer not in CUT_BY_COLUMNS or kind == "bias"):
        return info
    axis = 0 if by_rows else 1
    if info.shape[axis] % n:
        raise ValueError(
            f"{n} ranks cannot share {info.name}, {list(info.shape)}, evenly along "
            f"axis {axis}"
        )
    shape, nbytes = list(info.shape), info.nbytes // n
    shape[axis] //= n
    if by_rows:
        start = info.start + rank * nbytes
        return replace(info, shape=tuple(shape), start=start, nbytes=nbytes)
    stride = info.nbytes // info.shape[0]
    start = info.start + rank * stride // n
    return ColumnsInfo(
        info.name, info.dtype, tuple(shape), info.file, start, nbytes, stride
    )


def rank_share(
    model: Llama,
    tensors: Mapping[str, TensorInfo],
    group: Group | None,
    bits: int | None = None,
) -> tuple[Llama, Mapping[str, TensorInfo]]:
    """Return what this rank runs of a model, without weights, and where these lie.

    q, k, v, gate and up are cut by rows, which are outputs; o and down, which take
    those in, by columns; the rest is whole. group: None is a rank alone. bits: see
    load; what a rank quantizes is its part of the matrix, and the same groups of it.
    Raises ValueError if the ranks cannot share it.
    """
    if group is None:
        return to_quantize(model, tensors, bits)
    rank, n = group.rank(), group.size()
    args = rank_args(model.args, n)
    share = {name: rank_tensor(info, rank, n) for name, info in tensors.items()}
    part = build_model(args, share)
    if bits and (cut := quantizable(model) - quantizable(part)):
        shape = list(tensors[min(cut)].shape)
        raise ValueError(
            f"{n} ranks cannot share {min(cut)}, {shape}, to quantize it: each needs "
            f"a multiple of {GROUP_SIZE} columns"
        )
    return to_quantize(part, share, bits)


def broadcast(group: Group, message: list) -> list:
    """Return on every rank the list, for JSON, that rank 0 gives."""
    data = json.dumps(message).encode() if message and group.rank() == 0 else b""
    length = mx.distributed.all_sum(mx.array([len(data)]), group=group).item()
    if length == 0:  # usually the list is empty: one sum is enough
        return []
    data = mx.array(list(data or bytes(length)), mx.uint8)
    return json.loads(bytes(mx.distributed.all_sum(data, group=group).tolist()))


def cancelled_by_any(
    group: Group, stop: Callable[[], bool], tokens: Sequence[int]
) -> Callable[[], bool]:
    """Return a function that tells whether a rank wants to stop, alike on all ranks.

    tokens: those sampled so far. A call starts a sum over the ranks, and returns the
    result of the sum before, so that nobody waits for the step that is in flight.
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


def leads(group: Group | None) -> bool:
    """Return whether this is the rank that is asked, and that shows what comes of it: a
    rank alone, or rank 0. The others follow it."""
    return group is None or group.rank() == 0


RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # set for a rank of a group


def join_ranks() -> Group | None:
    """Return the group of ranks that mlx.launch, or mpirun, has started this process
    as one of, when all are there; None for a process of its own."""
    if os.environ.keys().isdisjoint(RANK_VARIABLES):
        return None
    return mx.distributed.init(strict=True)


# -----------------------------------------------------------------------------
# 23. A model made ready
# What is to be loaded here, whether there is room for it, and which of the ways above
# make it faster. Loading is how the engine, and `info --measure`, come to a model.
# uses: 1-7, 11-14, 16, 17, 19-22
# needs: Iterator, Mapping, mx
# -----------------------------------------------------------------------------


def dequantizes(model: Llama, dtype: mx.Dtype | None, group: Group | None) -> bool:
    """Return whether `accelerate` unpacks a model that computes in this dtype."""
    alone = group is None or group.size() == 1
    packed = any(isinstance(module, QuantizedMatrix) for module in model.modules())
    if not (alone and packed) or dtype is None or dtype != mx.float32:
        return False
    return holds_dequantized(4 * parameter_count(model))  # in float32


def accelerate(
    model: Llama, group: Group | None = None, *, keep_packed: bool = False
) -> None:
    """Put into a model whatever makes it faster on this device; to be called when the
    weights are in place.

    A whole model gives the same logits without it, but for rounding.

    A rank's share needs it: the sums over all ranks, one after attention and one after
    the MLP, are put in here, and take the place of the kernel.
    keep_packed: packed weights stay so, even where `dequantizes` says otherwise.
    """
    shared = group is not None and group.size() > 1
    if shared:
        for block in model.model.layers:
            block.self_attn.o_proj = SummedLinear(block.self_attn.o_proj, group)
            block.mlp.down_proj = SummedLinear(block.mlp.down_proj, group)
    if mx.default_device() == mx.cpu:
        if not keep_packed and dequantizes(model, model.model.norm.weight.dtype, group):
            dequantize(model)
        # The ranks of a CPU share its cores. In a small model other work counts more.
        if not shared and parameter_count(model) > LARGE_FOR_CPU:
            # OpenBLAS spreads products with dense matrices by itself.
            spread_products(model, dense=not has_openblas())
        lay_out_by_columns(model)
        if has_openblas():
            unpack_for_many(model)
        return
    if not shared:
        fuse(model)
    arrange_steps(model)


class Loading:
    """What this rank is to load of a folder's model: what it takes, and how it is read.

    whole, tensors: see examine. group: None is a rank alone. dtype, bits: see load.
    Raises ValueError if the ranks cannot share it, or it cannot be quantized.

    Attributes: model, this rank's share, without weights until they are read. tensors:
    where they lie, file_bytes in all. weights: the bytes that they take in memory, and
    adopted: of these, the ones that are not copied. unpacked: whether packed weights
    are dequantized. cache_per_token: bytes.
    """

    def __init__(
        self,
        whole: Llama,
        tensors: Mapping[str, TensorInfo],
        group: Group | None = None,
        dtype: mx.Dtype | None = None,
        bits: int | None = None,
    ):
        self.group, self.dtype = group, chosen_dtype(dtype)
        self.model, self.tensors = rank_share(whole, tensors, group, bits)
        self.file_bytes = sum(info.nbytes for info in self.tensors.values())
        # If bits were asked for, the weights stay packed.
        self.unpacked = bits is None and dequantizes(self.model, self.dtype, group)
        if self.unpacked:
            self.weights = 4 * parameter_count(self.model)  # in float32
        else:
            self.weights = memory_of(self.tensors.values(), self.dtype)
        self.adopted = adopted_bytes(self.tensors.values(), self.dtype)
        item_size = cache_item_size(self.tensors, self.dtype)
        self.cache_per_token = kv_bytes_per_token(self.model.args, item_size)

    def nbytes(self, context: int) -> int:
        """Return what the weights take together with a cache of so many tokens."""
        return self.weights + context * self.cache_per_token

    def require_room(self, context: int) -> list[str]:
        """Return warnings about memory and speed, with a cache of so many tokens.
        Raises MemoryTooSmall."""
        cache = context * self.cache_per_token
        return require_room(parameter_count(self.model), self.weights, cache)

    def read(self) -> Iterator[int]:
        """Read the weights, and make the model faster. Yields the bytes read so far."""
        yield from read_weights(self.model, self.tensors, self.dtype)
        accelerate(self.model, self.group, keep_packed=not self.unpacked)


# -----------------------------------------------------------------------------
# Part Four: streaming. A model that answers in the background, and remembers.
# -----------------------------------------------------------------------------

import fcntl
import hashlib
import queue
import shutil
import threading
import time
import traceback
import weakref
import zlib

# -----------------------------------------------------------------------------
# 24. Sessions
# A conversation on the disk: the cache, the ids that it holds, and notes of whoever
# saves it. Reading the text anew would take as long as it took the first time; reading
# the file takes as long as the disk: Llama 3 8B keeps 131,072 bytes a token, so 8000
# tokens are 1.05 GB. A file is replaced whole or not at all, is checked for damage, and
# belongs to one model.
# uses: 1-7, 11-14, 16, 17
# needs: Callable, Mapping, Path, contextlib, fcntl, hashlib, json, mx, os, shutil, zlib
# -----------------------------------------------------------------------------


def fingerprint(folder: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """Return what tells a model from another: a hash of its settings, the list of its
    tensors, and the first bytes of each."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for info in tensors.values():
        digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
        with open(info.file, "rb") as stream:
            stream.seek(info.start)
            digest.update(stream.read(min(info.nbytes, 1024)))
    return digest.hexdigest()


def checksum(arrays: Mapping[str, mx.array]) -> int:
    """Return the CRC-32 of the bytes of arrays, in the order of their names."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(memoryview(arrays[name].view(mx.uint8)), total)
    return total


class SessionTooLong(ValueError):
    """A session file holds more tokens than the context."""


def are_ids(value: object) -> bool:
    return type(value) is list and all(type(i) is int and 0 <= i < 2**31 for i in value)


def flush(descriptor: int) -> None:
    """Have what was written to a file reach the disk. On macOS fsync leaves it in the
    memory of the disk itself, from which F_FULLFSYNC writes it down."""
    with contextlib.suppress(OSError):  # a disk of the network may not know it
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def replace_file(file: Path, write: Callable[[Path], None]) -> None:
    """Have `write` write a file under another name, and put it in the place of `file`,
    or of what this links to, when it is on the disk: a crash leaves the old one. The
    new file keeps the permissions of the old one."""
    target = Path(os.path.realpath(file))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    draft = target.with_name(f".{target.name}.{os.getpid()}.safetensors")
    try:
        write(draft)
        if target.exists():
            shutil.copymode(target, draft)
        with open(draft, "rb") as stream:
            flush(stream.fileno())
        os.replace(draft, target)
    except RuntimeError as error:  # MLX's, of a full disk, say
        raise OSError(f"{file} cannot be written: {error}") from None
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    flush(folder)
    os.close(folder)


def save_session(
    file: Path, cache: list[KVCache], ids: list[int], notes: dict, model: str
) -> None:
    """Write to a file ids, the part of a cache that holds them, and notes for JSON.

    model: its fingerprint.
    """
    arrays, held = {}, len(ids)
    for n, layer in enumerate(cache if held else []):
        arrays[f"{n}.keys"] = mx.contiguous(layer.keys[..., :held, :])
        arrays[f"{n}.values"] = mx.contiguous(layer.values[..., :held, :])
    session = {"fingerprint": model, "checksum": checksum(arrays)}
    text = json.dumps(session | {"ids": ids, "notes": notes})
    metadata = {"session": text, "crc32": str(zlib.crc32(text.encode()))}
    replace_file(file, lambda draft: mx.save_safetensors(str(draft), arrays, metadata))


def read_session(file: Path) -> dict:
    """Return what a session file holds beside the cache. Raises ValueError if none."""
    try:
        metadata = json.loads(header_bytes(file)[8:])["__metadata__"]
        text, crc32 = metadata["session"], int(metadata["crc32"])
        session = json.loads(text)
        sound = type(session["notes"]) is dict and are_ids(session["ids"])
        whole = zlib.crc32(text.encode()) == crc32
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError):
        raise ValueError(f"{file}: not a session of llama.py") from None
    if not whole:
        raise ValueError(f"{file}: the conversation is damaged")
    if not sound:
        raise ValueError(f"{file}: not a session of llama.py")
    return session


def restore_session(
    file: Path, cache: list[KVCache], args: ModelArgs, dtype: mx.Dtype, model: str
) -> tuple[list[int], dict]:
    """Fill a cache from a file that `save_session` wrote; return ids and notes.

    args: whose cache it is, in dtype. model: its fingerprint.
    Raises OSError, or ValueError if it is no such file, is damaged, does not fit the
    cache, or was written with another model; the cache is as it was then.
    """
    infos, session = checked_header(file), read_session(file)
    ids, capacity = session["ids"], cache[0].capacity
    if session.get("fingerprint") != model:
        raise ValueError(f"{file}: the session is of another model, or of other bits")
    if len(ids) > capacity:
        sizes = f"{len(ids)} tokens, the context {capacity}"
        raise SessionTooLong(f"{file}: the session has {sizes}")
    if "checksum" not in session:
        raise ValueError(f"{file}: a session of an older llama.py")
    layers = range(len(cache) if ids else 0)
    names = [f"{n}.{part}" for n in layers for part in ("keys", "values")]
    wanted = (1, args.num_key_value_heads, len(ids), args.head_dim)
    for name in names:
        if name not in infos or infos[name].shape != wanted:
            raise ValueError(f"{file}: damaged: {name} is not {wanted}")
    stored = [infos[name] for name in names]
    arrays = {info.name: array for info, array in read_tensors(stored)}
    if checksum(arrays) != session["checksum"]:
        raise ValueError(f"{file}: the cache in it is damaged")
    trim_to(cache, 0)
    for n in layers:
        keys, values = arrays[f"{n}.keys"], arrays[f"{n}.values"]
        cache[n].update_and_fetch(keys.astype(dtype), values.astype(dtype))
        mx.eval(cache[n].state)
    return ids, session["notes"]


# -----------------------------------------------------------------------------
# 25. Pieces of a reply
# A reply is shown as it is written, but whole characters only, and nothing of a text
# that ends it. So tokens wait while what they end with may go on to such a text. If
# "END" ends the reply, tokens become pieces so:
#
#     tokens      "The "   "E"      "nd"     " E"     "N"      "D!"
#     pieces      "The "   waits    "End"    waits    waits    " ", and it is the end
#
# What a model thinks before it answers, between <think> and </think>, is told apart.
# uses: 7, 12
# needs: Collection, Sequence, dataclass, field
# -----------------------------------------------------------------------------

THINK, THOUGHT = "<think>", "</think>"  # what encloses the thinking before an answer


@dataclass
class Piece:
    """Text, and the ids that it is made of.

    opening: THINK and what follows it, if the prompt has begun the thinking so.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    opening: str = ""

    @property
    def content(self) -> str:
        """The text as it stands in a conversation: with the opening before it."""
        return self.opening + self.text

    def thinking_end(self) -> int | None:
        """Return how many characters of the text are thinking, with its tags: 0 if it
        begins otherwise, None if it may still become THINK. Later tags are text."""
        begun = self.content.lstrip()
        if not begun.startswith(THINK):
            return None if THINK.startswith(begun) else 0
        end = self.text.find(THOUGHT)
        return len(self.text) if end < 0 else end + len(THOUGHT)

    @property
    def thinking(self) -> str:
        """The thinking, without its tags."""
        text = self.text[: self.thinking_end() or 0].strip()
        return text.removeprefix(THINK).removesuffix(THOUGHT).strip()


def opening_of(prompt: Text) -> str:
    """Return THINK and the blanks after it if the template ends a prompt with that."""
    tail = prompt[len(prompt.rstrip()) - len(THINK) :]
    writers = {writer for _, writer in tail.runs()}
    return str(tail) if tail.startswith(THINK) and writers == {TEMPLATE} else ""


def check_stop(stop: Collection[str]) -> None:
    """Raise ValueError unless these are texts that a reply can end before."""
    listed = isinstance(stop, Collection) and not isinstance(stop, str)
    if not listed or not all(isinstance(text, str) for text in stop):
        raise ValueError(f"stop must be a list of texts, got {stop!r:.80}")
    if "" in stop:
        raise ValueError("stop must be texts of at least one character, got ''")


class PieceMaker:
    """Makes Pieces of the tokens of a reply, up to the first of the texts in stop.

    A Piece is made of whole tokens and whole characters. So tokens wait, all or none,
    while a later one may finish the last character, or a stop text.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str]):
        self.stream, self.stop = stream, stop
        self.beginnings = tuple(text[:n] for text in stop for n in range(1, len(text)))
        self.waiting = Piece()

    def add(self, token: int) -> None:
        self.waiting.text += self.stream.add(token)
        self.waiting.ids.append(token)

    def stop_found(self) -> int | None:
        """Return where a stop text begins; of several, the one that ends first."""
        found = []
        for text in self.stop:
            at = self.waiting.text.find(text)
            if at >= 0:
                found.append((at + len(text), at))
        return min(found)[1] if found else None

    def must_wait(self) -> bool:
        begun = self.waiting.text.endswith(self.beginnings)
        return begun or not self.stream.is_whole()

    def take(self) -> Piece:
        """Return the Piece of the tokens that wait, which then wait no longer."""
        piece, self.waiting = self.waiting, Piece()
        return piece


# -----------------------------------------------------------------------------
# 26. Engine
# An actor: one thread owns everything of MLX, whose arrays and streams belong to the
# thread that made them, and the outside exchanges ids and strings with it through
# queues. So an interface never blocks, and any thread may ask. What the cache holds of
# one conversation is kept: the next turn begins with the same ids, and reads its own.
#
#     with Engine("stories") as engine:
#         for piece in engine.chat([{"role": "user", "content": "Hi!"}]):
#             print(piece, end="", flush=True)
#
# There `chat` puts a Request into the worker's queue and returns a Reply; the worker
# prefills and decodes, and puts Pieces into the request's queue; the loop takes them.
# uses: 1-9, 11-25
# needs: Callable, Collection, Iterator, Mapping, NamedTuple, Path, collections,
#     contextlib, dataclass, field, functools, mx, queue, threading, time, traceback,
#     weakref
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
    adopted_memory: int = 0  # weights that are used where the file is mapped
    finish_reason: str = ""  # stop, length, context, cancelled or error
    ranks: int = 1  # processes that share the model
    unpacked: bool = False  # packed weights, when they were loaded


class Progress(NamedTuple):
    """How far the worker is: bytes of weights, or tokens of a prompt."""

    done: int
    total: int


@dataclass
class Request:
    """What the worker is to do; sampling is make_sampler's options."""

    ids: list[int]
    max_tokens: int | None
    sampling: dict
    drafts: int  # tokens to draft at a time, 0 for none
    drop_space: bool  # see Tokenizer.stream
    stop: list[str]  # texts to end before
    # What comes of it: Progress and Pieces, in the end Stats or an error.
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.perf_counter)
    # What the worker has written, and when: its start, then each token.
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def told(self) -> list:
        """Return what the other ranks are told, which make their own of it."""
        told = [self.ids, self.max_tokens, self.sampling, self.drafts]
        return [*told, self.drop_space, self.stop]

    def finish(self, outcome: "Stats | Exception") -> None:
        """Send the last event, twice. If Ctrl-C comes between taking the event and
        using it, whoever waits asks again, and the second one answers."""
        self.events.put(outcome)
        self.events.put(outcome)


class Reply(Iterator[str]):
    """The pieces of a reply, as an iterator of str; Engine makes it.

    taken: the Piece of all that was taken so far. text: all of its text, and thinking:
    what a reasoning model has thought in it before its answer. stats: a Stats once the
    iterator has ended. An error in the worker is raised here. A reply that is dropped
    is cancelled.
    """

    def __init__(
        self,
        request: Request,
        progress: Callable[[int, int], None] | None,
        engine: "Engine",
    ):
        self.taken = Piece()
        self.stats: Stats = None  # until the iterator has ended
        self._request, self._progress = request, progress
        self._engine = engine  # which would be closed if nobody kept it
        weakref.finalize(self, request.stopped.set)

    @property
    def text(self) -> str:
        return self.taken.text

    @property
    def thinking(self) -> str:
        return self.taken.thinking

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


@contextlib.contextmanager
def wired_memory(nbytes: int) -> Iterator[None]:
    """Keep a model of `nbytes`, weights and cache, in wired memory within the block.

    macOS may otherwise page a large model out between tokens, which makes it many
    times slower; wiring more than needed takes memory from everything else. So: what
    is needed and 2 GB, at most what Metal recommends. Does nothing elsewhere.
    """
    limit = wired_limit()
    if limit is None:
        yield
        return
    before = mx.set_wired_limit(min(limit, nbytes + 2_000_000_000))
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # which the caller has heard of
            mx.synchronize()  # nothing may be running that counts on it
        mx.set_wired_limit(before)


TICK = 0.05  # seconds; how often ranks with nothing to do meet


class Worker(threading.Thread):
    """The thread that loads a model and serves requests, one after another."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        context: int | None,
        group: Group | None,
        dtype: mx.Dtype | None,
        bits: int | None,
        prefill_step: int | None,
    ):
        super().__init__(name="llama worker", daemon=True)
        self.folder, self.tokenizer, self.context = folder, tokenizer, context
        self.group, self.prefill_step = group, prefill_step
        self.dtype, self.bits = dtype, bits
        self.failure = None
        self.events = queue.SimpleQueue()  # of the load: Progress; ModelArgs or error
        self.requests = queue.SimpleQueue()  # Request or function; None to end
        self.closing = threading.Event()

    def run(self) -> None:
        if self.closing.is_set():  # by a Ctrl-C before it began; nobody waits for it
            return
        try:
            self.load()
            while (request := self.next_request()) is not None:
                if isinstance(request, Request):
                    self.serve(request)
                else:
                    request()
                request = None  # what it holds is not needed until the next
        except Exception as error:
            self.failure = error
            self.events.put(error)
            while not self.requests.empty():  # or whoever asked would wait for ever
                if isinstance(request := self.requests.get(), Request):
                    request.finish(error)
        finally:
            # What a thread leaves running when it ends can abort the process.
            self.loading = self.model = self.cache = None
            mx.clear_streams()

    def next_request(self) -> "Request | Callable | None":
        """Return what is to be done next: on every rank what rank 0 is asked."""
        if not self.group:
            return self.requests.get()
        message = []
        while not message:
            request = None
            if leads(self.group):
                with contextlib.suppress(queue.Empty):
                    request = self.requests.get(timeout=TICK)
                    message = [None if request is None else request.told()]
            else:
                time.sleep(TICK)
            # Also when there is nothing to do: ranks that wait for one another in MLX
            # take a core each, and the death of one is noticed only here.
            try:
                message = broadcast(self.group, message)
            except Exception as error:
                if request is not None:  # it is in the queue no more
                    request.finish(error)
                raise
        [told] = message
        return request if leads(self.group) or told is None else Request(*told)

    def load(self) -> None:
        """Load the model; report Progress, and in the end its ModelArgs."""
        whole, tensors = examine(self.folder)
        self.context, about_context = choose_context(whole.args, self.context)
        loading = Loading(whole, tensors, self.group, self.dtype, self.bits)
        self.loading, self.model = loading, loading.model
        self.prefill_step = self.prefill_step or default_prefill_step()
        self.drafts = default_drafts()
        self.warnings = [about_context] if about_context else []
        self.warnings += loading.require_room(self.context)
        if keys := ", ".join(without_effect(self.folder)):
            has = "have" if "," in keys else "has"
            self.warnings.append(f"generation_config.json: {keys} {has} no effect here")
        for done in loading.read():
            self.events.put(Progress(done, loading.file_bytes))
            if self.closing.is_set():
                raise RuntimeError("the engine was closed while loading")
        self.forget()
        self.events.put(whole.args)

    def forget(self) -> None:
        self.cache, self.cached = self.model.make_cache(self.context), []

    def reuse(self, ids: list[int]) -> int:
        """Trim the cache to the ids that a prompt begins with; return their number."""
        reused, most = 0, min(len(self.cached), len(ids) - 1)  # one is left to be read
        while reused < most and self.cached[reused] == ids[reused]:
            reused += 1
        trim_to(self.cache, reused)
        return reused

    def serve(self, request: Request) -> None:
        """Answer a request. An error is for whoever asked; the next may work."""
        try:
            # Only now: while the worker waits it keeps memory from nobody.
            with wired_memory(self.loading.nbytes(self.context)):
                self.reply_to(request)
        except Exception as error:
            # What the failed step made may be all the memory there is, and the error
            # refers to it as long as somebody keeps the error.
            traceback.clear_frames(error.__traceback__)
            if not self.group:  # a rank might wait for one that has gone
                with contextlib.suppress(RuntimeError):  # what still runs may fail too
                    mx.synchronize()
            self.forget()
            mx.clear_cache()
            request.finish(error)
            if self.group and not isinstance(error, ValueError):
                raise  # only a ValueError is the same on all ranks

    def reply_to(self, request: Request) -> None:
        """Send Progress and Pieces of a reply as they come, then its Stats."""
        request.times.append(time.perf_counter())
        mx.reset_peak_memory()
        ids = request.ids

        def cancelled() -> bool:
            return request.stopped.is_set() or self.closing.is_set()

        if self.group:
            cancelled = cancelled_by_any(self.group, cancelled, request.tokens)
        reused = self.reuse(ids)
        lookup = Lookup(request.drafts, ids) if request.drafts else None
        logits = self.prefill_prompt(request, ids[reused:], cancelled)
        reason = "cancelled"
        if logits is not None:
            loop = decode
            if lookup:
                loop = functools.partial(decode_with_lookup, lookup)
            sampler = make_sampler(**request.sampling, prompt=ids)
            ends = request.max_tokens, self.tokenizer.stop_tokens
            reply = loop(self.model, logits, self.cache, sampler, *ends)
            reason = self.write(request, reply, cancelled, lookup)
        self.cached = (ids + request.tokens)[: self.cache[0].offset]
        accepted = lookup.accepted if lookup else 0
        request.finish(self.stats_of(request, reused, accepted, reason))

    def prefill_prompt(
        self, request: Request, prompt: list[int], cancelled: Callable[[], bool]
    ) -> mx.array | None:
        """Return the logits that follow a prompt, None if the reply is cancelled before
        they are known. Reports Progress."""
        if cancelled():
            return None
        for done, logits in prefill(self.model, prompt, self.cache, self.prefill_step):
            request.events.put(Progress(done, len(prompt)))
            if cancelled():
                return None
        return logits

    def write(
        self,
        request: Request,
        reply: Iterator[int],
        cancelled: Callable[[], bool],
        lookup: Lookup | None,
    ) -> str:
        """Put what is decoded into Pieces; return why it ended."""
        stream = self.tokenizer.stream(drop_space=request.drop_space)
        maker, reason, passes = PieceMaker(stream, request.stop), None, 0
        while reason is None:
            try:
                token = next(reply)
            except StopIteration as end:
                reason = end.value
                break
            request.tokens.append(token)
            request.times.append(time.perf_counter())
            maker.add(token)
            if maker.stop_found() is not None:
                break
            if not maker.must_wait():
                request.events.put(maker.take())
            # Asked once for all tokens of a pass, since ranks ask by a sum over them.
            if lookup is None or lookup.passes > passes:
                passes = lookup.passes if lookup else 0
                if cancelled():
                    reason = "cancelled"
        reply.close()  # which trims the step that was launched ahead
        maker.waiting.text += stream.close()
        end = maker.stop_found()
        if end is not None:
            self.cut_reply(request, maker.waiting, end)
            return "stop"
        request.events.put(maker.take())
        return reason

    def cut_reply(self, request: Request, waiting: Piece, end: int) -> None:
        """End a reply where a stop text begins, in the tokens that wait: the cache
        keeps those before them, and the text up to the end is encoded anew."""
        kept = len(request.tokens) - len(waiting.ids)
        trim_to(self.cache, len(request.ids) + kept)
        text = waiting.text[:end]
        request.events.put(Piece(text, self.tokenizer.encode(text, first=False)))

    def stats_of(
        self, request: Request, reused: int, accepted: int, reason: str
    ) -> Stats:
        """Return what a reply took; reused, accepted, reason: see Stats."""
        started, *times = request.times
        read = len(request.ids) - reused
        first, last = (times[0], times[-1]) if times else (started, started)
        return Stats(
            prompt_tokens=len(request.ids),
            reused_tokens=reused,
            generation_tokens=len(times),
            accepted_tokens=accepted,
            time_to_first_token_s=first - request.submitted,
            prefill_tps=read / (first - started) if times else 0.0,
            decode_tps=(len(times) - 1) / (last - first) if last > first else 0.0,
            context_used=self.cache[0].offset,
            context=self.context,
            peak_memory=mx.get_peak_memory(),
            adopted_memory=self.loading.adopted,
            finish_reason=reason,
            ranks=self.group.size() if self.group else 1,
            unpacked=self.loading.unpacked,
        )

    def save(self, file: Path, notes: dict, tokens: int | None) -> None:
        """Write the cache, what it holds, and notes to a file."""
        name = fingerprint(self.folder, self.loading.tensors)
        save_session(file, self.cache, self.cached[:tokens], notes, name)

    def restore(self, file: Path) -> dict:
        """Fill the cache from a file, and return its notes; see Engine.restore."""
        args, dtype = self.model.args, self.model.model.norm.weight.dtype
        name = fingerprint(self.folder, self.loading.tensors)
        try:
            ids, notes = restore_session(file, self.cache, args, dtype, name)
        except Exception:
            if any(layer.offset != len(self.cached) for layer in self.cache):
                self.forget()  # it was filled in part
            raise
        self.cached = ids
        return notes


class PromptTooLong(ValueError):
    """A prompt of `tokens` does not fit the context, which can be `longest` at most."""

    def __init__(self, tokens: int, context: int, longest: int):
        self.tokens, self.context, self.longest = tokens, context, longest
        super().__init__(f"the prompt must have 1 to {context} tokens, got {tokens}")


def shut_down(worker: Worker) -> None:
    """End a worker: cancel what it does and wait until it is gone."""
    if leads(worker.group):  # which tells the others
        worker.closing.set()
    worker.requests.put(None)
    if worker is threading.current_thread():  # where garbage may be collected
        return
    while worker.is_alive():
        with contextlib.suppress(KeyboardInterrupt):  # it ends with the step it is in
            worker.join()


class Engine(contextlib.AbstractContextManager["Engine"]):
    """A model and a worker thread that answers with it; a context manager.

    model: a folder or org/name. tokenizer: None is the folder's. context: tokens of
    cache, allocated once; None is the model's longest, at most 8192. dtype, bits: see
    load. prefill_step: see prefill; None is default_prefill_step(). progress: called
    with the bytes loaded, and in all. group: ranks that share the model, from
    join_ranks; rank 0 is asked, the others answer with it until it closes its engine.
    Returns when the model is loaded; raises what Tokenizer.from_folder and load raise.

    Attributes: tokenizer, args (a ModelArgs), context, defaults (make_sampler's
    options where a request gives none), warnings (lines about context, memory, speed).
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        context: int | None = None,
        dtype: mx.Dtype | None = None,
        bits: int | None = None,
        prefill_step: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        group: Group | None = None,
    ):
        if prefill_step is not None:
            require_count("prefill_step", prefill_step, 1)
        folder = find_folder(model)
        require_kind(folder)
        self.tokenizer = tokenizer or Tokenizer.from_folder(folder)
        self.defaults = default_sampling(folder)
        self._taken = collections.deque(maxlen=256)  # the Piece of each past reply
        self._lock = threading.Lock()
        self._worker = Worker(
            folder, self.tokenizer, context, group, dtype, bits, prefill_step
        )
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
        self.warnings = self._worker.warnings

    def chat(
        self,
        messages: list[dict[str, str]],
        *,
        variables: Mapping[str, object] = {},
        **options,
    ) -> Reply:
        """Return at once with the reply to a conversation, to be iterated over.

        messages: see Tokenizer.encode_chat. An assistant's message that is the text of
        an earlier Reply stands for the very ids, so the cache is reused up to there.
        variables: what else the template may ask for: {"enable_thinking": False} has
        most reasoning models answer at once. options: those of `submit`.
        """
        check_conversation(messages)
        tokenizer, replies = self.tokenizer, {}
        for piece in list(self._taken):
            if piece.text:
                replies[piece.text] = piece.ids
            if piece.opening:
                opening = Text.by(TEMPLATE, piece.opening)
                opening = tokenizer.encode(opening, first=False)
                replies[piece.content] = opening + piece.ids
        prompt = tokenizer.render(messages, **variables)
        ids = tokenizer.encode_prompt(prompt, messages, replies)
        reply = self.submit(ids, **options)
        reply.taken.opening = opening_of(prompt)
        return reply

    def complete(self, text: str, **options) -> Reply:
        """Return at once with what continues a text, with no chat format; as `chat`."""
        ids = self.tokenizer.bos_prefix + self.tokenizer.encode(text)
        return self.submit(ids, **{"drop_space": False} | options)

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
        stop: Collection[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Reply:
        """Return at once with the reply to ids.

        max_tokens: None goes on to the end of the turn, or of the context. Sampling:
        see make_sampler; None is the folder's default, 0 turns a filter off. lookup:
        tokens drafted at a time, see Lookup; 0 is off, None is default_drafts(). stop:
        texts; the reply ends where the first of them would begin.
        progress: called, by whoever iterates, with the tokens of the prompt read, and
        in all. drop_space: see Tokenizer.stream.
        Raises ValueError for options out of range or a prompt that does not fit,
        RuntimeError if the engine is closed.
        """
        ids = checked_ids(ids, self.args.vocab_size)
        if not 0 < len(ids) <= self.context:
            raise PromptTooLong(len(ids), self.context, self.args.longest_context)
        check_stop(stop)
        lookup = self._worker.drafts if lookup is None else lookup
        for name, value in (("max_tokens", max_tokens), ("lookup", lookup)):
            if value is not None:
                require_count(name, value, 0)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given |= {"min_p": min_p, "repetition_penalty": repetition_penalty}
        given = {name: value for name, value in given.items() if value is not None}
        sampling = self.defaults | given
        check_sampling(**sampling)
        sampling["seed"] = new_seed() if seed is None else seed
        check_seed(sampling["seed"])
        request = Request(ids, max_tokens, sampling, lookup, drop_space, [*stop])
        reply = Reply(request, progress, self)
        with self._lock:  # nothing may be asked after the worker's last request
            self._require_worker()
            self._taken.append(reply.taken)
            self._worker.requests.put(request)
            if failure := self._worker.failure:  # it may not look there any more
                request.finish(failure)
        return reply

    def save(self, file: str | Path, notes: dict, *, tokens: int | None = None) -> None:
        """Write the conversation to a file: cache, ids, and notes, which JSON can hold.

        tokens: how many of the cache's, from its beginning; None is all of them.
        The file appears whole or not at all, whatever happens meanwhile.
        """
        self._on_worker(self._worker.save, Path(file), notes, tokens)

    def restore(self, file: str | Path) -> dict:
        """Fill the cache from a file that `save` wrote; return its notes.

        Raises OSError, or ValueError if it is no such file, is damaged, does not fit
        the context, or was written with another model.
        """
        return self._on_worker(self._worker.restore, Path(file))

    def remember(self, piece: Piece) -> None:
        """Let `chat` use these ids for an assistant's message that is this text."""
        self._taken.append(piece)

    def close(self) -> None:
        """End the worker, cancelling what it does, and wait for it. Idempotent."""
        with self._lock:
            self._shut_down()

    def __exit__(self, *_exception) -> None:
        self.close()
        if self._worker.failure:  # a rank other than 0 has no reply to raise it
            raise self._worker.failure

    def _require_worker(self) -> None:
        worker = self._worker
        # In a child that was forked there is no such thread.
        if not self._shut_down.alive or worker.failure or not worker.is_alive():
            raise RuntimeError("the engine is closed")
        if not leads(worker.group):
            raise RuntimeError("only rank 0 can be asked; the others follow")

    def _on_worker(self, task: Callable, *arguments: object) -> dict | None:
        """Have the worker do a task, after what it was asked before; return what the
        task returns, or raise what it raises."""
        if self._worker.group:
            raise ValueError("a session is kept by one rank, which has the whole cache")
        answer = queue.SimpleQueue()

        def put_answer() -> None:
            try:
                answer.put(task(*arguments))
            except Exception as error:
                answer.put(error)

        with self._lock:
            self._require_worker()
            self._worker.requests.put(put_answer)
        if isinstance(result := answer.get(), Exception):
            raise result
        return result


# -----------------------------------------------------------------------------
# Part Five: command line. What a person types, and what is printed.
# -----------------------------------------------------------------------------

import argparse
import select
import shlex
import statistics
import termios
import textwrap
from dataclasses import asdict
from typing import TextIO

# -----------------------------------------------------------------------------
# 27. On a terminal
# What is written to a person: escapes and colours only to a terminal, what comes from a
# model or a file made printable first. A reply comes in pieces, and a word that crosses
# the edge is not to be broken, nor anything shown twice. So a word is held back until
# its end has come. On 12 columns, with what is written after each piece:
#
#     "a quick" -> "a"    " bro" -> " quick"    "wn fox\n" -> "\nbrown fox\n"
#
# uses: none
# needs: Iterable, TextIO, os, sys, textwrap, time, unicodedata
# -----------------------------------------------------------------------------

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
    """Print lines about what goes on, dim where colour is wanted. On a terminal a line
    that is too long is broken between two words."""
    text = printable(text)
    if sys.stderr.isatty():
        # 0 if the terminal does not tell
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or sys.maxsize
        whole = {"break_long_words": False, "break_on_hyphens": False}
        lines = [textwrap.fill(line, columns, **whole) for line in text.split("\n")]
        text = "\n".join(lines)
    if coloured(sys.stderr):
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """A line on a terminal that says how far something is, if it takes a moment, and
    how long the rest will take, if all of it takes more than two seconds."""

    def __init__(self, label: str, patience: float = 0.5):
        self.label, self.patience, self.shown = label, patience, False
        self.started = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        passed = time.monotonic() - self.started
        if styled(sys.stderr) and passed >= self.patience:
            line = f"\r{self.label} {100 * done // max(total, 1)} %"
            left = passed * (total - done) / max(done, 1)
            if done and passed + left > 2:
                rest = f"{left / 60:.0f} min" if left > 99 else f"{left:.0f} s"
                line += f", {rest} left"
            print(f"{line}\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = True

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = False


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Print rows of a name and a text, aligned; a name only where it changes."""
    before = None
    for name, text in rows:
        row = f"{'' if name == before else name:11} {text}"
        print(printable(row), flush=True)
        before = name


def columns_of(character: str) -> int:
    """Return how many columns a terminal gives a character."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):  # part of the one before
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def is_breakable(character: str) -> bool:
    """Return whether a line may end next to a character wherever it stands: it takes
    two columns, or is of a script without blanks (Thai to Burmese, and Khmer)."""
    columns = columns_of(character)
    if "\u0e00" <= character < "\u10a0" or "\u1780" <= character < "\u1800":
        return columns == 1  # not a mark above or below a letter
    return columns == 2


class WordWrap:
    """Writes text to a terminal, and begins a new line before a word that would cross
    its edge; a word that is longer than a line is broken by the terminal itself.

    A word is held back until its end has come, and so are the blanks before it, which
    a new line replaces. So nothing that was shown has ever to be moved. To what is no
    terminal it writes the text as it is.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.columns, self.column = stream, 0, 0
        self.blanks, self.word, self.crosses = "", "", False
        self.dim = False
        self.taken = 0  # characters that were to be shown

    def write(self, text: str, *, dim: bool = False) -> None:
        """Show text, dim where colour is wanted."""
        self.taken += len(text)  # before Ctrl-C can come between
        if text and dim != self.dim:
            self.end_word()
            self.dim = dim
        if self.stream.isatty():
            # Asked each time, as it may be resized; 0 if the terminal does not tell.
            columns = os.get_terminal_size(self.stream.fileno()).columns
            self.columns = columns or sys.maxsize
            if self.column > self.columns:
                self.column %= self.columns  # made narrower, it has broken the line
            for character in printable(text):
                self.add(character)
        else:
            self.stream.write(text)
        self.stream.flush()

    def add(self, character: str) -> None:
        if character in " \t\n" or is_breakable(character):
            self.end_word()
        joins = columns_of(character) == 0 and not self.blanks + self.word
        if character == "\n":
            self.end_line()
            self.put(character)
        elif character in " \t":
            self.blanks += character
        elif self.crosses or joins:
            self.put(character)
        else:
            self.word += character
            if is_breakable(character):
                self.end_word()
            elif not self.fits(self.blanks + self.word):
                self.end_word()
                self.crosses = True

    def end_word(self) -> None:
        """Show the word that is held, on a new line if it does not fit on this one."""
        blanks, word, self.crosses = self.blanks, self.word, False
        if word:
            self.blanks = self.word = ""
            begun = self.column and (blanks or not is_breakable(word[0]))
            if begun and not self.fits(blanks + word):
                blanks = "\n"
            self.put(blanks + word)

    def end_line(self) -> None:
        """Show all that is held, except blanks that do not fit."""
        self.end_word()
        if self.fits(self.blanks):
            self.put(self.blanks)
        self.blanks = ""

    def put(self, text: str) -> None:
        # Each text by itself, so that the terminal is never left dim.
        dim = self.dim and coloured(self.stream) and not text.isspace()
        self.stream.write(f"\x1b[2m{text}\x1b[0m" if dim else text)
        for character in text:
            self.column = self.after(self.column, character)
            if self.column > self.columns:  # the terminal has begun a new line
                self.column = columns_of(character)

    def after(self, column: int, character: str) -> int:
        """Return the column that follows a character at a column."""
        if character == "\n":
            return 0
        if character == "\t":
            return min(column + 8 - column % 8, self.columns)
        return column + columns_of(character)

    def fits(self, text: str) -> bool:
        column = self.column
        for character in text:
            column = self.after(column, character)
        return column <= self.columns


# -----------------------------------------------------------------------------
# 28. Info
# What a model is, whether it fits this machine and how fast it is here; or which models
# there are. Answers go to stdout, notes and progress to stderr. No reply is faster than
# its weights are read: the 7.5 billion of the 8b that each token needs, in 4.5 bits,
# are 4.2 GB, so memory of 100 GB/s gives at most 24 tokens/s. First stand the published
# shapes, and what is said of an error of any command.
# uses: 1-9, 11-27
# needs: Iterator, Mapping, Path, argparse, asdict, collections, contextlib, json, math,
#     mx, nn, signal, statistics, textwrap, time, tree_flatten, tree_unflatten
# -----------------------------------------------------------------------------


def llama3_args(
    D: int, F: int, layers: int, H: int, *, scaling: float = 8.0, tied: bool = False
) -> ModelArgs:
    """Return the shape of a Llama 3.x: the values that all sizes share, with these."""
    return ModelArgs(
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=H,
        vocab_size=128_256,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": scaling,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=tied,
    )


# The published shapes: 8b, 70b and 405b of Llama 3.1 [1, table 3], 1b and 3b of 3.2.
PRESETS = {
    "1b": llama3_args(2048, 8192, 16, 32, scaling=32.0, tied=True),
    "3b": llama3_args(3072, 8192, 28, 24, scaling=32.0, tied=True),
    "8b": llama3_args(4096, 14336, 32, 32),
    "70b": llama3_args(8192, 28672, 80, 64),
    "405b": llama3_args(16384, 53248, 126, 128),
}


def larger_context(tokens: int, context: int, longest: int) -> str:
    """Return which option makes room for tokens; "" if the model has no room."""
    if context < longest and tokens <= longest:
        return f"; --ctx sets the limit, of a model made for up to {longest}"
    return ""


def advice(error: Exception, command: str = "chat") -> str:
    """Return which options of a command may help against an error; "" if none does."""
    if isinstance(error, MemoryTooSmall):
        if error.weights > error.there:
            return "; fewer bits need less, and --bits packs what is not packed yet"
        option = "--prompt-tokens" if command == "info" else "--ctx"
        return f"; {option} sets the size of the cache"
    if isinstance(error, AlreadyQuantized):
        return "; leave out --bits"
    if isinstance(error, PromptTooLong):
        larger = larger_context(error.tokens, error.context, error.longest)
        return larger or "; only a shorter prompt fits"
    if isinstance(error, SessionTooLong):
        return "; see --ctx"
    if isinstance(error, NotANumber):
        more = ", --dtype float32 may help" if command == "chat" else ""
        return f"; `inspect --check` finds NaN in the files{more}"
    if isinstance(error, NoSuchModel):
        if command == "info":
            return f"; the presets are {', '.join(PRESETS)}"
        more = "; a prompt goes after --prompt" if command == "chat" else ""
        return f"; `llama.py info` lists what is here{more}"
    if isinstance(error, NoTemplate):
        return f": use --raw, or --template with one of {', '.join(BUILT_IN)}"
    return ""


def error_line(error: Exception, command: str = "chat") -> str:
    """Return an error as one line, with advice; the system's without their numbers."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        about = "" if error.filename is None else f"{error.filename}: "
        text = about + error.strerror
    return printable(" ".join(f"{text}{advice(error, command)}".split()))


def choose_folder(model: str | None) -> Path:
    """Return the folder of MODEL; without one, of the model beside this file."""
    if model in PRESETS and not Path(model).is_dir():
        raise FileNotFoundError(
            f"{model} is a preset without weights; only info accepts it"
        )
    if model is not None:
        return find_folder(model)
    folder = Path(__file__).resolve().parent / "stories"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            "no MODEL: give a folder or org/name, as in: llama.py chat "
            "mlx-community/Llama-3.2-1B-Instruct-4bit"
        )
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


def bits_in_memory(model: Llama, bits: int) -> int:
    """Return how many bits weights have here once loaded: 16 if dequantized."""
    return 16 if holds_dequantized(weight_bytes(model, 16, 4)) else bits


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
    side, layers, count, dtype = 8192, 1, 4, mx.bfloat16
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        # Many matrices, as in a model: a CPU's cache would hold a single one.
        side, layers, count, dtype = 768, 16, 1, mx.float32
    stack = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(layers)])
    stack.set_dtype(dtype)
    if on_cpu:
        spread_products(stack, dense=bits < 16 or not has_openblas())
    lay_out_by_columns(stack)
    if bits < 16:
        nn.quantize(stack, 64, bits)
    mx.eval(stack.parameters())
    nbytes = sum(array.nbytes for _, array in tree_flatten(stack.parameters()))
    best = math.inf
    for _ in range(10):  # threads of other cores take a few to wake
        vectors = [mx.ones((1, side), dtype) for _ in range(count)]
        started = time.perf_counter()
        mx.eval([stack(vector) for vector in vectors])
        best = min(best, time.perf_counter() - started)
    return count * nbytes / best


def fitting(weights: int, cache: int, longest: int, memory: int) -> tuple[int, str]:
    """Return the longest context that fits, and in a word or two whether a model does.

    weights: bytes. cache: bytes a token.
    """
    context = max(0, min((memory - weights) // cache, longest))
    if context == 0:
        return 0, "does not fit"
    usual = weights + cache * min(longest, DEFAULT_CONTEXT)
    return context, "fits" if usual <= 0.8 * memory else "tight"


def stored_bits(model: Llama, tensors: Mapping[str, TensorInfo]) -> int:
    """Return in how many bits the files hold a weight, in most of their bytes."""
    sizes = collections.Counter()
    for path, layer in model.named_modules():
        if isinstance(layer, (QuantizedMatrix, nn.Linear, nn.Embedding)):
            info = tensors[f"{path}.weight"]
            bits = getattr(layer, "bits", 8 * DTYPES[info.dtype].size)
            sizes[bits] += info.nbytes
    return sizes.most_common(1)[0][0]


PARTS = {  # where parameters are, by what their names contain
    ".mlp.": "MLP",
    ".self_attn.": "attention",
    "embed_tokens": "vocabulary",
    "lm_head": "vocabulary",
}


def stored_model(name: str | None) -> tuple[Llama, dict]:
    """Return a folder's model as it is when nothing is packed, and what `info` tells of
    its files."""
    folder = choose_folder(name)
    model, tensors = examine(folder)
    unpacked = {n: t for n, t in tensors.items() if not n.endswith(".scales")}
    return build_model(model.args, unpacked), {
        "folder": str(folder),
        "loaded_bytes": Loading(model, tensors).weights,
        "stored_bytes": sum(info.nbytes for info in tensors.values()),
        "stored_bits": stored_bits(model, tensors),
    }


def describe(model: str | None) -> dict:
    """Return what `info` tells of a preset or a model."""
    if model in PRESETS:
        dense, files = Llama(PRESETS[model]), {}
    else:
        dense, files = stored_model(model)
    parts = collections.Counter()
    for name, array in tree_flatten(dense.parameters()):
        parts[next((PARTS[k] for k in PARTS if k in name), "norms")] += array.size
    # Of an embedding that is not the head too, a token reads one row.
    unread = parts["vocabulary"] // 2 if "lm_head" in dense else 0
    share_read = 1 - unread / parts.total()
    # In memory: the CPU computes in float32, so all that is not packed doubles.
    item_size = 4 if mx.default_device() == mx.cpu else 2
    cache, memory = kv_bytes_per_token(dense.args, item_size), machine_memory()
    sizes, contexts, verdicts = {}, {}, {}
    for bits in (16, 8, 4):
        there, sizes[bits] = bits_in_memory(dense, bits), weight_bytes(dense, bits)
        size, speed = weight_bytes(dense, there, item_size), reading_speed(there)
        if bits == files.get("stored_bits"):
            sizes[bits], size = files["stored_bytes"], files["loaded_bytes"]
        context, word = fitting(size, cache, dense.args.longest_context, memory)
        details = f"{gigabytes(size)} in memory"
        if context:
            fastest = speed / (size * share_read)
            details = f"context {context:,}, up to {fastest:,.1f} tokens/s"
        contexts[bits], verdicts[bits] = context, f"{word}, {details}"
    return {
        "model": model or "stories",
        "folder": files.get("folder"),
        "config": asdict(dense.args),
        "parameters": parts.total(),
        "parameters_of": dict(parts.most_common()),
        "weight_bytes": sizes,
        "stored_bytes": files.get("stored_bytes"),
        "stored_bits": files.get("stored_bits"),
        "kv_bytes_per_token": cache,
        "memory_bytes": memory,
        "device": mx.default_device().type.name,
        "longest_context": contexts,
        "verdict": verdicts,
    }


def random_model(args: ModelArgs, bits: int | None) -> Llama:
    """Return a model of random weights, in 16 bits (on a CPU in float32) or quantized.

    Making a layer takes some memory besides. With the largest first, that is less than
    what is still to be made, so the peak is the model itself.
    """
    model, dtype = Llama(args), default_dtype() or mx.bfloat16
    layers = sorted(dense_layers(model), key=lambda entry: -entry[1].weight.size)
    block = mx.random.randint(0, 256, (65_536,), mx.uint8).view(mx.uint32)
    progress, made = ProgressLine("making random weights"), 0
    total = sum(layer.weight.size for _, layer in layers)
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
        made += rows * columns
        progress(made, total)
    progress.clear()
    model.set_dtype(dtype)  # the norms
    mx.eval(model.parameters())
    return model


def measure_prompt(
    model: Llama, ids: list[int], cache: list[KVCache]
) -> tuple[float, mx.array]:
    """Return the seconds from a prompt of ids to the first token of a reply, and the
    logits that follow the prompt, which the cache then holds."""
    seconds, total = [], 4 * len(ids)
    progress = ProgressLine("measuring the prompt", patience=0)
    progress(0, total)  # at once, since the first step may take long
    for before in range(0, total, len(ids)):
        trim_to(cache, 0)
        started = time.perf_counter()
        for done, logits in prefill(model, ids, cache, default_prefill_step()):
            progress(before + done, total)
        for _ in decode(model, logits, cache, greedy, 1):
            seconds.append(time.perf_counter() - started)
    progress.clear()
    return statistics.median(seconds[1:]), logits


def measure_reply(
    model: Llama, logits: mx.array, cache: list[KVCache], tokens: int
) -> float:
    """Return the tokens per second of a reply to what a cache holds."""
    speeds, held, total = [], cache[0].offset, 4 * tokens
    progress = ProgressLine("measuring the reply")
    for before in range(0, total, tokens):
        trim_to(cache, held)
        times = []
        for _ in decode(model, logits, cache, greedy, tokens):
            times.append(time.perf_counter())
            progress(before + len(times), total)
        speeds.append((tokens - 1) / (times[-1] - times[0]))
    progress.clear()
    return statistics.median(speeds[1:])


def measure(
    model: Llama, prompt_tokens: int, generation_tokens: int
) -> Iterator[dict[str, float]]:
    """Yield how fast a model is here, first with a prompt, then with a reply: medians
    of three runs, after one to warm up.

    Greedy, over a prompt of random ids. Speeds in tokens/s, gbps in 1e9 bytes of
    weights read a second, bandwidth_share of what copying reaches, peak_gb meanwhile.
    """
    ids = mx.random.randint(0, model.args.vocab_size, (prompt_tokens,)).tolist()
    cache = model.make_cache(prompt_tokens + generation_tokens)
    mx.reset_peak_memory()
    first, logits = measure_prompt(model, ids, cache)
    yield {
        "prompt_tokens": prompt_tokens,
        "generation_tokens": generation_tokens,
        "prefill_tps": prompt_tokens / first,
        "time_to_first_token_s": first,
    }
    decode_tps = measure_reply(model, logits, cache, generation_tokens)
    peak = mx.get_peak_memory()
    sizes = {name: array.nbytes for name, array in tree_flatten(model.parameters())}
    embedding = sum(n for name, n in sizes.items() if "embed_tokens" in name)
    # Of an embedding that is not the head too, a token reads one row.
    read = sum(sizes.values()) - (embedding if "lm_head" in model else 0)
    yield {
        "decode_tps": decode_tps,
        "gbps": read * decode_tps / 1e9,
        "weights_gb": sum(sizes.values()) / 1e9,
        "active_gb": mx.get_active_memory() / 1e9,
        "peak_gb": peak / 1e9,
        "bandwidth_share": read * decode_tps / copy_bandwidth(),
    }


def measured(options: argparse.Namespace, found: dict) -> Iterator[dict[str, float]]:
    """Yield what `measure` says of a preset, with random weights, or a model."""
    args, group = ModelArgs(**found["config"]), options.group
    total = options.prompt_tokens + options.generation_tokens

    def warn(*texts: str | None) -> None:
        for text in texts:
            if text and leads(group):
                note(text)

    _, about_context = choose_context(args, total)
    warn(about_context)
    if found["folder"] is None:
        args = rank_args(args, group.size() if group else 1)
        item_size, bits = (default_dtype() or mx.bfloat16).size, options.bits or 16
        if group is None:
            bits = bits_in_memory(Llama(args), bits)
        weights = weight_bytes(Llama(args), bits, item_size)
        cache = total * kv_bytes_per_token(args, item_size)
        warn(*require_room(found["parameters"], weights, cache))
        nbytes = weights + cache
        model = random_model(args, options.bits)
        accelerate(model, group)
    else:
        loading = Loading(*examine(found["folder"]), group, bits=options.bits)
        warn(*loading.require_room(total))
        model, nbytes = loading.model, loading.nbytes(total)
        progress = ProgressLine("loading")
        for done in loading.read():
            progress(done, loading.file_bytes)
        progress.clear()
    with wired_memory(nbytes):
        yield from measure(model, options.prompt_tokens, options.generation_tokens)


def measured_rows(name: str, device: str, found: dict) -> list[tuple[str, str]]:
    """Return what `measure` has found last, as rows: of a prompt; or of a reply, and
    then the last one, of all, to paste elsewhere."""
    prefill, tokens = f"{found['prefill_tps']:,.1f}", found["prompt_tokens"]
    if "decode_tps" not in found:
        return [("prefill", f"{prefill} tokens/s, {tokens} tokens")]
    decode, tokens = f"{found['decode_tps']:,.1f}", found["generation_tokens"]
    reads, first = f"{found['gbps']:,.1f}", f"{found['time_to_first_token_s']:.2f} s"
    share = f"{100 * found['bandwidth_share']:.0f} %"
    peak, end = gigabytes(1e9 * found["peak_gb"]), gigabytes(1e9 * found["active_gb"])
    weights_gb, peak_gb = f"{found['weights_gb']:.2f}", f"{found['peak_gb']:.2f}"
    columns = (name, device, weights_gb, prefill, decode, reads, peak_gb)
    return [
        ("decode", f"{decode} tokens/s, {tokens} tokens, the first after {first}"),
        ("reads", f"{reads} GB/s of weights, {share} of what copying reaches here"),
        ("peak", f"{peak}, {end} at the end"),
        ("as a row", f"| {' | '.join(columns)} |"),
    ]


def bars(sizes: dict[str, int]) -> Iterator[str]:
    """Yield names, their shares of the sum in percent, and those as bars."""
    for name, size in sizes.items():
        share = 100 * size / sum(sizes.values())
        if share >= 1:
            yield f"{name:10} {share:3.0f} % {round(share / 2) * '#'}"


def info_rows(found: dict) -> list[tuple[str, str]]:
    """Return what `describe` has found, as rows of a table."""
    args, kv = ModelArgs(**found["config"]), found["kv_bytes_per_token"]
    usual = min(args.longest_context, DEFAULT_CONTEXT)
    scaling = (args.rope_scaling or {"rope_type": "no"})["rope_type"]
    window = args.sliding_window
    window = "" if window is None else f", a window of {window:,}"
    head = "the embedding" if args.tie_word_embeddings else "a matrix of its own"
    heads = f"{args.num_attention_heads} heads on {args.num_key_value_heads}"
    rows = [
        ("model", found["model"]),
        *([("folder", found["folder"])] if found["folder"] else []),
        ("layers", f"{args.num_hidden_layers} of width {args.hidden_size:,}"),
        ("attention", f"{heads} key/value heads of {args.head_dim}"),
        ("MLP", f"SwiGLU of width {args.intermediate_size:,}"),
        ("vocabulary", f"{args.vocab_size:,} tokens; the head is {head}"),
        ("positions", f"{args.max_position_embeddings:,} tokens{window}"),
        ("rotary", f"theta {args.rope_theta:,.0f}, {scaling} scaling"),
        ("parameters", f"{found['parameters']:,}"),
        *(("of these", text) for text in bars(found["parameters_of"])),
        ("cache", f"{kv:,} bytes a token, {gigabytes(kv * usual)} for {usual:,}"),
        ("memory here", f"{gigabytes(found['memory_bytes'])}, {found['device']}"),
    ]
    stored = found["stored_bits"]
    if stored is not None:
        size = gigabytes(found["stored_bytes"])
        rows.append(("stored", f"{size}, {stored} bits for most weights"))
    for bits, nbytes in found["weight_bytes"].items():
        name = "as stored" if bits == stored else "weights"
        words = found["verdict"][bits]
        rows.append((name, f"{bits:2} bits {gigabytes(nbytes):>9}: {words}"))
    if found["device"] == "cpu":
        # With OpenBLAS they are unpacked once, if there is room, and else each time.
        why = "fewer bits are hardly faster, since weights are unpacked first"
        rows.append(("on a CPU", why))
    return rows


def listed(name: str, entry: Path) -> dict:
    """Return a row of the list of models. Of weights only headers are read, and no
    tokenizer, so the list is quick; `inspect` finds everything.

    entry: a folder, or a model's entry in the Hugging Face cache.
    """
    found = {"model": name, "disk_bytes": 0, "bits": None, "context": 0}
    folder = entry
    try:
        # Links to files that are counted themselves have next to no size.
        sizes = [path.lstat().st_size for path in entry.rglob("*") if path.is_file()]
        found["disk_bytes"] = sum(sizes)
        revisions = snapshots_of(entry) or [entry]
        if len(revisions) > 1:
            raise ValueError(f"{len(revisions)} revisions, and none of them is main")
        folder = revisions[0]
        model, tensors, problems = check_folder(folder, read=False)
        if problems:
            raise problems[0]
        if not any((folder / f"tokenizer.{end}").exists() for end in ("json", "model")):
            raise FileNotFoundError("no tokenizer.json and no tokenizer.model")
        loading, bits = Loading(model, tensors), stored_bits(model, tensors)
        room = loading.cache_per_token, model.args.longest_context, machine_memory()
        context, word = fitting(loading.weights, *room)
        if context == 0 and bits >= 16:
            item_size = cache_item_size(tensors, loading.dtype)
            context, _ = fitting(weight_bytes(model, 4, item_size), *room)
            word = "with --bits 4" if context else word
        found |= {"bits": bits, "context": context}
        limit = JSON_BYTES + MOST_TOKENS * BYTES_PER_TOKEN
        settings = read_json(folder / "tokenizer_config.json", limit)
        own_file = (folder / "chat_template.jinja").exists()
        if not own_file and not settings.get("chat_template"):
            raise NoTemplate("a base model, it has no chat template")
        return found | {"verdict": word, "problem": None}
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        where = printable(str(folder))
        reason = error_line(error).replace(f"{where}/", "")
        reason = reason.removeprefix(f"{where}: ")
        return found | {"verdict": "refused", "problem": reason}


def models_here() -> list[dict]:
    """Return what is listed of the built-in model and of the Hugging Face cache; what
    can be chatted with comes first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        found.append(listed("stories (built in)", choose_folder(None)))
    entries = hub_folder().glob("models--*")
    for entry in sorted(entries, key=lambda path: path.name.lower()):
        name = entry.name.removeprefix("models--").replace("--", "/", 1)
        found.append(listed(name, entry))
    return sorted(found, key=lambda model: model["problem"] is not None)


def print_models(models: list[dict]) -> None:
    """Print the list of models in 80 columns."""
    width = 40  # of the names that share a line with the rest
    print(f"{'MODEL':{width}} {'SIZE':>9} BITS   CONTEXT  VERDICT")
    for model in models:
        name, bits = printable(model["model"]), model["bits"] or ""
        context = f"{model['context']:,}" if model["context"] else ""
        if len(name) > width:
            print(name)
            name = ""
        row = f"{name:{width}} {gigabytes(model['disk_bytes']):>9} {bits:>4}"
        print(f"{row} {context:>9}  {model['verdict']}", flush=True)
        if model["problem"]:
            short = textwrap.fill(model["problem"], 76, max_lines=2, placeholder=" ...")
            print(textwrap.indent(short, "    "))
    rows = [("presets", f"{' '.join(PRESETS)}, shapes without weights: see info 8b")]
    rows.append(("cache", str(hub_folder())))
    if len(models) < 2:
        rows.append(("to get one", "hf download HuggingFaceTB/SmolLM2-135M-Instruct"))
    print_table(rows)


def add_measured(options: argparse.Namespace, found: dict, shown: bool) -> None:
    """Measure a preset or a model, and add the result to what `describe` has found;
    shown: print it too, each part as soon as it is known."""
    if __name__ == "__main__":
        # Python handles no signal within a step, which can take minutes, and there is
        # nothing to be saved: Ctrl-C ends the process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    mx.random.seed(0)  # all ranks read the same ids
    ranks = options.group.size() if options.group else 1
    found["measured"], name = {}, Path(found["model"]).name
    for part in measured(options, found):
        found["measured"] |= part
        if shown:
            print_table(measured_rows(name, found["device"], found["measured"]))
    found["measured"]["ranks"] = ranks
    if shown and ranks > 1:
        print_table([("ranks", f"{ranks}; bytes are those of one")])


def cmd_info(options: argparse.Namespace) -> int:
    """Print what a preset or a model is, what it needs, and what fits here; without
    MODEL, what models there are."""
    given = options.bits, options.prompt_tokens, options.generation_tokens
    if any(given) and not options.measure:
        options.usage("--bits, --prompt-tokens, --generation-tokens need --measure")
    options.prompt_tokens = options.prompt_tokens or 512
    options.generation_tokens = options.generation_tokens or 128
    if options.model is None and not options.measure:
        found = {"models": models_here(), "presets": [*PRESETS]}
        if options.json:
            print(json.dumps(found | {"cache": str(hub_folder())}, indent=2))
        else:
            print_models(found["models"])
        return 0
    found, shown = describe(options.model), leads(options.group) and not options.json
    if shown:
        print_table(info_rows(found))
    if options.measure:
        add_measured(options, found, shown)
    if options.json and leads(options.group):
        print(json.dumps(found, indent=2))
    return 0


# -----------------------------------------------------------------------------
# 29. Inspect
# What a folder holds, with everything that is wrong with it, and what the model will
# read of a conversation. `load` raises the first problem, `inspect` lists all, so it
# finds some wherever a chat would be refused.
# uses: 1-9, 11-28
# needs: Collection, Iterator, Path, argparse, collections, json, mx, nn, re
# -----------------------------------------------------------------------------


def not_finite(tensors: Collection[TensorInfo]) -> Iterator[ValueError]:
    """Yield an error for each tensor that holds NaN or infinity; reads all data."""
    progress, done = ProgressLine("checking"), 0
    total = sum(info.nbytes for info in tensors)
    for info, array in read_tensors(tensors):
        done += info.nbytes
        progress(done, total)
        if not mx.issubdtype(array.dtype, mx.floating):
            continue
        if bad := mx.sum(~mx.isfinite(array)).item():
            yield ValueError(
                f"{info.file}: {bad} of {array.size} values of {info.name} are NaN or "
                "infinite"
            )
    progress.clear()


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


def require_words(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> None:
    """Raise ValueError unless the chat template makes a prompt of a conversation."""
    if not tokenizer.encode_chat(messages):
        raise ValueError(f"{tokenizer.source}: the chat template writes nothing")


def made_up_exchange(tokenizer: Tokenizer) -> str:
    """Return a conversation as the model will read it.

    With instructions, or without if the template takes none. Raises ValueError if it
    takes no conversation, or writes what the model cannot read.
    """
    contents = ["Be brief.", "Hello!", "Hi!", "How are you?"]
    roles = ["system", "user", "assistant", "user"]
    talk = [{"role": r, "content": text} for r, text in zip(roles, contents)]
    bos, rows = max(tokenizer.bos_prefix, default=0), tokenizer.rows
    if bos >= rows:  # what every text begins with
        raise ValueError(f"{tokenizer.source}: bos has the id {bos}, the model {rows}")
    for messages in (talk[1:2], talk[1:]):
        require_words(tokenizer, messages)
    try:
        return str(tokenizer.render(talk))
    except ValueError:
        return str(tokenizer.render(talk[1:]))


def inspected_tokenizer(folder: Path, problems: list[Exception]) -> dict:
    """Return what `inspect` tells of a folder's tokenizer and chat template, {} if it
    cannot be read; adds to the problems what is wrong with them."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except (OSError, ValueError) as error:
        problems.append(error)
        return {}
    exchange = None
    try:
        exchange = made_up_exchange(tokenizer)
    except ValueError as error:
        problems.append(ValueError(f"{error}{advice(error)}"))
    vocabulary = tokenizer.vocabulary
    added = tokenizer.special_tokens | tokenizer.added_words
    return {
        "tokenizer_size": len(vocabulary.bytes_of_id.keys() | added.values()),
        "special_tokens": tokenizer.special_tokens,
        "added_words": tokenizer.added_words,
        "lacking_bytes": len(vocabulary.lacking),
        "chat_template": tokenizer.template,
        "exchange": exchange,
        "stop_tokens": sorted(tokenizer.stop_tokens),
    }


def inspection(folder: Path, check: bool) -> dict:
    """Return what `inspect` tells of a folder; check: look at every value too."""
    model, tensors, problems = check_folder(folder)
    sampling, no_effect = {}, []
    try:
        sampling = default_sampling(folder)
        no_effect = without_effect(folder)
    except (OSError, ValueError) as error:
        problems.append(error)
    words = inspected_tokenizer(folder, problems)
    if check:
        problems += not_finite(tensors.values())
    return {
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
        "without_effect": no_effect,
        "problems": [*dict.fromkeys(map(str, problems))],
        **words,
    }


def tensor_rows(tensors: list[dict], total: int) -> Iterator[tuple[str, str]]:
    """Yield a row for the tensors of a stack that differ only in the layer's number:
    these look alike. total: the bytes of all, of which each row's share is a bar."""
    groups = collections.defaultdict(list)
    for t in tensors:
        name = re.sub(r"^(model\.)?(layers\.\d+\.)?", "", t["name"])
        kind = f"{name.removesuffix('.weight')} {t['dtype']} {list(t['shape'])}"
        groups[kind].append(t["bytes"])
    for kind, sizes in sorted(groups.items(), key=lambda group: -sum(group[1])):
        bar = round(8 * sum(sizes) / max(total, 1)) * "#"
        yield "tensors", f"{gigabytes(sum(sizes)):>9} {bar:8} {len(sizes):3} {kind}"


def inspection_rows(found: dict) -> list[tuple[str, str]]:
    """Return what `inspection` has found, as rows of a table."""
    rows = [("folder", found["folder"])]
    for name, size in found["files"].items():
        rows.append(("files", f"{gigabytes(size):>9}  {name}"))
    rows += tensor_rows(found["tensors"], found["bytes"])
    share = 100 * found["adoptable_bytes"] // max(found["bytes"], 1)
    share = f"of which {share} % can be used in place on Metal"
    rows.append(("in all", f"{gigabytes(found['bytes']):>9}  {share}"))
    rows += [("layers", f"{n} {kind}") for kind, n in found["layers"].items()]
    if "tokenizer_size" in found:
        names = {i: text for text, i in found["special_tokens"].items()}
        stops = ", ".join(f"{i} {names.get(i, '')}" for i in found["stop_tokens"])
        added = len(names) + len(found["added_words"])
        size = f"{found['tokenizer_size']:,} ids, {added} of them added"
        if lacking := found["lacking_bytes"]:
            size += f"; {lacking} of the 256 bytes are in no token"
        rows += [("tokenizer", size), ("stops at", stops)]
        if found["exchange"] is not None:
            lines = found["exchange"].split("\n")
            rows += [("example", line) for line in lines]
    sampling = [f"{name} {value}" for name, value in found["sampling"].items()]
    rows.append(("sampling", ", ".join(sampling)))
    if found["without_effect"]:
        rows.append(("no effect", ", ".join(found["without_effect"])))
    rows += [("problem", text) for text in found["problems"] or ["none found"]]
    return rows


def cmd_inspect(options: argparse.Namespace) -> int:
    """Print what a model folder holds, and all that is wrong with it."""
    found = inspection(choose_folder(options.model), options.check)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_table(inspection_rows(found))
    return 1 if found["problems"] else 0


# -----------------------------------------------------------------------------
# 30. Typing
# A message that is typed: lines with editing, history and completion, by readline, and
# what is pasted as one message. What is typed during a reply waits for its prompt:
#
#     typed during a reply    one <Return> two
#     then                    "one" is the next message, and "two" stands at the prompt
#                             after it, to be edited
#
# uses: 1-7, 11-14, 16, 17, 24, 27
# needs: Callable, Iterator, Path, Sequence, contextlib, functools, json, os, re,
#     select, signal, sys, termios, threading
# -----------------------------------------------------------------------------


def state_folder() -> Path:
    """Return where this program keeps what it remembers of its user, made if absent."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = Path(base, "llama.py")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def write_privately(text: str, file: Path) -> None:
    """Write a text to a new file, which only its owner can read."""
    private = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(private, "w", encoding="utf-8") as stream:
        stream.write(text)


def paths_beginning(path: str) -> list[str]:
    """Return the paths there are that begin so, folders with a slash at their end."""
    folder, name = os.path.split(path)
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(os.path.expanduser(folder) or "."):
            hidden = entry.name.startswith(".") and not name.startswith(".")
            if entry.name.startswith(name) and not hidden:
                slash = "/" if entry.is_dir() else ""
                found.append(os.path.join(folder, entry.name) + slash)
    return sorted(found)


def edits_with_libedit() -> bool:
    """Return whether lines are edited by libedit, which is readline on many Macs."""
    readline = sys.modules.get("readline")
    return readline is not None and "libedit" in (readline.__doc__ or "")


def end_by_signal(number: int, _frame: object) -> None:
    """Handle a signal: unwind, so that the worker stops and the terminal is restored,
    and exit with the status that a shell gives it."""
    raise SystemExit(128 + number)


def read_line(prompt: str) -> str:
    """Return a line that is typed after a prompt, which stays out of a file or pipe."""
    # When its terminal is closed, libedit goes on reading it, and Python never gets to
    # run a handler. Nothing is lost at the prompt, so the hangup may end the process.
    handled = signal.getsignal(signal.SIGHUP) is end_by_signal and edits_with_libedit()
    if handled:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)
        return input()
    finally:
        if handled:
            signal.signal(signal.SIGHUP, end_by_signal)


def agreed(question: str) -> bool:
    """Ask a question on the terminal, again if need be; return whether the answer is
    yes. An empty one is no, and so are Ctrl-C and Ctrl-D."""
    while True:
        try:
            answer = read_line(f"{question} [y/N] ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            note("")
            return False
        if answer in ("y", "yes", "n", "no", ""):
            return answer in ("y", "yes")
        note("y is yes, n is no")


def suspend() -> None:
    """Stop this process as Ctrl-Z does, and return when it goes on."""
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, handler)


def leave_prompt(*_) -> None:
    """Handle Ctrl-Z at a prompt: readline is to give the terminal back first."""
    raise InterruptedError


@contextlib.contextmanager
def on_stop(handler: Callable) -> Iterator[None]:
    """Within the block have a function handle Ctrl-Z, unless it is ignored here."""
    before = signal.getsignal(signal.SIGTSTP)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGTSTP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block Ctrl-C does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def typed_lines(text: str) -> list[str]:
    """Return the lines of what was typed. What is between the marks of a paste is in
    one of them, with its own ends of lines."""
    lines = [""]
    begins, ends = re.escape(PASTE_BEGINS), re.escape(PASTE_ENDS)
    parts = re.split(rf"{begins}(.*?)(?:{ends}|\Z)", text, flags=re.DOTALL)
    for n, part in enumerate(parts):  # typed, pasted, typed, ...
        first, *others = [part] if n % 2 else part.split("\n")
        lines[-1] += first
        lines += others
    return lines


class LineEditor:
    """Reads messages from the terminal, with editing, completion and history.

    words: the commands. files: those that a path follows. Without readline, which is
    not everywhere, it reads lines and does no more.

    A terminal that is asked to mark pastes sends PASTE_BEGINS and PASTE_ENDS around
    each. GNU readline asks for that while it reads a line. While a reply is printed
    this class asks, so that readline finds the marks later.
    """

    # What the terminal does not do with what is typed during a reply: show it, or wait
    # for the end of a line, of which it would keep no more than 4095 bytes.
    hidden = (termios.ECHO, termios.ICANON)

    def __init__(self, words: Sequence[str], files: Sequence[str] = ()):
        self.words, self.files = words, files
        self.terminal = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
        self.readline = sys.modules.get("readline")
        # To ask the terminal for marks takes an escape sequence.
        self.marks = bool(self.readline and self.terminal) and styled(sys.stdout)
        if self.readline is None:
            return
        self.bind()
        self.readline.set_completer_delims(" ")
        self.readline.set_completer(self.complete)
        self.readline.set_auto_history(False)
        lines = []  # of a history that is not there, or is no text
        with contextlib.suppress(OSError, ValueError):
            lines = (state_folder() / "history").read_text("utf-8").splitlines()
        for line in lines:
            # What other programs wrote there is passed over.
            with contextlib.suppress(RecursionError, TypeError, ValueError):
                self.readline.add_history(json.loads(line))

    def bind(self) -> None:
        """Tell readline what its keys do."""
        paste = "on" if self.marks else "off"
        self.readline.parse_and_bind(f"set enable-bracketed-paste {paste}")
        self.readline.parse_and_bind("tab: complete")

    def complete(self, text: str, state: int) -> str | None:
        """Return a completion of the word at the cursor, None after the last one."""
        before = self.readline.get_line_buffer()[: self.readline.get_begidx()]
        command, _, begun = before.partition(" ")
        if before and command in self.files:
            path = begun.lstrip() + text  # a name may have blanks
            start = len(path) - len(text)
            words = [found[start:] for found in paths_beginning(path)]
        elif text.startswith("/") and not before:
            words = [word for word in self.words if word.startswith(text)]
        else:
            words = [f"{text}\t"]  # a tab of the text: of a paste, say
        return [*words, None][state]

    def remember(self, text: str) -> None:
        """Keep a message, for this user only: the last 1000, a JSON string a line. One
        that begins with a blank is not kept, as in a shell."""
        if self.readline is None or text.startswith(" "):
            return
        with contextlib.suppress(ValueError):  # letters that the locale has not
            self.readline.add_history(text)
        with contextlib.suppress(OSError, ValueError):  # not ours, or not writable
            file = state_folder() / "history"
            lines = file.read_text("utf-8").splitlines() if file.exists() else []
            lines = [*lines[-999:], json.dumps(text)]
            whole = "\n".join(lines) + "\n"
            replace_file(file, functools.partial(write_privately, whole))

    def set_terminal(self, *hidden: int) -> None:
        """Have the terminal as it was at the start, but without some local modes."""
        if self.terminal is not None:
            modes = [*self.terminal]
            for mode in hidden:
                modes[3] &= ~mode
            if hidden:  # Ctrl-C is not to throw away what is typed, or not yet shown
                modes[3] |= termios.NOFLSH
            with contextlib.suppress(termios.error):  # it has gone
                termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)

    @contextlib.contextmanager
    def typing_hidden(self) -> Iterator[None]:
        """Within the block what is typed is not shown. It waits for the next prompt."""

        def hide() -> None:
            self.set_terminal(*self.hidden)
            self.mark_pastes(True)

        def show() -> None:
            self.mark_pastes(False)
            self.set_terminal()

        def stop(*_) -> None:
            show()
            suspend()
            hide()

        with on_stop(stop):
            try:
                hide()
                yield
            finally:
                show()

    def mark_pastes(self, wanted: bool) -> None:
        """Ask the terminal to mark what is pasted, or no longer to mark it."""
        if self.marks:
            with contextlib.suppress(OSError):  # it has gone
                # A handler of Ctrl-Z must not print: it may have interrupted a print.
                asked = b"\x1b[?2004h" if wanted else b"\x1b[?2004l"
                os.write(sys.stdout.fileno(), asked)

    def buffer(self) -> str:
        return self.readline.get_line_buffer() if self.readline else ""

    def line(self, prompt: str) -> str:
        """Return a line that is typed after a prompt, or lines that are pasted."""
        self.set_terminal()
        first, text = prompt == ">>> ", ""  # nothing is above; what was typed already
        if coloured(sys.stdout) and self.readline:
            # For GNU readline, \x01 and \x02 enclose characters that take no space.
            prompt = f"\x01\x1b[2m\x02{prompt}\x01\x1b[0m\x02"
        while True:
            if text:
                insert = functools.partial(self.readline.insert_text, text)
                self.readline.set_startup_hook(insert)
            try:
                with on_stop(leave_prompt):
                    return read_line(prompt)
            except InterruptedError:
                text = self.buffer()
                suspend()
            except KeyboardInterrupt:
                note("" if not first or self.buffer() else "\n(Ctrl-D quits)")
                raise
            finally:
                if self.readline:
                    self.readline.set_startup_hook()

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


class LibeditEditor(LineEditor):
    """A LineEditor for libedit, which is readline on many Macs. It has other commands,
    does not know where a paste ends, and cannot begin a line with a text: what is
    typed ahead or pasted is read here, and shown in front of what it edits."""

    hidden = (termios.ECHO,)  # with ICANON the end of a line that is typed is known

    def __init__(self, words: Sequence[str], files: Sequence[str] = ()):
        super().__init__(words, files)
        self.ahead = [""]  # lines typed before their prompt; the last one is begun

    def bind(self) -> None:
        self.readline.parse_and_bind("bind ^I rl_complete")
        for mark in (PASTE_BEGINS, PASTE_ENDS):  # of a paste during a reply
            self.readline.parse_and_bind(f"bind {mark} ed-ignore")

    def edit(self, prompt: str, text: str) -> str:
        """Return a line that is typed after a prompt, and begins with a text."""
        while True:
            before = self.buffer()
            try:
                with on_stop(leave_prompt):
                    return text + read_line(prompt + text)
            except InterruptedError:
                text += self.typed(before)
                suspend()
            except KeyboardInterrupt:
                cleared = prompt != ">>> " or text + self.typed(before)
                note("" if cleared else "\n(Ctrl-D quits)")
                raise

    def typed(self, before: str) -> str:
        """Return what is typed on a line. before: the buffer when the line began, which
        libedit empties only at the first key."""
        text = self.buffer()
        return "" if text == before else text

    def waiting(self, seconds: float) -> str:
        """Return what waits on the terminal, or comes within some seconds."""
        data = b""
        while select.select([sys.stdin], [], [], seconds)[0]:
            part = os.read(sys.stdin.fileno(), 4096)
            if not part:
                break
            data += part
        text = data.decode("utf-8", "replace").replace("\r\n", "\n")
        return text.replace("\r", "\n")

    def pasted(self, seconds: float) -> str:
        """Return what follows a line at once, ended or not."""
        self.set_terminal(termios.ECHO, termios.ICANON)
        try:
            return self.waiting(seconds)
        finally:
            self.set_terminal()

    def take_ahead(self) -> None:
        """Take the lines that were typed during a reply, and all of a paste that began
        then. The rest of the last line is left to libedit."""
        text = self.waiting(0)
        if text.rfind(PASTE_BEGINS) > text.rfind(PASTE_ENDS):
            text += self.pasted(0.1)
        first, *lines = typed_lines(text)
        self.ahead[-1] += first
        self.ahead += lines

    def line(self, prompt: str) -> str:
        self.set_terminal()
        self.take_ahead()
        *above, last = self.ahead.pop(0).split("\n")
        for line in above:
            print(printable(prompt + line), file=sys.stderr)
            prompt = "... "
        if self.ahead:  # it was ended
            print(printable(prompt + last), file=sys.stderr)
            return "\n".join([*above, last])
        self.ahead = [""]
        lines = [*above, self.edit(prompt, last)]
        while pasted := self.pasted(0.02):
            *more, begun = pasted.split("\n")
            for line in more:
                print(printable(f"... {line}"), file=sys.stderr)
            lines += more
            if begun:
                lines.append(self.edit("... ", begun))
        return "\n".join(lines)


def line_editor(words: Sequence[str], files: Sequence[str] = ()) -> LineEditor:
    """Return the editor for this Python's readline; see LineEditor."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    libedit = sys.stdin.isatty() and edits_with_libedit()
    return (LibeditEditor if libedit else LineEditor)(words, files)


# -----------------------------------------------------------------------------
# 31. Chat
# A conversation: on a terminal one that is typed, with commands that begin with a
# slash; in a pipe one question and its answer.
#
#     >>> Hello!           Chat.take: `ask` for a reply, print it, `keep` the turn
#     >>> /set seed 7      Chat.obey: do_set("seed 7")
#     >>> /undo            Chat.obey: do_undo(""), which drops the turn
#
# uses: 1-9, 11-28, 30
# needs: Path, Sequence, argparse, asdict, collections, contextlib, difflib, fields,
#     json, os, shlex, signal, sys
# -----------------------------------------------------------------------------

CHOICES = "/undo and /reset make room"


def early_end(stats: Stats, limit: str, longest: int) -> str | None:
    """Return why a reply ended before the model ended it, None if it did not.

    limit: how the length was limited. longest: the model's longest context."""
    if stats.finish_reason == "length":
        return f"{stats.generation_tokens} tokens, as {limit} says"
    if stats.finish_reason == "context":
        more = larger_context(stats.context + 1, stats.context, longest)
        return f"the context of {stats.context} tokens is full{more}"
    return "Ctrl-C" if stats.finish_reason == "cancelled" else None


def stats_lines(stats: Stats, seed: int) -> str:
    """Return statistics as lines that fit a terminal, without what is not known of a
    reply that was stopped early."""
    copied = f", {stats.accepted_tokens} looked up" if stats.accepted_tokens else ""
    adopted = f", {gigabytes(stats.adopted_memory)} of the weights not copied"
    read = f" at {stats.prefill_tps:.0f} tokens/s" if stats.prefill_tps else ""
    wrote = f" at {stats.decode_tps:.1f} tokens/s" if stats.decode_tps else ""
    first = f"first token after {stats.time_to_first_token_s:.2f} s, "
    return (
        f"prompt {stats.prompt_tokens} (reused {stats.reused_tokens}){read}, reply "
        f"{stats.generation_tokens}{wrote}{copied}\n"
        f"{first if stats.generation_tokens else ''}context {stats.context_used} of "
        f"{stats.context}, peak {gigabytes(stats.peak_memory)}, seed {seed}"
        + (f", {stats.ranks} ranks" if stats.ranks > 1 else "")
        + (adopted if stats.adopted_memory else "")
        + (", weights unpacked" if stats.unpacked else "")
    )


def print_piece(screen: WordWrap, piece: Piece) -> None:
    """Show what has come of a piece, with its thinking dim: nothing of a beginning that
    may become a tag, nor the blanks and ends of lines that nothing follows yet."""
    shown, end, last = screen.taken, piece.thinking_end(), len(piece.text.rstrip())
    if end is not None:
        screen.write(piece.text[shown : min(end, last)], dim=True)
        screen.write(piece.text[max(shown, end) : last])


def print_end(screen: WordWrap, piece: Piece) -> None:
    """Show what `print_piece` has not shown, and end the line; on a terminal no more
    than one empty line follows the text."""
    text = piece.text[screen.taken :]
    if screen.stream.isatty():
        ended = text.rstrip()
        empty = text.count("\n", len(ended)) > 1
        text = ended + ("\n\n" if empty else "\n")
    elif not text.endswith("\n"):
        text += "\n"
    if piece.text:
        screen.write(text)


def print_reply(
    engine: Engine, messages: list[dict], options: argparse.Namespace, seed: int
) -> Reply:
    """Print the reply to a conversation as it comes, and return it.

    Ctrl-C stops it; what was printed by then is the reply.
    """
    screen, progress = WordWrap(sys.stdout), ProgressLine("reading the prompt")
    names = (*INTERVALS, "max_tokens", "lookup", "stop")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"seed": seed, "progress": progress}
    if options.raw:
        text = "".join(message["content"] for message in messages)
        reply = engine.complete(text, **settings)
    else:
        reply = engine.chat(messages, variables=options.variables, **settings)
    try:
        for _piece in reply:
            progress.clear()
            if not options.json:
                print_piece(screen, reply.taken)
    except KeyboardInterrupt:
        reply.cancel()
        collections.deque(reply, 0)  # no more text: waits until the worker has stopped
    finally:
        progress.clear()
        if not options.json:
            print_end(screen, reply.taken)
    if options.json:
        found = {"text": reply.text, "thinking": reply.thinking}
        found |= {"finish_reason": reply.stats.finish_reason}
        found |= {"seed": seed, "stats": asdict(reply.stats)}
        print(json.dumps(found), flush=True)
    else:
        longest = engine.args.longest_context
        if reason := early_end(reply.stats, options.limit, longest):
            note(f"[stopped: {reason}]")
    if options.stats:
        note(stats_lines(reply.stats, seed))
    return reply


def read_text(path: str) -> str:
    """Return the text in a file. Raises ValueError if it is not UTF-8, or too long for
    any template: a device need not end."""
    try:
        with open(Path(path).expanduser(), encoding="utf-8-sig") as stream:
            text = stream.read(LONGEST_TEXT + 1)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{path}: more than {LONGEST_TEXT:,} characters")
    return text


def read_system(text: str | None) -> str | None:
    """Return the instructions that a text names: @FILE is what the file holds, and @@
    begins a text with @."""
    if text is None or not text.startswith("@"):
        return text
    if text.startswith("@@"):
        return text[1:]
    return read_text(text[1:]).removesuffix("\n")


def typed_path(text: str) -> str:
    """Return the path that is typed: as it is, or as a terminal writes one that is
    dropped on it, with quotes or backslashes for a shell."""
    with contextlib.suppress(OSError, ValueError):
        words = shlex.split(text)
        if len(words) == 1 and not Path(text).expanduser().exists():
            return words[0]
    return text


def counted(turns: list) -> str:
    return "1 turn" if len(turns) == 1 else f"{len(turns)} turns"


def rebuilt(kind: type, values: dict) -> object:
    """Return a Piece or Stats from what JSON kept of one. Raises TypeError if the keys
    are not its fields, or a value is of another type than the default."""
    made, usual = kind(**values), kind()
    for entry in fields(kind):
        value, wanted = getattr(made, entry.name), type(getattr(usual, entry.name))
        if type(value) is not wanted or (wanted is list and not are_ids(value)):
            raise TypeError(
                f"{entry.name}: wanted {wanted.__name__}, got {value!r:.80}"
            )
    return made


def version_of(file: str | None) -> tuple[int, int] | None:
    """Return what tells a file from what another program puts in its place; None if
    there is none."""
    if not file or not os.path.exists(file):
        return None
    status = os.stat(file)
    return status.st_ino, status.st_mtime_ns


def session_settings(given: dict) -> dict:
    """Return the settings that a session keeps; an older one lacks some.

    Raises KeyError, TypeError or ValueError for what is none.
    """
    settings = {name: given[name] for name in INTERVALS}
    check_sampling(**settings)
    limit, stop = given.get("max_tokens"), given.get("stop", [])
    if limit is not None:
        require_count("max_tokens", limit, 0)
    check_stop(stop)
    variables = {}
    if "enable_thinking" in given.get("variables", {}):
        variables["enable_thinking"] = bool(given["variables"]["enable_thinking"])
    more = {"max_tokens": limit, "stop": [*stop], "variables": variables}
    return settings | more


class Conversation:
    """The turns of a conversation, and their file if it is a session's."""

    def __init__(self, engine: Engine, options: argparse.Namespace):
        self.engine, self.options = engine, options
        self.system = None if options.system == "none" else options.system
        options.limit = "--max-tokens"  # how max_tokens was given
        options.variables = {}  # what /set thinking tells the template
        self.seed = new_seed() if options.seed is None else options.seed
        self.turns = []  # (user, Piece, Stats, seed)
        self.saved = []  # the turns that a file has
        self.version = version_of(options.session)  # as it was read, or written
        if options.session and Path(options.session).exists():
            self.load(Path(options.session))

    def messages(self, turns: list, text: str) -> list[dict]:
        """Return the messages of turns, and another one of the user's."""
        # An empty text is a message too; a template may have its own if there is none.
        there = self.system is not None
        messages = [{"role": "system", "content": self.system}] if there else []
        for user, piece, *_ in turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": piece.content})
        return [*messages, {"role": "user", "content": text}]

    def ask(self, text: str, seed: int) -> Reply:
        """Answer a message, and add both to the conversation and its session file.

        With Ctrl-C before the first word nothing is added."""
        messages = self.messages(self.turns, text)
        reply = print_reply(self.engine, messages, self.options, seed)
        if reply.stats.finish_reason == "cancelled" and not reply.text.strip():
            return reply
        self.seed = (seed + 1) % 2**64
        self.turns.append((text, reply.taken, reply.stats, seed))
        self.keep()
        return reply

    def last(self) -> tuple[str, Piece, Stats, int]:
        if not self.turns:
            raise ValueError("the conversation is empty")
        return self.turns[-1]

    def keep(self) -> None:
        """Bring the file of --session up to date."""
        file = self.options.session
        if not file:
            return
        self.require_own(file)
        # If Ctrl-C ended the wait for the worker, which writes the file all the same,
        # that would be taken for what another program wrote.
        with uninterrupted():
            self.save(Path(file))
            self.version = version_of(file)

    def require_own(self, file: str) -> None:
        if version_of(file) not in (None, self.version):
            raise ValueError(
                f"{file}: another program has written it meanwhile; it stays as it is"
            )

    def save(self, file: Path) -> None:
        """Write a session file."""
        turns = [
            [user, asdict(piece), asdict(stats), seed]
            for user, piece, stats, seed in self.turns
        ]
        notes = {"system": self.system, "turns": turns, "seed": self.seed}
        notes["model"] = self.model_name()
        names = (*INTERVALS, "max_tokens", "stop", "variables")  # what /set can change
        notes["settings"] = {name: getattr(self.options, name) for name in names}
        used = self.turns[-1][2].context_used if self.turns else 0
        self.engine.save(file, notes, tokens=used)  # and nothing that was forgotten
        self.saved = [*self.turns]

    def model_name(self) -> str:
        """Return what the user calls the model."""
        source = Path(os.path.abspath(self.engine.tokenizer.source))
        if source.parent.name == "snapshots":  # of the Hugging Face cache
            return f"{self.options.model}, revision {source.name}"
        return source.name

    def set_aside(self) -> str:
        """Rename the file of --session, if there is one, before other turns take its
        place: an earlier FILE.bak goes. Return where the turns are then, in words."""
        if not self.options.session or not Path(self.options.session).exists():
            return ""
        self.require_own(self.options.session)
        os.replace(self.options.session, f"{self.options.session}.bak")
        return f", kept in {self.options.session}.bak"

    def load(self, file: Path) -> None:
        """Resume the conversation of a session file. What the command line says of
        instructions, seed and settings wins over what the file says."""
        notes = self.read_notes(file)
        try:
            turns = [
                (str(user), rebuilt(Piece, piece), rebuilt(Stats, stats), int(seed))
                for user, piece, stats, seed in notes["turns"]
            ]
            settings = session_settings(notes["settings"])
            system, seed = notes["system"], notes["seed"]
            if type(seed) is not int or not 0 <= seed < 2**64:
                raise TypeError(f"seed: got {seed!r:.80}")
            system = system if system is None else str(system)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: not a conversation: {error!r}") from None
        self.turns, self.saved = turns, [*turns]
        self.seed = seed if self.options.seed is None else self.seed
        self.system = system if self.options.system is None else self.system
        for name, value in settings.items():
            if getattr(self.options, name) in (None, [], {}):
                setattr(self.options, name, value)
                if name == "max_tokens" and value is not None:
                    self.options.limit = "the session"
        for _, piece, *_ in turns:
            self.engine.remember(piece)
        note(f"{file}: {counted(turns)}")

    def read_notes(self, file: Path) -> dict:
        """Return the notes of a session file, its cache restored; without the cache if
        that cannot be used and the user wants the text all the same."""
        try:
            return self.engine.restore(file)
        except ValueError as error:
            notes = read_session(file)["notes"]
            if not sys.stdin.isatty():
                raise
            told, writer = f"{error_line(error)}\n", notes.get("model")
            if isinstance(writer, str):
                told += f"It is a conversation with the model {writer:.200}.\n"
            WordWrap(sys.stderr).write(told)
            if not agreed("Shall this model read the conversation again?"):
                raise ValueError(f"{file} stays as it is") from None
            return notes


def shown(name: str, value: float) -> float | str:
    """Return how the value of a setting is written: a filter of 0 is off."""
    filters = INTERVALS.keys() - {"temperature"}
    return "off" if value == 0 and name in filters else value


# command: (what it takes, what it does); each is the method of Chat named do_
COMMANDS = {
    "context": ("", "shows how full the context is, and what each turn took"),
    "exit": ("", "ends the program, as /quit, /bye and Ctrl-D do"),
    "file": ("PATH", "puts a text file before the next message"),
    "help": ("", "lists what can be typed"),
    "history": ("", "shows the last message and its reply again"),
    "load": ("FILE", "resumes the conversation of a session file"),
    "reset": ("", "forgets the conversation, but not the instructions"),
    "retry": ("", "answers the last message again, with the next seed"),
    "save": (
        "FILE",
        "writes a new file: a session, or Markdown if it ends in .md",
    ),
    "set": ("NAME VALUE", "changes a setting; without VALUE shows it, or all"),
    "stats": ("", "shows speed and memory of the last reply"),
    "system": ("TEXT", "sets the instructions, or shows them; none removes them"),
    "undo": ("", "removes the last attached file, or else the last exchange"),
}

# What else can be typed, and what it does.
KEYS = {
    '"""': "begins and ends a message of several lines",
    "//": "begins a message whose first character is a slash",
    "a blank": "begins a message that the history does not keep",
    "up arrow": "brings back what was typed before",
    "Tab": "completes a command, or the path after it",
    "Ctrl-C": "stops a reply, or clears what is typed",
}

OTHER_NAMES = {"bye": "exit", "quit": "exit", "clear": "reset", "?": "help"}
PATHS = ("FILE", "PATH")  # what a command takes if it is a path


def ask_which(name: str, names: Sequence[str], otherwise: str, sign: str = "") -> str:
    """Return a question which name is meant, with a sign before it: those that begin
    so, or else the one that is most like it; without one, another text."""
    near = [known for known in names if name and known.startswith(name)]
    near = near or difflib.get_close_matches(name, names, 1)
    return f"did you mean {' or '.join(sign + n for n in near)}?" if near else otherwise


class Chat(Conversation):
    """A conversation that is typed, with its commands.

    A command begins with a slash, and is the method of that name after do_.
    """

    def __init__(self, engine: Engine, options: argparse.Namespace):
        super().__init__(engine, options)
        self.attached = []  # texts of files that go into the next message
        names = sorted([*COMMANDS, *OTHER_NAMES])
        files = [f"/{name}" for name in COMMANDS if COMMANDS[name][0] in PATHS]
        # A blank follows those that want something.
        ends = {f"/{name}": " " for name in COMMANDS if COMMANDS[name][0]}
        words = [f"/{name}" for name in names]
        self.editor = line_editor([w + ends.get(w, "") for w in words], files)

    def run(self) -> None:
        """Read messages and commands, and answer them, until Ctrl-D."""
        keys = "Ctrl-C stops a reply, Ctrl-D quits"
        if self.options.group and not sys.stdin.isatty():
            # mlx.launch passes on what is typed, but not Ctrl-D, and ends at Ctrl-C.
            signal.signal(signal.SIGINT, end_by_signal)
            keys = "Ctrl-C quits"
        note(self.model_name())
        note(
            f"context {self.engine.context} tokens, seed {self.seed}\n"
            f'/help lists commands, """ begins and ends a message of several lines,\n'
            f"{keys}"
        )
        if self.turns:
            self.do_history("")
        while True:
            try:
                text = self.editor.read()
                if text is None:
                    return
                self.take(text)
            except EOFError:  # /exit
                return
            except KeyboardInterrupt:  # the prompt and a reply handle their own
                note("")
            except (OSError, RuntimeError, ValueError) as error:
                # The conversation goes on, and can be saved elsewhere.
                WordWrap(sys.stderr).write(f"{error_line(error)}\n")

    def obey(self, text: str) -> None:
        """Do what a command says, without its slash."""
        name, _, argument = text.partition(" ")
        argument = argument.strip()
        method = OTHER_NAMES.get(name, name)
        if method not in COMMANDS:
            names = [*COMMANDS, *OTHER_NAMES]
            hint = ask_which(name, names, "/help lists them", sign="/")
            raise ValueError(f"no command /{name}; {hint} (// sends a slash)")
        takes = COMMANDS[method][0]
        if argument and not takes:
            raise ValueError(f"/{name} takes nothing, got {argument!r}")
        if takes in PATHS and not argument:
            raise ValueError(f"/{name} wants a {takes}")
        argument = typed_path(argument) if takes in PATHS else argument
        getattr(self, f"do_{method}")(argument)
        if name in ("load", "reset", "set", "system", "undo"):
            self.keep()

    def take(self, text: str) -> None:
        """Do what a typed text says: a command, or a message to the model."""
        if text.startswith("/") and not text.startswith("//"):
            self.obey(text[1:].strip())
        elif text.strip():
            text, before = text.removeprefix("/"), len(self.turns)
            with contextlib.suppress(KeyboardInterrupt):  # before it is read
                self.ask("\n\n".join([*self.attached, text]), self.seed)
            if len(self.turns) > before:
                self.attached = []
            elif text.startswith(" "):  # see LineEditor.remember
                note("(the message is forgotten)")
            else:
                note("(the message is forgotten; the up arrow brings it back)")

    def ask(self, text: str, seed: int) -> Reply:
        """Answer as a Conversation does, and warn when the context is nearly full."""
        try:
            with self.editor.typing_hidden():
                reply = super().ask(text, seed)
        except PromptTooLong as error:
            larger = larger_context(error.tokens, error.context, error.longest)
            raise ValueError(f"{error}{larger}{self.room(text)}") from None
        used, size = reply.stats.context_used, reply.stats.context
        if used > 0.9 * size:
            note(f"the context is {100 * used // size} % full: {CHOICES}")
        return reply

    def room(self, text: str) -> str:
        """Return what makes room for a message that does not fit the context."""
        tokenizer = self.engine.tokenizer
        if self.options.raw:
            tokens = len(tokenizer.bos_prefix + tokenizer.encode(text))
        else:
            alone = self.messages([], text)
            tokens = len(tokenizer.encode_chat(alone, **self.options.variables))
        if tokens <= self.engine.context:
            return f"; {CHOICES}"
        if self.attached:
            return "; /undo removes the last attached file"
        alone = f"; the message alone has {tokens}" if self.turns else ""
        fits = tokens <= self.engine.args.longest_context
        return alone if fits else f"{alone}; only a shorter message fits"

    def do_load(self, path: str) -> None:
        file, forgotten = Path(path).expanduser(), self.turns
        file.stat()  # an error, if there is none, before the question
        session = self.options.session
        own = session and os.path.realpath(file) == os.path.realpath(session)
        question = f"{counted(self.turns)} not saved. Forget the conversation?"
        if self.turns and self.turns != self.saved and not agreed(question):
            return
        self.load(file)
        if forgotten and not own and (kept := self.set_aside()):
            note(f"{counted(forgotten)} forgotten{kept}")
        if self.turns:
            self.do_history("")

    def do_exit(self, _: str) -> None:
        raise EOFError

    def do_help(self, _: str) -> None:
        for name, (takes, text) in COMMANDS.items():
            note(f"{f'/{name} {takes}':16} {text}")
        for keys, text in KEYS.items():
            note(f"{keys:16} {text}")

    def do_history(self, _: str) -> None:
        user, piece, stats, _ = self.last()
        WordWrap(sys.stderr).write(f"\n>>> {user}\n")
        screen = WordWrap(sys.stderr)
        print_piece(screen, piece)
        screen.write(piece.text[screen.taken :].rstrip() + "\n")
        if early_end(stats, self.options.limit, self.engine.args.longest_context):
            note("[stopped]")
        screen.write("\n")

    def do_system(self, text: str) -> None:
        if text not in ("", "none") and self.options.raw:
            raise ValueError("--raw has no chat format: no place for instructions")
        if text:
            self.system = None if text == "none" else read_system(text)
        there = self.system is not None
        note(f"instructions: {self.system}" if there else "no instructions")

    def do_reset(self, _: str) -> None:
        kept = self.set_aside() if self.turns else ""
        note(f"{counted(self.turns)} forgotten{kept}")
        self.turns, self.attached = [], []

    def do_undo(self, _: str) -> None:
        if self.attached:
            forgotten = self.attached.pop()
        else:
            forgotten = self.last()[0]
            self.turns.pop()
        note(f"forgotten: {forgotten[:60]!r}")

    def do_retry(self, _: str) -> None:
        turn = self.last()
        self.turns.pop()
        before = len(self.turns)
        try:
            self.ask(turn[0], (turn[3] + 1) % 2**64)
        finally:
            if len(self.turns) == before:  # there is no other reply
                self.turns.append(turn)

    def do_file(self, path: str) -> None:
        text = read_text(path)
        attached = [*self.attached, f"{Path(path).name}:\n\n{text}"]
        tokens = len(self.engine.tokenizer.encode("\n\n".join(attached)))
        if tokens >= self.engine.context:
            longest = self.engine.args.longest_context
            more = larger_context(tokens + 1, self.engine.context, longest)
            others = ""
            if self.attached:
                others = " with the other attached files"
                more += "; /undo removes the last of them"
            raise ValueError(
                f"{path}: {tokens} tokens{others}, the context has "
                f"{self.engine.context}{more or '; only a part of it fits'}"
            )
        self.attached = attached
        note(f"before the next message: {Path(path).name}, {len(text)} characters")

    def do_save(self, path: str) -> None:
        file = Path(path).expanduser()
        if file.exists():
            raise FileExistsError(f"{file} exists; choose another name")
        if file.suffix != ".md":
            self.save(file)
        else:
            parts = [("system", self.system)] if self.system else []
            for user, piece, *_ in self.turns:
                parts += [("user", user), ("assistant", piece.content)]
            text = "\n\n".join(f"## {role}\n\n{content}" for role, content in parts)
            file.write_text(text + "\n", "utf-8")
            self.saved = [*self.turns]
        note(f"{counted(self.turns)} written to {file}")

    def do_stats(self, _: str) -> None:
        note(stats_lines(*self.last()[2:]))

    def do_set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        usual = dict.fromkeys((*INTERVALS, "max_tokens"), "off") | self.engine.defaults
        values = {}
        for n in usual:
            given = getattr(self.options, n)
            values[n] = usual[n] if given is None else shown(n, given)
        values["seed"] = self.seed
        values["stop"] = ", ".join(map(repr, self.options.stop)) or "off"
        words = {True: "on", False: "off", None: "default"}
        values["thinking"] = words[self.options.variables.get("enable_thinking")]
        if name and name not in values:
            hint = ask_which(name, [*values], "/set lists them")
            raise ValueError(f"no setting {name}; {hint}")
        if not value:
            for n in [name] if name else values:
                note(f"{n:18} {values[n]}")
        elif name == "thinking":
            self.set_thinking(value)
        elif name == "stop":
            self.options.stop = [] if value in ("default", "off") else [value]
            note(f"stop is {value!r}" if self.options.stop else "stop is off")
        else:
            self.set_number(name, value, usual)

    def set_number(self, name: str, value: str, usual: dict) -> None:
        """Set an option that is a number, or have it as usual again."""
        if name in usual and value in ("default", str(usual[name])):
            setattr(self.options, name, None)
            note(f"{name} is {usual[name]}")
            return
        value = "0" if name in INTERVALS and value == "off" else value
        number = typed_number(name, value)
        setattr(self if name == "seed" else self.options, name, number)
        if name == "max_tokens":
            self.options.limit = "/set max_tokens"
        note(f"{name} is {shown(name, number)}")

    def set_thinking(self, value: str) -> None:
        on, off = {"enable_thinking": True}, {"enable_thinking": False}
        choices = {"on": on, "off": off, "default": {}}
        if value not in choices:
            raise ValueError(f"thinking must be on, off or default, got {value!r}")
        if self.options.raw or "enable_thinking" not in self.engine.tokenizer.template:
            raise ValueError("this chat template cannot turn thinking on or off")
        self.options.variables = choices[value]
        note(f"thinking is {value}")

    def do_context(self, _: str) -> None:
        size, before = self.engine.context, 0
        for n, (user, _, stats, _) in enumerate(self.turns, 1):
            note(f"turn {n}: {stats.context_used - before} tokens, {user[:40]!r}")
            before = stats.context_used
        for text in self.attached:
            note(f"attached: {text[:40]!r}")
        note(f"{before} of {size} tokens used, {size - before} left")


# -----------------------------------------------------------------------------
# 32. Main
# The command line: its options, what they must be, and how a run ends. `main` returns
# the status that a process ends with:
#
#     0    main(["info", "8b"])
#     1    main(["info", "nowhere"])                  a model, a file or input at fault
#     2    main(["chat", "--temperature", "cold"])    usage
#     130  Ctrl-C, where one answer was asked for
#
# uses: 1-9, 11-31
# needs: Callable, Path, Sequence, argparse, functools, mx, os, signal, sys, threading,
#     time
# -----------------------------------------------------------------------------

__version__ = "1.0"
FLOATS = ("float32", "float16", "bfloat16")  # of --dtype


def number_type(name: str, least: int = 0) -> Callable[[str], float]:
    """Return the argparse type of an option; see typed_number."""

    def parse(text: str) -> float:
        try:
            return typed_number(name, text, least)
        except ValueError as error:  # argparse says the name
            words = str(error).removeprefix(f"{name} ")
            raise argparse.ArgumentTypeError(words) from None

    return parse


def read_piped() -> str:
    """Return the text that is piped in. Raises ValueError if it is not UTF-8."""
    words = "reading standard input, which is still open (< /dev/null gives none)"
    patience = threading.Timer(1.0, note, [words])
    patience.start()
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8: {error}") from None
    finally:
        patience.cancel()


def read_prompt(options: argparse.Namespace) -> str | None:
    """Return --prompt and what is piped in, as one message; None at a terminal.

    What mlx.launch pipes in is what is typed at its terminal, and does not end.
    Raises ValueError for a message without text.
    """
    prompt = options.prompt
    if not sys.stdin.isatty() and not options.group:
        prompt = "\n\n".join(text for text in (prompt, read_piped()) if text)
    if prompt == "":
        raise ValueError("the prompt is empty: nothing follows --prompt or is piped in")
    return prompt


def check_chat(options: argparse.Namespace) -> None:
    """Refuse options that chat cannot honour."""
    try:
        check_stop(options.stop)
    except ValueError as error:
        options.usage(f"argument --stop: {str(error).removeprefix('stop ')}")
    for text in (options.prompt, options.system, *options.stop):
        if text and text != text.encode("utf-8", "replace").decode():
            options.usage(f"an argument is not UTF-8: {text!r:.80}")
    if options.raw and (options.system not in (None, "", "none") or options.template):
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
    follower = not leads(options.group)
    if not follower:
        options.system = read_system(options.system)
    folder, progress = choose_folder(options.model), ProgressLine("loading")
    require_kind(folder)
    tokenizer = Tokenizer.from_folder(folder, template=options.template)
    if not options.raw:
        # Now, rather than after loading a large model.
        require_words(tokenizer, [{"role": "user", "content": "Hi!"}])
    prompt = None if follower else read_prompt(options)
    try:
        engine = Engine(
            folder,
            tokenizer=tokenizer,
            context=options.ctx,
            dtype=options.dtype and getattr(mx, options.dtype),
            bits=options.bits,
            prefill_step=options.prefill_step,
            progress=None if follower else progress,
            group=options.group,
        )
    finally:
        progress.clear()
    with engine:
        if follower:
            return 0  # when rank 0 has closed its engine
        for warning in engine.warnings:
            note(warning)
        if prompt is None:
            Chat(engine, options).run()
            cancelled = False
        else:
            conversation = Conversation(engine, options)
            reply = conversation.ask(prompt, conversation.seed)
            cancelled = reply.stats.finish_reason == "cancelled"
        if __name__ == "__main__":
            # All that is left is to end the worker, and that must not be interrupted.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    return 130 if cancelled else 0


def build_parser() -> argparse.ArgumentParser:
    """Return a parser whose help is a screen of 24 lines and 80 columns."""
    layout = functools.partial(argparse.HelpFormatter, max_help_position=26, width=80)
    parser = argparse.ArgumentParser(
        prog="llama.py",
        description="Run Llama-family models with Apple's MLX.",
        epilog="example: python llama.py chat",
        formatter_class=layout,
    )
    version = f"llama.py {__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(usage=parser.error)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    options = {}
    for run, name, text, example in (
        (cmd_chat, "chat", "talk to a model", 'chat ./model --prompt "Hi!"'),
        (cmd_info, "info", "list models; what one needs, and what fits", "info 8b"),
        (cmd_inspect, "inspect", "list and check a model folder", "inspect ./model"),
    ):
        usage = f"llama.py {name} [MODEL] [options]"
        command = commands.add_parser(
            name,
            help=text,
            usage=f"{usage}\nexample: python llama.py {example}",
            formatter_class=layout,
            add_help=False,
        )
        command.set_defaults(run=run, usage=command.error, group=None)
        options[name] = command.add_argument_group().add_argument  # a single list
        options[name]("-h", "--help", action="help", help=argparse.SUPPRESS)
    number, count, size = [number_type("N", least) for least in (0, 1, 2)]
    here = "a folder, or org/name as downloaded"
    where = f"{here}; default: stories/"

    add = options["info"]
    text = f"{', '.join(PRESETS)}, {here}; default: list what is here"
    add("model", nargs="?", metavar="MODEL", help=text)
    text = "measure its speed here; a preset gets random weights"
    add("--measure", action="store_true", help=text)
    text = "with --measure, at least 2; default: 512"
    add("--prompt-tokens", metavar="N", type=size, help=text)
    text = "with --measure, at least 2; default: 128"
    add("--generation-tokens", metavar="N", type=size, help=text)
    text = "with --measure, 4 or 8; default: as stored, preset 16"
    add("--bits", metavar="N", type=int, choices=(4, 8), help=text)
    add("--json", action="store_true", help="print JSON instead of text")

    add = options["inspect"]
    add("model", nargs="?", metavar="MODEL", help=where)
    add("--check", action="store_true", help="also look for NaN in all data")
    add("--json", action="store_true", help="print JSON instead of text")

    # None, the default of most, leaves it to the model's folder.
    add = options["chat"]
    add("model", nargs="?", metavar="MODEL", help=where)
    text = "answer this and any piped input, and exit"
    add("-p", "--prompt", metavar="TEXT", help=text)
    text = "instructions, @FILE to read them from a file, or none"
    add("-s", "--system", metavar="TEXT", help=text)
    add("--session", metavar="FILE", help="resume a conversation, and save it there")
    add("--raw", action="store_true", help="continue the text, with no chat format")
    text = "such as chatml or llama3.1; default: the model's"
    add("--template", metavar="NAME", choices=BUILT_IN, help=text)
    text = "longest reply, tokens; default: no limit"
    add("--max-tokens", metavar="N", type=number, help=text)
    text = f"{interval('temperature')}, 0 is greedy; default: model's or 0.6"
    temperature = number_type("temperature")
    add("--temperature", metavar="T", type=temperature, help=text)
    # What llama-cli and mlx_lm call it. It is an option of its own, since a second name
    # of the one above would not fit into the help's column.
    add("--temp", dest="temperature", type=temperature, help=argparse.SUPPRESS)
    text = f"{interval('top_k')}, the K likeliest, 0 is all; default: model's"
    add("--top-k", metavar="K", type=number_type("top_k"), help=text)
    text = f"{interval('top_p')}, likeliest P, 0 is off; default: model's or 0.9"
    add("--top-p", metavar="P", type=number_type("top_p"), help=text)
    text = f"{interval('min_p')} of the likeliest's, 0 is off; default: model's"
    add("--min-p", metavar="P", type=number_type("min_p"), help=text)
    text = f"{interval('repetition_penalty')}, 0 and 1 are off; default: model's or 1"
    penalty = number_type("repetition_penalty")
    add("--repetition-penalty", metavar="R", type=penalty, help=text)
    text = "repeats a run exactly; default: a new one"
    add("--seed", metavar="N", type=number, help=text)
    text = "size of the context; default: the model's, up to 8192"
    add("--ctx", metavar="N", type=count, help=text)
    text = "tokens to guess; default: CUDA 15, Metal 7, CPU 0"
    add("--lookup", metavar="N", type=number, help=text)
    text = "default: CUDA 2048, Metal 512, CPU 32 (OpenBLAS 128)"
    add("--prefill-step", metavar="N", type=count, help=text)
    text = f"{' '.join(FLOATS)}; default: file's, CPU float32"
    add("--dtype", metavar="D", choices=FLOATS, help=text)
    text = "quantize to 4 or 8 while loading; default: as stored"
    add("--bits", metavar="N", type=int, choices=(4, 8), help=text)
    text = "end the reply before this text; may be given again"
    add("--stop", metavar="TEXT", action="append", default=[], help=text)
    add("--stats", action="store_true", help="print speed and memory to stderr")
    add("--json", action="store_true", help="print JSON instead of text")
    return parser


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line. What is wrong with it is told with the
    usage of its command; if there is no command, the help is."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        plain = options.command == "chat" and not unknown[0].startswith("-")
        more = "the prompt goes after --prompt, in quotes" if plain else "see --help"
        options.usage(f"unrecognized arguments: {' '.join(unknown)}; {more}")
    if options.command is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    return options


def complain(error: Exception, who: str = "", command: str = "chat") -> None:
    """Print the error that ends the program. who: the rank whose it is."""
    line = f"llama.py: error: {who}{error_line(error, command)}"
    print(line, file=sys.stderr, flush=True)


def run(argv: Sequence[str] | None) -> int:
    """Do what a command line says; return its exit status, errors told in a line."""
    rank = ""
    try:
        options = read_options(argv)
        if options.run is cmd_chat or getattr(options, "measure", False):
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
        complain(error, who=rank, command=options.command)
        if rank:
            time.sleep(0.5)  # a launcher ends the others as soon as one has ended
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 1, 2, or 128 and a signal's."""
    for name in ("stdin", "stdout", "stderr"):  # the parent process may have closed it
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
    # For a rank a signal keeps its usual action, which ends the process at once: the
    # rank may be waiting in MLX for one that has gone, where Python handles no signal.
    alone = os.environ.keys().isdisjoint(RANK_VARIABLES)
    for signal_number in (signal.SIGHUP, signal.SIGTERM):
        if alone and signal.getsignal(signal_number) is signal.SIG_DFL:  # not nohup's
            signal.signal(signal_number, end_by_signal)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see the first imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
