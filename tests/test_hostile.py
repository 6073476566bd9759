"""Hostile and damaged folders: each is used, or refused in one line."""

import collections
import contextlib
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.support import (
    CONFIG,
    HERE,
    ONE,
    USER,
    VOCABULARIES,
    command,
    entry,
    file_of,
    heads,
    hostile,
    load_model,
    needs_data,
    on_the_cpu,
    places,
    quantize,
    random_folder,
    random_weights,
    refusal,
    small_spec,
    vocabulary_folder,
    without,
    write_index,
    write_model,
    write_tokenizer,
    written,
)

pytest_plugins = ["tests.fixtures"]


def splitting_folder(path: Path, **config) -> Path:
    """A model of random weights whose tokenizer splits a text as most others do."""
    folder = random_folder(path, **config)
    hostile(tokenizer={"pre_tokenizer": small_spec()["pre_tokenizer"]})(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return splitting_folder(tmp_path_factory.mktemp("model"))


def test_a_json_file_of_more_bytes_than_belong_to_a_model_is_refused(tmp_path):
    file, most = tmp_path / "config.json", llama.JSON_BYTES
    assert 500_000 <= most <= 5_000_000  # real ones have 100 KB, an index has 300 KB
    file.write_text(json.dumps({"a": "a" * (most - 9)}))
    assert len(llama.read_json(file)["a"]) == most - 9
    file.write_text(json.dumps({"a": "a" * (most - 8)}))
    words = f"{most + 1:,} bytes, wanted at most {most:,}"
    with pytest.raises(ValueError, match=words):
        llama.read_json(file)


@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_the_settings_of_a_model_have_the_limit_of_a_json_file(name, folder, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    file = spoilt / f"{name}.json"
    file.write_text(json.dumps({"a": "a" * llama.JSON_BYTES}))
    words = rf"/{name}\.json: {llama.JSON_BYTES + 9:,} bytes, wanted at most"
    for read in (llama.load, llama.Tokenizer.from_folder):
        with pytest.raises(ValueError, match=words):
            read(spoilt)


def test_a_tokenizer_json_as_large_as_the_largest_vocabularies_have_it_is_read(
    tmp_path,
):
    """262,144 tokens and 500,000 merges, as pairs, one word to a line."""
    # As json.dumps would write it with an indent of 2, in a tenth of the time.
    vocab = ",\n".join([f'      "{n:x}": {n}' for n in range(262_144)])
    pair = '      [\n        "\\u0120the",\n        "%x"\n      ]'
    merges = ",\n".join([pair % n for n in range(500_000)])
    text = f'    "vocab": {{\n{vocab}\n    }},\n    "merges": [\n{merges}\n    ]'
    text = f'{{\n  "model": {{\n{text}\n  }}\n}}'
    config = {"vocab_size": 262_144}
    write_tokenizer(tmp_path, {}, config=config)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(
        ValueError, match="wanted merges of two pieces, all known"
    ):  # it is read and judged
        llama.Tokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path, {}, config={"vocab_size": 32_000})
    (tmp_path / "tokenizer.json").write_text(text)
    limit = llama.JSON_BYTES + 200 * 32_000
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json: .* wanted at most {limit:,}"
    ):
        llama.Tokenizer.from_folder(tmp_path)


UNSOUND = {
    "a header cut short": file_of(ONE)[:40],
    "a header of 2**62 bytes": (2**62).to_bytes(8, "little") + b"{}",
    "overlap": file_of(ONE | {"b": entry("F32", [2], 4, 12)}, b"0" * 12),
    "a hole": file_of(ONE | {"b": entry("F32", [2], 12, 20)}, b"0" * 20),
    "a late start": file_of({"a": entry("F32", [2], 8, 16)}, b"0" * 16),
    "a size not of its shape": file_of({"a": entry("F32", [3], 0, 8)}, b"0" * 8),
    "a shape beyond 64 bits": file_of({"a": entry("F32", [2**40] * 2, 0, 8)}, b"0" * 8),
    "a dtype of no format": file_of({"a": entry("F33", [2], 0, 8)}, b"0" * 8),
    "no JSON": file_of(b"hello"),
    "no JSON object": file_of(b"[]"),
    "nothing": b"",
}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_pointer_of_git_lfs_is_told_in_the_place_of_any_file(name, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "m")
    (own / name).write_bytes(LFS)
    assert f"{name}: a git-lfs pointer, not the file" in refusal("chat", own, "-p", "x")


WORDED = [
    (file_of(ONE, b"1234567"), "truncated"),
    (file_of(ONE), "truncated"),
    (file_of(ONE, b"123456789"), "edited"),
    (file_of({"a": entry("F64", [1], 0, 8)}, b"0" * 8), "a has dtype F64"),
    (file_of({"a": entry("F32", [2**31, 0], 0, 0)}), "at most 2147418112 numbers"),
    (LFS, "git lfs pull"),
    *((content, "not a safetensors file") for content in UNSOUND.values()),
]


@pytest.mark.parametrize(
    ("content", "words"),
    WORDED,
    ids=["short", "empty", "long", "F64", "size", "lfs", *UNSOUND],
)
def test_an_unsound_file_is_refused_by_name(tmp_path, content, words):
    file = written(tmp_path, content)
    with pytest.raises(ValueError, match=words) as error:
        llama.checked_header(file)
    assert str(file) in str(error.value)


