"""Real vocabularies: the ids of texts are those of Hugging Face's tokenizers.

LLAMA_TEST_VOCABULARIES names a folder of folders, each with a tokenizer.json, as
make_vocabularies.py writes them; those of LLAMA_TEST_DATA are compared as well. With
LLAMA_TEST_TEXTS=N each vocabulary meets N random texts, with LLAMA_TEST_SEEDS=N there
are N random vocabularies. `python -m pytest -s tests/test_vocabularies.py` prints how
many texts and ids were compared.
"""

import json
import os
import random
import re
from pathlib import Path

import pytest

import llama
from tests.support import (
    DATA,
    VOCABULARIES,
    by_both,
    by_template,
    needs_data,
    peer,
    vocabulary_folder,
    write_tokenizer,
)

MADE = Path(os.environ.get("LLAMA_TEST_VOCABULARIES", "") or "/nonexistent")
COUNT = int(os.environ.get("LLAMA_TEST_TEXTS", "400"))
FOLDERS = [
    pytest.param(vocabulary_folder(name), id=name, marks=needs_data)
    for name in VOCABULARIES
]
FOLDERS += [
    pytest.param(folder, id=folder.name)
    for folder in sorted(MADE.iterdir() if MADE.is_dir() else [])
    if (folder / "tokenizer.json").exists()
]

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 3:45 p.m., isn't it?",
    "I'VE seen THEY'RE 'twas o'clock rock'n'roll don't DON'T I'll we'd 'S 'ſ can'T",
    "Zürich, naïve façade, Ærøskøbing, Łódź, smørrebrød, ﬁnancial ﬂow, ŉ ǅ ß ẞ İ ı",
    "Việt Nam có nhiều món ăn ngon. Ngoài ra, điều này rất hợp lý.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак, ґанок.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ἐν ἀρχῇ ἦν ὁ λόγος.",
    "日本語のテキスト、カタカナとひらがな。漢字かな交じり文｡ﾊﾝｶｸ",
    "中文文本：你好，世界！简体字与繁體字。「引号」——破折号……",
    "한국어 텍스트입니다. 안녕하세요? ㄱㄴㄷ ᄒ\u1161\u11ab",
    "نص عربي مع تشكيل: اَلْعَرَبِيَّةُ ١٢٣٤٥، وفارسی ایران ۱۲۳ می\u200cخواهم",
    "עברית עם נִקּוּד ומספרים 123",
    "हिन्दी में पाठ: नमस्ते दुनिया १२३। বাংলা ১২৩ தமிழ் ௧௨௩ తెలుగు ქართული Հայերեն",
    "ภาษาไทยไม่มีช่องว่าง ๑๒๓ ລາວ ខ្មែរ မြန်မာ བོད་ཡིག አማርኛ ᐃᓄᒃᑎᑐᑦ Ꮳꮃꭹ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☃️ 🙂🙃 ✌︎ ♥ ⌚ \U0001f9ff",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\nclass A:\n\tpass\n",
    "#include <stdio.h>\r\nint main(void) {\r\n\tprintf(\"%d\\n\", 1 << 3);\r\n}\r\n",
    "<div class=\"a\"><p>x &amp; y</p></div> <!-- c --> {{ jinja }} {% if x %}",
    "SELECT * FROM t WHERE a='b' AND c>=10; -- x\nhttps://example.org/?q=1&r=2#s",
    "1 12 123 1234 12345 123456 1,234.56 0x1F 1e-10 ½ ¾ ² ³ Ⅷ ⅓ ① ㊿ 𝟙𝟚 ٣٤ 一二",
    " leading", "trailing ", "  two  spaces  ", "\n\n\n", "\t\t\tx", " \n \n x", "   ",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u2029h\x85i\x1cj\x1fk\x0bl\x0cm",
    "\x00\x01\x02\x04\x06\x13\x14\x16\x1d\x7f\x80\x9f",
    "\U000f0000\U00100000\U0010ffff\ufffe\uffff\ufdd0 \U000e0041\U0003fffd\U000dffff",
    "e\u0301 é n\u0303 ñ \u0041\u030a Å \u212b ﬀ ① ｆｕｌｌ　ｗｉｄｔｈ ｶﾞ",
    "▁ ▁▁ a▁b ▁a <0x41> <0xFF> <unk> Ġ Ċ ĠĠ â Ã",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ !!! ... --- === ### ``` \"\"\" '''",
    "“curly” ‘quotes’ – — … • † ‡ § ¶ © ® ™ € £ ¥ ← ↑ → ↓ ∀∂∈ℝ∧∪≡∞ ╔══╗ ░▒▓",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case iPhone eBay XMLHttp",
    "word" * 50, "a" * 300, " " * 300, "=" * 200, "-" * 77 + "\n" + "*" * 66, "😀" * 40,
    "<s>[INST] Hello [/INST] </s> <|im_start|>user\nhi<|im_end|>\n <|eot_id|><|end|>",
    "<｜begin▁of▁sentence｜><｜User｜>x<｜Assistant｜><think>\nhm\n</think><｜fim▁hole｜>",
    "<|begin_of_text|> <|endoftext|>  <tool_call>\n{}\n</tool_call> [TOOL_CALLS][0]",
]  # fmt: skip
ODD = ["  ", "\n", " \n", "\t", "\r\n", "1234", "½", "don't", "日本", "カナ", "é", "🙂"]
ODD += ["\u200d", "\x00", "x", " x", "...", "!!", "ſ", "Ⅷ", "(a", "　", "‘", '"q', "٣"]
ODD += ["\x1c", "\x85", "\u2028", "\x04", "\U000f1234", ")", "|", "]", "한", "▁", "'LL"]


