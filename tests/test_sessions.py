"""Sessions: files that are damaged, foreign, interrupted or written by anyone."""

import collections
import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import time
import zlib
from pathlib import Path

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import numpy as np
import pytest

from tests.support import (
    CTRL_C,
    CTRL_D,
    CTRL_Z,
    ON_A_GPU,
    PROMPT,
    SHELL,
    THINKS,
    USER,
    Terminal,
    chat_with,
    command,
    continued,
    file_of,
    places,
    random_folder,
    refusal,
    thinking_folder,
    without,
)

pytest_plugins = ["tests.fixtures"]


def test_a_fingerprint_is_of_every_tensor(tmp_path):
    found = set()
    for n, (name, shape, dtype) in enumerate(
        (
            ("a", (2, 4), mx.float32),
            ("b", (2, 4), mx.float32),
            ("a", (4, 2), mx.float32),
            ("a", (2, 4), mx.int32),
        )
    ):
        (folder := tmp_path / str(n)).mkdir()
        (folder / "config.json").write_text("{}")
        tensors = {name: mx.zeros(shape, dtype)}
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        infos = llama.read_header(folder / "model.safetensors")
        found.add(llama.fingerprint(folder, infos))
    assert len(found) == 4


def test_a_session_belongs_to_the_bits_that_it_was_computed_in(tmp_path):
    folder, file = random_folder(tmp_path / "m", width=64), tmp_path / "s"
    for bits in (4, None):
        with llama.Engine(folder, bits=bits) as engine:
            collections.deque(engine.chat(USER, max_tokens=5), 0)
            engine.save(file, {"bits": bits})
        for other in (4, 8, None):
            with llama.Engine(folder, bits=other) as engine:
                if other == bits:
                    assert engine.restore(file) == {"bits": bits}
                    continue
                with pytest.raises(ValueError, match="the session is of another model"):
                    engine.restore(file)


def test_a_session_that_cannot_be_written_leaves_nothing_behind(engine, tmp_path):
    (tmp_path / "s").mkdir()  # in the way
    with pytest.raises(OSError, match="s"):
        engine.save(tmp_path / "s", {})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_saved_conversation_goes_on_without_being_read_anew(folder, tmp_path):
    options = {"max_tokens": 10, "temperature": 0}
    with llama.Engine(folder) as engine:
        first = engine.chat(USER, **options)
        collections.deque(first, 0)
        engine.save(tmp_path / "s", {"ids": first.taken.ids})
        second = engine.chat(continued(first), **options)
        wanted = "".join(second)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]  # no draft is left
    with llama.Engine(folder) as engine:
        notes = engine.restore(tmp_path / "s")
        engine.remember(llama.Piece(first.text, notes["ids"]))
        again = engine.chat(continued(first), **options)
        assert "".join(again) == wanted
        assert again.stats.reused_tokens == second.stats.reused_tokens > 20


def session_file(session: dict, file: Path) -> bytes:
    """A session file with the cache of another, and a checksum that is right."""
    before = llama.header_bytes(file)
    header = json.loads(before[8:])
    text = json.dumps(session)
    crc32 = str(zlib.crc32(text.encode()))
    header["__metadata__"] |= {"session": text, "crc32": crc32}
    return file_of(header, file.read_bytes()[len(before) :])


def with_arrays(arrays: dict[str, mx.array], file: Path) -> bytes:
    """A session file with the conversation of another, and a checksum that is right."""
    session = llama.read_session(file) | {"checksum": llama.checksum(arrays)}
    text = json.dumps(session)
    metadata = {"session": text, "crc32": str(zlib.crc32(text.encode()))}
    draft = file.with_name("draft.safetensors")
    mx.save_safetensors(str(draft), arrays, metadata)
    data = draft.read_bytes()
    draft.unlink()
    return data


def of_an_older_llama(file: Path) -> bytes:
    """A session file as it was when each tensor had a checksum of its own."""
    arrays = mx.load(str(file), format="safetensors")
    sums = {name: llama.checksum({name: array}) for name, array in arrays.items()}
    session = without(llama.read_session(file), "checksum")
    return session_file(session | {"checksums": sums}, file)


