"""What several test files share: small models, terminals, oracles."""

import collections
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import pty
import py_compile
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

HERE = Path(llama.__file__).parent


STORIES = HERE / "stories"


# The words with which Python runs llama.py as a program. Of a module it keeps the
# bytecode: each of some 250 programs that the tests start would take longer to compile
# 9,000 lines than to do what it is tested for. Python finds the module by PYTHONPATH.
PROGRAM = ("-m", "llama")


# MLX itself may lie where an inherited PYTHONPATH says.
INHERITED = os.environ.get("PYTHONPATH", "")


HERE_ON_THE_PATH = {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), INHERITED]))}


if sys.dont_write_bytecode:  # even where Python is told to keep none
    with contextlib.suppress(OSError):
        py_compile.compile(llama.__file__)


DATA = Path(os.environ.get("LLAMA_TEST_DATA", "") or "/nonexistent")


needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="LLAMA_TEST_DATA names no folder of real models"
)


# Tests run on the device that MLX chooses, as users do. But exact oracles, and what is
# about a CPU's memory, numbers or time, run on the CPU: a GPU may multiply float32 in
# fewer bits (CUDA does in TF32, which keeps 11), and compiles some of its kernels when
# they are first used, which can take it half a minute.
DEVICE = mx.default_device()


ON_A_GPU = DEVICE != mx.cpu


on_the_cpu = pytest.mark.usefixtures("cpu")
speed_once = pytest.mark.usefixtures("speed_once")
# MLX's build for CUDA rounds what small arrays take.
needs_exact_counts = pytest.mark.skipif(
    mx.cuda.is_available(), reason="a build for CUDA does not count memory to the byte"
)


def peer(name: str, version: str | None = None):
    """A package that an oracle needs, no older than a version; skips, saying so, where
    it is not installed."""
    wanted = f"{name} {version}" if version else name
    reason = f"the peer {wanted} is not installed"
    return pytest.importorskip(name, version, reason=reason)


on_a_gpu = pytest.mark.skipif(
    not ON_A_GPU, reason="about a GPU; for a CPU an exact test says more"
)


GPU_TOLERANCE = 2e-2  # of logits in float32, two layers deep; seen: 0.5e-2 in TF32


CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 20000.0,
}


WIDE = CONFIG | {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}


def without(table, *keys):
    return {key: value for key, value in table.items() if key not in keys}


def assert_close(got, wanted, tolerance):
    """The greatest error, relative to the greatest value, is within the tolerance."""
    got = np.array(got.astype(mx.float32)) if isinstance(got, mx.array) else got
    wanted = np.asarray(wanted)
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def random_tokens(config, batch=1, length=24):
    rng = np.random.default_rng(1)
    return rng.integers(0, config["vocab_size"], (batch, length), np.int32)


def random_weights(config):
    """Hugging Face's names and shapes, with values that let every tensor matter."""
    D, F, V = (config[f"{key}_size"] for key in ("hidden", "intermediate", "vocab"))
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, kv = (n * config["head_dim"] for n in heads)
    shapes = {name: (V, D) for name in ("model.embed_tokens", "lm_head")}
    for layer in range(config["num_hidden_layers"]):
        block = {"self_attn.q_proj": (q, D), "self_attn.o_proj": (D, q)}
        block |= {"self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
        block |= {"mlp.down_proj": (D, F)}
        block |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D)}
        block |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        shapes |= {f"model.layers.{layer}.{name}": block[name] for name in block}
    shapes["model.norm"] = (D,)
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes.items():
        mean = float(len(shape) == 1)  # norms lie around 1
        weights[f"{name}.weight"] = rng.normal(mean, 0.2, shape).astype(np.float32)
    return weights


def fill(model, config):
    """Give a model the random weights of a config; return it."""
    names = dict(tree_flatten(model.parameters()))
    weights = {k: v for k, v in random_weights(config).items() if k in names}
    return model.load_weights([(k, mx.array(v)) for k, v in weights.items()])


def filled(config):
    """A model of a config, with its random weights."""
    return fill(llama.Llama(llama.ModelArgs.from_dict(config)), config)


def tiny_model():
    return filled(CONFIG)


def load_model(folder, dtype=None, bits=None):
    """The model of a folder, which needs no tokenizer."""
    model, tensors = llama.to_quantize(*llama.examine(folder), bits)
    for _ in llama.read_weights(model, tensors, dtype or llama.default_dtype()):
        pass
    return model


def problems_of(folder):
    """What is wrong with a folder, in words."""
    return [*map(str, llama.check_folder(folder)[2])]


def in_another_thread(work):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result(timeout=30)


