"""The chat on a terminal: editing, commands, history, colour."""

import functools
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

import llama
from tests.support import (
    CTRL_C,
    CTRL_D,
    HERE,
    PASTES_ARE_MARKED,
    PASTES_ARE_PLAIN,
    STORIES,
    THINKS,
    Terminal,
    chat_with,
    command,
    libedit,
    random_folder,
    thinking_folder,
)

pytest_plugins = ["tests.fixtures"]


def test_a_prompt_on_the_screen_stays_out_of_a_file(folder, tmp_path):
    out = tmp_path / "out.txt"
    program = f"import llama, sys; sys.stdout = open({str(out)!r}, 'w');"
    program += (
        f"llama.main(['chat', {str(folder)!r}, '--max-tokens', '3', '--seed', '1'])"
    )
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r}); {program}")
    chat = Terminal(program=script)
    chat.wait_for(">>> ")
    chat.type("x\r", edited=False)
    chat.wait_for("[stopped")
    chat.wait_for(">>> ")
    chat.type(CTRL_D, edited=False)
    assert chat.status() == 0
    assert ">>>" not in out.read_text() and out.read_text()


def says(text: str, path: Path) -> Path:
    """A program that is llama.py but for its model, which always says a text."""
    script = path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import llama\n"
        "def decode(*_):\n"
        f"    yield from llama.Tokenizer.from_folder(sys.argv[2]).encode({text!r})\n"
        "    return 'stop'\n"
        "llama.decode = decode\n"
        "sys.exit(llama.main(sys.argv[1:]))"
    )
    return script


STORY = """One day, a little dog named Max went to the park with his mom. He saw a big \
ball in the tree, and he was very happy. \
"I want the ball!" said Max, and jumped as high as a little dog can.

His mom smiled and shook the tree. The ball fell down, and the two of them played with \
it until the sun went down behind the houses."""


def test_a_reply_wraps_at_the_edge_of_the_terminal_and_in_a_pipe_it_does_not(tmp_path):
    """A chat honours a new size, and nothing is gained: no blanks, no other words."""
    words, script = ("chat", STORIES, "--lookup", 0), says(STORY, tmp_path)
    text = subprocess.run(
        [sys.executable, script, *map(str, words), "--prompt", "Hi!"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=True,
    ).stdout.decode()
    assert text == STORY + "\n" and max(map(len, text.splitlines())) > 100
    chat = Terminal(*words, program=script, columns=41)
    for columns in (41, 60, 27):
        chat.wait_for(">>> ")
        chat.resize(columns)
        chat.type("Hi!\r")
        chat.wait_for(PASTES_ARE_PLAIN)  # readline has read the message
        chat.wait_for(PASTES_ARE_MARKED)  # as long as the reply is printed
        shown = without_progress(chat.wait_for(PASTES_ARE_PLAIN).strip("\r\n"))
        assert shown.replace("\r\n", "\n") == wrapped(text, columns)
        chat.wait_for(">>> ")
        chat.type("/reset\r")
        chat.wait_for("forgotten")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def without_progress(shown: str) -> str:
    """What was printed after the progress of reading, which a slow machine shows first
    and wipes out."""
    return re.sub(r"^\s*(\r?(reading the prompt[^\x1b]*)?\x1b\[K)+", "", shown)


def wrapped(text: str, columns: int) -> str:
    """A text of words and single blanks, its lines filled as Python's textwrap does."""
    return "\n".join(
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        for line in text.rstrip("\n").split("\n")
    )


class Screen(io.StringIO):
    """A terminal of some columns, which breaks a line at its edge."""

    def __init__(self, columns: int, monkeypatch):
        super().__init__()
        size = lambda _: os.terminal_size((self.columns, 24))
        monkeypatch.setattr(llama.os, "get_terminal_size", size)
        self.columns = columns

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def rows(self) -> list[str]:
        """What one sees: characters of two columns are not cut at the edge."""
        rows = []
        for line in self.getvalue().split("\n"):
            rows.append("")
            for character in line:
                if wide(rows[-1] + character) > self.columns:
                    rows.append("")
                rows[-1] += character
        return rows


def wide(text: str) -> int:
    return sum(
        0 if c in "\u0301\u0e35\u0e48" else 2 if c in "日本語の世界、🙂" else 1
        for c in text
    )


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("one two three", ["one two", "three"]),
        ("one seven x", ["one", "seven x"]),  # "one seven" has nine columns
        ("12345678 9", ["12345678", "9"]),  # a full line, then a blank
        ("12345678\n9", ["12345678", "9"]),
        ("a 123456789012", ["a", "12345678", "9012"]),  # longer than a line
        ("123456789012 b", ["12345678", "9012 b"]),
        ("1234567   \n9", ["1234567", "9"]),  # only one blank would fit
        ("123   \n9", ["123   ", "9"]),
        ("  two\n   three   four", ["  two", "   three", "four"]),
        ("日本語の世界", ["日本語の", "世界"]),
        ("a日本語の世界", ["a日本語", "の世界"]),
        ("日本語 の世界", ["日本語", "の世界"]),
        ("日本語hello", ["日本語", "hello"]),
        ("e\u0301" * 8 + " b", ["e\u0301" * 8, "b"]),  # eight columns, not sixteen
        ("one 🙂🙂 b", ["one 🙂🙂", "b"]),
        ("\u0e17\u0e35\u0e48" * 9, ["\u0e17\u0e35\u0e48" * 8, "\u0e17\u0e35\u0e48"]),
        ("\u0e17\u0e35" * 6 + "abc", ["\u0e17\u0e35" * 6, "abc"]),
        ("a\tb c", ["a", "b c"]),
        ("\x1b[2J one", ["\\x1b[2J", "one"]),
    ],
)
def test_words_wrap_by_their_width(text, rows, monkeypatch):
    """In eight columns; however the text comes in pieces."""
    for size in (1, 2, 3, len(text)):
        screen = Screen(8, monkeypatch)
        wrap = llama.WordWrap(screen)
        for start in range(0, len(text), size):
            wrap.write(text[start : start + size])
        wrap.end_line()
        assert screen.rows() == rows