def test_a_session_that_cannot_be_trusted_is_refused(folder, tmp_path):
    other = random_folder(tmp_path / "other", intermediate_size=96)
    file, bad = tmp_path / "s", tmp_path / "bad"
    with llama.Engine(folder) as engine:
        collections.deque(engine.chat(USER, max_tokens=5), 0)
        engine.save(file, {"text": "be kind"})
        data = file.read_bytes()

        def refused(changed: bytes) -> str:
            bad.write_bytes(changed)
            with pytest.raises(ValueError, match=str(bad)) as caught:
                engine.restore(bad)
            return str(caught.value)

        for at in (-1, -2000, -5000):  # anywhere in the cache
            flipped = bytearray(data)
            flipped[at] ^= 1
            assert "damaged" in refused(bytes(flipped))
        assert "truncated" in refused(data[:-1])
        assert "not a safetensors file" in refused(data[:300])
        assert "not a safetensors file" in refused(b"\xff" * 100)
        plain = (folder / "model.safetensors").read_bytes()
        assert "not a session" in refused(plain)
        session = llama.read_session(file)
        unnamed = without(session, "fingerprint")
        assert "another model" in refused(session_file(unnamed, file))
        assert "not a session" in refused(
            session_file(session | {"ids": [math.inf]}, file)
        )
        assert "a session of an older llama.py" in refused(of_an_older_llama(file))
        assert "conversation is damaged" in refused(data.replace(b"kind", b"kinX"))
        engine.restore(file)
    with (
        llama.Engine(other) as engine,
        pytest.raises(ValueError, match="the session is of another model"),
    ):
        engine.restore(file)
    with (
        llama.Engine(folder, context=16) as engine,
        pytest.raises(llama.SessionTooLong, match=r"\d+ tokens, the context 16$"),
    ):
        engine.restore(file)


@pytest.mark.parametrize("name", ["0.keys", "1.values"])
def test_a_session_without_an_array_is_refused(engine, tmp_path, name):
    file = str(tmp_path / "s.safetensors")
    collections.deque(engine.chat(USER, max_tokens=5), 0)
    engine.save(file, {})
    arrays, metadata = mx.load(file, return_metadata=True)
    mx.eval(arrays)  # before the file is written anew
    mx.save_safetensors(file, without(arrays, name), metadata)
    shape = arrays[name].shape
    words = re.escape(f"damaged: {name} is not {shape}")
    with pytest.raises(ValueError, match=words):
        engine.restore(file)
    flat = arrays[name].reshape(1, 1, -1, shape[-1])  # the same bytes
    for changed in (without(arrays, name), arrays | {name: flat}):
        bad = Path(file).with_name("bad")
        bad.write_bytes(with_arrays(changed, Path(file)))
        with pytest.raises(ValueError, match=words):
            engine.restore(bad)


def test_a_session_that_is_refused_leaves_the_cache_as_it_was(folder, tmp_path):
    file, bad = tmp_path / "s", tmp_path / "bad"
    options = {"max_tokens": 10, "temperature": 0}
    with llama.Engine(folder) as engine:
        first = engine.chat(USER, **options)
        collections.deque(first, 0)
        engine.save(file, {})
        second = engine.chat(continued(first), **options)
        wanted, reused = "".join(second), second.stats.reused_tokens
        data, session = file.read_bytes(), llama.read_session(file)
        arrays = mx.load(str(file), format="safetensors")
        for content, error in (
            (data[:-1], "truncated"),
            (data[:-1] + bytes([data[-1] ^ 1]), "the cache in it is damaged"),
            (of_an_older_llama(file), "older"),
            (session_file(session | {"fingerprint": "x"}, file), "another model"),
            (
                session_file(session | {"ids": [1] * 600}, file),
                "600 tokens, the context",
            ),
            (with_arrays(without(arrays, "1.values"), file), "damaged: 1.values"),
        ):
            again = engine.chat(USER, **options)
            assert "".join(again) == first.text
            bad.write_bytes(content)
            with pytest.raises(ValueError, match=error):
                engine.restore(bad)
            again = engine.chat(continued(first), **options)
            assert ("".join(again), again.stats.reused_tokens) == (wanted, reused)


def test_a_conversation_that_cannot_be_saved_goes_on(folder, tmp_path):
    chat = Terminal("chat", folder, "--max-tokens", 3)
    for typed, shown in (
        ("Hi", "[stopped: 3 tokens"),
        (f"/save {tmp_path}/no/talk", f"{tmp_path}/no: no such folder"),
        (f"/save {tmp_path}/talk", "1 turn written"),
    ):
        chat.wait_for(PROMPT)
        chat.type(f"{typed}\r")
        chat.wait_for(shown)
    chat.wait_for(PROMPT)
    chat.type(CTRL_D)
    assert chat.status() == 0