def write_model(folder, config=CONFIG, weights=None, shards=1):
    """Write config.json and the weights, in one file or in shards with an index."""
    weights = random_weights(config) if weights is None else weights
    arrays = {name: mx.array(value) for name, value in weights.items()}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        return folder
    weight_map = {}
    for i in range(shards):
        name, part = f"model-{i}.safetensors", list(arrays)[i::shards]
        mx.save_safetensors(str(folder / name), {key: arrays[key] for key in part})
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def in_parts(model, tokens, cuts):
    """The logits of tokens (B, L) read through a cache, part after part."""
    cache = model.make_cache(tokens.shape[1])
    parts = [model(part, cache) for part in mx.split(tokens, cuts, axis=1)]
    assert {layer.offset for layer in cache} == {tokens.shape[1]}
    return mx.concatenate(parts, axis=1)


def numbers(uses: str) -> list[int]:
    """ "none" -> [], "1, 4-6" -> [1, 4, 5, 6]"""
    spans = [part.split("-") for part in uses.split(", ") if part != "none"]
    return [n for span in spans for n in range(int(span[0]), int(span[-1]) + 1)]


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header, tensors=b""):
    """The bytes of a file; its tensors begin at a multiple of 8, as is usual."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tensors


def written(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    return folder / "model.safetensors"


ONE = {"a": entry("F32", [2], 0, 8)}


VOCABULARIES = ("llama3", "llama2", "gpt2-digits", "stories260K")


def vocabulary_folder(name: str) -> Path:
    return DATA / ("models" if name == "stories260K" else "tokenizers") / name


def small_spec(**changes) -> dict:
    """A byte-level tokenizer.json with one merge, "a" and "b"."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]
    vocab = {piece: n for n, piece in enumerate(["</s>", *letters, "ab"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    step = {"type": "ByteLevel", "add_prefix_space": False}
    added = [{"id": 0, "content": "</s>", "special": True}]
    spec = {"model": model, "pre_tokenizer": step, "added_tokens": added}
    return {**spec, **changes, "model": model | changes.get("model", {})}


def write_tokenizer(folder: Path, spec: object, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def heads(n):
    return {"num_attention_heads": n, "num_key_value_heads": n}


def kept(logprobs: mx.array) -> list[int]:
    return [i for i, value in enumerate(logprobs[0].tolist()) if value > -math.inf]


def run(generation: Iterator[int]) -> tuple[list[int], str]:
    """What a generation yields, and why it ended."""
    tokens = []
    while True:
        try:
            tokens.append(next(generation))
        except StopIteration as end:
            return tokens, end.value


def held(cache: list[llama.KVCache]) -> list[int]:
    """The ids that a CountingModel's cache holds."""
    return [int(i) for i in cache[0].keys[0, 0, : cache[0].offset, 0].tolist()]


def with_extras(model: llama.Llama, config: dict) -> llama.Llama:
    """The model, given the biases, of zeros, and norms that a config.json says it has."""
    for name in llama.wanted_extras(config, model.args):
        _, _, block, part, layer, kind = name.split(".")
        part = model.model.layers[int(block)][part]
        if kind == "bias":
            part[layer].bias = mx.zeros(len(part[layer].weight))
        else:
            part[layer] = nn.RMSNorm(model.args.head_dim, model.args.rms_norm_eps)
    return model


def quantize(model, group_size=64, bits=4, mode="affine"):
    """Quantize every matrix of a model that can be cut into groups, as MLX's converter
    does."""
    for path, layer in llama.dense_layers(model):
        if layer.weight.shape[1] % group_size == 0:
            packed = mx.quantize(layer.weight, group_size, bits, mode)
            layer = llama.quantized_like(layer, group_size, bits, mode)
            layer.update(dict(zip(("weight", "scales", "biases"), packed)))
            model.update_modules(tree_unflatten([(path, layer)]))


def four_bit_model(tied, mode="affine", **changes):
    """A model in bfloat16 and 4 bits, small enough for the emulated kernel."""
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1} | changes
    config |= {"tie_word_embeddings": tied}
    mx.random.seed(0)
    model = with_extras(llama.Llama(llama.ModelArgs.from_dict(config)), config)
    quantize(model, 32, 4, mode)
    for block in model.model.layers:
        size = block.input_layernorm.weight.shape
        block.input_layernorm.weight = mx.random.uniform(0.5, 1.5, size)
    model.set_dtype(mx.bfloat16)
    return model


def start(
    environment: dict[str, str], *words: object, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=HERE,
        env=os.environ | environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(*ranks: subprocess.Popen, seconds: float = 60) -> list[tuple[int, str, str]]:
    """Status, output and messages of ranks, without what MLX's ring adds to these."""
    # When the other end has gone, its threads say so, and may break into each other.
    noise = r"(Receiving from|Sending to) socket |\d* failed with errno \d+\s*"
    found, until = [], time.monotonic() + seconds
    try:
        for rank in ranks:
            out, error = rank.communicate(timeout=max(until - time.monotonic(), 0.1))
            lines = re.sub(noise, "", error).splitlines()
            own = [line for line in lines if not line.startswith("[ring]")]
            found.append((rank.returncode, out, "\n".join(own)))
    finally:
        for rank in ranks:
            rank.kill()
    return found


def random_folder(path: Path, *, context: int = 512, width: int = 32, **config) -> Path:
    """A model of random weights that speaks ChatML in bytes.

    A text is one word to its tokenizer. For the split of most others, a program has to
    find out first which characters are letters, which takes longer than all the rest.
    """
    size = 260  # small_spec's 257 pieces, and three control tokens
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": size,
        "max_position_embeddings": context,
        "eos_token_id": size - 1,
        **config,
    }
    special = ["</s>", "<|im_start|>", "<|im_end|>"]
    ids = [0, size - 2, size - 1]
    added = [
        {"id": i, "content": t, "special": True}
        for i, t in zip(ids, special, strict=True)
    ]
    settings = {"chat_template": llama.BUILT_IN["chatml"]}
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    spec = small_spec(added_tokens=added, pre_tokenizer=step)
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path, spec, config=config, tokenizer_config=settings)
    mx.random.seed(0)
    model = with_extras(llama.Llama(llama.ModelArgs.from_dict(config)), config)
    weights = {k: v * 4 for k, v in tree_flatten(model.parameters())}
    never = mx.array([[0.0] if i in (0, size - 1) else [1.0] for i in range(size)])
    rows = config["vocab_size"]  # greedy, it never ends by itself
    weights["lm_head.weight"] = weights["lm_head.weight"] * never[:rows]
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


# As templates of reasoning models have it: they leave the thinking of earlier turns out,
# and a prompt may end with what begins it, or with thinking that is empty.
THINKS = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1].strip() }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def thinking_folder(path: Path, template: str = THINKS) -> Path:
    folder = random_folder(path)
    settings = json.dumps({"chat_template": template})
    (folder / "tokenizer_config.json").write_text(settings)
    return folder


