"""Signals, pipes, closed streams and many threads at once."""

import collections
import contextlib
import functools
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import termios
import threading
import time
import types

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest

from tests.support import (
    CTRL_C,
    CTRL_D,
    CTRL_Z,
    HERE,
    ON_A_GPU,
    PROGRAM,
    SHELL,
    Terminal,
    chat_with,
    command,
    random_folder,
)

pytest_plugins = ["tests.fixtures"]


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_during_the_imports_ends_it_without_a_word(ignored, tmp_path):
    """Unless whoever started it had it ignore Ctrl-C, as a shell does behind `&`."""
    package = tmp_path / "tiktoken"
    package.mkdir()
    program = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nexit(3)"
    (package / "__init__.py").write_text(program)
    action = signal.SIG_IGN if ignored else signal.SIG_DFL
    done = subprocess.run(
        [sys.executable, HERE / "llama.py", "--version"],
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, action),
        capture_output=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert done.returncode == (3 if ignored else -signal.SIGINT)


def test_requests_from_many_threads_are_all_answered_with_their_own(engine):
    def ask(n: int) -> str:
        return "".join(engine.complete(f"number {n}", max_tokens=8, temperature=0))

    wanted = {n: ask(n) for n in range(12)}
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: ask(n)}))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == wanted and len(set(wanted.values())) > 1


@pytest.mark.parametrize("requests", [int(os.environ.get("LLAMA_TEST_SOAK", "120"))])
def test_every_one_of_many_requests_gets_its_own_reply(requests, tmp_path, monkeypatch):
    """From eight threads; a third are cancelled or dropped, some fail in the worker.

    LLAMA_TEST_SOAK sets how many there are.
    """
    prompts = [f"{'prompt ' * (n % 7)}{n}" for n in range(24)]
    real, failures = llama.prefill, itertools.count()
    folder = random_folder(tmp_path / "m", num_hidden_layers=1)

    def prefill(*args):
        if next(failures) % 29 == 28:
            raise FloatingPointError("injected")
        return real(*args)

    with llama.Engine(folder) as engine:
        options = {"max_tokens": 12, "temperature": 0}
        wanted = {p: "".join(engine.complete(p, **options)) for p in prompts}
        before = threading.active_count(), mx.get_active_memory()
        monkeypatch.setattr(llama, "prefill", prefill)
        wrong, failed = [], []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(requests // 8):
                prompt = prompts[rng.integers(len(prompts))]
                kind, stop = rng.integers(6), rng.integers(12)
                try:
                    if rng.integers(20) == 0:
                        with pytest.raises(ValueError, match="top_p"):
                            engine.complete(prompt, top_p=-1)
                    reply = engine.complete(prompt, **options)
                    pieces = list(itertools.islice(reply, stop if kind < 2 else None))
                    if kind == 0:
                        reply.cancel()
                        collections.deque(reply, 0)
                    text = "".join(pieces)
                    if not wanted[prompt].startswith(text) or (
                        kind > 1 and text != wanted[prompt]
                    ):
                        wrong.append((prompt, text))
                except FloatingPointError:
                    failed.append(prompt)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive()
        assert wrong == [] and failed
        monkeypatch.setattr(llama, "prefill", real)
        assert "".join(engine.complete(prompts[0], **options)) == wanted[prompts[0]]
        assert threading.active_count() == before[0]
        gc.collect()  # tracebacks of the injected errors are cycles
        assert mx.get_active_memory() <= before[1] + 100_000


@pytest.mark.parametrize("ending", ["engine.close()", "pass", "raise SystemExit(0)"])
def test_twenty_one_processes_end_with_status_0(folder, ending):
    """A thread alive in MLX at exit would abort about half of them."""
    program = f"import llama; engine = llama.Engine({str(folder)!r});"
    program += f"reply = engine.complete('x'); next(reply); {ending}"
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, cwd=HERE) for _ in range(7)]
    assert [process.wait(60) for process in running] == [0] * 7