def test_a_session_is_resumed_with_its_settings_and_kept_up_to_date(folder, tmp_path):
    words = ("chat", folder, "--session", tmp_path / "s", "--max-tokens", 4, "--json")

    def run(prompt: str, *more: str) -> dict:
        return json.loads(command(*words, "--prompt", prompt, *more).stdout)

    run("one", "--temperature", "0.25", "--system", "Be kind.", "--seed", "5")
    second = run("two")
    assert second["seed"] == 6 and second["stats"]["reused_tokens"] > 20
    notes = llama.read_session(tmp_path / "s")["notes"]
    assert [turn[0] for turn in notes["turns"]] == ["one", "two"]
    assert notes["settings"]["temperature"] == 0.25 and notes["system"] == "Be kind."
    run("three", "--temperature", "0.5")
    notes = llama.read_session(tmp_path / "s")["notes"]
    assert notes["settings"]["temperature"] == 0.5


def test_all_that_can_be_set_is_kept_in_a_session(tmp_path, capsys):
    folder, file = thinking_folder(tmp_path / "m", THINKS), tmp_path / "s"
    with llama.Engine(folder) as engine:
        chat = chat_with(engine, "--session", str(file))
        for name, value in (("max_tokens", 2), ("stop", "Tom"), ("thinking", "off")):
            chat.take(f"/set {name} {value}")
        words = llama.build_parser().parse_args(["chat", "--session", str(file)])
        again = llama.Chat(engine, words)
        assert (again.options.max_tokens, again.options.stop) == (2, ["Tom"])
        assert again.options.variables == {"enable_thinking": False}
        again.take("x")
        assert "[stopped: 2 tokens, as the session says]" in capsys.readouterr().err
        typed = ["chat", "--session", str(file), "--max-tokens", "3", "--stop", "Sue"]
        other = llama.Chat(engine, llama.build_parser().parse_args(typed))
        assert (other.options.max_tokens, other.options.stop) == (3, ["Sue"])
        other.take("x")
        assert "as --max-tokens says" in capsys.readouterr().err


def test_what_is_forgotten_is_forgotten_in_the_session_file_too(engine, tmp_path):
    chat, file = chat_with(engine, "--session", str(tmp_path / "s")), tmp_path / "s"
    for text in ("one", "two"):
        chat.take(text)
    one, two = (stats.context_used for _, _, stats, _ in chat.turns)
    assert len(llama.read_session(file)["ids"]) == two
    chat.take("/undo")
    session = llama.read_session(file)
    assert len(session["ids"]) == one and len(session["notes"]["turns"]) == 1
    chat.take("/set temperature 0.25")
    assert llama.read_session(file)["notes"]["settings"]["temperature"] == 0.25
    chat.take("/reset")
    session = llama.read_session(file)
    assert session["ids"] == [] and session["notes"]["turns"] == []
    resumed = chat_with(engine, "--session", str(file))
    resumed.take("three")
    assert len(resumed.turns) == 1 and resumed.options.temperature == 0.25
    resumed.take(f"/save {tmp_path}/other")
    resumed.take("/reset")
    resumed.take(f"/load {tmp_path}/other")
    assert len(llama.read_session(file)["notes"]["turns"]) == 1


def test_a_conversation_that_is_reset_or_loaded_over_is_kept_as_bak_once(
    engine, tmp_path, capsys
):
    file, bak = tmp_path / "s", tmp_path / "s.bak"
    messages = lambda file: [t[0] for t in llama.read_session(file)["notes"]["turns"]]
    chat = chat_with(engine, "--session", str(file))
    chat.take("/reset")
    assert not bak.exists()  # there was nothing to lose
    chat.take("one")
    chat.take("/reset")
    assert messages(bak) == ["one"] and messages(file) == []
    assert f"1 turn forgotten, kept in {bak}" in capsys.readouterr().err
    chat.take("/reset")
    assert messages(bak) == ["one"]
    chat.take("two")
    chat.take(f"/load {bak}")  # the two change places
    assert messages(bak) == ["two"] and messages(file) == ["one"]
    chat.take("three")
    chat.take("/reset")
    assert messages(bak) == ["one", "three"] and messages(file) == []
    with pytest.raises(FileNotFoundError):
        chat.take("/load nowhere")
    assert file.exists() and messages(bak) == ["one", "three"]