USER = [{"role": "user", "content": "Hello!"}]


def continued(reply: llama.Reply, text: str = "More?") -> list[dict]:
    """The conversation of USER after a reply, and another message."""
    said = {"role": "assistant", "content": reply.text}
    return [*USER, said, {"role": "user", "content": text}]


def turns(engine: llama.Engine) -> list:
    """A turn that is cancelled in the middle, one after it, and that one again, which
    ends before a part of its text."""
    first = engine.chat(USER, temperature=0.5, seed=1)
    for _ in range(5):
        next(first)
    first.cancel()
    collections.deque(first, 0)
    said = {"role": "assistant", "content": first.text}
    messages = [*USER, said, {"role": "user", "content": "More?"}]
    options = {"temperature": 0.5, "seed": 2, "max_tokens": 12, "lookup": 2}
    second = engine.chat(messages, **options)
    text, stats = "".join(second), second.stats
    third = "".join(engine.chat(messages, stop=[text[5:7]], **options))
    reason = first.stats.finish_reason
    return [first.text, reason, text, stats.reused_tokens > 20, third]


def command(
    *words: object, text: str | bytes = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run llama.py as a user does, with text piped in."""
    return subprocess.run(
        [sys.executable, *PROGRAM, *map(str, words)],
        env=os.environ | HERE_ON_THE_PATH | environment,
        input=text.encode() if isinstance(text, str) else text,
        capture_output=True,
        timeout=100,
        check=False,
    )


def refusal(*words: object, **options) -> str:
    """The one line with which a command is refused."""
    done = command(*words, **options)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b"" and len(lines) == 1, done
    return lines[0].removeprefix("llama.py: error: ")


@functools.cache
def libedit() -> dict[str, str]:
    """The environment in which Python's line editor is libedit, as it is on most Macs;
    skips where there is none to be had."""
    environment = {"LD_PRELOAD": "libedit.so.2"}  # Debian's libedit2
    program = "import readline; print('libedit' in readline.__doc__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    if done.stdout != b"True\n":
        pytest.skip("the library libedit.so.2 is not installed (Debian: libedit2)")
    return environment


# Takes the terminal on its standard input as its own, so that Ctrl-C is a signal, and
# becomes llama.py. (pty.fork would fork this process, whose threads may hold locks.)
ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

# A shell that runs one program, says of a stopped one whether the terminal shows what
# is typed, and has it go on after a line. Unlike others it mends nothing by itself.
SHELL = """
import fcntl, os, signal, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while True:
    _, status = os.waitpid(child, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpid())
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    modes = termios.tcgetattr(0)[3]
    shown = modes & termios.ECHO and modes & termios.ICANON
    print("stopped,", "shows" if shown else "hides", "what is typed", flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, child)
    os.kill(child, signal.SIGCONT)
"""


# The prompt of GNU readline, in its colour. A message shown again stands behind a
# plain ">>> ", and a test that takes that for the prompt types too early.
PROMPT = "\x1b[2m>>> \x1b[0m"

# What a terminal is sent to ask for marks around what is pasted, or for none.
PASTES_ARE_MARKED, PASTES_ARE_PLAIN = "\x1b[?2004h", "\x1b[?2004l"


class Terminal:
    """llama.py on a terminal of its own, driven as a person would."""

    def __init__(
        self,
        *words: object,
        program: Path | None = None,  # in place of llama.py
        stdout: int | None = None,  # a file, in place of the terminal
        columns: int = 0,  # a terminal may not know
        start: str = ON_A_TERMINAL,
        **environment: str,
    ):
        self.screen = self.output = ""  # what is not waited for yet, and all there was
        self.master, terminal = pty.openpty()
        self.resize(columns)
        program = PROGRAM if program is None else [program]
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *program, *map(str, words)],
            stdin=terminal,
            stdout=terminal if stdout is None else stdout,
            stderr=terminal,
            env=os.environ | HERE_ON_THE_PATH | {"TERM": "xterm"} | environment,
        )
        os.close(terminal)

    def resize(self, columns: int, rows: int = 24) -> None:
        size = struct.pack("HHHH", rows if columns else 0, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def read(self) -> None:
        """Take what there is, waiting for it for a moment."""
        with contextlib.suppress(OSError):  # Linux, when the other side has closed
            if select.select([self.master], [], [], 0.05)[0]:
                text = os.read(self.master, 65536).decode("utf-8", "replace")
                self.screen += text
                self.output += text

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read on until the text appears; return what came before it, taking both."""
        ends = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < ends, f"no {text!r} in {self.screen!r}"
            self.read()
        before, _, self.screen = self.screen.partition(text)
        return before

    def type(self, text: str, *, edited: bool = True) -> None:
        """Type as soon as it makes no difference that no person is as fast; what no
        line editor reads, as soon as a signal is heard."""
        if text in (CTRL_C, CTRL_Z):
            # Between printing its prompt and waiting for input, readline does not
            # notice a signal until the next key.
            time.sleep(0.2)
        # Where no line editor reads single keys yet, Ctrl-D would be lost.
        ends = time.monotonic() + (2 if text == CTRL_D else 0.2)
        while edited and self.takes_lines() and time.monotonic() < ends:
            time.sleep(0.01)
        os.write(self.master, text.encode())

    def marks_pastes(self) -> bool:
        asked = map(self.output.rfind, (PASTES_ARE_MARKED, PASTES_ARE_PLAIN))
        return next(asked) > next(asked)

    def paste(self, text: str) -> None:
        text = text.replace("\n", "\r")
        marks = ("\x1b[200~", "\x1b[201~") if self.marks_pastes() else ("", "")
        self.type(text.join(marks))

    def takes_lines(self) -> bool:
        """No line editor reads each key as it comes: a prompt is not there yet."""
        return bool(termios.tcgetattr(self.master)[3] & termios.ICANON)

    def status(self, seconds: float = 60) -> int:
        """Wait for the end; return the exit status."""
        ends = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > ends:
                self.process.kill()
                raise AssertionError(f"still running: {self.screen!r}")
            self.read()
        self.read()
        os.close(self.master)
        return self.process.returncode


CTRL_C, CTRL_D, CTRL_Z = "\x03", "\x04", "\x1a"


def hostile(**changes) -> Callable[[Path], None]:
    """A change of a folder's JSON files: None removes a key."""

    def change(folder: Path) -> None:
        for name, values in changes.items():
            file = folder / f"{name}.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(found | values))

    return change


def places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Every (container, key) in a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def chat_with(engine: llama.Engine, *words: str) -> llama.Chat:
    """A conversation whose first reply has seed 1, unless a session goes on."""
    options = llama.build_parser().parse_args(["chat", "--max-tokens", "4", *words])
    chat = llama.Chat(engine, options)
    chat.seed = chat.seed if chat.turns else 1
    return chat


def by_template(text: str) -> llama.Text:
    """A text that a chat template wrote."""
    return llama.Text.by(llama.TEMPLATE, text)


def by_both(*parts: str) -> llama.Text:
    """A text whose parts a chat template and the first message wrote by turns."""
    writers = itertools.cycle([llama.TEMPLATE, 0])
    return llama.NOTHING.join(map(llama.Text.by, writers, parts))