def test_what_is_shown_after_each_piece_is_what_the_banner_says(monkeypatch):
    screen = Screen(12, monkeypatch)
    wrap, before = llama.WordWrap(screen), ""
    example = [("a quick", "a"), (" bro", " quick"), ("wn fox\n", "\nbrown fox\n")]
    for piece, shown in example:
        wrap.write(piece)
        assert screen.getvalue() == before + shown
        before += shown
        told = " -> ".join(map(json.dumps, (piece, shown)))
        assert told in (HERE / "llama.py").read_text("utf-8")


def test_a_new_size_is_honoured_within_a_reply(monkeypatch):
    text = "The quick brown fox jumps over the lazy dog again and again. "
    screen, rows = Screen(30, monkeypatch), []
    wrap = llama.WordWrap(screen)
    for screen.columns in (30, 12, 17, 25):
        wrap.write(text + "\n")
        rows += wrapped(text, screen.columns).split("\n")
    wrap.write("The quick brown fox")
    screen.columns = 12  # it breaks what it shows, and three columns are in use
    wrap.write(" jumps")
    wrap.end_line()
    assert [row.rstrip() for row in screen.getvalue().split("\n")] == [
        *rows,
        "The quick brown fox",
        "jumps",
    ]


def test_wrapped_text_is_the_text_but_for_ends_of_lines(monkeypatch):
    """Of random texts, in pieces, while the terminal is resized; no word is broken."""
    for seed in range(100):
        rng = random.Random(seed)
        words = ["".join(rng.choices("abcdé", k=rng.randint(1, 9))) for _ in range(60)]
        text = "".join(word + rng.choice([" ", " ", " ", "\n", "  "]) for word in words)
        screen, left = Screen(9 + seed % 20, monkeypatch), text
        wrap = llama.WordWrap(screen)
        while left:
            size = rng.randint(1, 12)
            wrap.write(left[:size])
            left = left[size:]
            screen.columns = rng.randint(9, 30) if seed % 2 else screen.columns
        wrap.end_line()
        shown = screen.getvalue()
        assert shown.split() == words
        assert not re.search(r" \n|\n ", shown)
        if seed % 2 == 0:
            assert all(wide(line) <= screen.columns for line in shown.split("\n"))
        assert len(shown) <= len(text)


def test_dim_text_wraps_as_other_text_does_and_the_terminal_is_never_left_dim(
    monkeypatch,
):
    """Escape sequences take no column; a stop between two writes finds none open."""
    text = "one seven x </t>nine 日本語の世界 123456789012 b  \n"
    for seed in range(100):
        rng, size = random.Random(seed), 1 + seed % 4
        plain, mixed = Screen(8, monkeypatch), Screen(8, monkeypatch)
        wraps, dim = [llama.WordWrap(plain), llama.WordWrap(mixed)], seed % 2 == 0
        for start in range(0, len(text), size):
            part = text[start : start + size]
            if text[start - 1 : start] in ("", " ", ">"):  # between words
                dim = dim if seed < 2 else rng.random() < 0.5
            wraps[0].write(part)
            wraps[1].write(part, dim=dim)
            opened, closed = map(mixed.getvalue().count, ("\x1b[2m", "\x1b[0m"))
            assert opened == closed
        for wrap in wraps:
            wrap.end_line()
        assert seed or mixed.getvalue().startswith("\x1b[2mone\x1b[0m")
        assert seed != 1 or "\x1b" not in mixed.getvalue()
        shown = re.sub(r"\x1b\[[02]m", "", mixed.getvalue())
        if seed < 2:
            assert shown == plain.getvalue()
        assert shown.split() == plain.getvalue().split()


