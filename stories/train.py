"""Train the model in this folder: a storyteller with the shape of a Llama 3.

    python stories/train.py --teacher DIR --stories FILE            train, save, measure
    python stories/train.py --teacher DIR --stories FILE --measure  only measure

DIR is stories260K as a Hugging Face folder, FILE the text of TinyStories; README.md
says where they come from, and what the recipe gave. Needs `pip install tokenizers numpy`
beside what llama.py needs; training was done on a GPU.

It is also the worked example of copying from llama.py: the module that is trained here
is the one that chats, unchanged.

1. The teacher writes stories: free ones, and ones whose opening we give, so that we
   know what each is about.
2. A vocabulary is made from them, and the model trained on plain stories.
3. The better ones become conversations, and training goes on with both to its end.
4. The model is stored in 8 bits, and measured against its teacher.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import tokenizers
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
import llama

SEED = 7
HELD_OUT = 50 * 1024  # last bytes of FILE; as many before them chose the recipe

ARGS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": [1, 4],
    "torch_dtype": "bfloat16",
}
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

WINDOW, ROWS = 1024, 32  # tokens in a row of a batch, rows
PLAIN_STEPS, CHAT_STEPS = 800, 1600
PEAK, WARMUP, DECAY = 2e-3, 200, 0.1  # learning rate, its first steps, weight decay
DROPOUT = 0.1
FREE, OPENED, BATCH = 10, 26, 4096  # batches of stories that the teacher writes
REAL, RETOLD = 3, 4  # times that real stories are read as they are, and retold
TOLD = 3  # times that a story with a given opening is told
CHATTER = 15_000  # conversations without a story

# What is said, but for the stories; and words that a story can be about, of which those
# of one kind can stand for one another.
TALK = json.loads((FOLDER / "dialogues.json").read_text())
WORDS = {kind: words.split() for kind, words in TALK.pop("words").items()}
GIRLS, BOYS, MOODS, LOOKS = map(WORDS.pop, ("girls", "boys", "moods", "looks"))
ANIMALS, PEOPLE, TOYS, PLACES = (
    WORDS[kind] for kind in ("animals", "people", "toys", "places")
)
NOUNS = {noun: kind for kind in WORDS.values() for noun in kind}
IRREGULAR = {
    "mouse": "mice",
    "fish": "fish",
    "sheep": "sheep",
    "wolf": "wolves",
    "leaf": "leaves",
}


def plural(noun: str) -> str:
    """Return the plural of one of NOUNS."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("y") and noun[-2] not in "aeo":
        return noun[:-1] + "ies"
    return noun + ("es" if noun[-1] in "sx" or noun[-2:] in ("ch", "sh") else "s")


def a(words: str) -> str:
    """Return words with their indefinite article."""
    return ("an " if words[0] in "aeiou" else "a ") + words


NOUN_OF = {form: noun for noun in NOUNS for form in (noun, plural(noun))}
WORD = re.compile(r"[A-Za-z]+")
SELF = re.compile(  # a word said twice, who meets or calls himself
    r"\b(\w+) \1\b|\b([A-Z]\w+) and \2\b|\b([A-Z]\w+) (?:said|asked)[^\"]*, \"[^\"]*\b\3\b"
)


# Stories: real ones, and what they are about.


def parted(text: str) -> list[str]:
    """Return the stories in a text: a blank line parts paragraphs, a line's end alone
    parts stories."""
    return re.split(r"(?<!\n)\n(?!\n)", text)


def read_stories(file: Path) -> tuple[list[str], str, str]:
    """Return the stories of a file to learn from, and two ends of it that nothing is
    learnt from, as they stand: one to choose the recipe by, one to measure it."""
    data = file.read_bytes()
    cuts = len(data) - 2 * HELD_OUT, len(data) - HELD_OUT, len(data)
    text, validation, held_out = (
        data[start:stop].decode(errors="ignore")
        for start, stop in zip((0, *cuts), cuts)
    )
    stories = parted(text)[:-1]  # the last one is cut
    return [s.strip() for s in stories if len(s) > 100], validation, held_out


def mentions(text: str) -> Counter:
    """Return how often each of NOUNS is mentioned, plurals counted in."""
    words = (word.lower() for word in WORD.findall(text))
    return Counter(NOUN_OF[word] for word in words if word in NOUN_OF)