def test_loading_asks_before_it_forgets_what_no_file_has(folder, tmp_path):
    words = ("chat", folder, "--max-tokens", 3)
    other = tmp_path / "other"
    done = command(*words, "--session", other, "--prompt", "of the file")
    assert done.returncode == 0
    chat = Terminal(*words, start=SHELL, columns=200)
    chat.wait_for(PROMPT)
    chat.type("mine\r")
    chat.wait_for("[stopped")
    for no in ("n\r", CTRL_C, CTRL_D, "\r"):
        chat.wait_for(PROMPT)
        chat.type(f"/load {other}\r")
        chat.wait_for("1 turn not saved. Forget the conversation? [y/N] ")
        chat.type(no)
        chat.wait_for(PROMPT)
        chat.type("/context\r")
        chat.wait_for("'mine'")
    chat.wait_for(PROMPT)
    chat.type(f"/load {other}")
    chat.wait_for(str(other))
    chat.type(CTRL_Z)
    chat.wait_for("stopped, ")
    chat.type("\r")
    chat.wait_for(PROMPT)
    chat.type("\r")
    chat.wait_for("[y/N] ")
    chat.type(f"/file {other}\r")  # for a prompt, and no answer
    chat.wait_for("y is yes, n is no")
    chat.wait_for("1 turn not saved. Forget the conversation? [y/N] ")
    chat.type("yes\r")  # all that the answer has, not the line after Ctrl-Z too
    chat.wait_for(">>> of the file")
    chat.wait_for(PROMPT)
    chat.type(f"/load {other}\r")  # which has all there is
    for typed in ("new\r", f"/save {tmp_path}/new\r", f"/load {other}\r", CTRL_D):
        assert "[y/N]" not in chat.wait_for(PROMPT)
        chat.type(typed)
    assert chat.status() == 0 and (tmp_path / "new").exists()


NOT_OF_A_SESSION = (None, -1, 1.5, 10**30, math.inf, True, "x", [], [1], {}, [[1]])


def test_a_session_that_someone_wrote_is_used_or_refused(engine, tmp_path):
    """With a checksum that is right, and anything anywhere in the conversation."""
    file, bad = tmp_path / "s", tmp_path / "bad"
    chat = chat_with(engine)
    for text in ("one", "two"):
        chat.take(text)
    chat.save(file)
    used = 0
    for seed in range(200):
        rng, session = random.Random(seed), llama.read_session(file)
        container, key = rng.choice([p for p in places(session) if len(p[0]) < 30])
        container[key] = rng.choice(NOT_OF_A_SESSION)
        bad.write_bytes(session_file(session, file))
        try:
            resumed = chat_with(engine, "--session", str(bad))
        except ValueError:
            continue
        commands = ("/context", "/stats") if resumed.turns else ()
        for typed in (*commands, "/set", "three"):
            resumed.take(typed)
        used += 1
    assert 20 < used < 180
    session = llama.read_session(file)
    for seed in (-1, 2**64, 1.0):
        session["notes"]["seed"] = seed
        bad.write_bytes(session_file(session, file))
        with pytest.raises(ValueError, match=f"seed: got {seed}"):
            chat_with(engine, "--session", str(bad))


def test_a_session_with_another_model_offers_its_text(folder, tmp_path):
    other, session = random_folder(tmp_path / "m", num_hidden_layers=1), tmp_path / "s"
    words = ("--session", session, "--max-tokens", 3)
    assert command("chat", other, *words, "--prompt", "x").returncode == 0
    line = refusal("chat", folder, *words, "--prompt", "y")
    assert "the session is of another model" in line
    before = session.read_bytes()
    for no in ("\r", CTRL_C, CTRL_D):  # and no reply takes the place of what is there
        chat = Terminal("chat", folder, *words)
        chat.wait_for("[y/N] ")
        chat.type(no, edited=False)
        chat.wait_for(f"llama.py: error: {session} stays as it is")
        assert chat.status() == 1 and session.read_bytes() == before
    chat = Terminal("chat", folder, *words)
    chat.wait_for("the session is of another model")
    chat.wait_for("It is a conversation with the model m.")
    for typed in ("Hello!\r", "y\r"):  # it asks again
        chat.wait_for("Shall this model read the conversation again? [y/N] ")
        chat.type(typed, edited=False)
    chat.wait_for("s: 1 turn\x1b")
    chat.wait_for(PROMPT)
    chat.type("and?\r")
    chat.wait_for("[stopped")
    chat.wait_for(PROMPT)
    chat.type(CTRL_D)
    assert chat.status() == 0
    assert len(llama.read_session(session)["notes"]["turns"]) == 2