THOUGHT = "<think>\nHm, {} hm.\n</think>\n\nHello! A <think> is a tag, as </think> is."


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_thinking_is_dim_on_a_terminal_and_text_in_a_pipe(
    opened, environment, tmp_path
):
    """Also where the prompt begins it; the last exchange is shown again so."""
    text = THOUGHT.format("hm, " * 30)
    text = text.removeprefix("<think>\n") if opened else text
    opens = THINKS.replace("{% if enable", "<think>\n{% if enable")
    model = thinking_folder(tmp_path / "m", opens if opened else THINKS)
    script, words = says(text, tmp_path), ("chat", model, "--lookup", 0)
    chat = Terminal(*words, program=script, columns=40, **environment)
    chat.wait_for(">>> ")
    for typed in ("Hi!\r", "/history\r"):
        chat.type(typed)
        chat.wait_for(PASTES_ARE_PLAIN)
        screen = chat.wait_for(PASTES_ARE_MARKED)
        if typed == "Hi!\r":  # they are marked as long as the reply is printed
            screen = chat.wait_for(PASTES_ARE_PLAIN)
        screen = without_progress(screen).replace("\r\n", "\n")
        dim = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", screen, re.DOTALL))
        thinking = text[: text.index("</think>")]
        wanted = "" if environment else thinking + "</think>"
        assert "".join(dim.split()) == "".join(wanted.split())
        plain = re.sub(r"\x1b\[[02]m", "", screen)
        assert max(map(len, plain.split("\n"))) <= 40
        assert " ".join(plain.split()).endswith(" ".join(text.split()))
        chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    for option in ((), ("--json",)):
        done = subprocess.run(
            [sys.executable, script, *map(str, (*words, "-p", "Hi!", *option))],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
        if option:
            found = json.loads(done.stdout)
            assert found["text"] == text
            assert found["thinking"] == thinking.removeprefix("<think>").strip()
        else:
            assert done.stdout.decode() == text + "\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Rome", "Rome\n"),
        ("Rome\n", "Rome\n"),
        ("Rome.\n\n", "Rome.\n\n"),
        ("Rome.\n\n\n", "Rome.\n\n"),
        ("Rome.\n\n  ", "Rome.\n\n"),
        ("one\n\n\n\ntwo ", "one\n\n\n\ntwo\n"),
        ("<thi", "<thi\n"),
        ("<think>\n\n", "<think>\n\n"),
        ("", ""),
    ],
)
def test_one_empty_line_at_most_follows_a_reply_and_a_pipe_gets_all_of_it(
    text, shown, monkeypatch
):
    for stream in (Screen(40, monkeypatch), io.StringIO()):
        wrap, piece = llama.WordWrap(stream), llama.Piece()
        for piece.text in [text[:end] for end in range(len(text) + 1)]:
            llama.print_piece(wrap, piece)
        llama.print_end(wrap, piece)
        if stream.isatty():
            assert re.sub(r"\x1b\[[02]m", "", stream.getvalue()) == shown
        else:
            assert stream.getvalue().removesuffix("\n") == text.removesuffix("\n")


def test_history_says_of_a_reply_that_it_was_stopped(engine, capsys):
    chat = chat_with(engine)
    for reason, told in (
        ("cancelled", "[stopped]\n"),
        ("length", "[stopped]\n"),
        ("context", "[stopped]\n"),
        ("stop", ""),
    ):
        reply, stats = llama.Piece("Rome.\n\n"), llama.Stats(finish_reason=reason)
        chat.turns = [("Where?", reply, stats, 1)]
        chat.take("/history")
        assert capsys.readouterr().err == f"\n>>> Where?\nRome.\n{told}\n"


def test_statistics_tell_only_what_is_known():
    for stats, told in (
        ({}, "prompt 9 (reused 4), reply 0\ncontext 0 of 0, "),
        (
            {"generation_tokens": 1, "prefill_tps": 50.0, "time_to_first_token_s": 0.5},
            "prompt 9 (reused 4) at 50 tokens/s, reply 1\nfirst token after 0.50 s, ",
        ),
        (
            {"generation_tokens": 2, "prefill_tps": 50.0, "decode_tps": 2.0},
            "prompt 9 (reused 4) at 50 tokens/s, reply 2 at 2.0 tokens/s\nfirst token ",
        ),
    ):
        stats = llama.Stats(prompt_tokens=9, reused_tokens=4, **stats)
        assert llama.stats_lines(stats, 1).startswith(told)


def test_the_conversation_is_what_the_commands_make_of_it(engine, monkeypatch):
    chat, asked = chat_with(engine, "--system", "Be kind."), []
    stats = llama.Stats(context_used=10, context=100)

    def spy(_engine, messages, _options, seed):
        asked.append([m["content"] for m in messages])
        reply = f"reply {len(asked)}, seed {seed}"
        return types.SimpleNamespace(taken=llama.Piece(reply), stats=stats)

    monkeypatch.setattr(llama, "print_reply", spy)
    typed = ["one", "two", "/undo", "three", "/retry", "//four"]
    typed += ["/system none", "five"]
    for text in [*typed, "/reset", "/system Be brief.", "/system", "six"]:
        chat.take(text)
    first = ["one", "reply 1, seed 1"]
    assert asked == [
        ["Be kind.", "one"],
        ["Be kind.", *first, "two"],
        ["Be kind.", *first, "three"],
        ["Be kind.", *first, "three"],
        ["Be kind.", *first, "three", "reply 4, seed 4", "/four"],
        [*first, "three", "reply 4, seed 4", "/four", "reply 5, seed 5", "five"],
        ["Be brief.", "six"],
    ]


def test_undo_recomputes_nothing(engine):
    chat = chat_with(engine, "--temperature", "0")
    for text in ("one", "two", "/undo", "two"):
        chat.take(text)
    assert chat.last()[2].reused_tokens == chat.last()[2].prompt_tokens - 1