def random_texts(own: llama.Tokenizer, count: int) -> list[str]:
    """Texts of odd parts, words of these texts, tokens, and any characters."""
    rng, words = random.Random(own.source), " ".join(TEXTS).split(" ")
    names = [*own.special_tokens, *own.added_words] or ["</s>"]
    tokens = [*own.vocabulary.bytes_of_id.values()]
    ways = [
        lambda: rng.choice(ODD),
        lambda: " " + rng.choice(words),
        lambda: rng.choice(tokens).decode("utf-8", "replace"),
        lambda: chr(
            rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        ),
        lambda: rng.choice(names)[: rng.choice([1, 3, 99, 99])],
    ]
    texts = []
    for _ in range(count):
        some = rng.sample(ways, rng.randint(1, len(ways)))
        texts.append("".join(rng.choice(some)() for _ in range(rng.randint(1, 30))))
    return texts


def reference(folder: Path, own: llama.Tokenizer):
    """Hugging Face's tokenizer, whose special tokens are our control tokens."""
    spec = json.loads((folder / "tokenizer.json").read_bytes())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in own.special_tokens
    return peer("tokenizers").Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize("folder", FOLDERS)
def test_ids_of_real_vocabularies_are_those_of_hugging_face(folder):
    own = llama.Tokenizer.from_folder(folder)
    theirs = reference(folder, own)
    compared = 0
    for text in [*TEXTS, *random_texts(own, COUNT)]:
        # As ordinary text: no control token is found.
        theirs.encode_special_tokens = True
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert own.encode(text) == wanted, text
        # All written by a template: every one is.
        theirs.encode_special_tokens = False
        all_found = theirs.encode(text, add_special_tokens=False).ids
        assert own.encode(by_template(text)) == all_found, text
        compared += len(wanted) + len(all_found)
    print(f"\n{folder.name}: {len(TEXTS) + COUNT} texts twice, {compared:,} ids")


@pytest.mark.parametrize("folder", FOLDERS)
def test_real_vocabularies_give_texts_back(folder):
    own = llama.Tokenizer.from_folder(folder)
    for text in TEXTS:
        form = own.vocabulary.normalize(text)
        if own.vocabulary.decoder.drops:
            form = form.replace(llama.SPACE, " ")
        encoded = form.encode().translate(None, own.vocabulary.lacking)
        wanted = encoded.decode("utf-8", "replace")
        wanted = wanted.removeprefix(" ") if own.vocabulary.decoder.drops else wanted
        found = own.decode(own.encode(text))
        assert found.removeprefix(" ") == wanted.removeprefix(" "), text


@pytest.mark.skipif(not MADE.is_dir(), reason="LLAMA_TEST_VOCABULARIES names no folder")
def test_metas_rank_files_are_read_or_refused():
    ranks = llama.Tokenizer.from_folder(MADE / "llama3-ranks")
    own = llama.Tokenizer.from_folder(MADE / "llama3")
    for text in [*TEXTS, *random_texts(own, 100)]:
        assert ranks.encode(text) == own.encode(text), text


@pytest.mark.skipif(not MADE.is_dir(), reason="LLAMA_TEST_VOCABULARIES names no folder")
def test_the_example_in_the_banner_is_what_mistrals_vocabulary_gives():
    banner = Path(llama.__file__).read_text().split("# 13. Other")[1]
    shown = re.search(r"words +(\S+) .*\n# +merged +(.+)\n# +ids +(\d+) +(.+)", banner)
    own = llama.Tokenizer.from_folder(MADE / "mistral-sp-v1-legacy")
    ids = own.encode(by_both("<s>", "Hi <s>"))
    assert ids == [int(shown[3]), *map(int, shown[4].split(", "))]
    assert own.vocabulary.cut("Hi <s>", True) == [shown[1]]
    pieces = [own.vocabulary.bytes_of_id[i].decode() for i in ids[1:]]
    assert [p.replace(" ", "▁") for p in pieces] == shown[2].split()