def test_a_damaged_file_is_refused_with_a_value_error_or_not_at_all(tmp_path):
    sound = file_of(ONE | {"b": entry("BF16", [1, 2], 8, 12)}, b"0" * 12)
    assert len(llama.checked_header(written(tmp_path, sound))) == 2
    for length in range(len(sound)):
        with pytest.raises(ValueError):
            llama.checked_header(written(tmp_path, sound[:length]))
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = llama.checked_header(written(tmp_path, damaged))
        except ValueError:
            continue
        ends = [(t.start, t.start + t.nbytes) for t in found.values()]
        assert all(0 < start <= end <= len(sound) for start, end in ends)


PATHS = ["../b.safetensors", "/b.safetensors", "a/b.safetensors", "a\\b.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [({"a": p}, "wanted plain names") for p in [*PATHS, "b.safetensors\n", "", 7, None]]
    + [(absent, "weight_map must be an object") for absent in (None, {}, PATHS)],
)
def test_an_index_must_name_plain_files(tmp_path, weight_map, words):
    (tmp_path / "folder").mkdir()
    written(tmp_path, file_of(ONE, b"0" * 8)).rename(tmp_path / "b.safetensors")
    write_index(tmp_path / "folder", weight_map)
    with pytest.raises(ValueError, match=rf"index\.json: {words}"):
        llama.weight_files(tmp_path / "folder")


def test_two_kinds_of_weights_in_one_folder_are_refused(tmp_path):
    """transformers reads model.safetensors, and others what the index names."""
    for name in ("b.safetensors", "model.safetensors"):
        written(tmp_path, file_of(ONE, b"0" * 8)).rename(tmp_path / name)
    write_index(tmp_path, {"a": "b.safetensors"})
    words = (
        r"both model\.safetensors and model\.safetensors\.index\.json, which names b"
    )
    with pytest.raises(ValueError, match=words):
        llama.weight_files(tmp_path)
    write_index(tmp_path, {"a": "b.safetensors", "b": "model.safetensors"})
    assert len(llama.weight_files(tmp_path)) == 2
    write_index(tmp_path, {"a": "model.safetensors"})
    assert len(llama.weight_files(tmp_path)) == 1


def spliced(names: Sequence[str], rng: random.Random) -> str:
    """Text in which control tokens are whole, halved, doubled and within each other."""
    parts = ["", " ", "\n", "é", "x", "system\n\n", "[INST]", "<<SYS>>", "{}", "{bos}"]
    for _ in range(rng.randrange(1, 8)):
        name = rng.choice(names)
        cut = rng.randrange(len(name) + 1)
        parts += [
            name,
            name[:cut],
            name[cut:],
            name[:cut] + rng.choice(names) + name[cut:],
        ]
    return "".join(rng.choices(parts, k=rng.randrange(1, 12)))


def controls_of(own: llama.Tokenizer) -> set[int]:
    return {*own.special_tokens.values(), *own.stop_tokens, own.bos, own.eos}


def skeleton(own: llama.Tokenizer, texts: Sequence[str]) -> list[int]:
    """The control ids of a conversation that begins with a system message."""
    roles = ("system", "user", "assistant", "user")
    pairs = zip(roles, texts, strict=True)
    ids = own.encode_chat([{"role": r, "content": t} for r, t in pairs])
    return [i for i in ids if i in controls_of(own)]


@needs_data
@pytest.mark.parametrize("name", VOCABULARIES)
def test_no_splice_of_control_tokens_becomes_one(name):
    """In any format, role and place: exactly the ids that the format puts there."""
    rng, seen = random.Random(0), 0
    for template in llama.BUILT_IN:
        own = llama.Tokenizer.from_folder(vocabulary_folder(name), template=template)
        wanted = skeleton(own, ["a", "b", "c", "d"])
        seen += len(wanted) > 2
        for _ in range(150):
            texts = [spliced([*own.special_tokens], rng) for _ in range(4)]
            assert skeleton(own, texts) == wanted, texts
            assert not controls_of(own) & {*own.encode(texts[0])}
    assert seen >= 1


@pytest.mark.parametrize("file", ["added_tokens", "special_tokens_map"])
def test_whatever_is_in_a_file_of_tokens_is_used_or_refused(file, tmp_path):
    write_tokenizer(tmp_path, small_spec(), tokenizer_config={})
    values = [
        None,
        7,
        -1,
        2**40,
        1.5,
        True,
        "x",
        "",
        [],
        {},
        [7],
        ["x"],
        [{}],
        {"x": 1},
    ]
    values += [{"content": "x"}, {"content": 7}, {"content": []}, "\ud800", "ab" * 9999]
    keys = ["x", "", "\ud800", "bos_token", "additional_special_tokens", "y" * 99999]
    keys += ["extra_special_tokens", "added_tokens_decoder", "259"]
    used = 0
    for key, value in itertools.product(keys, values):
        (tmp_path / f"{file}.json").write_text(json.dumps({key: value}))
        try:
            own = llama.Tokenizer.from_folder(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            continue
        used += 1
        ids, controls = own.encode("ab x"), {*own.special_tokens.values()}
        # A token behind all others can get the id of ab, which is 257 of 257. Then it
        # is a control token's, and no text has it.
        assert not controls.intersection(ids) or "x" in own.special_tokens
        if 257 not in controls:
            assert ids[0] in (257, *own.added_words.values())
    assert used > 5


def test_many_and_long_added_tokens_are_read_at_once(tmp_path):
    """As many as a file of the largest size may have."""
    spec = small_spec()
    spec["added_tokens"] += [
        {"id": 258 + n, "content": f"<|{n}|>" + "x" * (n % 300)} for n in range(60_000)
    ]
    began = time.monotonic()
    own = llama.Tokenizer.from_folder(write_tokenizer(tmp_path, spec))
    assert own.encode("<|59999|>" + "x" * 299) == [60_257]
    assert time.monotonic() - began < 10


def test_a_tensor_of_more_numbers_than_mlx_counts_is_refused(tmp_path):
    """Each size of it may be small. The file is one that takes no place on the disk."""
    fine = contextlib.nullcontext()
    for rows, refused in ((32_766, False), (32_768, True)):
        size, file = rows * 2**16, tmp_path / f"{rows}.safetensors"
        file.write_bytes(file_of({"a": entry("U8", [rows, 2**16], 0, size)}))
        os.truncate(file, file.stat().st_size + size)
        with pytest.raises(ValueError, match="numbers") if refused else fine:
            llama.checked_header(file)


@pytest.mark.parametrize("wrong", [-1, 2**31, 1.5, True])
def test_ids_that_are_no_whole_numbers_are_refused(wrong, tmp_path):
    folder = write_tokenizer(tmp_path, small_spec(), config={"eos_token_id": wrong})
    with pytest.raises(ValueError, match="token ids must be whole numbers"):
        llama.Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (heads(2**20), "config.json says"),
        (heads(2**30), "too many"),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers"),
    ],
)
def test_a_config_that_fits_no_machine_is_refused_at_once(tmp_path, change, words):
    write_model(tmp_path, CONFIG | change, random_weights(CONFIG))
    with pytest.raises(ValueError, match=words):
        llama.examine(tmp_path)


