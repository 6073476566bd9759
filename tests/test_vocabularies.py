"""Real vocabularies: the ids of texts are those of Hugging Face's tokenizers.

LLAMA_TEST_VOCABULARIES names a folder of folders, each with a tokenizer.json, as
make_vocabularies.py writes them; those of LLAMA_TEST_DATA are compared as well. With
LLAMA_TEST_TEXTS=N each vocabulary meets N random texts. `python -m pytest -s
tests/test_vocabularies.py` prints how many texts and ids were compared.
"""

import json
import os
import random
from pathlib import Path

import pytest

import llama
from tests.support import DATA, VOCABULARIES, needs_data, peer, vocabulary_folder

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
    tokens = [*own.vocabulary.text.values()]
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
        assert own.encode_marked(text, b"\1" * len(text)) == all_found, text
        compared += len(wanted) + len(all_found)
    print(f"\n{folder.name}: {len(TEXTS) + COUNT} texts twice, {compared:,} ids")


@pytest.mark.parametrize("folder", FOLDERS)
def test_real_vocabularies_give_texts_back(folder):
    own = llama.Tokenizer.from_folder(folder)
    for text in TEXTS:
        form = own.vocabulary.normalize(text)
        if own.vocabulary.spaced:
            form = form.replace(llama.SPACE, " ")
        encoded = form.encode().translate(None, own.vocabulary.lacking)
        wanted = encoded.decode("utf-8", "replace")
        wanted = wanted.removeprefix(" ") if own.vocabulary.spaced else wanted
        found = own.decode(own.encode(text))
        assert found.removeprefix(" ") == wanted.removeprefix(" "), text


def test_there_are_vocabularies_to_compare():
    if not MADE.is_dir():
        pytest.skip("LLAMA_TEST_VOCABULARIES names no folder of vocabularies")
    assert len(FOLDERS) > len(VOCABULARIES) and DATA.is_dir()
