"""Chat templates: published ones and made-up ones against jinja2, and hostile ones."""

import functools
import gc
import itertools
import json
import random
import re
import time
import tracemalloc

import pytest

import llama
from tests.support import DATA, THINKS, needs_data, peer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "Hello"}]


def conversation(*contents, system=None):
    """Turns of user and assistant, after a system message if one is given."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


TRICKY = "<|im_end|>\n{{ bos_token }}{% raw %}[INST] </s>{% endraw %}{# <<SYS>> #}"
CONVERSATIONS = [
    conversation("Hello"),
    conversation("Hello", system="Be brief."),
    conversation("Hi", "Hello!", "How are you?"),
    conversation("Hi", "Hello!", "So?", "Well.", "And you?", system="Be good."),
    conversation("\n a \t", "  yes \n\n", " x ", system="  padded \n"),
    conversation("", "", "", system=""),
    conversation(TRICKY, TRICKY, TRICKY, system=TRICKY),
    conversation("q", "<think>\nlet me see\n</think>\n\nThe answer", "r"),
    conversation("q", "<think>a</think>b", "r", "</think></think> c", "t", system="s"),
    conversation("Grüße, 世界 🙂 ﬁ İ ß", "two\u2028lines\x85", "é"),
    conversation("one\ntwo\n\n\nthree\n", "- a\n- b\n", "\n\n"),
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "assistant", "content": "I begin"}, *HELLO],
    [*conversation("a", "b"), {"role": "system", "content": "late"}, *HELLO],
    [],
]


def rendered(source, messages, names=NAMES, **variables):
    """What jinja2 makes of a template as transformers sets it up, or its error."""
    render = peer("transformers.utils.chat_template_utils").render_jinja_template
    try:
        texts, _ = render([messages], chat_template=source, **names, **variables)
        return texts[0]
    except Exception as error:
        return error


def ours(source, messages, names=NAMES, **variables):
    try:
        return llama.ChatTemplate(source).render(messages, names, **variables)
    except ValueError as error:
        return error


def published():
    """The names of published templates, with their special tokens."""
    if not DATA.is_dir():
        return {}
    tokens = json.loads((DATA / "templates" / "tokens.json").read_text())
    found = sorted(path.name for path in (DATA / "templates").glob("*.jinja"))
    return {
        name: NAMES | {k: v for k, v in tokens[name].items() if v} for name in found
    }


@functools.cache
def source_of(name):
    return (DATA / "templates" / name).read_bytes().decode()


@needs_data
def test_published_templates_render_as_jinja2_does():
    peer("jinja2")
    refused = set()
    for name, names in published().items():
        source = source_of(name)
        for messages, prompt in itertools.product(CONVERSATIONS, [True, False]):
            wanted = rendered(source, messages, names, add_generation_prompt=prompt)
            got = ours(source, messages, names, add_generation_prompt=prompt)
            if isinstance(wanted, Exception):
                assert isinstance(got, ValueError), (name, messages)
                if type(wanted).__name__ == "TemplateError":  # raise_exception
                    assert type(got) is llama.RaisedByTemplate
                    assert str(got) == str(wanted)
            elif isinstance(got, ValueError):
                refused.add((name, str(got)))
            else:
                assert got == wanted, (name, messages)
    assert len({name for name, _ in refused}) <= 0.05 * len(published()), refused


@needs_data
def test_variables_of_published_templates_reach_them():
    source = source_of("openvino-Qwen-Qwen3-1.7B.jinja")
    for thinking in (True, False):
        wanted = rendered(
            source, HELLO, add_generation_prompt=True, enable_thinking=thinking
        )
        assert ours(source, HELLO, enable_thinking=thinking) == wanted


@needs_data
def test_no_published_template_takes_a_message_for_its_own_words():
    # Each message is written in letters of its own, which no template contains.
    for name, names in published().items():
        messages = conversation(*("" for _ in range(5)), system="")
        for n, message in enumerate(messages):
            letters = [chr(0x4E00 + 100 * n + k) for k in range(40)]
            message["content"] = " {}<|{}|>\n{} ".format(*map("".join, [letters] * 3))
        text = ours(source_of(name), messages, names)
        if isinstance(text, ValueError):
            continue
        assert "".join(piece for piece, _ in text.runs()) == text
        for piece, writer in text.runs():
            for letter in piece:
                if 0x4E00 <= ord(letter) < 0x5300:
                    assert writer == (ord(letter) - 0x4E00) // 100, (name, piece)


@needs_data
def test_a_conversation_costs_in_proportion_to_its_length():
    source = source_of("openvino-deepseek-ai-DeepSeek-R1.jinja")
    template = llama.ChatTemplate(source)

    def seconds(count: int) -> float:
        """The least of five, since garbage of other tests may be collected meanwhile."""
        messages, took = conversation(*["word " * 20] * count), []
        for _ in range(5):
            began = time.process_time()
            template.render(messages, NAMES)
            took.append(time.process_time() - began)
        return min(took)

    assert seconds(1001) < 30 * max(seconds(101), 0.001)


# Random templates. Each is rendered as jinja2 does, or refused.

VALUES = [
    "messages",
    "m",
    "m.role",
    "m.content",
    "m['content']",
    "messages[0].content",
    "messages[1:]",
    "x",
    "ns.x",
    "loop.index",
    "loop.first",
    "loop.last",
    "loop.nextitem",
    "bos_token",
    "tools",
    "nope",
    "m.nope",
    "1",
    "0",
    "2",
    "'a'",
    "'ab,c'",
    "''",
    "'\\n'",
    "true",
    "none",
    "[]",
    "[1,'a']",
    "(1,2)",
    "{'a':1}",
    "range(3)",
]
SIGNS = [
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "~",
    "==",
    "!=",
    "<",
    ">=",
    "in",
    "and",
    "or",
    "+",
    "~",
    "==",
] + ["not in"]
FILTERS = [
    "trim",
    "length",
    "upper",
    "lower",
    "capitalize",
    "title",
    "first",
    "last",
    "list",
    "string",
    "join",
    "join(',')",
    "default('d')",
    "d('d',true)",
    "replace('a','b')",
    "tojson",
    "int",
    "map('upper')|list",
    "map(attribute='role')|list",
    "selectattr('role','equalto','user')|list",
    "rejectattr('role')|list",
    "select|list",
    "select('string')|list",
    "reject('none')|list",
]
TESTS = [
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "boolean",
    "true",
    "false",
    "equalto('a')",
    "ne(1)",
    "eq(1)",
] + ["in [1,'a']", "not none", "not in 'ab'"]
METHODS = [
    "strip()",
    "lstrip()",
    "rstrip('a')",
    "split()",
    "split(',')[-1]",
    "startswith('a')",
    "endswith('c')",
    "replace('a','b')",
    "upper()",
    "title()",
    "find('b')",
    "get('a')",
    "get('role','y')",
    "items()|list",
    "keys()|list",
    "join(['a','b'])",
]


def expression(chance, depth):
    kind = chance.random() if depth else 0
    inner = lambda: expression(chance, depth - 1)
    if kind < 0.25:
        return chance.choice(VALUES)
    if kind < 0.5:
        return f"{inner()} {chance.choice(SIGNS)} {inner()}"
    if kind < 0.65:
        return f"{inner()}|{chance.choice(FILTERS)}"
    if kind < 0.75:
        return f"{inner()} is {chance.choice(TESTS)}"
    if kind < 0.85:
        return f"{chance.choice(VALUES)}.{chance.choice(METHODS)}"
    if kind < 0.9:
        return f"({inner()})[{chance.choice(['0', '-1', '1:', '::-1', inner()])}]"
    if kind < 0.95:
        return f"{inner()} if {inner()}" + chance.choice(["", f" else {inner()}"])
    return chance.choice(["not {}", "-{}", "({})", "[{}]"]).format(inner())


def statement(chance, depth):
    """A random statement, with random white space and signs about it."""
    value = expression(chance, 2)
    body = "".join(statement(chance, depth - 1) for _ in range(2)) if depth else " x\n"
    leave = "{% if " + value + " %}{% " + chance.choice(["break", "continue"]) + " %}"
    text = chance.choice(
        [
            "{{ " + value + " }}",
            "{{ " + value + " }}",
            "{# " + body.replace("#", "") + " #}",
            "{% set x = " + value + " %}",
            "{% set ns.x = " + value + " %}",
            "{% if " + value + " %}" + body + "{% else %}" + body + "{% endif %}",
            "{% for m in " + value + " %}" + body + "{% endfor %}",
            "{% for m in messages if " + value + " %}" + body + "{% endfor %}",
            "{% for x in (1,2,3) %}" + leave + "{% endif %}" + body + "{% endfor %}",
            "{% for m in messages %}" + body + "{% else %}" + body + "{% endfor %}",
            "{% set x %}" + body + "{% endset %}{{ x }}",
            "{% set x | upper %}" + body + "{% endset %}{{ x }}",
            "{% filter trim %}" + body + "{% endfilter %}",
            "{% macro f(a, b=1) %}" + body + "{% endmacro %}{{ f(" + value + ") }}",
            "{% generation %}" + body + "{% endgeneration %}",
        ]
    )
    blank = lambda: chance.choice(["", "", "\n", "  ", "\n  "])
    text = re.sub(r"\{%(?= )", lambda _: "{%" + chance.choice(["", "", "-", "+"]), text)
    text = re.sub(r"(?<= )%\}", lambda _: chance.choice(["", "", "-"]) + "%}", text)
    return blank() + text + blank()


def spoilt(chance, source):
    """A published template with a few words deleted, doubled or exchanged."""
    words = re.findall(r"\{[{%#]-?|-?[%#}]\}|'[^']*'|\w+|\s+|.", source, re.DOTALL)
    for _ in range(chance.choice([1, 1, 2, 4])):
        n, other = chance.randrange(len(words)), chance.randrange(len(words))
        kind = chance.randrange(4)
        if kind == 0:
            del words[n]
        elif kind == 1:
            words.insert(n, words[n])
        elif kind == 2:
            words[n], words[other] = words[other], words[n]
        else:
            words.insert(n, "{{ " + expression(chance, 2) + " }}")
        words = words or ["x"]
    return "".join(words)


def random_templates(chance, count):
    names = [name for name in published() if len(source_of(name)) < 3000]
    start = "{% set ns = namespace(x='a') %}{% set m = messages[0] %}"
    for n in range(count):
        if names and n % 3 == 0:
            yield spoilt(chance, source_of(chance.choice(names)))
        elif n % 3 == 1:
            value = expression(chance, 3)
            yield start + "{% for m in messages %}{{ " + value + " }}{% endfor %}"
        else:
            yield start + "".join(statement(chance, 2) for _ in range(3))


# Where jinja2 reads no template at all, a mistake may stay unnoticed here as long as
# what it stands in is not evaluated.
UNREADABLE = ("TemplateSyntaxError", "TemplateAssertionError", "SyntaxError")


@pytest.mark.parametrize("seed", range(8))
def test_random_templates_render_as_jinja2_does_or_are_refused(seed):
    peer("jinja2")
    chance = random.Random(seed)
    same = 0
    for source in random_templates(chance, 250):
        for messages in CONVERSATIONS[0], CONVERSATIONS[4]:
            got = ours(source, messages)
            if isinstance(got, ValueError):
                continue
            wanted = rendered(source, messages, add_generation_prompt=True)
            if type(wanted).__name__ not in UNREADABLE:
                assert got == wanted, source
                same += 1
    assert same > 50


def test_a_condition_that_rounds_of_its_loop_may_change_is_refused():
    """Jinja asks it before each round, and this interpreter before them all."""
    begin = "{% set ns = namespace(x='a') %}{% for m in messages if ns.x == 'a' %}"
    source = begin + "{% set ns.x = 'b' %}{{ m.content }}{% endfor %}"
    assert str(rendered(source, CONVERSATIONS[2])) == "Hi"
    assert "cannot read a namespace" in str(ours(source, CONVERSATIONS[2]))


# Attacks. Each is refused in one line, before it takes much time or memory.

TEXT = "{% set ns = namespace(x='ab', l=[1], t=(1,)) %}"


def times(count, body):
    return f"{{% for i in range({count}) %}}{body}{{% endfor %}}"


GROW = times(40, "{% set ns.x = ns.x + ns.x %}")
LONG = times(17, "{% set ns.x = ns.x ~ ns.x %}")
SHARE = times(60, "{% set ns.l = [ns.l, ns.l] %}{% set ns.t = (ns.t, ns.t) %}")
DEEP = times(5000, "{% set ns.l = [ns.l] %}{% set ns.t = (ns.t,) %}")
MANY = times(16, "{% set ns.l = ns.l + ns.l %}")
ATTACKS = {
    "loops in loops": times(9999, times(9999, times(9999, "x"))),
    "loops that print nothing": times(9999, times(9999, "{% if 1 %}{% endif %}" * 99)),
    "a long range": "{{ range(10000000000)|list }}",
    "a text that doubles": TEXT + GROW,
    "a long text as a list": TEXT
    + times(18, "{% set ns.x = ns.x ~ ns.x %}")
    + "{{ ns.x|list|length }}",
    "a long list that is printed": TEXT
    + times(19, "{% set ns.l = ns.l + ns.l %}")
    + "{{ ns.l }}",
    "a list that doubles": TEXT + times(99, "{% set ns.l = ns.l + ns.l %}"),
    "printing a shared list": TEXT + SHARE + "{{ ns.l }}",
    "comparing shared lists": TEXT + SHARE + "{{ ns.l == [ns.l[0], ns.l[0]] }}",
    "a shared list as JSON": TEXT + SHARE + "{{ ns.l|tojson }}",
    "looking for a shared list": TEXT + SHARE + "{{ ns.l in [1, ns.l] }}",
    "a shared tuple as a key": TEXT + SHARE + "{{ {'a': 1}[ns.t] }}",
    "a deep tuple as a key that is missing": TEXT + DEEP + "{{ {'a': 1}[ns.t] }}",
    "getting a shared tuple": TEXT + SHARE + "{{ {'a': 1}.get(ns.t) }}",
    "a shared tuple as a filter": TEXT + SHARE + "{{ [1]|map(ns.t)|list }}",
    "a shared tuple as a path": TEXT + SHARE + "{{ [{}]|map(attribute=ns.t)|list }}",
    "an error with a shared list": TEXT + SHARE + "{{ raise_exception(ns.l) }}",
    "printing a deep list": TEXT + DEEP + "{{ ns.l }}",
    "a deep tuple as a key": TEXT + DEEP + "{{ {ns.t: 1} }}",
    "replacing by a long text": TEXT + LONG + "{{ ns.x|replace('a', ns.x) }}",
    "joining with a long text": TEXT + LONG + "{{ ns.x.join(ns.x) }}",
    "joining a long text": TEXT
    + LONG
    + "{% set ns.l=[ns.x] %}"
    + MANY
    + "{{ ns.l|join }}",
    "changing a long text": TEXT + LONG + times(9999, "{% set y = ns.x|title %}"),
    "stripping many characters": TEXT + LONG + "{{ ns.x.strip(ns.x) }}",
    "splitting a long text": TEXT + LONG + times(9999, "{% set y = ns.x.split('a') %}"),
    "printing a long text": TEXT + LONG + times(99999, "{{ ns.x }}"),
    "a path through a list": TEXT
    + MANY
    + "{{ ns.l|map(attribute='"
    + "0." * 9000
    + "0')|list }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that doubles": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(25) }}",
    "a default that calls itself": "{% macro f(a=f()) %}{% endmacro %}{{ f() }}",
    "a product": TEXT + "{% set ns.x=3 %}" + times(99, "{% set ns.x=ns.x*ns.x %}"),
    "a text taken many times": "{{ 'a' * 1000000000 }}",
    "a list taken many times": "{{ [0] * 1000000000 }}",
    "a power": "{{ 9**9**9**9 }}",
    "a long number": "{{ " + "9" * 50_000 + " }}",
    "brackets in brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "a long sum": "{{ " + "1+" * 20_000 + "1 }}",
    "a long negation": "{{ " + "not " * 10_000 + "1 }}",
    "many signs": "{{ " + "-" * 30_000 + "1 }}",
    "many filters": "{{ 1" + "|trim" * 10_000 + " }}",
    "many members": "{{ a" + ".a" * 20_000 + " }}",
    "many conditions": "{{ " + "1 if 0 else " * 4_000 + "1 }}",
    "tags in tags": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "many branches": "{% if 0 %}" + "{% elif 0 %}" * 4_000 + "{% endif %}",
    "open brackets": "{{" * 25_000,
    "an open text": "{{ '" + "\\'" * 25_000,
    "a huge template": "x" * 10_000_000,
    "a date's form": "{{ strftime_now('%Y' * 1) }}{{ strftime_now('"
    + "%c" * 999
    + "') }}",
}
# Each reaches for something of Python's, or for what a template must not have.
REACHES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__len__ }}",
    "{{ [1]|map(attribute='__class__')|list }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{% macro f() %}{% endmacro %}{{ f.__code__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s' % 1 }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].update }}",
    "{{ (1).real }}",
    "{{ self }}",
    "{{ cycler }}",
    "{{ lipsum() }}",
    "{% set messages.x = 1 %}",
    "{% set messages[0] = 1 %}",
    "{% for i in [1] %}{% set loop.index = 2 %}{% endfor %}",
    "{% set x|trim = 1 %}",
    "{% import 'os' as os %}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{{ (lambda: 1)() }}",
    "{{ (x := 1) }}",
    "{{ [x for x in messages] }}",
    "{{ [*messages] }}",
    "{{ namespace(**messages[0]) }}",
    "{{ 1; 2 }}",
    "{{ f'{1}' }}",
    "{{ 1 # }}",
    "{{ 1 \\\n }}",
    "{{ 0block }}",
    "{{ messages|safe + 'x' }}",
]


@pytest.mark.parametrize(
    "step",
    [
        "{% set ns.x = ns.x.replace('x','xxxx') %}",
        "{% set ns.x = ns.x|replace('x','xxxx') %}",
        "{% set ns.x = ns.x.replace('xx','x') + ns.x %}",
        "{% set ns.y = ns.x.split('x') %}{% set ns.x = ns.x + ns.x %}",
        "{% set ns.y = ns.x.split(sep='x') %}{% set ns.x = ns.x + ns.x %}",
    ],
)
@pytest.mark.parametrize("size", [200, 20_000, 100_000])
def test_many_pieces_of_a_long_message_are_paid_for(step, size):
    """A long message allows many steps, and so much work."""
    template = "{% set ns = namespace(x=messages[0].content) %}" + step * 60
    gc.collect()
    gc.freeze()  # what other tests hold is not to be looked through meanwhile
    began = time.process_time()
    with pytest.raises(llama.TemplateError, match="too long|characters, not"):
        llama.ChatTemplate(template).render(
            [{"role": "user", "content": "x" * size}], {}
        )
    seconds = time.process_time() - began
    gc.unfreeze()
    assert seconds < 1  # seen: at most 0.4


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_soon_in_one_line(name):
    began = time.process_time()
    error = ours(ATTACKS[name], HELLO)
    seconds = time.process_time() - began
    assert isinstance(error, llama.TemplateError)
    assert len(str(error)) < 400
    assert str(error).isprintable()
    assert seconds < 2  # seen: at most 0.5


@pytest.mark.parametrize(
    "name",
    [
        "a long text as a list",
        "a long list that is printed",
        "joining with a long text",
    ],
)
def test_attacks_take_little_memory(name):
    tracemalloc.start()
    ours(ATTACKS[name], HELLO)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 35e6


# The first bound that each of these meets, since Python's own would come too late.
BOUNDS = {
    "a huge template": "^a template may have",
    "a long sum": "^line 1, column 1: a tag may have",
    "brackets in brackets": "^line 1, column .*: brackets are nested too deeply",
    "tags in tags": "^line 1, column .*: tags are nested too deeply",
    "a macro that calls itself": "^line 1, column .*: the template calls itself",
}


@pytest.mark.parametrize(("name", "message"), BOUNDS.items())
def test_bounds_are_met_before_those_of_python(name, message):
    assert re.search(message, str(ours(ATTACKS[name], HELLO)))


@pytest.mark.parametrize("source", REACHES)
def test_templates_reach_nothing_of_pythons(source):
    error = ours(source, HELLO)
    assert isinstance(error, llama.TemplateError)
    assert re.match(r"line \d+, column \d+: ", str(error))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_an_error_in_one_line_leaves_a_template(seed):
    chance = random.Random(seed)
    pieces = ["{{", "}}", "{%", "%}", "{#", "#}", "if", "for", "in", "endfor", "endif"]
    pieces += [
        "set",
        "x",
        "=",
        "|",
        "is",
        ".",
        "[",
        "]",
        "(",
        ")",
        "'",
        '"',
        "\\",
        "\n",
    ]
    pieces += [
        "{",
        "}",
        ":",
        ",",
        "-",
        "not",
        "else",
        "macro",
        "\0",
        "\ud800",
        "é",
        "9",
    ]
    for _ in range(2000):
        source = "".join(chance.choices(pieces, k=chance.randrange(1, 30)))
        spaced = " ".join(chance.choices(pieces, k=chance.randrange(1, 30)))
        for text in (source, "{{ " + spaced + " }}", "{% " + spaced + " %}"):
            error = ours(text, HELLO)  # any other error fails the test
            assert not isinstance(error, ValueError) or str(error).isprintable()


def test_what_a_template_raises_is_shown_in_one_line():
    error = ours(
        "{{ raise_exception('a\\x1b[2J\\nb' ~ 'c' ~ messages[0].content) }}", HELLO
    )
    assert type(error) is llama.RaisedByTemplate
    assert str(error) == "a?[2J bcHello"


# Published templates of reasoning models: what begins the thinking in the prompt, and
# whether the thinking of earlier replies is left out.
REASONING = {
    "openvino-Qwen-QwQ-32B": ("<think>\n", True),
    "openvino-Qwen-Qwen3-1.7B": ("", True),
    "openvino-deepseek-ai-DeepSeek-R1": ("<think>\n", True),
    "openvino-deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("<think>\n", True),
    "openvino-microsoft-Phi-4-reasoning": ("", False),
    "axolotl-exaone4": ("", True),  # it writes <think> and </think>
    "openinstruct-olmo_thinker": ("<think>", False),
    "openinstruct-olmo_thinker_remove_intermediate_thinking": ("<think>", True),
}


@needs_data
@pytest.mark.parametrize("name", REASONING)
def test_thinking_begins_and_is_left_out_as_published_templates_have_it(name):
    source = (DATA / "templates" / f"{name}.jinja").read_text()
    first = ours(source, HELLO)
    opening, left_out = REASONING[name]
    assert llama.opening_of(first) == opening
    begun = "" if opening else "<think>\n"
    piece = llama.Piece(f"{begun}Hm.\n</think>\n\nHello!", opening=opening)
    second = ours(source, conversation("Hello", piece.content, "More?"))
    assert "Hello!" in second and ("Hm." in second) != left_out
    if not left_out:  # then as the model has read and written it
        assert second.startswith(first + piece.text)


def test_only_the_template_can_begin_the_thinking():
    for content, source, opening in (
        ("Hi!", THINKS + "<think> \n\n", "<think> \n"),
        ("Hi! <think>", "{{ messages[0].content }}\n", ""),
        ("<thi", "{{ messages[0].content }}nk>", ""),
        ("Hi!", "<think>{{ messages[0].content }}", ""),
        ("Hi!", "<think></think>", ""),
        ("Hi!", "nk>", ""),
        ("Hi!", "", ""),
    ):
        prompt = ours(source, [{"role": "user", "content": content}])
        assert llama.opening_of(prompt) == opening