def test_control_characters_are_spelled_out():
    hostile = "a\x1b[2J\r\x07\x7f\x9b\u202eb\n\tü🙂"
    safe = "a\\x1b[2J\\r\\x07\\x7f\\x9b\\u202eb\n\tü🙂"
    assert llama.printable(hostile) == safe


HUGE = 10**400


@pytest.mark.parametrize(
    "change",
    [
        hostile(config={"rope_scaling": {"rope_type": "linear", "factor": HUGE}}),
        hostile(
            config={
                "rope_scaling": {"rope_type": "yarn", "factor": 2},
                "rope_theta": 1.0,
            }
        ),
        hostile(
            config={"rope_scaling": {"rope_type": "yarn", "attention_factor": 1e300}}
        ),
        hostile(config={"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        hostile(config={"rope_parameters": {"partial_rotary_factor": 0.5}}),
        hostile(
            config={
                "rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 5e-324}
            }
        ),
        hostile(config={"rope_parameters": "x"}),
        hostile(config={"head_dim": 268435454}),
        hostile(config={"num_hidden_layers": 2**31 - 1}),
        hostile(config={"vocab_size": [1]}),
        hostile(config={"quantization": [4]}),
        hostile(config={"eos_token_id": "x"}),
        hostile(config={"eos_token_id": [[1]]}),
        hostile(generation_config={"top_k": math.inf}),
        hostile(generation_config={"temperature": HUGE}),
        hostile(generation_config={"top_p": "x"}),
        hostile(generation_config={"eos_token_id": {"a": 1}}),
        hostile(tokenizer_config={"chat_template": 5}),
        hostile(tokenizer_config={"chat_template": [{"name": "x"}]}),
        hostile(tokenizer_config={"added_tokens_decoder": [1]}),
        hostile(tokenizer={"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}),
        hostile(tokenizer={"pre_tokenizer": [1]}),
        hostile(tokenizer={"added_tokens": "x"}),
        hostile(tokenizer={"added_tokens": [{"id": 300, "content": 5}]}),
        hostile(tokenizer={"model": {}}),
        hostile(tokenizer={"post_processor": {"processors": [1]}}),
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff{}"),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: os.truncate(folder / "config.json", 100_000_000),
        lambda folder: os.truncate(folder / "tokenizer.json", 100_000_000),
    ],
)
def test_a_hostile_folder_is_told_in_one_line(change, folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "m")
    change(broken)
    assert llama.main(["inspect", str(broken), "--check"]) == 1
    assert "problem" in capsys.readouterr().out
    words = ["chat", str(broken), "--prompt", "x", "--max-tokens", "1"]
    with contextlib.redirect_stdout(None), open(os.devnull) as nothing:
        stdin, sys.stdin = sys.stdin, nothing
        try:
            assert llama.main(words) == 1
        finally:
            sys.stdin = stdin
    error = capsys.readouterr().err
    assert error.startswith("llama.py: error: ") and error.count("\n") == 1


# Values that a number, a text or a list of a JSON file may turn into.
WRONG = (
    *(None, True, [], {}, "", "x", [1], {"a": 1}, [[[]]], "\x1b[2J", "<|im_end|>"),
    *(-1, 0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**63, HUGE, -HUGE),
    *(0.5, 1e-9, 1e300, math.nan, math.inf, -math.inf, "F64", "U8", "(a+)+$", "(?=a)"),
)


# What spoiling a file that has been spoilt before may raise.
WRONG_ALREADY = (OSError, ValueError, RecursionError, TypeError, LookupError)
WRONG_ALREADY += (AttributeError, MemoryError, OverflowError)


# A few bytes of JSON that become many in memory, to be repeated.
SWELLING = ("[],", "{},", '{"":0},', '"ab",', "0.5,", '["ab","cd"],')


SWELLING += ("[" * 900 + "]" * 900 + ",", '{"":' * 900 + "0" + "}" * 900 + ",")


def swells_to(unit: str) -> int:
    """The memory that parsing an object of 90 KB takes, which has a unit repeated."""
    text = swollen(b'{"top_k": 5}', unit, 90_000)
    tracemalloc.start()
    try:
        json.loads(text)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def swollen(data: bytes, unit: str, size: int) -> bytes:
    """A JSON object with an entry more: a list of `unit`, again and again."""
    entry = ', "swollen": [' + unit * (size // len(unit)) + "0]}"
    return data.rstrip()[:-1] + entry.encode()


# The flat one and the nested one that take the most memory in this Python, and time.
SWELLING_MOST = [max(units, key=swells_to) for units in (SWELLING[:6], SWELLING[6:])]


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """JSON with a value replaced, removed, doubled or moved, nested too deep, or
    swollen."""
    if rng.random() < 0.1:
        size = rng.choice((100_000, llama.JSON_BYTES * 4 // 5, 20_000_000))
        return swollen(data, rng.choice(SWELLING), size)
    value = json.loads(data)
    found = list(places(value))
    # Vocabularies have thousands of places; the rest should be met as often.
    few = [p for p in found if len(p[0]) < 50]
    container, key = rng.choice(few if few and rng.random() < 0.7 else found)
    action = rng.randrange(6)
    if action < 3:
        container[key] = rng.choice(WRONG)
    elif action == 3:
        del container[key]
    elif action == 4:
        other, other_key = rng.choice(found)
        container[key] = json.loads(json.dumps(other[other_key]))
    text = json.dumps(value)
    if action == 5:
        deep = "[" * rng.choice((10, 2_000, 100_000))
        text = rng.choice(
            (deep, text[:-1] + f', "z": {deep}', text[:-1] + ", " + text[1:])
        )
    return text.encode()


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header lies about its own length or its tensors."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        lie = rng.choice((0, 1, length - 1, length + 1, 100_000_000, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + data[8:]
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2))):
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        part = rng.choice(("dtype", "shape", "data_offsets"))
        if part == "dtype":
            entry[part] = rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "BF16", "C64", 5))
        else:
            entry[part][rng.randrange(len(entry[part]))] = rng.choice(WRONG[11:24])
    text = json.dumps(header).encode()
    if rng.random() < 0.3:
        text = mutated_json(text, rng)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


# Shapes of tensors: without a dimension, with one and many, with sizes of 0 and huge.
ODD_SHAPES = (
    [],
    [0],
    [1],
    [3],
    [64],
    [260],
    [64, 0],
    [0, 8],
    [64, 1],
    [64, 2],
    [64, 7],
)
ODD_SHAPES += ([64, 8], [64, 64], [260, 2], [2**31 - 1, 0], [0, 2**31 - 1], [2, 64, 8])
ODD_SHAPES += ([64, 8, 1], [0, 0, 0], [1, 1, 1, 1], [1] * 12)
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1, "I32": 4, "I64": 8}


def mutated_tensors(data: bytes, rng: random.Random) -> bytes:
    """A sound safetensors file whose tensors have other shapes and dtypes, lack some, or
    have more: scales, biases and norms, of some layers or of all."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for name, each in header.items():
        if name != "__metadata__":
            start, end = each["data_offsets"]
            tensors[name] = each["dtype"], each["shape"], body[start:end]
    layers = [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]
    kinds = [*{path.split(".")[-1] for path in layers}]
    parts = ("weight", "scales", "scales", "biases", "biases", "bias")
    for _ in range(rng.choice((1, 1, 2, 6))):
        path, part = rng.choice([*layers, "lm_head"]), rng.choice(parts)
        paths = [path]
        if rng.random() < 0.3:  # in all layers, not in one
            kind = rng.choice(sorted(kinds))
            paths = [path for path in layers if path.endswith(kind)]
        if rng.random() < 0.15:
            block = f"model.layers.{rng.randrange(3)}.self_attn"
            paths, part = (
                [f"{block}.{n}_norm" for n in rng.choice(("q", "qk"))],
                "weight",
            )
        action, dtype = rng.randrange(5), rng.choice([*ITEM_SIZES])
        shape = rng.choice(ODD_SHAPES)
        for name in (f"{path}.{part}" for path in paths):
            if action == 0:
                tensors.pop(name, None)
                continue
            old = tensors.get(name, ("F32", [64, 2], b""))
            dtype = old[0] if action < 4 else dtype
            if action == 1 and old[1]:  # one of its sizes alone
                shape = [*old[1]]
                at = rng.randrange(len(shape))
                shape[at] = rng.choice((0, 1, 2, shape[at] * 2, shape[at] + 1, 64))
                if math.prod(shape) > 10**6:  # it is made in memory here
                    shape[at] = 0
            nbytes = ITEM_SIZES[dtype] * math.prod(shape)
            tensors[name] = dtype, shape, (old[2] + bytes(nbytes))[:nbytes]
    header, body = {}, b""
    for name, (dtype, shape, part) in tensors.items():
        header[name] = entry(dtype, shape, len(body), len(body) + len(part))
        body += part
    return file_of(header, body)


# What a config.json may say of its family, soundly or not.
TYPES = ["full_attention", "sliding_attention"]
OF_FAMILIES = {
    "model_type": ("llama", "mistral", "qwen2", "qwen3", "Qwen3", "qwen3_moe", "phi3"),
    "sliding_window": (1, 2, 16, 100, 4096, None),
    "use_sliding_window": (True, False, None),
    "max_window_layers": (0, 1, 2, 28, None),
    "layer_types": (TYPES, TYPES[:1] * 2, TYPES[1:] * 2, TYPES * 2, ["x", []], None),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"rope_type": "default"}, None),
    "rope_parameters": ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}, None),
    "original_max_position_embeddings": (64, None),
    "quantization_config": ({"quant_method": "gptq"}, {"quant_method": []}, None),
    "text_config": ({}, None),
    "hidden_size": (None,),
    "head_dim": (None, 8, 16, 128),
    "num_hidden_layers": (None, 1, 3),
    "max_position_embeddings": (None, 1, 30, 2**31 - 1),
}


def mutated_family(data: bytes, rng: random.Random) -> bytes:
    """A config.json that says something else of its family."""
    config = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        key = rng.choice([*OF_FAMILIES])
        config[key] = rng.choice((*OF_FAMILIES[key], rng.choice(WRONG)))
        if rng.random() < 0.2:
            del config[key]
    return json.dumps(config).encode()


def mutated_settings(data: bytes, rng: random.Random) -> bytes:
    """A config.json that says something else of what its tensors are."""
    config = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        keys = ("tie_word_embeddings", "quantization", "quantization_config")
        key = rng.choice((*keys, "quantization", "attention_bias", "mlp_bias"))
        if not key.startswith("quantization") or rng.random() < 0.3:
            config[key] = rng.choice(WRONG)
            continue
        value = {name: rng.choice(WRONG) for name in ("group_size", "bits", "mode")}
        value = {n: v for n, v in value.items() if rng.random() < 0.5}
        layer = f"model.layers.{rng.randrange(2)}.mlp.up_proj"
        path = rng.choice((layer, "lm_head", "model.embed_tokens", ""))
        sound = {"group_size": 32, "bits": 4}
        config[key] = sound | {path: rng.choice((value, rng.choice(WRONG)))}
        if rng.random() < 0.3:
            config[key] |= value
    return json.dumps(config).encode()


def mutate(folder: Path, rng: random.Random) -> str:
    """Spoil a file of a folder; return how, for the message of a failure."""
    file = rng.choice(sorted(folder.iterdir()))
    if rng.random() < 0.3:
        name = rng.choice(("model.safetensors", "model.safetensors", "config.json"))
        change = mutated_tensors
        if name == "config.json":
            change = rng.choice((mutated_settings, mutated_family))
        file = folder / name
        with contextlib.suppress(*WRONG_ALREADY):
            file.write_bytes(change(file.read_bytes(), rng))
        return f"{file.name}: {change.__name__}"
    if not file.is_file():
        return f"{file.name} left"
    data = bytearray(file.read_bytes())
    action = rng.choice(("bytes", "cut", "insert", "shape", "shape", "shape", "entry"))
    if action == "shape" and data:
        change = mutated_json if file.suffix == ".json" else mutated_header
        with contextlib.suppress(*WRONG_ALREADY):
            file.write_bytes(change(bytes(data), rng))
    elif action == "entry":
        action = rng.choice(("missing", "empty", "folder", "loop", "swapped", "huge"))
        file.unlink()
        if action == "empty":
            file.touch()
        elif action == "folder":
            file.mkdir()
        elif action == "loop":
            file.symlink_to(file.name)
        elif action == "swapped":
            others = [other for other in sorted(folder.iterdir()) if other.is_file()]
            shutil.copy(rng.choice(others), file)
        elif action == "huge":  # 100 MB of nothing, which take no room on the disk
            file.write_bytes(data[:8])
            os.truncate(file, 100_000_000)
    elif action == "cut":
        file.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif data:
        for _ in range(rng.choice((1, 1, 3, 30))):
            at = rng.randrange(len(data))
            data[at : at + (action == "bytes")] = rng.randbytes(1)
        file.write_bytes(data)
    return f"{file.name}: {action}"


def bytes_allowed(folder: Path) -> int:
    """The memory that using a folder may take.

    Its weights are held once, and what a cast needs; the rest is Python's own. Only the
    size of a JSON file is limited, and parsing can turn 3 bytes into 120 bytes of
    objects: that is 40 times the size. A header is JSON, too. What is
    over its limit is not read at all. A vocabulary's limit grows with what config.json
    says of its size, whatever the weights say, and without one is the largest.
    """
    tokens, config = None, folder / "config.json"
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        if config.stat().st_size <= llama.JSON_BYTES:
            tokens = json.loads(config.read_bytes()).get("vocab_size")
    tokens = tokens if isinstance(tokens, int | float) else 262_144
    grown = llama.JSON_BYTES + 200 * min(max(tokens, 0), 262_144)
    sizes = {file.name: file.lstat().st_size for file in folder.iterdir()}
    limits = {"tokenizer.json": grown, "tokenizer_config.json": grown}
    # A header may grow by a tenth of its file, so this is what file and header have.
    limits["model.safetensors"] = llama.JSON_BYTES * 10 // 9 + 200_000
    read = [n for name, n in sizes.items() if n <= limits.get(name, llama.JSON_BYTES)]
    return 40 * sum(read) + sum(sizes.values()) * 3 // 2 + 50_000_000


@contextlib.contextmanager
def within(seconds: float, nbytes: float = math.inf) -> Iterator[None]:
    """Fail if the block takes longer, or, on Linux, more memory at its peak.

    Time that the machine gives to others is not counted, and what other tests have
    left in memory is not looked through for garbage."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def peak() -> int:
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        return 1024 * int(found[1])

    measured = reset.exists()
    if measured:
        reset.write_text("5")
        before = peak()
    gc.freeze()
    begins, worked = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        gc.unfreeze()
    took = min(time.monotonic() - begins, time.process_time() - worked)
    assert took < seconds, f"{took:.1f} s"
    assert not measured or peak() - before < nbytes, f"{peak() - before:,} bytes"


def packed_folder(path: Path) -> Path:
    """A model in 4 bits, in groups of 32, with an index."""
    splitting_folder(path, width=64)
    model = load_model(path)
    quantize(model, group_size=32, bits=4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    hostile(config={"quantization": {"group_size": 32, "bits": 4}})(path)
    write_index(path, dict.fromkeys(weights, "model.safetensors"))
    sampling = {"temperature": 0.5, "top_k": 5, "eos_token_id": [1]}
    hostile(generation_config=sampling)(path)
    return path


def refusals(folder: Path, change: dict[str, mx.array | None]) -> str:
    """What is wrong with a folder with other tensors; None takes one away."""
    file = folder / "model.safetensors"
    arrays = mx.load(str(file)) | change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    mx.eval(arrays)  # before the file that they are read from is written
    mx.save_safetensors(str(file), arrays)
    write_index(folder, dict.fromkeys(arrays, "model.safetensors"))
    problems = llama.check_folder(folder)[2]
    assert all(type(problem) is ValueError for problem in problems)
    for read in (llama.load, rank_share):
        with pytest.raises(ValueError) if problems else contextlib.nullcontext():
            read(folder)
    return "\n".join(map(str, problems))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return packed_folder(tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("layer", ["mlp.up_proj", "self_attn.o_proj", "lm_head"])
@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_part_of_a_packed_layer_that_is_of_no_use_is_refused(
    layer, part, packed, tmp_path
):
    """Whatever its shape and dtype, of one layer or of all, and tied or not."""
    folder = shutil.copytree(packed, tmp_path / "m")
    assert refusals(folder, {}) == ""
    paths = [f"model.layers.{n}.{layer}" for n in range(2)]
    paths = [layer] if layer == "lm_head" else paths
    arrays = mx.load(str(packed / "model.safetensors"))
    sound = arrays[f"{paths[0]}.{part}"]
    shapes = [shape for shape in ODD_SHAPES if (*shape,) != sound.shape]
    others = [mx.zeros(shape, sound.dtype) for shape in shapes]
    wrong = {"weight": mx.float32}.get(part, mx.uint32)
    others += [mx.zeros(sound.shape, wrong), mx.zeros(sound.shape, mx.int64), None]
    # A head may be tied. Of other layers, each setting of that meets some of the shapes.
    settings = itertools.cycle([(None,), (True,), (False,)])
    for other in others:
        for count in sorted({1, len(paths)}):
            for tied in (None, True, False) if layer == "lm_head" else next(settings):
                hostile(config={"tie_word_embeddings": tied})(folder)
                change = {f"{path}.{part}": other for path in paths[:count]}
                told = refusals(folder, arrays | change)
                how = f"{layer}.{part} {other if other is None else other.shape}"
                assert layer in told or "packed" in told, f"{how}: {told}"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lm_head.bias": (260,)}, "lm_head.bias"),
        ({"lm_head.biases": (260, 2)}, "lm_head.biases"),
        ({"lm_head.scales": ()}, "lm_head|packed"),
        ({"model.layers.0.self_attn.q_norm.weight": (8,)}, "q_norm"),
        ({"model.layers.1.self_attn.k_norm.weight": ()}, "k_norm"),
        ({"model.layers.0.self_attn.q_norm.scales": (8,)}, "q_norm"),
        ({"model.layers.2.mlp.up_proj.weight": (64,)}, "layers.2"),
        ({"model.layers.0.self_attn.o_proj": (64,)}, "o_proj"),
        ({"model.layers.0.self_attn.o_proj.bias": (64, 1)}, "o_proj.bias"),
        ({"model.norm.scales": (64,)}, "norm.scales"),
        ({"o_proj.scales": (64,)}, "o_proj.scales"),
        ({"": (1,)}, "unexpected"),
    ],
)
@pytest.mark.parametrize("tied", [None, True, False])
def test_tensors_that_no_llama_has_are_refused(tensors, words, tied, folder, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    hostile(config={"tie_word_embeddings": tied})(spoilt)
    told = refusals(spoilt, {name: mx.zeros(tensors[name]) for name in tensors})
    assert re.search(words, told), told


@contextlib.contextmanager
def told(how: str) -> Iterator[None]:
    """Say how a folder was spoilt if the block fails."""
    try:
        yield
    except BaseException as failure:
        raise AssertionError(how) from failure


def rank_share(folder: Path) -> None:
    """What the second of two ranks would load."""
    rank = types.SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    model, tensors = llama.rank_share(*llama.examine(folder), rank)
    for _ in llama.read_weights(model, tensors):
        pass


def assert_used_or_refused(folder: Path) -> None:
    """Each function that reads a folder raises OSError or ValueError, or nothing, and
    what is wrong is told in a line of a length that a terminal can show."""
    problems = llama.check_folder(folder)[2]
    assert all(isinstance(problem, OSError | ValueError) for problem in problems)
    readers = (llama.load, llama.Tokenizer.from_folder, llama.default_sampling)
    for read in (*readers, rank_share):
        try:
            read(folder)
        except (OSError, ValueError) as error:
            problems.append(error)
    for text in map(str, problems):
        assert len(text) < 3000 and text.strip(), text[:300]


@on_the_cpu
@pytest.mark.parametrize("cases", [int(os.environ.get("LLAMA_TEST_FUZZ", "120"))])
def test_a_spoilt_folder_is_used_or_refused_in_one_line(
    cases, folder, tmp_path, capfd, monkeypatch
):
    """LLAMA_TEST_FUZZ sets how many: each is spoilt once to three times, from its own
    seed, and then inspected and talked to."""
    window = {"use_sliding_window": True, "sliding_window": 100, "head_dim": 8}
    window |= {"model_type": "qwen3", "max_window_layers": 1}
    qwen = splitting_folder(tmp_path / "qwen", **window)
    sound = folder, packed_folder(tmp_path / "packed"), qwen
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    refused = 0
    for seed in range(cases):
        rng = random.Random(seed)
        spoilt = shutil.copytree(rng.choice(sound), tmp_path / "m")
        how = [mutate(spoilt, rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        memory = bytes_allowed(spoilt)
        with told(f"seed {seed}: {how}"):
            assert_used_or_refused(spoilt)
        raw = ["--raw"] * (seed % 2)
        talk = ["chat", spoilt, "--prompt", "a" * 40 + "!", "--max-tokens", "2", *raw]
        for words in (["inspect", spoilt, "--check"], talk):
            with told(f"seed {seed}: {how}: {words[0]}"):
                with within(5, memory):
                    status = llama.main([*map(str, words)])
                out, error = capfd.readouterr()
                lines = error.splitlines()
                assert "Traceback" not in error and status in (0, 1)
                if status and words[0] == "chat":
                    assert lines[-1].startswith("llama.py: error: ") and not out
                assert "\x1b" not in error + out * (words[0] == "inspect")
            refused += status
        shutil.rmtree(spoilt)
    assert refused > cases // 2


# One of these replaces what is in each place of a folder's JSON files.
MISPLACED = [None, -1, 10**6, "", "<|im_start|>", [], {}, [None]]

SOUND = {  # beside what is there; SentencePiece-like settings, and those of others
    "config": {"tie_word_embeddings": False, "bos_token_id": 1, "rope_scaling": None},
    "generation_config": {"temperature": 1.0, "top_k": 5, "eos_token_id": [1]},
    "tokenizer_config": {"bos_token": "</s>", "add_bos_token": True},
    "tokenizer": {"post_processor": None},
    "special_tokens_map": {"eos_token": "</s>"},
    "added_tokens": {"<|im_end|>": 259},
}


def spoilt_files(folder: Path) -> Iterator[str]:
    """Spoil a folder in one place after another; yield how each time."""
    hostile(**SOUND)(folder)
    rng = random.Random(0)
    texts = [b"", b"{}", b"[1]", b"{{ x", b"{% raw %}", b"{{ raise_exception('no') }}"]
    names = [f"{name}.json" for name in SOUND]
    for name in [*names, "chat_template.jinja", "model.safetensors"]:
        file = folder / name
        sound = file.read_bytes() if file.exists() else None
        for text in texts:
            file.write_bytes(text)
            yield f"{name}: {text}"
        file.unlink()
        yield f"no {name}"
        if sound is not None:
            file.write_bytes(sound)
    for name in SOUND:
        file = folder / f"{name}.json"
        sound = file.read_bytes()
        value = json.loads(sound)
        for container, key in [*places(value)]:
            kept = container[key]
            if isinstance(key, str) and len(key) < 3 or key in ("a", 3):
                continue  # of the vocabulary: one is like another
            container[key] = other = rng.choice(MISPLACED)
            file.write_text(json.dumps(value))
            yield f"{name}: {key} is {other!r}"
            container[key] = kept
            if isinstance(key, str):
                del container[key]
                file.write_text(json.dumps(value))
                yield f"{name}: no {key}"
                container[key] = kept
        file.write_bytes(sound)


@on_the_cpu
def test_inspect_refuses_whatever_chat_refuses(folder, tmp_path, capfd, monkeypatch):
    """With --raw or without, and nothing else."""
    spoilt = shutil.copytree(folder, tmp_path / "m")
    typed = ["--prompt", "x", "--max-tokens", "1"]
    seen = collections.Counter()
    for how in spoilt_files(spoilt):
        statuses = []
        for words in (["inspect"], ["chat", *typed], ["chat", "--raw", *typed]):
            monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
            statuses.append(llama.main([words[0], str(spoilt), *words[1:]]))
        inspected, chat, raw = statuses
        out, error = capfd.readouterr()
        assert inspected == max(chat, raw), f"{how}: {out[-500:]}{error}"
        seen[chat, raw] += 1
    assert min(seen[0, 0], seen[1, 0], seen[1, 1]) > 5


@pytest.mark.parametrize("size", [llama.JSON_BYTES - 100_000, 20_000_000])
@pytest.mark.parametrize(
    "name",
    ["config", "generation_config", "tokenizer_config", "tokenizer"]
    + ["model.safetensors.index", "model"],
)
def test_json_made_to_swell_takes_the_memory_that_its_limit_bounds(
    name, size, folder, tmp_path, capfd, monkeypatch
):
    """Whether it is then used or refused."""
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    spoilt = shutil.copytree(folder, tmp_path / "m")
    write_index(spoilt, {"a": "model.safetensors"})
    file = spoilt / (f"{name}.json" if name != "model" else "model.safetensors")
    sound = file.read_bytes() if file.exists() else b'{"top_k": 5}'
    at = 8 + int.from_bytes(sound[:8], "little")
    # What is over its limit is not read, whatever it is.
    for unit in SWELLING_MOST if size < llama.JSON_BYTES else SWELLING_MOST[:1]:
        if name == "model":
            header = swollen(sound[8:at], unit, size)
            file.write_bytes(file_of(header, sound[at:]))
        else:
            file.write_bytes(swollen(sound, unit, size))
        memory = bytes_allowed(spoilt)
        talk = ["chat", str(spoilt), "--raw", "--prompt", "x", "--max-tokens", "1"]
        for words in (["inspect", str(spoilt)], talk):
            with within(5, memory):
                status = llama.main(words)
            out, error = capfd.readouterr()
            assert status in (0, 1) and "Traceback" not in error
            if size == 20_000_000:  # not read, and so no memory is taken
                assert status == 1 and "wanted a" in out + error


@pytest.mark.parametrize("layers", [1001, 15_000])
def test_layers_are_not_made_for_tensors_that_hold_nothing(layers, folder, tmp_path):
    """An empty tensor takes 50 bytes of a header, a layer many kilobytes and 0.5 ms."""
    spoilt = shutil.copytree(folder, tmp_path / "m")
    hostile(config={"num_hidden_layers": layers})(spoilt)
    file = spoilt / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    empty = {f"{n:x}": entry("U8", [0], 0, 0) for n in range(layers)}
    header = json.dumps(empty | json.loads(data[8 : 8 + length])).encode()
    file.write_bytes(file_of(header, data[8 + length :]))
    with within(5, 100_000_000), pytest.raises(ValueError):
        llama.examine(spoilt)


def test_what_is_missing_is_not_listed_without_end(folder, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    (spoilt / "model.safetensors").unlink()
    write_index(spoilt, {str(n): f"{n:x}.safetensors" for n in range(20_000)})
    with pytest.raises(FileNotFoundError, match=r"no 0\.safetensors, ") as error:
        llama.examine(spoilt)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "claim", [2**18, 2**31, None, 0.5, True, math.nan, math.inf, 1e300]
)
def test_a_vocabulary_has_a_limit_whatever_config_json_says_of_its_size(
    claim, folder, tmp_path
):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    config = json.loads((spoilt / "config.json").read_text()) | {"vocab_size": claim}
    config = without(config, "vocab_size") if claim is None else config
    (spoilt / "config.json").write_text(json.dumps(config))
    limit = llama.JSON_BYTES + 200 * 262_144
    os.truncate(spoilt / "tokenizer.json", limit + 1)
    words = rf"tokenizer\.json: {limit + 1:,} bytes, wanted at most {limit:,}"
    with pytest.raises(ValueError, match=words):
        llama.Tokenizer.from_folder(spoilt)


@pytest.mark.parametrize("claim", [260, 1])
def test_the_limit_of_a_vocabulary_is_by_its_tokens(claim, folder, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    hostile(config={"vocab_size": claim})(spoilt)
    limit = llama.JSON_BYTES + 200 * claim
    os.truncate(spoilt / "tokenizer.json", int(limit) + 1)
    with pytest.raises(ValueError, match=rf"wanted at most {limit:,}"):
        llama.Tokenizer.from_folder(spoilt)


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja"])
def test_other_files_of_a_tokenizer_have_limits_too(name, folder, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    if name == "tokenizer.model":
        (spoilt / "tokenizer.json").unlink()
    (spoilt / name).write_bytes(b"AA== 0\n" * 1_000_000)
    with pytest.raises(ValueError, match=rf"{name}: 7,000,000 bytes, wanted at most"):
        llama.Tokenizer.from_folder(spoilt)


# What engines panic over, or run for minutes.
UNFIT_SPLITS = [
    "(?=a)",
    r"\b",
    "(?:a|aa)+$(?<!a)",
    "(?:" * 100,
    r"\p{L}{1000}",
    "(?=a)" * 100_000,
    "[" + r"\]" * 400,
    r"a?\p{L}*" * 100,
    "(?:a?){15}a{15}(?=b)|.",
]


@pytest.mark.parametrize("regex", UNFIT_SPLITS)
def test_a_split_that_is_not_read_is_told_in_one_line(regex, folder, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Sequence", "pretokenizers": [step, last]}
    hostile(tokenizer={"pre_tokenizer": split})(spoilt)
    typed = ("--raw", "--prompt", "a" * 2000, "--max-tokens", "1")
    with within(5):
        done = command("chat", spoilt, *typed)
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("llama.py: error: ") and "unknown split: " in line
    assert (done.returncode, done.stdout) == (1, b"")


AUDITED = """
import sys
import llama

def audit(event, arguments):
    forbidden = ("socket.", "subprocess.", "os.exec", "os.system", "pickle.", "os.fork")
    forbidden += ("os.mkdir", "os.remove", "os.rename", "shutil.")
    writes = event == "open" and arguments[1] and set(arguments[1]) & set("wax+")
    # The interpreter of chat templates has Python read its lines, as a tree of syntax:
    # that is a compile of an unknown file, after which nothing is executed.
    compiles = event == "compile" and arguments[1] != "<unknown>"
    if event.startswith(forbidden) or event == "exec" or compiles or writes:
        raise AssertionError(f"{event} {arguments}")

llama.reading_speed = lambda bits: 1.0
llama.main(["info", "1b"])  # what Python itself compiles when first used
sys.addaudithook(audit)
sys.exit(llama.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [("inspect", "--check"), ("chat", "--prompt", "x")])
def test_nothing_is_executed_sent_or_written(words, folder):
    line = [sys.executable, "-c", AUDITED, words[0], str(folder), *words[1:]]
    nothing = subprocess.DEVNULL
    done = subprocess.run(
        line, cwd=HERE, stdin=nothing, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_file_that_shrinks_once_it_is_loaded_harms_nothing(folder, tmp_path):
    """Off Metal, where loading copies; on Metal the mapping is the memory."""
    if mx.metal.is_available():
        pytest.skip("Metal computes from the mapped file itself")
    copy = shutil.copytree(folder, tmp_path / "m")
    with llama.Engine(copy) as engine:
        wanted = "".join(engine.chat(USER, max_tokens=8, temperature=0.0))
        os.truncate(copy / "model.safetensors", 100)
        assert "".join(engine.chat(USER, max_tokens=8, temperature=0.0)) == wanted


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_link_to_a_device_is_not_read(name, folder, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "m")
    (spoilt / name).unlink()
    (spoilt / name).symlink_to("/dev/zero")  # of no size, and without an end
    problems = llama.check_folder(spoilt)[2] if name == "config.json" else []
    if name == "tokenizer.json":
        with pytest.raises(ValueError, match="not a regular file") as error:
            llama.Tokenizer.from_folder(spoilt)
        problems.append(error.value)
    assert "not a regular file" in str(problems[0])