def test_there_are_vocabularies_to_compare():
    if not MADE.is_dir():
        pytest.skip("LLAMA_TEST_VOCABULARIES names no folder of vocabularies")
    assert len(FOLDERS) > len(VOCABULARIES) and DATA.is_dir()


def split(regex: str, behavior: str = "Isolated", kind: str = "Regex") -> dict:
    """A step of a pre_tokenizer."""
    pattern = {"pattern": {kind: regex}, "invert": behavior == "Removed"}
    return {"type": "Split", "behavior": behavior, **pattern}


def byte_level(use_regex: bool, prefix: bool = False) -> dict:
    """The step that writes bytes as letters."""
    step = {"add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **step}


def digits(individual: bool) -> dict:
    return {"type": "Digits", "individual_digits": individual}


KANA = "[一-龥ࠀ-一가-퟿]+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of published pre_tokenizers, some with shorter classes of letters.
PUBLISHED = {
    "DeepSeek LLM": [
        split("[\r\n]"),
        split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆﬀ-ﬆＡ-Ｚａ-ｚ]+"),
        split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        split(r"\s+$"),
        split(KANA),
        digits(True),
        byte_level(False),
    ],
    "DeepSeek Coder": [
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split(KANA),
        digits(True),
        byte_level(False),
    ],
    "StarCoder, granite-code, SmolLM": [digits(True), byte_level(True)],
    "digits together": [digits(False), byte_level(True)],
    "Falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        byte_level(True),
        digits(False),
        split("[0-9][0-9][0-9]"),
    ],
    "Viking": [
        split(r" ?[^(\s|[.,!?…。，、।۔،])]+"),
        digits(True),
        byte_level(False),
    ],
    "MiniCPM": [split(r"\p{N}{1,3}"), byte_level(True)],
    "literals that match nothing": [split(r"\p{L}+", kind="String"), byte_level(False)],
    "GPT-4o": [split(O200K, "Removed"), byte_level(False)],
    "Tekken": [split(O200K.replace("{1,3}", "")), byte_level(False)],
    "a space first": [byte_level(True, prefix=True)],
    "one word": [byte_level(False)],
}