@pytest.mark.parametrize("spoilt", ["older", "truncated", "damaged", "too long"])
def test_a_session_whose_cache_cannot_be_used_offers_its_text(spoilt, folder, tmp_path):
    file, words = tmp_path / "s", ("--session", tmp_path / "s", "--max-tokens", 3)
    assert command("chat", folder, *words, "--prompt", "Hi").returncode == 0
    data = file.read_bytes()
    content, told = {
        "older": (of_an_older_llama(file), "s: a session of an older llama.py"),
        "truncated": (data[:-1], "truncated or"),
        "damaged": (data[:-1] + bytes([data[-1] ^ 1]), "the cache in it is damaged"),
        "too long": (data, " tokens, the context 16; see --ctx"),
    }[spoilt]
    file.write_bytes(content)
    words += ("--ctx", 16) if spoilt == "too long" else ()
    assert told in refusal("chat", folder, *words, "--prompt", "y")
    chat = Terminal("chat", folder, *words, "--stats")
    chat.wait_for(told)
    chat.wait_for("Shall this model read the conversation again? [y/N] ")
    chat.type("y\r", edited=False)
    chat.wait_for("s: 1 turn\x1b")
    if spoilt != "too long":
        chat.wait_for(PROMPT)
        chat.type("and?\r")
        chat.wait_for("(reused 0)")  # all of it was read anew
    chat.wait_for(PROMPT)
    chat.type(CTRL_D)
    assert chat.status() == 0
    if spoilt != "too long":  # what is saved now can be resumed
        assert command("chat", folder, *words, "--prompt", "so").returncode == 0
        assert len(llama.read_session(file)["notes"]["turns"]) == 3


def test_the_question_about_a_session_stays_out_of_a_file(folder, tmp_path):
    session, out = tmp_path / "s", tmp_path / "out.txt"
    words = ("chat", folder, "--session", session, "--max-tokens", 3, "--prompt", "Hi")
    assert command(*words).returncode == 0
    session.write_bytes(of_an_older_llama(session))
    with open(out, "wb") as file:
        chat = Terminal(*words, stdout=file.fileno())
    chat.wait_for("a session of an older llama.py")
    chat.type("y\r")
    assert chat.status() == 0
    assert out.read_text("utf-8", "replace") and b"[y/N]" not in out.read_bytes()


def test_a_session_killed_at_any_moment_keeps_every_completed_turn(folder, tmp_path):
    """A turn is complete when the next prompt stands on the screen."""
    rng, everything = np.random.default_rng(0), 0
    words = ("--max-tokens", 2, "--session")
    for n in range(16):
        session, completed = tmp_path / f"s{n}", 0
        chat = Terminal("chat", folder, *words, session)
        chat.wait_for(PROMPT)
        if ON_A_GPU:  # which takes a while before it computes at all
            chat.type("x\r")
            chat.wait_for(PROMPT)
            completed += 1
        everything -= completed
        ends = time.monotonic() + rng.uniform(0, 0.2)
        os.write(chat.master, b"x\r" * 20)
        while time.monotonic() < ends:
            chat.read()
            *done, chat.screen = chat.screen.split(PROMPT)
            completed += len(done)
        chat.process.kill()
        chat.process.wait()
        os.close(chat.master)
        kept = 0
        if session.exists():
            kept = len(llama.read_session(session)["notes"]["turns"])
            llama.read_header(session)
        assert kept >= completed, n
        everything += completed
    assert everything > 8  # there was something to lose


def test_a_full_disk_leaves_the_last_session_complete(folder, tmp_path, monkeypatch):
    file = tmp_path / "talk"
    with llama.Engine(folder) as engine:
        "".join(engine.chat(USER, max_tokens=4))
        engine.save(file, {})
        saved = file.read_bytes()
        "".join(engine.chat([{"role": "user", "content": "Bye"}], max_tokens=4))

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        def failed(*_):
            raise RuntimeError("[write] Unable to write 9 bytes to file.")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            engine.save(file, {})
        monkeypatch.setattr(mx, "save_safetensors", failed)
        with pytest.raises(OSError, match=r"talk cannot be written: \[write\] Unable"):
            engine.save(file, {})
    assert file.read_bytes() == saved and os.listdir(tmp_path) == ["talk"]