def subjects(story: str) -> list[str]:
    """Return the nouns a story is about: repeated, and there from its beginning."""
    counts, early = mentions(story), mentions(story[: len(story) // 3])
    return [n for n, count in counts.most_common() if count > 1 and n in early][:2]


def retold(story: str, rng: random.Random) -> str:
    """Return a story with its names and nouns exchanged for others of their kind."""
    swaps = {}
    words = set(WORD.findall(story))
    for names in (GIRLS, BOYS):
        for name in names:
            if name in words:
                swaps[name] = rng.choice(
                    [n for n in names if n not in words and n not in swaps.values()]
                )
    present = mentions(story)
    for noun in present:
        kind = NOUNS[noun]
        others = [n for n in kind if n not in present and n not in swaps.values()]
        if others and rng.random() < 0.7:
            other = rng.choice(others)
            for form in (plural, str):  # where both are the same, the singular stays
                swaps[form(noun)] = form(other)
                swaps[form(noun).capitalize()] = form(other).capitalize()
    if not swaps:
        return story
    either = "|".join(map(re.escape, swaps))

    def swap(match: re.Match) -> str:
        article, word = match[1] or "", swaps[match[2]]
        if article:
            right = "an " if word[0].lower() in "aeiou" else "a "
            article = right.capitalize() if article[0] == "A" else right
        return article + word

    return re.sub(rf"\b([Aa]n? )?\b({either})\b", swap, story)


# Openings: what the teacher goes on from, and the request each one answers.


def choose(rng: random.Random, *texts: str, **words: str) -> str:
    """Return one of texts with the words filled in."""
    return rng.choice(texts).format(**words)


def ask_about(rng: random.Random, topic: str) -> str:
    """Return a request for a story about a topic: "a cat and a boat"."""
    return choose(
        rng,
        "Tell me a story about {t}.",
        "Tell me a story about {t}.",
        "Tell me a story about {t}",
        "Tell me a short story about {t}.",
        "Can you tell me a story about {t}?",
        "Could you tell me a story with {t} in it?",
        "Please tell me a story about {t}.",
        "Please write a story about {t}.",
        "Write a story about {t}.",
        "Write a short story about {t}.",
        "Write a short story with {t}.",
        "I want a story about {t}.",
        "I would like to hear a story about {t}.",
        "I'd love a story about {t}, please.",
        "A story about {t}, please.",
        "a story about {t}",
        "story about {t}",
        "Do you know a story about {t}?",
        "Make up a story about {t}.",
        "Tell me about {t}.",
        "{t}",
        "How about {t}?",
        "Let's hear a story about {t}!",
        "Tell me a bedtime story about {t}.",
        t=topic,
    )


def person(rng: random.Random) -> tuple[str, str, str, str]:
    """Return a name that the teacher can spell, its noun, and the pronouns."""
    if rng.random() < 0.5:
        return rng.choice(GIRLS[:8]), "girl", "She", "her"
    return rng.choice(BOYS[:9]), "boy", "He", "his"


def two_nouns(rng: random.Random) -> tuple[str, str, list[str]]:
    """Return a request for a story about two nouns, its opening, and the words it is about."""
    one = rng.choice(ANIMALS if rng.random() < 0.7 else list(NOUNS))
    two = rng.choice([noun for noun in NOUNS if noun != one])
    name, child, he, his = person(rng)
    words = {"X": a(one), "x": one, "Y": a(two), "y": two, "name": name}
    words |= {"child": child, "he": he.lower(), "He": he, "his": his}
    words |= {"lX": a(rng.choice(LOOKS) + " " + one), "ly": rng.choice(LOOKS)}
    words["look"] = rng.choice(LOOKS)
    words["lY"] = a(words["ly"] + " " + two)
    if one in ANIMALS or one in PEOPLE:
        opening = choose(
            rng,
            "Once upon a time, there was {lX} named {name}. {name} had {lY}.",
            "Once upon a time, there was {X} named {name}. {name} loved {his} {ly} {y}.",
            "Once upon a time, there was {lX} named {name}. One day, {name} the {x} "
            "found {lY}.",
            "Once upon a time, there was {lX}. The {x} had {lY}.",
            "One day, {lX} named {name} saw {lY}.",
            "Once upon a time, there was {lX} named {name} who lived near {Y}.",
            "Once upon a time, there was {X} named {name}. {He} wanted to find {lY}.",
            "Once upon a time, there was a little {child} named {name}. {He} had {X} "
            "and {Y}.",
            **words,
        )
    else:
        opening = choose(
            rng,
            "Once upon a time, there was a little {child} named {name}. {He} had {lX} "
            "and {lY}.",
            "One day, {name} found {lX} and {Y}.",
            "Once upon a time, there was a {child} named {name}. {name} loved {his} "
            "{x} and {his} {y}.",
            "Once upon a time, there was {lX}. Near the {x} was {lY}.",
            "One day, {name} saw {lX} next to {lY}.",
            "{name} was a little {child} who had {lX}. One day, {he} saw {Y}.",
            **words,
        )
    # The teacher forgets; a noun named twice, it keeps.
    opening += choose(
        rng,
        " {name} liked the {y} very much.",
        " The {y} was very {look}.",
        " {name} wanted to show the {y} to the {x}.",
        " {name} took the {y} and went to the park.",
        " {name} wanted to play with the {y}.",
        " The {x} looked at the {y} and",
        " The {x} and the {y}",
        " One day, the {x} and the {y} were gone. {name}",
        "",
        **words,
    )
    topic = choose(
        rng,
        "{X} and {Y}",
        "{X} and {Y}",
        "{X} and {Y}",
        "{X} and {Y}",
        "the {x} and the {y}",
        "{X} with {Y}",
        "{X} who found {Y}" if one in ANIMALS else "{Y} and {X}",
        **words,
    )
    return ask_about(rng, topic), opening, [one, two]


def one_noun(rng: random.Random) -> tuple[str, str, list[str]]:
    """Return a request for a story about one noun, its opening, and the words it is about."""
    one = rng.choice(ANIMALS + PEOPLE if rng.random() < 0.7 else list(NOUNS))
    look = rng.choice(LOOKS + MOODS if one in ANIMALS + PEOPLE else LOOKS)
    name, child, he, his = person(rng)
    words = {"X": a(one), "x": one, "lX": a(f"{look} {one}"), "name": name}
    words |= {"child": child, "he": he.lower(), "He": he, "his": his, "look": look}
    topic = choose(rng, "{X}", "{X}", "{lX}", "the {x}", "my {x}", **words)
    start = "Once upon a time, there was {lX}"
    if look not in topic:
        start = rng.choice(
            ("Once upon a time, there was {X}", "One day, there was {X}")
        )
    rest = (".", ". The {x}", ". A {child} named {name} liked the {x}.")
    if one in ANIMALS + PEOPLE:
        rest = (" named {name}.", " named {name}. {name}", ".", " who", ". The {x}")
    opening = (start + rng.choice(rest)).format(**words)
    return ask_about(rng, topic), opening, [one]


def named(rng: random.Random) -> tuple[str, str, list[str]]:
    """Return a request for a story with a child of some name, its opening, and the words it is about."""
    name, child, he, his = person(rng)
    mood = rng.choice(MOODS)
    noun = rng.choice(ANIMALS + TOYS)
    words = {"name": name, "child": child, "He": he, "his": his, "mood": mood}
    words |= {"he": he.lower(), "x": noun, "X": a(noun), "M": a(mood)}
    if rng.random() < 0.3:  # with a companion
        topic = choose(
            rng, "{name} and {his} {x}", "a {child} named {name} and {X}", **words
        )
        opening = choose(
            rng,
            "Once upon a time, there was a {child} named {name}. {He} had {X}.",
            "Once upon a time, a {child} named {name} loved {his} {x}.",
            **words,
        )
        return ask_about(rng, topic), opening, [noun]
    topic = choose(
        rng,
        "a {child} named {name} who is {mood}",
        "a {child} named {name} who is {mood}",
        "{M} {child} named {name}",
        "{M} {child} called {name}",
        "a {child} named {name} who was {mood}",
        **words,
    )
    opening = choose(
        rng,
        "Once upon a time, there was a {child} named {name}. {He} was very {mood}.",
        "Once upon a time, there was {M} {child} named {name}.",
        "One day, a {child} named {name} was {mood}.",
        "There was a {child} named {name}. {name} was {mood} because {he}",
        **words,
    )
    return ask_about(rng, topic), opening, [name, mood]


def told(story: str, words: Iterable[str], opening: str, known: set[str]) -> bool:
    """Say whether a story fits for a conversation: its length, its end, its words all
    used twice and one of them after the opening, nobody meeting himself or speaking to
    himself, no sentence said twice, no crowd of names, and no word that is none."""
    rest = story[len(opening) :].lower()
    if not (500 < len(story) < 1150 and story[-1] in '.!?"'):
        return False
    counts = Counter(word.lower() for word in WORD.findall(story))
    forms = [(w.lower(), plural(w) if w in NOUNS else "") for w in words]
    if not all(sum(counts[form] for form in {*pair}) > 1 for pair in forms):
        return False
    if words and not any(re.search(rf"\b{word}", rest) for word, _ in forms):
        return False
    if len({*GIRLS, *BOYS} & {*WORD.findall(story)}) > 2 or not counts.keys() <= known:
        return False
    if SELF.search(story):
        return False
    sentences = re.split(r"(?<=[.!?])\W+", story)
    if len(set(sentences)) < len(sentences):
        return False
    twice = sum(max(mentions(s).values(), default=0) > 1 for s in sentences)
    often = max((counts[noun] for noun in mentions(story)), default=0)
    return twice <= 1 and often <= max(8, sum(counts.values()) // 14)


def known_words(real: list[str]) -> set[str]:
    """Return the words that a story may have, in small letters."""
    words = {word.lower() for story in real for word in WORD.findall(story)}
    return words | {name.lower() for name in GIRLS + BOYS} | NOUN_OF.keys()


# The teacher, and sampling from any model.


def sample(
    model: llama.Llama,
    prompts: list[list[int]],
    *,
    temperature: float,
    length: int,
    stops: Iterable[int],
    enough: float = 1.0,
) -> list[list[int] | None]:
    """Return each prompt with its continuation, None where no stop came in time.

    Rows of all lengths go through together: a row takes its prompt's tokens while it
    has any, and samples after that. enough: the share of rows that, once they have
    stopped, end the wait for the others.
    """
    widest = max(map(len, prompts))
    padded = mx.array([ids + [0] * (widest - len(ids)) for ids in prompts], mx.int32)
    lengths = mx.array([len(ids) for ids in prompts])
    stops = mx.array(sorted(stops))
    cache = model.make_cache(length)
    token, done, columns = padded[:, 0], mx.zeros(len(prompts), mx.bool_), []
    for step in range(1, length):
        columns.append(token)
        logits = model(token[:, None], cache)[:, -1].astype(mx.float32)
        drawn = mx.random.categorical(logits / temperature).astype(mx.int32)
        own = step >= lengths
        token = mx.where(own, drawn, padded[:, min(step, widest - 1)])
        done = done | (own & (token[:, None] == stops).any(axis=-1))
        mx.async_eval(token, done)
        if step % 32 == 0 and done.sum().item() >= enough * len(prompts):
            break
    rows = np.array(mx.stack([*columns, token], axis=1))
    stops, found = set(stops.tolist()), []
    for row, prompt in zip(rows.tolist(), prompts):
        ends = (n for n in range(len(prompt), len(row)) if row[n] in stops)
        end = next(ends, None)
        found.append(None if end is None else row[:end])
    return found


class WideRoPE:
    """llama.RoPE out of plain operations: MLX's CUDA kernel (0.32.4) cannot be launched
    for hundreds of rows of heads as narrow as the teacher's."""

    def __init__(self, rope: llama.RoPE):
        self.frequencies = 1 / rope.tokens_per_radian

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        one, other = mx.split(x, 2, axis=-1)
        angles = offset * self.frequencies
        cos, sin = mx.cos(angles), mx.sin(angles)
        return mx.concatenate([one * cos - other * sin, other * cos + one * sin], -1)


def write_stories(folder: Path, real: list[str]) -> tuple[list[str], list[dict]]:
    """Return what the teacher writes: free stories, and stories with a given opening
    as {"ask", "words", "story"}, some of them with a "sequel"."""
    rng = random.Random(SEED)
    mx.random.seed(SEED)
    teacher, tokenizer = llama.load(folder, dtype=mx.float32)
    for layer in teacher.model.layers:
        layer.self_attn.rope = WideRoPE(layer.self_attn.rope)
    stops = {tokenizer.bos, tokenizer.eos}

    def write(openings: list[str], temperature: float) -> list[str | None]:
        texts = []
        for n in range(0, len(openings), BATCH):
            prompts = [
                [tokenizer.bos, *tokenizer.encode(o)] for o in openings[n : n + BATCH]
            ]
            rows = sample(
                teacher,
                prompts,
                temperature=temperature,
                length=500,
                stops=stops,
                enough=0.97,  # the last few would never end
            )
            texts += [row and tokenizer.decode(row[1:]).strip() for row in rows]
        return texts

    def tidy(text: str) -> str:
        return re.sub(r"\s*\n\s*", "\n\n", text)

    known = known_words(real)
    # As warm as the teacher was trained: this is where the model learns the language.
    free = [tidy(t) for t in write([""] * FREE * BATCH, 1.0) if t and len(t) > 200]
    asked = [
        rng.choice((two_nouns, two_nouns, one_noun, named))(rng)
        for _ in range(OPENED * BATCH)
    ]
    opened = []
    for (ask, opening, words), text in zip(asked, write([o for _, o, _ in asked], 0.6)):
        if text and told(text, words, opening, known):
            opened.append({"ask": ask, "words": words, "story": tidy(text)})
    # What happened next: the teacher reads the end of a story and a new beginning.
    rng.shuffle(opened)
    first = opened[: BATCH * 2]
    starts = []
    for item in first:
        who = re.search(r"named (\w+)", item["story"])
        who = who[1] if who else "the " + item["words"][0]
        item["next"] = choose(
            rng,
            "The next day, {who} went",
            "The next morning, {who} woke up and",
            "After that, {who}",
            "The next day, {who} saw",
            "Then one day, {who}",
            who=who,
        )
        starts.append(item["story"][-250:].split(". ", 1)[-1] + "\n" + item["next"])
    for item, start, text in zip(first, starts, write(starts, 0.6)):
        sequel = text and tidy(text[len(start) - len(item["next"]) :])
        if sequel and sequel.startswith(item["next"]) and told(sequel, [], "", known):
            item["sequel"] = sequel
        del item["next"]
    return free, opened


# Conversations.


def request_for(story: str, rng: random.Random) -> str:
    """Return a request that a story answers."""
    nouns = subjects(story)
    who = re.search(r"(girl|boy) named ([A-Z]\w+)", story[:300])
    mood = next(
        (m for m in MOODS if re.search(rf"\b{m}\b", story[: len(story) // 2])), None
    )
    if who and rng.random() < 0.35:
        child, name = who.groups()
        topic = f"a {child} named {name}"
        if mood and rng.random() < 0.6:
            topic += f" who is {mood}"
        elif nouns and rng.random() < 0.6:
            topic += f" and {a(nouns[0])}"
        return ask_about(rng, topic)
    if nouns:
        return ask_about(rng, " and ".join(map(a, nouns)))
    return rng.choice(TALK["any"]["user"])


def said(rng: random.Random, text: str) -> str:
    """Return what a user might type: slots filled, cased and ended at will."""
    text = re.sub(r"\{(\w+)\}", lambda m: rng.choice(TALK["slots"][m[1]]), text)
    if rng.random() < 0.25:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.25:
        text = text.rstrip(".!?")
    return text


def small_talk(rng: random.Random, kind: str) -> list[str]:
    return [said(rng, rng.choice(TALK[kind]["user"])), rng.choice(TALK[kind]["reply"])]


def conversation(items: list[dict], rng: random.Random) -> list[str]:
    """Return the turns, user's and ours by turns, of a talk that begins with items[0]
    and may go on to the others."""
    first, *others = items
    turns = small_talk(rng, "greeting") if rng.random() < 0.15 else []
    if rng.random() < 0.08:
        turns += small_talk(rng, rng.choice(("off_topic", "who")))
    turns += [said(rng, first["ask"]), first["story"]]
    if "sequel" in first and rng.random() < 0.6:
        turns += [said(rng, rng.choice(TALK["next"]["user"])), first["sequel"]]
    elif rng.random() < 0.15 and all(word in NOUNS for word in first["words"]):
        about = " and ".join(map(a, first["words"]))
        turns += [
            said(rng, rng.choice(TALK["about"]["user"])),
            f"It was about {about}.",
        ]
    for other in others:
        end = rng.random()
        if end < 0.45:
            break
        if end < 0.6:
            turns += small_talk(
                rng, rng.choice(("thanks", "praise", "off_topic", "who"))
            )
        words = other["words"]
        if all(word in NOUNS for word in words) and rng.random() < 0.7:
            about = " and ".join(map(a, words))
            ask = rng.choice(TALK["another_about"]["user"]).replace("{t}", about)
        else:
            ask = other["ask"] if words else rng.choice(TALK["another"]["user"])
        turns += [said(rng, ask), other["story"]]
    if rng.random() < 0.15:
        turns += small_talk(rng, rng.choice(("thanks", "praise", "bye", "off_topic")))
    return turns


def chatter(rng: random.Random) -> list[str]:
    """Return the turns of a talk without a story."""
    kinds = (
        ["off_topic"] * 8 + ["greeting"] * 3 + ["who"] * 3 + ["thanks", "bye", "how"]
    )
    return [
        t
        for kind in rng.choices(kinds, k=rng.randint(1, 3))
        for t in small_talk(rng, kind)
    ]


def render(turns: list[str], rng: random.Random) -> str:
    """Return a talk in Llama 3's format, some of them with a system message."""
    roles = ["user", "assistant"] * (len(turns) // 2)
    if rng.random() < 0.15:
        roles, turns = ["system", *roles], [rng.choice(TALK["system"]), *turns]
    parts = (
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>"
        for role, text in zip(roles, turns)
    )
    return "<|begin_of_text|>" + "".join(parts)


def plain(story: str) -> str:
    return f"<|begin_of_text|>{story}<|end_of_text|>"


# Vocabulary.


def make_vocabulary(texts: list[str]) -> tokenizers.Tokenizer:
    """Return a byte-level BPE in the layout of Llama 3's, special ids first."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(llama.LLAMA3_SPLIT), "isolated"
    )
    in_bytes = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=ARGS["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Documents:
    """Tokenized documents, laid end to end; batches of windows that begin with one."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, texts: list[str]):
        rows = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(row.ids, np.uint16) for row in rows]
        starts = np.cumsum([0, *map(len, ids)])
        stream = np.concatenate([*ids, *ids[: WINDOW + 1]])  # a window past the end
        self.tokens, self.size = mx.array(stream), int(starts[-1])
        self.starts = mx.array(starts[:-1].astype(np.int32))

    def batch(self, rows: int) -> mx.array:
        """Return (rows, WINDOW + 1) tokens."""
        chosen = self.starts[mx.random.randint(0, len(self.starts), (rows,))]
        return self.tokens[chosen[:, None] + mx.arange(WINDOW + 1)].astype(mx.int32)


# Training.


class Dropped(nn.Module):
    """A part of a block whose output is dropped out in training."""

    def __init__(self, part: nn.Module, p: float):
        super().__init__()
        self.part, self.dropout = part, nn.Dropout(p)

    def __call__(self, *args):
        return self.dropout(self.part(*args))


def cross_entropy(model: llama.Llama, windows: mx.array) -> mx.array:
    """Return the nats of each token after the first, (rows, L - 1)."""
    logits = model(windows[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, windows[:, 1:])


def halved(model: llama.Llama) -> dict:
    """Return the weights of a model in bfloat16."""
    return tree_map(lambda w: w.astype(mx.bfloat16), model.parameters())


class Trainer:
    """AdamW on weights in float32; passes in bfloat16, with dropout."""

    def __init__(self, steps: int):
        args = llama.ModelArgs.from_dict(ARGS)
        self.model = llama.Llama(args)
        normal = nn.init.normal(0.0, 0.02)
        # What a block adds to the residual stream, by the number of additions.
        narrow = nn.init.normal(0.0, 0.02 / math.sqrt(2 * args.num_hidden_layers))
        for name, part in self.model.named_modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                last = name.endswith(("o_proj", "down_proj"))
                part.weight = (narrow if last else normal)(part.weight)
        dropped = llama.Llama(args)
        for layer in dropped.model.layers:
            layer.self_attn = Dropped(layer.self_attn, DROPOUT)
            layer.mlp = Dropped(layer.mlp, DROPOUT)
        # Up, level, and for the second half down to nothing.
        parts = [
            optimizers.linear_schedule(0.0, PEAK, WARMUP),
            optimizers.linear_schedule(PEAK, PEAK, 1),
            optimizers.linear_schedule(PEAK, 0.0, steps // 2),
        ]
        rate = optimizers.join_schedules(parts, [WARMUP, steps - steps // 2])
        self.optimizer = optimizers.AdamW(rate, betas=[0.9, 0.95], weight_decay=DECAY)
        self.optimizer.init(self.model.trainable_parameters())

        def loss(model: llama.Llama, windows: mx.array) -> mx.array:
            weights = halved(model)
            for layer in weights["model"]["layers"]:
                layer["self_attn"] = {"part": layer["self_attn"]}
                layer["mlp"] = {"part": layer["mlp"]}
            dropped.update(weights)
            return cross_entropy(dropped, windows).mean()

        loss_and_gradients = nn.value_and_grad(self.model, loss)
        self.state = [self.model.state, self.optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(windows: mx.array) -> mx.array:
            value, gradients = loss_and_gradients(self.model, windows)
            gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
            self.optimizer.update(self.model, gradients)
            return value

        self.step = step
        mx.eval(self.state)

    def run(self, documents: Documents, steps: int, every: int = 250) -> None:
        """Train on batches of ROWS windows, saying how it goes."""
        begin, total = time.perf_counter(), mx.array(0.0)
        for n in range(1, steps + 1):
            total = total + self.step(documents.batch(ROWS))
            mx.async_eval(total, self.state)
            if n % every == 0:
                speed = n * ROWS * WINDOW / (time.perf_counter() - begin)
                loss = total.item() / every
                say(f"step {n:5} of {steps}: loss {loss:.3f}, {speed:,.0f} tokens/s")
                total = mx.array(0.0)

    def in_bfloat16(self) -> llama.Llama:
        """Return the model as it stands, in bfloat16."""
        half = llama.Llama(self.model.args)
        half.update(halved(self.model))
        return half


# Measures.


def bits_per_byte(
    model: llama.Llama, tokenizer: llama.Tokenizer, text: str, window: int
) -> float:
    """Return the bits per byte of a text of stories, each read from its beginning.

    A story longer than the window goes on in a next one, whose first half only gives
    context.
    """
    bits = size = 0
    for story in filter(None, parted(text)):
        ids = [tokenizer.bos, *tokenizer.encode(story)]
        size += len(story.encode())
        for start in range(0, max(1, len(ids) - window // 2), window // 2):
            part = ids[start : start + window]
            nats = cross_entropy(model, mx.array([part]))[0]
            bits += nats[(window // 2 - 1 if start else 0) :].sum().item() / math.log(2)
    return bits / size


def pairs(count: int) -> list[tuple[str, str]]:
    """Return pairs of nouns to ask for."""
    rng = random.Random(2024)
    things = [n for n in NOUNS if n not in ANIMALS + PEOPLE + PLACES]
    return [(rng.choice(ANIMALS), rng.choice(things)) for _ in range(count)]


def story_test(model: llama.Llama, tokenizer: llama.Tokenizer) -> dict:
    """Return how 100 requests for a story about two things are answered."""
    asked = pairs(100)
    prompts = [
        tokenizer.encode_chat(
            [{"role": "user", "content": f"Tell me a story about {a(x)} and {a(y)}."}]
        )
        for x, y in asked
    ]
    mx.random.seed(SEED)
    longest = max(map(len, prompts)) + 400
    rows = sample(
        model, prompts, temperature=0.7, length=longest, stops=tokenizer.stop_tokens
    )
    replies = [row and tokenizer.decode(row[len(p) :]) for row, p in zip(rows, prompts)]
    both = [
        r and all(mentions(r)[noun] for noun in pair) for r, pair in zip(replies, asked)
    ]
    words = sorted(len(WORD.findall(r)) for r in replies if r)
    return {
        "both": sum(map(bool, both)),
        "ended": len(words),
        "words": words[len(words) // 2] if words else 0,
        "hundred": sum(n >= 100 for n in words),
        "replies": replies,
    }


# Saving.


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[4],
        "chat_template": TEMPLATE,
        "model_max_length": ARGS["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save(model: llama.Llama, folder: Path) -> None:
    """Quantize a model to 8 bits, and write it in MLX's layout."""
    nn.quantize(model, group_size=64, bits=8)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    quantization = {"group_size": 64, "bits": 8, "mode": "affine"}
    config = ARGS | {"quantization": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    settings = {
        "bos_token_id": 0,
        "eos_token_id": [1, 4],
        "temperature": 0.7,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(
        json.dumps(settings, indent=2) + "\n"
    )


# The whole of it.


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGIN:5.0f} s  {text}", flush=True)


BEGIN = time.perf_counter()


def talks(
    opened: list[dict], free: list[str], real: list[str], rng: random.Random
) -> list[str]:
    """Return conversations: about what the teacher wrote, about real stories retold,
    and about nothing."""
    known = known_words(real)
    free = [story for story in free if told(story, [], "", known)]
    anew = [retold(story, rng) for _ in range(RETOLD) for story in real]
    items = opened * TOLD + [
        {"ask": request_for(story, rng), "words": subjects(story), "story": story}
        for story in free + anew
    ]
    rng.shuffle(items)
    texts = [render(chatter(rng), rng) for _ in range(CHATTER)]
    while items:
        count = rng.choice((1, 1, 2, 3))
        texts.append(render(conversation(items[-count:], rng), rng))
        del items[-count:]
    return texts


def train(teacher: Path, file: Path, samples: Path | None = None) -> llama.Llama:
    """Return the trained model in bfloat16; save its tokenizer in FOLDER."""
    real, validation, _ = read_stories(file)
    if samples and samples.exists():
        free, opened = json.loads(samples.read_text())
    else:
        free, opened = write_stories(teacher, real)
        if samples:
            samples.write_text(json.dumps([free, opened]))
    rng = random.Random(SEED)
    mx.random.seed(SEED)
    say(f"{len(real):,} real stories; of the teacher {len(free):,} free ones,")
    followed = sum("sequel" in item for item in opened)
    say(f"{len(opened):,} opened ones that fit, {followed:,} with a sequel")

    texts = [item["ask"] for item in opened[:5000]]
    texts += [said(rng, t) for k in TALK.values() if "reply" in k for t in k["user"]]
    texts += [t for k in TALK.values() if "reply" in k for t in k["reply"] * 20]
    fast = make_vocabulary(real * 4 + free[:20_000] + texts)
    save_tokenizer(fast, FOLDER)
    tokenizer = llama.Tokenizer.from_folder(FOLDER)
    say(f"vocabulary of {fast.get_vocab_size():,} tokens")

    stories = [plain(story) for story in free + real * REAL]
    rng.shuffle(stories)
    documents = Documents(fast, stories)
    say(f"plain stories: {documents.size:,} tokens")
    trainer = Trainer(PLAIN_STEPS + CHAT_STEPS)
    trainer.run(documents, PLAIN_STEPS)

    half = trainer.in_bfloat16()
    say(f"{bits_per_byte(half, tokenizer, validation, WINDOW):.4f} bits per byte")

    conversations = talks(opened, free, real, rng)
    stories = conversations + [plain(s) for s in free[::2] + real * REAL]
    rng.shuffle(stories)
    documents = Documents(fast, stories)
    say(f"{len(conversations):,} conversations")
    say(f"with plain stories, {documents.size:,} tokens")
    trainer.run(documents, CHAT_STEPS)

    half = trainer.in_bfloat16()
    say(f"{bits_per_byte(half, tokenizer, validation, WINDOW):.4f} bits per byte")
    return half


def measure(model: llama.Llama, tokenizer: llama.Tokenizer, held_out: str) -> None:
    """Print the measures of the model card."""
    bits = bits_per_byte(model, tokenizer, held_out, WINDOW)
    say(f"held out: {bits:.4f} bits per byte")
    test = story_test(model, tokenizer)
    say(
        f"100 requests: {test['both']} with both nouns, {test['ended']} ended, "
        f"{test['hundred']} of a hundred words or more, {test['words']} at the median"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--teacher", type=Path, required=True, help="folder of stories260K"
    )
    parser.add_argument(
        "--stories", type=Path, required=True, help="text of TinyStories"
    )
    parser.add_argument("--samples", type=Path, help="keep the teacher's stories there")
    parser.add_argument("--measure", action="store_true", help="measure, train nothing")
    options = parser.parse_args()
    *_, held_out = read_stories(options.stories)
    if not options.measure:
        half = train(options.teacher, options.stories, options.samples)
        tokenizer = llama.Tokenizer.from_folder(FOLDER)
        bits = bits_per_byte(half, tokenizer, held_out, WINDOW)
        say(f"held out, in bfloat16: {bits:.4f} bits per byte")
        save(half, FOLDER)
    model, tokenizer = llama.load(FOLDER)
    measure(model, tokenizer, held_out)
    model, tokenizer = llama.load(options.teacher)
    bits = bits_per_byte(model, tokenizer, held_out, 512)
    say(f"the teacher, held out: {bits:.4f} bits per byte")


if __name__ == "__main__":
    main()