def test_a_file_goes_before_the_next_message_and_a_transcript_to_a_new_one(
    engine, tmp_path, capsys
):
    chat = chat_with(engine)
    (tmp_path / "notes.txt").write_text("Zürich 🙂")
    chat.take(f"/file {tmp_path}/notes.txt")
    chat.take("Sum it up.")
    chat.take("And now?")
    users = [turn[0] for turn in chat.turns]
    assert users == ["notes.txt:\n\nZürich 🙂\n\nSum it up.", "And now?"]
    chat.take(f"/save {tmp_path}/talk.md")
    written = (tmp_path / "talk.md").read_text()
    assert re.findall("^## (.*)", written, re.MULTILINE) == ["user", "assistant"] * 2
    assert "Zürich 🙂" in written and chat.turns[1][1].text in written
    with pytest.raises(FileExistsError):
        chat.take(f"/save {tmp_path}/talk.md")
    (tmp_path / "raw").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="raw: not a text in UTF-8"):
        chat.take(f"/file {tmp_path}/raw")


def test_a_file_that_does_not_fit_is_refused_and_one_that_waits_is_undone_first(
    engine, tmp_path, capsys
):
    chat, file = chat_with(engine), tmp_path / "a.txt"
    chat.take("one")
    file.write_text("x" * engine.context)
    with pytest.raises(
        ValueError, match=r"a\.txt: 5\d\d tokens, the context has 512; only a part of"
    ):
        chat.take(f"/file {file}")
    file.write_text("x" * (engine.context // 2))
    chat.take(f"/file {file}")
    with pytest.raises(
        ValueError, match=r"a\.txt: 5\d\d tokens with the other attached files, the con"
    ):
        chat.take(f"/file {file}")  # twice would be too much
    chat.take("/context")
    assert "attached: 'a.txt:" in capsys.readouterr().err
    chat.take("/undo")
    assert not chat.attached and len(chat.turns) == 1
    assert "forgotten: 'a.txt:" in capsys.readouterr().err
    chat.take("/undo")
    assert not chat.turns


def test_a_reply_that_fails_in_mlx_does_not_end_the_conversation(
    engine, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("out of memory")

    typed = iter(("one", "/context", None))
    monkeypatch.setattr(llama, "print_reply", fail)
    monkeypatch.setattr(llama.LineEditor, "read", lambda _: next(typed))
    chat_with(engine).run()
    shown = capsys.readouterr().err
    assert "\nout of memory\n" in shown and "tokens used" in shown


def test_a_tab_completes_commands_and_is_text_elsewhere():
    editor = llama.line_editor(["/help", "/reset", "/retry"])
    for typed, completed in (
        ("/h", ["/help"]),
        ("/re", ["/reset", "/retry"]),
        ("/x", []),
        ("", ["\t"]),
        ("if", ["if\t"]),
    ):
        states = map(functools.partial(editor.complete, typed), itertools.count())
        assert [*itertools.takewhile(bool, states)] == completed


def test_a_tab_completes_paths_where_a_command_takes_one(line_editor, folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "long name.txt").write_text("some text")
    (tmp_path / "notes" / ".hidden").write_text("x")
    chat = Terminal(
        "chat", folder, "--max-tokens", 2, HOME=str(tmp_path), **line_editor
    )
    chat.wait_for(">>> ")
    for typed, told in (
        # The name has a blank: completed as far as "long", then from its second word.
        (
            "/fi\t~/no\tlo\t\x7f\x7f\t\r",
            "before the next message: long name.txt, 9 characters",
        ),
        (f"/save {tmp_path}/notes/.h\t\r", "/notes/.hidden exists"),
        (f"/load {tmp_path}/notes/.h\t\r", "/notes/.hidden: not a session"),
        (f"/context {tmp_path}/no\t\r", "takes nothing, got"),  # none is taken
    ):
        chat.type(typed)
        chat.wait_for(told)
        chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_lines_pasted_where_a_paste_is_not_marked_are_one_message(folder, state):
    """Under libedit; the last line is sent when it is ended."""
    chat = Terminal("chat", folder, "--max-tokens", 2, **libedit())
    for pasted, more in (
        ("one\r\rtwo  x\r", ""),
        ("one\rtwo\rthr", "ee\r"),
        ('"""one\rtwo\r', ""),
        ("single\r", ""),
    ):
        chat.wait_for(">>> ")
        chat.type(pasted)
        if more:
            chat.wait_for("... thr")
            chat.type(more)
        chat.wait_for("[stopped: 2 tokens")
    chat.wait_for(">>> ")
    chat.type("/con\t\r")
    chat.wait_for("turn 4")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    lines = (state / "history").read_text().splitlines()
    typed = [json.loads(line) for line in lines]
    assert typed == [
        "one\n\ntwo  x",
        "one\ntwo\nthree",
        '"""one\ntwo',
        "single",
        "/context",
    ]


def test_options_are_set_and_shown_while_talking(engine, capsys):
    chat = chat_with(engine)
    for text in ("/set temperature 0.25", "/set top-k 3", "/set max_tokens 2"):
        chat.take(text)
    chat.take("/set seed 9")
    chat.take("x")
    assert chat.last()[2].generation_tokens == 2 and chat.last()[3] == 9
    capsys.readouterr()
    for text in ("/set", "/stats", "/context", "/help"):
        chat.take(text)
    shown = capsys.readouterr().err
    assert max(map(len, shown.splitlines())) < 80
    for part in (
        "temperature        0.25",
        "top_k              3",
        "seed 9",
        "stop               off",
        "turn 1: ",
    ):
        assert part in shown
    helped = re.findall(r"^/(\w+)( [A-Z ]+)?  ", shown, re.MULTILINE)
    assert [name for name, _ in helped] == [*llama.COMMANDS]
    assert "\n/file PATH " in shown
    for keys in ('"""', "//", "a blank", "up arrow", "Tab", "Ctrl-C"):
        assert f"\n{keys}  " in shown
    for text in ("/set top-k 3", "/set seed 7", "/system Be kind."):
        chat.take(text)
    chat.take("/set max_tokens off")
    chat.take("/set temperature off")
    chat.take("/set temperature default")
    assert chat.options.max_tokens is None and chat.options.temperature is None
    shown = capsys.readouterr().err
    for part in ("top_k is 3", "seed is 7", "instructions: Be kind."):
        assert part in shown
    assert "max_tokens is off" in shown
    assert "temperature is 0.0\n" in shown  # which is greedy
    for text, told in (
        ("/set top_k", "top_k              3\n"),
        ("/set top_p off", "top_p is off\n"),
        ("/set top_p", "top_p              off\n"),
        ("/set max-tokens", "max_tokens         off\n"),
        ("/set seed", "seed               7\n"),
        ("/set stop red hat", "stop is 'red hat'\n"),
        ("/set stop", "stop               'red hat'\n"),
        ("/system", "instructions: Be kind.\n"),
        ("/system none", "no instructions\n"),
        ("/system", "no instructions\n"),
    ):
        chat.take(text)
        assert capsys.readouterr().err == told
    assert not chat.system
    chat.take("/?")
    assert "\n/file PATH " in capsys.readouterr().err
    chat.take("/clear")
    assert capsys.readouterr().err == "1 turn forgotten\n"


def test_a_stop_text_is_set_and_removed_while_talking(engine, capsys):
    chat = chat_with(engine, "--temperature", "0", "--stop", "no such text")
    chat.options.max_tokens = 20
    chat.take("x")
    whole = chat.last()[1].text
    stop = max(whole.split(), key=whole.find)[:3]  # of its last word
    cut = whole[: whole.find(stop)]
    assert cut
    for value, told, text in (
        (stop, repr(stop), cut),
        ("off", "off", whole),
        (stop, repr(stop), cut),
        ("default", "off", whole),
    ):
        chat.take("/undo")
        capsys.readouterr()
        chat.take(f"/set stop {value}")
        assert capsys.readouterr().err == f"stop is {llama.printable(told)}\n"
        chat.take("x")
        assert chat.last()[1].text == text


def test_commands_that_cannot_be_followed_say_why(engine):
    chat = chat_with(engine)
    for text, error in (
        ("/set top_p 2", r"top_p must be in \[0, 1\], got 2"),
        ("/set colour red", "no setting colour; /set lists them"),
        ("/set temp 1", r"no setting temp; did you mean temperature\?"),
        ("/set top 1", r"no setting top; did you mean top_k or top_p\?"),
        ("/set temprature 1", r"no setting temprature; did you mean temperature\?"),
        ("/re", r"no command /re; did you mean /reset or /retry\?"),
        ("/", r"no command /; /help lists them"),
        ("/set temperature hot", "temperature must be a number, got 'hot'"),
        (f"/set seed {2**63}", r"seed must be a whole number in \[0, 2\*\*63\), got"),
        ("/set max-tokens -1", "max_tokens must be a whole number .*, got '-1'"),
        ("/set top_k 1.5", r"\[-1, 1e9\], a whole number, got 1.5"),
        ("/file", "/file wants a PATH"),
        ("/save ", "/save wants a FILE"),
        ("/undo 2", "/undo takes nothing, got '2'"),
        ("/contxt", "no command /contxt; did you mean /context"),
        ("/xyzzy", "no command /xyzzy; /help lists them"),
        ("/clear 1", "/clear takes nothing, got '1'"),
        ("/quit now", "/quit takes nothing, got 'now'"),
        ("/hist", "no command /hist; did you mean /history"),
        ("/private", "no command /private; /help lists them"),
    ):
        with pytest.raises(ValueError, match=error):
            chat.take(text)
    with pytest.raises(ValueError, match="--raw has no chat format: no place"):
        chat_with(engine, "--raw").take("/system Be kind.")
    for nothing in ("/undo", "/retry", "/stats", "/history"):
        with pytest.raises(ValueError, match="the conversation is empty"):
            chat_with(engine).take(nothing)


def test_a_context_that_fills_up_is_announced(engine, capsys):
    chat = chat_with(engine)
    chat.take("x" * 300)
    assert "full" not in capsys.readouterr().err
    chat.take("x" * 120)
    assert re.search(r"9\d % full: /undo and /reset", capsys.readouterr().err)


def test_lines_pasted_or_between_quotes_are_one_message(folder, state):
    chat = Terminal("chat", folder, "--max-tokens", 2)
    chat.wait_for(PASTES_ARE_MARKED)  # which asks the terminal to mark what is pasted
    for typed in (
        '\x1b[200~"""one\ntwo\x1b[201~\r',
        '"""\rthree\rfour"""\r',
        "y" * 300 + "\r",
    ):
        chat.wait_for(">>> ")
        chat.type(typed)
        chat.wait_for("[stopped: 2 tokens")
    chat.wait_for(">>> ")
    chat.type("/con\t\r")
    chat.wait_for("turn 3")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    lines = (state / "history").read_text().splitlines()
    typed = [json.loads(line) for line in lines]
    assert typed == ['"""one\ntwo', "three\nfour", "y" * 300, "/context"]
    assert (state / "history").stat().st_mode & 0o777 == 0o600


def test_a_message_that_begins_with_a_blank_is_sent_and_not_kept(folder, state):
    """Neither in the file nor for the arrow keys."""
    chat = Terminal("chat", folder, "--max-tokens", 2)
    for typed, shown in (
        ("open\r", "[stopped"),
        (" secret\r", "[stopped"),
        ("/context\r", "tokens, ' secret'"),  # it was sent, as it is
        ("\x1b[A\x1b[A\r", "[stopped"),  # twice up, where it would be the first
        ("/context\r", "turn 3: "),
    ):
        chat.wait_for(">>> ")
        chat.type(typed)
        chat.wait_for(shown)
    chat.wait_for(" tokens, 'open'")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    lines = (state / "history").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ["open", "/context"] * 2


@pytest.mark.parametrize(
    ("content", "known"),
    [(b"\xff", ""), (b'ls\n1\n[1]\n"a\\u0000"\n"known"\n' + b"[" * 100_000, "known")],
)
def test_a_history_that_is_not_ours_is_no_obstacle(folder, state, content, known):
    """What is ours in it can be brought back."""
    state.mkdir(parents=True)
    (state / "history").write_bytes(content)
    chat = Terminal("chat", folder, "--max-tokens", 2)
    chat.wait_for(">>> ")
    if known:
        chat.type("\x1b[A")
        chat.wait_for(known)
    chat.type("x\r")
    chat.wait_for("[stopped")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_ctrl_c_between_the_prompt_and_a_reply_forgets_the_message(
    engine, monkeypatch, capsys
):
    """It strikes where neither handles it: while the history is written, say."""

    def read(_):
        if (text := next(typed)) is KeyboardInterrupt:
            raise text
        return text

    typed = iter(("one", KeyboardInterrupt, "/context", None))
    monkeypatch.setattr(llama.LineEditor, "read", read)
    chat = chat_with(engine)
    chat.run()
    assert len(chat.turns) == 1 and "tokens used" in capsys.readouterr().err


def test_a_history_that_is_interrupted_keeps_what_it_had(state, monkeypatch):
    def fail(text, file):
        file.write_text(text[:3])
        raise KeyboardInterrupt

    editor = llama.line_editor([])
    editor.remember("first")
    before = (state / "history").read_bytes()
    monkeypatch.setattr(llama, "write_privately", fail)
    with pytest.raises(KeyboardInterrupt):
        editor.remember("second")
    assert (state / "history").read_bytes() == before == b'"first"\n'
    assert os.listdir(state) == ["history"]
    assert (state / "history").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("locale", ["C", "xx_XX.UTF-8"])
def test_a_message_may_have_letters_that_the_locale_has_not(folder, state, locale):
    chat = Terminal("chat", folder, "--max-tokens", 2, LC_ALL=locale)
    for _ in range(2):
        chat.wait_for(">>> ")
        chat.type("Was ist schön?\r")
        chat.wait_for("[stopped")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    assert len((state / "history").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("my file.txt", "my file.txt"),
        ("'other file.txt'", "other file.txt"),
        (r"other\ file.txt", "other file.txt"),
        ('"a\'b.txt"', "a'b.txt"),
        ("a'b.txt", "a'b.txt"),
        (r"back\slash", r"back\slash"),
        ("two words", "two words"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_a_path_may_be_dropped_on_the_terminal(typed, path, tmp_path, monkeypatch):
    """Which writes it with quotes or backslashes, for a shell."""
    monkeypatch.chdir(tmp_path)
    for name in ("my file.txt", r"back\slash"):
        (tmp_path / name).touch()
    assert llama.typed_path(typed) == path


def test_a_file_without_an_end_is_refused(engine):
    with pytest.raises(ValueError, match="/dev/zero: more than 10,000,000 characters"):
        chat_with(engine).take("/file /dev/zero")
    with pytest.raises(ValueError, match="/dev/zero: more than 10,000,000 characters"):
        llama.read_system("@/dev/zero")


def test_editing_counts_characters_that_are_wide_or_made_of_several_bytes(
    folder, state
):
    chat = Terminal("chat", folder, "--max-tokens", 2, LANG="C.UTF-8", LC_ALL="C.UTF-8")
    chat.wait_for(">>> ")
    left, delete = "\x1b[D", "\x7f"
    chat.type("日本語🙂x" + left + left + delete + "é\r")  # before the smile
    chat.wait_for("[stopped")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    lines = (state / "history").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ["日本é🙂x"]


def test_a_terminal_may_be_resized_at_any_time(tmp_path):
    slow = random_folder(tmp_path / "m", context=8192, width=128)
    chat = Terminal("chat", slow, "--temperature", 0)
    chat.wait_for(">>> ")
    for typed, shown in (("half", "half"), (" a line\r", "\\x")):
        chat.type(typed)
        chat.wait_for(shown)  # what is typed, then bytes that are no text
        chat.resize(30, rows=10)
        chat.process.send_signal(signal.SIGWINCH)
    chat.type(CTRL_C)
    chat.wait_for("[stopped: Ctrl-C]")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_history_goes_on_in_the_next_run(folder, state):
    state.mkdir(parents=True)
    lines = [json.dumps(f"line {n}") for n in range(1500)]
    (state / "history").write_text("\n".join(lines))
    chat = Terminal("chat", folder, "--max-tokens", 2)
    chat.wait_for(">>> ")
    chat.type("\x1b[A\x1b[A\x01first \r")  # twice up, to the beginning of the line
    chat.wait_for("[stopped")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    typed = [json.loads(line) for line in (state / "history").read_text().splitlines()]
    assert typed[-1] == "first line 1498" and len(typed) == 1000


def test_a_conversation_on_a_terminal(folder):
    chat = Terminal("chat", folder, "--max-tokens", 5, "--stats", "--seed", 1)
    chat.wait_for("Ctrl-D quits")
    chat.wait_for(">>> ")
    chat.type("Hello!\r")
    chat.wait_for("reused 0")
    chat.wait_for(">>> ")
    chat.type(CTRL_C)
    chat.wait_for("(Ctrl-D quits)")
    chat.wait_for(">>> ")
    chat.type("And now?\r")
    reused = re.match(r"\d+", chat.wait_for(")", 60).partition("(reused ")[2])
    assert int(reused[0]) > 20
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_ctrl_c_says_how_to_quit_where_nothing_was_typed(folder, line_editor):
    chat = Terminal("chat", folder, "--max-tokens", 2, **line_editor)
    chat.wait_for(">>> ")
    for typed, shown, told in (
        ("half a line", "half a line", False),
        ("\r", ">>> ", True),
        ('"""in a block\r', "... ", False),
        ("Hi!\r", ">>> ", True),
    ):
        chat.type(typed)
        chat.wait_for(shown)
        chat.type(CTRL_C)
        assert ("(Ctrl-D quits)" in chat.wait_for(">>> ")) == told
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_an_error_of_the_context_says_what_can_help_then(folder, tmp_path):
    """--ctx if the model can have more, what to forget if that is enough."""
    file = tmp_path / "a.txt"
    file.write_text("z" * 380)
    long, longer, too_long = ("y" * n for n in (400, 480, 600))
    ctx, forget = (
        "; --ctx sets the limit, of a model made for up to 512",
        "; /undo and /reset make room",
    )
    undo = "; /undo removes the last attached file"
    alone, shorter = r"; the message alone has \d+", "; only a shorter message fits"
    with llama.Engine(folder, context=440) as small, llama.Engine(folder) as full:
        for engine, raw, typed, told in (
            (small, False, [longer], rf"got 499{ctx}$"),
            (small, False, ["x", longer], r"got 5\d\d; the message alone has 499$"),
            (small, False, [too_long], rf"got 619{shorter}$"),
            (small, False, ["x", long], rf"got 4\d\d{ctx}{forget}$"),
            (small, False, ["x" * 100, long], rf"got 5\d\d{forget}$"),
            (full, False, ["x", too_long], rf"got 6\d\d{alone}{shorter}$"),
            (full, False, ["x" * 100, longer], rf"got 6\d\d{forget}$"),
            (full, False, [f"/file {file}", long], rf"got 8\d\d{undo}$"),
            (small, True, ["x" * 60, long], rf"got 4\d\d{ctx}{forget}$"),
            (small, True, [longer], rf"got 480{ctx}$"),
        ):
            chat = chat_with(engine, *(["--raw"] if raw else []))
            for text in typed[:-1]:
                chat.take(text)
            with pytest.raises(ValueError, match=told):
                chat.take(typed[-1])
        chat = chat_with(small)
        chat.take(f"/file {file}")
        with pytest.raises(ValueError, match=r"context has 440; /undo removes the"):
            chat.take(f"/file {file}")


def test_a_full_context_names_no_option_that_cannot_help(folder, capsys):
    for context, told in (
        (500, "; --ctx sets the limit, of a model made for up to 512]"),
        (512, "]"),
    ):
        with llama.Engine(folder, context=context) as engine:
            chat = chat_with(engine, "--temperature", "0")
            chat.options.max_tokens = None
            chat.take("x")
        full = f"[stopped: the context of {context} tokens is full{told}\n"
        assert full in capsys.readouterr().err


def test_errors_and_notes_wrap_at_the_edge_of_the_terminal_too(folder):
    chat = Terminal("chat", folder, "--max-tokens", 2, columns=30, NO_COLOR="1")
    chat.wait_for(">>> ")
    chat.type("/contxt\r")
    chat.wait_for("no command /contxt; did you\r\nmean /context? (// sends a\r\nslash)")
    chat.wait_for(">>> ")
    chat.type("/system Be kind, and answer in one word.\r")
    chat.wait_for("instructions: Be kind, and\r\nanswer in one word.\r\n")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_options_are_named_as_they_were_given(folder):
    chat = Terminal("chat", folder, "--max-tokens", 3)
    for typed, shown in (
        ("x\r", "[stopped: 3 tokens, as --max-tokens says]"),
        ("/set max_tokens 2\r", "max_tokens is 2"),
        ("x\r", "[stopped: 2 tokens, as /set max_tokens says]"),
        ("/set colour 2\r", "\rno setting colour; /set lists them"),
        ("/nothing\r", "\rno command /nothing; "),
        ("x" * 600 + "\r", f"{PASTES_ARE_PLAIN}the prompt must have"),
        ("/load nowhere\r", "\rnowhere: No such file"),
    ):
        chat.wait_for(">>> ")
        chat.type(typed)
        assert "error" not in chat.wait_for(shown)
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0 and "error" not in chat.screen


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_words_that_other_programs_end_at_end_it(word, folder):
    chat = Terminal("chat", folder)
    chat.wait_for(">>> ")
    chat.type(f"{word}\r")
    assert chat.status() == 0 and "error" not in chat.screen


def test_a_conversation_that_is_resumed_shows_its_end_and_the_banner_the_model(
    tmp_path,
):
    folder, file = random_folder(tmp_path / "org"), tmp_path / "s"
    words = ("--session", file, "--max-tokens", 3, "--temperature", 0)
    said = [
        command("chat", folder, *words, "--prompt", text).stdout.decode().strip()
        for text in ("One", "two\nlines")
    ]
    chat = Terminal("chat", folder, *words)
    banner = chat.wait_for("Ctrl-D quits")
    assert "org\x1b[0m\r\ncontext 512 tokens" in banner.replace("\x1b[2m", "")
    wanted = f">>> two\nlines\n{llama.printable(said[1])}\n[stopped]\n\n"
    for typed in ("/history\r", "/undo\r"):
        shown = chat.wait_for(PASTES_ARE_MARKED).replace("\r", "")
        assert wanted in re.sub(r"\x1b\[[02]m", "", shown)
        chat.wait_for(">>> ")
        chat.type(typed)
    chat.wait_for("forgotten")
    chat.wait_for(">>> ")
    chat.type(f"/load {file}\r")
    chat.wait_for("1 turn\x1b")
    chat.wait_for(">>> One\r\n")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_a_message_that_does_not_fit_leaves_the_conversation_alive(folder):
    chat = Terminal("chat", folder, "--max-tokens", 3)
    chat.wait_for(">>> ")
    chat.type("x" * 600 + "\r")
    chat.wait_for("the prompt must have 1 to 512 tokens, got 6")
    chat.wait_for(">>> ")
    chat.type("Hi\r")
    chat.wait_for("[stopped: 3 tokens")
    chat.wait_for(">>> ")
    chat.type("y" * 470 + "\r")
    chat.wait_for("; /undo and /reset make room")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_progress_says_how_long_the_rest_takes_if_all_takes_over_two_seconds(
    monkeypatch,
):
    class Stream(io.StringIO):
        def isatty(self):
            return True

    now, stream = [100.0], Stream()
    monkeypatch.setattr(llama.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    progress = llama.ProgressLine("reading")
    for seconds, done, shown in (
        (0.4, 10, ""),  # it may be over in a moment
        (0.6, 0, "reading 0 %"),  # nothing is known of it
        (0.6, 50, "reading 50 %"),
        (1.0, 40, "reading 40 %, 2 s left"),
        (2.0, 10, "reading 10 %, 18 s left"),
        (60.0, 20, "reading 20 %, 4 min left"),
        (2.1, 100, "reading 100 %, 0 s left"),
    ):
        now[0] = 100.0 + seconds
        progress(done, 100)
        line = stream.getvalue().removeprefix("\r").removesuffix("\x1b[K")
        assert line == shown
        stream.seek(stream.truncate(0))


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_no_colour_where_it_is_not_wanted(folder, environment):
    chat = Terminal(
        *("chat", folder, "--prompt", "x", "--max-tokens", 2, "--stats"), **environment
    )
    assert chat.status() == 0
    assert "\x1b[2m" not in chat.screen and "seed" in chat.screen


@pytest.mark.parametrize(
    ("environment", "escapes"),
    [({"TERM": "dumb"}, "\x1b"), ({"NO_COLOR": "1"}, r"\x1b\[[0-9;]*m")],
)
def test_a_conversation_without_escapes(environment, escapes, folder):
    chat, seen = Terminal("chat", folder, "--max-tokens", 2, **environment), ""
    for typed in ("x" * 200 + "\r", "/help\r", CTRL_D):
        seen += chat.wait_for(">>> ")
        chat.type(typed)
    assert chat.status() == 0
    assert not re.search(escapes, seen + chat.screen)