@pytest.mark.parametrize("known", [True, False])
def test_a_session_is_on_the_disk_itself_before_it_replaces_another(
    known, folder, tmp_path, monkeypatch
):
    """On macOS fsync leaves it in the disk's own memory; some disks know nothing else."""
    flushed, synced = [], []

    def fcntl_of_macos(descriptor, command):
        flushed.append(command)
        if not known:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fcntl_of_macos)
    monkeypatch.setattr(os, "fsync", synced.append)
    with llama.Engine(folder) as engine:
        "".join(engine.chat(USER, max_tokens=2))
        engine.save(tmp_path / "talk", {})
    assert flushed == [51, 51] and len(synced) == (0 if known else 2)


def test_a_pipe_is_no_session_and_no_weights(engine, folder, tmp_path):
    """To open one could take for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a regular file"):
        engine.restore(tmp_path / "pipe")
    copy = shutil.copytree(folder, tmp_path / "m")
    for file in copy.glob("*.safetensors"):
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(ValueError, match=r"\.safetensors: not a regular file"):
        llama.examine(copy)


def test_a_session_stays_where_it_is_and_as_private_as_it_is(engine, tmp_path):
    """A link to it stays a link, and its new content has the mode of the old one."""
    file, link = tmp_path / "talk", tmp_path / "link"
    engine.save(file, {"n": 1})
    file.chmod(0o600)
    link.symlink_to(file)
    engine.save(link, {"n": 2})
    assert link.is_symlink() and not file.is_symlink()
    assert engine.restore(file) == {"n": 2}
    assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["link", "talk"]


def test_a_session_that_another_program_has_written_is_left_to_it(
    engine, tmp_path, capsys
):
    session = tmp_path / "talk"
    first = chat_with(engine, "--session", str(session))
    second = chat_with(engine, "--session", str(session))
    first.take("one")
    whole = session.read_bytes()
    with pytest.raises(ValueError, match="talk: another program has written it"):
        second.take("two")
    assert session.read_bytes() == whole and len(second.turns) == 1
    with pytest.raises(ValueError, match="talk: another program has written it"):
        second.take("/reset")  # which would move it away
    assert session.read_bytes() == whole and len(second.turns) == 1
    second.take(f"/save {tmp_path / 'other'}")
    first.take("three")
    session.unlink()  # by hand: then it is written again
    first.take("four")
    turns = [len(llama.read_session(f)["notes"]["turns"]) for f in tmp_path.iterdir()]
    assert sorted(turns) == [1, 3]


def test_ctrl_c_while_a_session_is_saved_is_not_another_program(
    engine, tmp_path, monkeypatch
):
    """It would be, if it ended the wait for the worker, which writes all the same."""
    session, real = tmp_path / "talk", llama.Engine.save
    chat = chat_with(engine, "--session", str(session))

    def save(*args, **settings):
        real(*args, **settings)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(llama.Engine, "save", save)
        chat.take("one")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # from then on it counts
    chat.take("two")
    assert len(llama.read_session(session)["notes"]["turns"]) == 2


def test_a_session_that_is_loaded_again_is_not_set_aside(engine, tmp_path):
    session = tmp_path / "talk"
    chat = chat_with(engine, "--session", str(session))
    chat.take("one")
    (tmp_path / "talk.bak").write_text("an older one")
    chat.take(f"/load {session}")
    assert (tmp_path / "talk.bak").read_text() == "an older one"
    assert len(chat.turns) == 1 and len(llama.read_session(session)["notes"]["turns"])


def test_a_restore_that_fails_halfway_leaves_an_engine_that_answers(
    folder, tmp_path, monkeypatch
):
    """What is filled in part is forgotten; what is refused before is kept."""
    with llama.Engine(folder) as engine:
        collections.deque(engine.chat(USER, max_tokens=5), 0)
        engine.save(tmp_path / "s", {})
        fill, calls = llama.KVCache.update_and_fetch, []

        def fails_at_the_second_layer(cache, keys, values):
            calls.append(cache)
            if len(calls) == 2:
                raise RuntimeError("no memory")
            return fill(cache, keys, values)

        with monkeypatch.context() as patch:
            patch.setattr(llama.KVCache, "update_and_fetch", fails_at_the_second_layer)
            with pytest.raises(RuntimeError, match="no memory"):
                engine.restore(tmp_path / "s")
        reply = engine.chat(USER, max_tokens=5)
        collections.deque(reply, 0)
        assert reply.stats.reused_tokens == 0