def test_ten_one_shot_runs_end_with_status_0(folder):
    words = ("chat", folder, "--prompt", "x", "--max-tokens", 3)
    assert [command(*words).returncode for _ in range(10)] == [0] * 10


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_goes_away_is_no_error(folder, buffered):
    words = ["chat", str(folder), "--raw", "--prompt", "x"]
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    process = subprocess.Popen(
        [sys.executable, *PROGRAM, *words],
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("words", ["info 8b", "chat --help", "inspect {}"])
@pytest.mark.parametrize(
    ("out", "status", "error"),
    [(">&-", 0, ""), ("| true", 0, ""), (">/dev/full", 1, "No space left")],
)
def test_output_that_goes_nowhere_is_told_in_one_line_or_not_at_all(
    words, out, status, error, folder
):
    line = f"'{sys.executable}' -m llama {words.format(folder)} {out}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=HERE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        capture_output=True,
        check=False,
        timeout=60,
    )
    told = done.stderr.decode().splitlines()
    assert done.returncode == status and len(told) == bool(error), told
    assert error in "".join(told)


def test_standard_input_may_be_closed(folder):
    line = f"'{sys.executable}' -m llama chat {folder} --prompt x --max-tokens 2 <&-"
    done = subprocess.run(
        ["bash", "-c", line], cwd=HERE, capture_output=True, check=False
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_ctrl_c_stops_the_reading_of_a_prompt_and_keeps_what_was_read(tmp_path):
    slow = random_folder(tmp_path / "m", context=65536, width=256)
    words = ("--ctx", 65536, "--max-tokens", 2, "--stats")
    # A GPU would have read 10,000 tokens, in its own steps, before Ctrl-C is typed.
    words += ("--prefill-step", 64) if ON_A_GPU else ()
    chat = Terminal("chat", slow, *words)
    chat.wait_for(">>> ")
    (tmp_path / "long.txt").write_text("word " * (10_000 if ON_A_GPU else 2000))
    chat.type(f"/file {tmp_path}/long.txt\r")
    chat.wait_for(">>> ")
    chat.type("Sum up.\r")
    chat.wait_for("reading the prompt")
    chat.type(CTRL_C)
    assert "\n" not in chat.wait_for("[stopped: Ctrl-C]", 10)
    assert "/s" not in chat.wait_for("context ")  # it has no speed yet
    kept = int(chat.wait_for(" of"))
    assert kept > 0
    chat.wait_for("(the message is forgotten; the up arrow brings it back)")
    chat.wait_for(">>> ")
    chat.type("/context\r")
    chat.wait_for("attached: ")
    chat.wait_for("m0 of 65536 tokens used")
    chat.wait_for(">>> ")
    chat.type("\x1b[A\x1b[A\r")  # above /context is the message
    chat.wait_for("Sum up.")
    chat.wait_for("reading the prompt")
    chat.type(CTRL_C)
    chat.wait_for("(reused ", 10)
    assert int(chat.wait_for(")")) == kept
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_ctrl_c_before_a_reply_begins_forgets_the_message(
    engine, tmp_path, monkeypatch, capsys
):
    """Of a chat, of /retry, whose earlier reply stays, and of one that is asked."""
    chat = chat_with(engine, "--session", str(tmp_path / "s"))
    chat.take("one")
    turn, seed, session = chat.last(), chat.seed, (tmp_path / "s").read_bytes()
    stopped = {"stats": llama.Stats(finish_reason="cancelled")}
    reply = types.SimpleNamespace(text="", taken=llama.Piece(), **stopped)
    # A reply of which nothing was seen yet.
    blank = types.SimpleNamespace(text="\n", taken=llama.Piece("\n", [1]), **stopped)
    for interrupted in (lambda *_: reply, lambda *_: blank, interrupt):
        monkeypatch.setattr(llama, "print_reply", interrupted)
        capsys.readouterr()
        chat.take("two")
        told = capsys.readouterr().err
        assert told == "(the message is forgotten; the up arrow brings it back)\n"
        chat.take(" secret")
        assert capsys.readouterr().err == "(the message is forgotten)\n"
        with contextlib.suppress(KeyboardInterrupt):
            chat.take("/retry")
        assert chat.turns == [turn] and chat.seed == seed
        assert (tmp_path / "s").read_bytes() == session


def interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_reply_and_keeps_the_conversation(tmp_path):
    slow = random_folder(tmp_path / "m", context=8192, width=128)
    chat = Terminal("chat", slow, "--temperature", "0")
    chat.wait_for(">>> ")
    chat.type("Hello!\r")
    chat.wait_for("\\x")  # bytes that are no text: it writes
    chat.type(CTRL_C)
    chat.wait_for("[stopped: Ctrl-C]", 10)
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_what_is_typed_during_a_reply_waits_for_the_prompt(line_editor, tmp_path):
    """A line of it is a message; the rest is there to be edited. Ctrl-C loses none."""
    slow = random_folder(tmp_path / "m", context=8192, width=128)
    chat = Terminal("chat", slow, "--temperature", 0, **line_editor)
    before = termios.tcgetattr(chat.master)
    chat.wait_for(">>> ")
    chat.type("Hello!\r")
    chat.wait_for("\\x")  # bytes that are no text: it writes
    chat.type("typed ahead\rand half")
    for message in ("typed ahead", "and half"):
        chat.type(CTRL_C)
        assert "typed" not in chat.wait_for("[stopped: Ctrl-C]", 10)
        chat.wait_for(">>> ")
        chat.wait_for(message)  # there, without being typed again
        if message == "and half":
            chat.type(" more\r")
        chat.wait_for("\\x")
    chat.type(CTRL_C)
    chat.wait_for("[stopped: Ctrl-C]", 10)
    chat.wait_for(">>> ")
    chat.type("/context\r")
    for message in ("'Hello!'", "'typed ahead'", "'and half more'"):
        chat.wait_for(message)
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    chat.process.wait(10)
    chat.read()
    assert not chat.marks_pastes()
    assert termios.tcgetattr(chat.master) == before
    assert chat.status() == 0


CODE = "def f(x):\n\treturn x\n\nWhat does this do?"


@pytest.mark.parametrize(
    ("steps", "messages"),
    [
        (
            [
                ("type", "one\rtwo\r"),
                ("paste", CODE),
                ("type", " So?\rthree: "),
                ("paste", "a single line"),
            ],
            ["one", "two", f"{CODE} So?", "three: a single line"],
        ),
        (
            [("type", "one: "), ("paste", CODE), ("type", " "), ("paste", "x\ny")],
            [f"one: {CODE} x\ny"],
        ),
        (
            [
                ("paste", CODE * 110),  # more than a terminal keeps of a line
                ("type", "\r"),
                ("paste", "ended\n"),
                ("type", "here"),
            ],
            [CODE * 110, "ended\nhere"],
        ),
    ],
)
def test_what_is_pasted_during_a_reply_is_one_message(
    steps, messages, line_editor, state, tmp_path
):
    # Narrow, and yet not through with 4,400 tokens when the rest of what is typed comes.
    slow = random_folder(tmp_path / "m", context=16384, width=32)
    chat = Terminal("chat", slow, "--temperature", 0, "--ctx", 16384, **line_editor)
    chat.wait_for(">>> ")
    chat.type("Hello!\r")
    chat.wait_for("\\x")  # bytes that are no text: it writes
    for action, text in [("type", "/set max_tokens 2\r"), *steps]:
        getattr(chat, action)(text)
    time.sleep(0.2)
    chat.process.send_signal(signal.SIGINT)  # a full terminal takes no Ctrl-C
    chat.wait_for("[stopped: Ctrl-C]", 10)
    chat.type("\r")
    time.sleep(0.5)  # libedit takes what follows within a moment for a part of it
    chat.type("/context\r")
    chat.wait_for("tokens used")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    lines = (state / "history").read_text().splitlines()
    typed = [json.loads(line) for line in lines]
    assert typed == ["Hello!", "/set max_tokens 2", *messages, "/context"]


def test_a_stopped_chat_gives_the_terminal_back_and_goes_on(line_editor, tmp_path):
    slow = random_folder(tmp_path / "m", context=8192, width=128)
    words = ("chat", slow, "--temperature", 0)
    chat = Terminal(*words, start=SHELL, **line_editor)
    chat.wait_for(">>> ")
    chat.type("half a line")
    chat.wait_for("half a line")
    chat.type(CTRL_Z)
    chat.wait_for("stopped, shows what is typed")
    chat.type("\r")
    chat.wait_for(">>> ")  # it is drawn again
    chat.wait_for("half a line")
    chat.type(" and the rest\r")
    chat.wait_for("\\x")  # it writes
    assert chat.marks_pastes()
    chat.type(CTRL_Z)
    chat.wait_for("stopped, shows what is typed")
    assert not chat.marks_pastes()
    chat.type("\r")
    chat.wait_for("\\x")
    assert chat.marks_pastes()
    chat.type("typed")
    chat.type(CTRL_C)
    assert "typed" not in chat.wait_for("[stopped: Ctrl-C]", 10)
    chat.wait_for(">>> ")
    chat.wait_for("typed")
    chat.type(CTRL_C)
    chat.wait_for(">>> ")
    chat.type("/context\r")
    chat.wait_for("'half a line and the rest'")
    chat.wait_for(">>> ")
    chat.type(CTRL_Z)  # at a prompt at which nothing was typed
    chat.wait_for("stopped, shows what is typed")
    chat.type("\r")
    chat.wait_for(">>> ")
    chat.type("/undo\r")
    chat.wait_for("forgotten: 'half a line and the rest'")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("writing", [False, True])
def test_a_signal_ends_it_and_restores_the_terminal(number, writing, folder):
    chat = Terminal("chat", folder, "--max-tokens", 5000)
    before = termios.tcgetattr(chat.master)
    chat.wait_for(">>> ")
    if writing:
        chat.type("Hello!\r")
        chat.wait_for("\\x")
    time.sleep(0.2)
    chat.process.send_signal(number)
    chat.process.wait(10)
    assert termios.tcgetattr(chat.master) == before
    chat.read()
    assert not chat.marks_pastes()
    assert chat.status(10) == 128 + number and "Traceback" not in chat.screen


def test_a_terminal_that_goes_away_ends_it(folder, line_editor):
    chat = Terminal("chat", folder, **line_editor)
    chat.wait_for(">>> ")
    time.sleep(0.2)  # until the line editor waits
    os.close(chat.master)
    try:
        assert chat.process.wait(20) in (0, 128 + signal.SIGHUP, -signal.SIGHUP)
    finally:
        chat.process.kill()  # libedit would read on


def test_a_thread_that_is_not_wanted_before_it_began_does_nothing(folder, monkeypatch):
    """Ctrl-C can strike while Python starts the thread; Python then takes it for one
    that never ran, and waits for none. It may run all the same, while all else ends."""

    def struck(worker):
        raise KeyboardInterrupt

    made = []
    monkeypatch.setattr(llama.Worker, "start", lambda w: made.append(w) or struck(w))
    with pytest.raises(KeyboardInterrupt):
        llama.Engine(folder)
    gc.collect()  # the engine, which nobody has got
    [worker] = made
    assert worker.closing.is_set() and not worker.is_alive()
    worker.run()
    assert worker.events.empty() and worker.failure is None


# Becomes llama.py, and is interrupted when its engine is about to be closed.
CLOSED_AT_CTRL_C = """
import os, runpy, signal, weakref

def close(self, _=None, call=weakref.finalize.__call__):
    os.kill(os.getpid(), signal.SIGINT)
    return call(self)

weakref.finalize.__call__ = close
runpy.run_module("llama", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("words", [(), ("--prompt", "Hello!")])
def test_ctrl_c_at_the_very_end_changes_nothing(words, tmp_path):
    """Else a worker that was not told to end could abort the process."""
    script = tmp_path / "script.py"
    script.write_text(CLOSED_AT_CTRL_C)
    chat = Terminal("chat", "--max-tokens", 2, *words, program=script)
    if not words:
        chat.wait_for(">>> ")
        chat.type(CTRL_D)
    assert chat.status() == 0 and "rror" not in chat.screen


WHEN_IMPORTED = """
import sys
import llama
print("imported", file=sys.stderr, flush=True)
sys.exit(llama.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("moments", [int(os.environ.get("LLAMA_TEST_MOMENTS", "6"))])
def test_ctrl_c_at_any_moment_is_quiet(moments):
    """While it loads, reads the prompt, writes or ends; LLAMA_TEST_MOMENTS of them.

    On CUDA attention is computed without cuDNN: the compiler that cuDNN calls for each
    new length of a prompt has a handler of its own for Ctrl-C, which ends the process.
    """
    without_cudnn = {"MLX_CUDA_USE_CUDNN_SDPA": "0"}
    # One text, whose drafts and so whose shapes are the same each time.
    words = ["chat", "--prompt", "Tell me a story about a cat. " * 20, "--seed", "1"]
    line = [sys.executable, "-c", WHEN_IMPORTED, *words]
    if ON_A_GPU:  # kernels that no run has used yet are compiled, whatever is typed
        assert command(*words, **without_cudnn).returncode == 0
    ends = set()
    for n in range(moments):
        process = subprocess.Popen(
            line,
            cwd=HERE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | without_cudnn,
        )
        process.stderr.readline()
        time.sleep(2.0 * random.Random(n).random() ** 3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
        ends.add(process.returncode)
        # Python's last act is to give the signal back: then a shell says 130 for -2.
        assert process.returncode in (0, 130, -signal.SIGINT), error
        assert b"Traceback" not in error and b"xception" not in error
    assert 130 in ends


def test_what_is_measured_is_shown_row_by_row_and_ctrl_c_ends_it(tmp_path):
    slow = random_folder(tmp_path / "m", context=65536, width=256)
    words = ("info", slow, "--measure", "--prompt-tokens", 32)
    run = Terminal(*words, "--generation-tokens", 50_000)
    run.wait_for("prefill ")
    run.wait_for("measuring the reply")
    assert "decode" not in run.wait_for(" left")  # it says how long that takes
    run.type(CTRL_C)
    assert run.status(seconds=20) in (130, -signal.SIGINT)
    assert "Traceback" not in run.screen


# In a step of MLX Python handles no signal, nor does it in this multiplication, which
# takes minutes.
A_LONG_STEP = """
import mlx.core as mx, runpy, sys
def step():
    print("in a step", flush=True)
    7 ** (3 * 10**8)
mx.clear_cache = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_ends_a_measurement_within_a_step(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(A_LONG_STEP)
    few = ("--prompt-tokens", 32, "--generation-tokens", 4)
    words = (HERE / "llama.py", "info", folder, "--measure", *few)
    run = Terminal(*words, program=script)
    run.wait_for("measuring the prompt 0 %")  # which is there before the first step
    run.wait_for("in a step")
    run.type(CTRL_C)
    assert run.status(seconds=10) == -signal.SIGINT
    assert "Traceback" not in run.screen


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_ctrl_c_ends_a_one_shot_run_with_status_130(phase, tmp_path):
    """The whole run would take far longer than it is given to end."""
    slow = random_folder(tmp_path / "m", context=65536, width=256)
    text = "word " * (10_000 if phase == "prefill" else 1)
    words = ("chat", slow, "--ctx", 65536, "--prefill-step", 64, "--prompt", text)
    run = Terminal(*words, "--temperature", 0)
    if phase == "prefill":
        run.wait_for("reading the prompt")
    else:
        for _ in range(3):
            run.wait_for("\\x")  # bytes that are no text, spelled out
    started = time.monotonic()
    run.type(CTRL_C)
    assert run.status(seconds=20) == 130
    assert time.monotonic() - started < 2  # a second, and room for a busy machine
    assert "Traceback" not in run.screen