@needs_data
@pytest.mark.parametrize("lacking", ["", "Ċā4ĠÃ"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_steps_give_the_ids_of_hugging_face(name, lacking, tmp_path):
    """With all bytes in the vocabulary, and without some that texts have."""
    file = vocabulary_folder("gpt2-digits") / "tokenizer.json"
    spec = json.loads(file.read_bytes())
    steps = {"type": "Sequence", "pretokenizers": PUBLISHED[name]}
    model = spec["model"]
    vocab = {p: i for p, i in model["vocab"].items() if not {*p} & {*lacking}}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = [merge for merge in merges if not {*"".join(merge)} & {*lacking}]
    model |= {"vocab": vocab, "merges": merges}
    spec |= {"pre_tokenizer": steps, "added_tokens": []}
    write_tokenizer(tmp_path, spec)
    own = llama.Tokenizer.from_folder(tmp_path)
    theirs = peer("tokenizers").Tokenizer.from_str(json.dumps(spec))
    for text in [*TEXTS, *random_texts(own, COUNT // 4)]:
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert own.encode(text) == wanted, text


# Parts of the texts and of the vocabularies of the test below.
LETTERS = ["abc ", "ab", "abé1 ", "abc ñ\n9日!"]
PIECES = [*"ab \n1!x_\t", "<s>", "<|x|>", "ab", "23", "?!", "é", "e\u0301", "日", "'s"]
PIECES += ["  ", "\x01", "\x02\U000f0000", "▁"]
EXPRESSIONS = [r"\p{N}{1,3}", "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\p{L}+|\p{N}"]
EXPRESSIONS += [r" ?\p{L}+", "[a-c]{1,2}", r"\s+$", "b", "a"]


def random_merges(rng: random.Random, letters: list[str]) -> list[list[str]]:
    """Merges in an order that no training gives, some of which make nothing."""
    pieces, merges = [*letters], []
    for _ in range(rng.randint(1, 25)):
        left, right = rng.choice(pieces), rng.choice(pieces)
        if len(left + right) <= 8:
            merges.append([left, right])
            pieces.append(left + right)
    merges = merges or [[letters[0], letters[0]]]
    merges = [[*pair] for pair in dict.fromkeys(map(tuple, merges))]
    if rng.random() < 0.4:
        rng.shuffle(merges)
    return merges


def random_model(rng: random.Random, letters: list[str], vocab: list[str]) -> dict:
    """A model with these letters, whose vocabulary begins with `vocab`."""
    merges = random_merges(rng, letters)
    pieces = [*vocab, *letters, *("".join(merge) for merge in merges)]
    if rng.random() < 0.4:
        pieces += ["".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(6)]
    ids = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    whole = rng.random() < 0.5
    return {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": whole}


def random_byte_level(rng: random.Random) -> dict:
    letters = {byte: letter for letter, byte in llama.byte_letters().items()}
    used = [*rng.choice(LETTERS).encode()]
    if rng.random() < 0.4:  # a vocabulary that lacks some bytes
        for byte in rng.sample([*used[1:], 1, 2, 0xF3], 2):
            letters.pop(byte, None)
    own = [letters[byte] for byte in used if byte in letters]
    model = random_model(rng, own, [*letters.values(), "<unk>"])
    between = [
        {"type": "Punctuation", "behavior": rng.choice(["Isolated", "Contiguous"])}
    ]
    between += [digits(rng.random() < 0.5)]
    between += [
        split(rng.choice(EXPRESSIONS), "Isolated", kind)
        for kind in ("Regex", "Regex", "String")
    ]
    steps = rng.sample(between, rng.randint(0, 3))
    last = byte_level(rng.random() < 0.5)
    steps.insert(rng.choice([len(steps), rng.randint(0, len(steps))]), last)
    forms = [None, {"type": "NFC"}, {"normalizers": []}, {"prepend": "a"}]
    replaced = {"type": "Replace", "pattern": {"String": "b"}, "content": "cc"}
    forms.append({"type": "Sequence", "normalizers": [{"type": "NFD"}, replaced]})
    steps = {"type": "Sequence", "pretokenizers": steps}
    return {"model": model, "pre_tokenizer": steps, "normalizer": rng.choice(forms)}


def random_sentencepiece(rng: random.Random) -> dict:
    letters = ["▁", "b", *rng.sample([*"aé日\n"], 3)]
    model = random_model(rng, letters, [f"<0x{byte:02X}>" for byte in range(256)])
    model["byte_fallback"] = True
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    both = {"normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    step = {"type": "Metaspace", "replacement": "▁"}
    step |= {"prepend_scheme": rng.choice(["always", "first", "never"])}
    step |= {"split": rng.random() < 0.5}
    cut = {"type": "Sequence", "pretokenizers": [digits(True), split("▁+")]}
    normalizer, steps = rng.choice(
        [(both, None), (spaces, None), (None, step), ({"type": "NFKC"}, step)]
        + [(both, cut)]
    )
    return {"model": model, "pre_tokenizer": steps, "normalizer": normalizer}


def random_added(rng: random.Random, vocab: dict) -> list[dict]:
    """Added tokens with random fields. None is a control token and in the vocabulary
    as well: its pieces are no pieces to us."""
    names = ["<s>", "<s>x", "s>", "ab", "a", " b", "<|x|>", "<|", "b ", "é", "▁<s>"]
    added = []
    for content in rng.sample(names, rng.randint(0, 5)):
        known = content in vocab
        fields = {"special": not known and rng.random() < 0.5, "content": content}
        fields |= {
            key: rng.random() < 0.3
            for key in ("lstrip", "rstrip", "single_word", "normalized")
        }
        new = len(vocab) + sum(token["content"] not in vocab for token in added)
        added.append(fields | {"id": vocab[content] if known else new})
    return added


@pytest.mark.parametrize("seed", range(int(os.environ.get("LLAMA_TEST_SEEDS", "60"))))
def test_random_vocabularies_give_the_ids_of_hugging_face(seed, tmp_path):
    rng = random.Random(seed)
    spec = rng.choice([random_byte_level, random_sentencepiece])(rng)
    added = random_added(rng, spec["model"]["vocab"])
    spec |= {"version": "1.0", "added_tokens": added}
    theirs = peer("tokenizers").Tokenizer.from_str(json.dumps(spec))
    own = llama.Tokenizer.from_folder(write_tokenizer(tmp_path, spec))
    for _ in range(30):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 14)))
        theirs.encode_special_tokens = True
        assert own.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        theirs.encode_special_tokens = False
        found = own.encode(by_template(text))
        assert found == theirs.encode(text, add_special_tokens=False).ids
