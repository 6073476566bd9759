"""The README's commands do what it says, pasted in order into a fresh clone."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llama
from tests.support import HERE, peer

README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
MODEL = "SmolLM2-135M-Instruct"
MODELS = Path(os.environ.get("LLAMA_TEST_MODEL", "") or "/nonexistent")

# What is only parsed here (by test_llama.py), by how the line begins, and why.
NOT_RUN = {
    "uv run": "uv installs packages from the index",
    "python3 -m venv": "installs packages, and the second one runs these very tests",
    ". .venv/bin/activate": "the environment of the tests is active",
    "pip install": "installs packages",
    "sudo apt install": "installs a package of the system, as root",
    "hf download": "needs a network; the tests bring the model",
    "mlx.launch --hostfile": "needs another machine",
    "python llama.py info 8b --measure": "takes an hour on a CPU",
    "python benchmarks/bench.py speed 8b": "needs a GPU",
}


def not_run(line: str) -> bool:
    return line.startswith(tuple(NOT_RUN))


def test_each_reason_not_to_run_a_command_is_needed():
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in COMMANDS), start


def test_the_commands_of_the_readme_work_in_order(tmp_path):
    for name in ("llama.py", "README.md", "stories", "benchmarks"):
        source = HERE / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    if (MODELS / "dense").exists():
        (tmp_path / MODEL).symlink_to(MODELS / "dense")
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    done = 0
    for line in COMMANDS:
        launches = line.startswith("mlx.launch") and not (tools / "mlx.launch").exists()
        without = MODEL in line and not (tmp_path / MODEL).exists()
        if not_run(line) or launches or without:
            continue
        if " chat" in line and "--max-tokens" not in line:
            line = f"{line} --max-tokens 4"  # or a small model might go on and on
        run = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environment,
            input="Hello!\n" if "chat" in line and "|" not in line else "",
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, f"{line}\n{run.stderr}"
        assert run.stdout or ">" in line, line
        done += 1
    assert done > 2


def transcripts() -> list[tuple[str, list[tuple[str, str]]]]:
    """The conversations that the README shows: a command, and what is asked and said."""
    found = []
    for block in re.findall(r"^```\n\$ (.*?)^```$", README, re.MULTILINE | re.DOTALL):
        command, *turns = re.split(r"^>>> ", block, flags=re.MULTILINE)
        turns = [turn.partition("\n")[::2] for turn in turns]
        found.append((command.splitlines()[0], turns))
    return found


def test_the_readme_shows_a_real_model_and_then_the_built_in_one():
    (first, _), (second, _) = transcripts()
    assert f"{MODEL} --bits 8" in first and second.startswith(
        "python llama.py chat --seed"
    )


@pytest.mark.parametrize("number", [0, 1])
def test_the_conversations_of_the_readme_are_what_the_models_say(number):
    """On a CPU, where a seed gives the same text; lines are wrapped in the README."""
    if llama.mx.default_device() != llama.mx.cpu:
        pytest.skip("on a GPU rounding makes other replies")
    command, turns = transcripts()[number]
    folder, bits = [(MODELS / "dense", 8), (HERE / "stories", None)][number]
    if not folder.exists():
        pytest.skip("LLAMA_TEST_MODEL names no folder of a real model")
    first, messages = int(re.search(r"--seed (\d+)", command)[1]), []
    with llama.Engine(folder, bits=bits) as engine:
        for seed, (text, wanted) in enumerate(turns, first):
            messages.append({"role": "user", "content": text})
            reply = "".join(engine.chat(messages, seed=seed))
            messages.append({"role": "assistant", "content": reply})
            assert reply.split() == wanted.split()


# Lines of a program that uses llama.py, and the words with which mypy refuses them.
MISUSES = {
    "llama.load(5)": 'incompatible type "int"',
    "llama.make_sampler(temperature='hot')": 'incompatible type "str"',
    "llama.Engine('folder').chat('Hi!')": 'incompatible type "str"',
    "with llama.Engine('folder') as e: e.chat(5)": 'incompatible type "int"',
    "llama.Tokenizer.from_folder('folder').encode(b'x')": 'incompatible type "bytes"',
    "llama.main(8)": 'incompatible type "int"',
    "llama.Engine('folder').chat([]).cancelled": 'no attribute "cancelled"',
}


@pytest.fixture(scope="module")
def checked_by_mypy(tmp_path_factory):
    """What mypy says of a program that imports llama.py, whose own lines it trusts."""
    api = peer("mypy.api")
    folder = tmp_path_factory.mktemp("typed")
    options = ["--strict", "--follow-imports=silent", f"--cache-dir={folder / 'cache'}"]

    def check(program: str) -> list[str]:
        (folder / "program.py").write_text(program)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MYPYPATH", str(HERE))
            said, trouble, _ = api.run([*options, str(folder / "program.py")])
        assert trouble == ""
        return [line for line in said.splitlines() if "error:" in line]

    return check


def test_the_python_of_the_readme_is_typed(checked_by_mypy):
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        assert checked_by_mypy(block) == []


@pytest.mark.parametrize("line", MISUSES)
def test_a_wrong_use_is_found_by_a_type_checker(line, checked_by_mypy):
    [error] = checked_by_mypy(f"import llama\n\n{line}\n")
    assert MISUSES[line] in error


def test_functions_say_their_types():
    """All parameters but *args and **options, and what comes back. Left out are the
    section of chat templates, whose values are those of Jinja, and functions within."""
    source = (HERE / "llama.py").read_text()
    begin, end = source.index("# 12. Chat templates"), source.index("# 13. Other voc")
    tree = ast.parse(source[:begin] + source[end:])
    bodies = [tree.body, *[n.body for n in tree.body if isinstance(n, ast.ClassDef)]]
    functions = [n for body in bodies for n in body if isinstance(n, ast.FunctionDef)]
    assert len(functions) > 200
    for function in functions:
        arguments = [*function.args.args, *function.args.kwonlyargs]
        untyped = {a.arg for a in arguments if a.annotation is None} - {"self", "cls"}
        assert not untyped, (function.name, untyped)
        special = function.name in ("__init__", "__post_init__")
        assert function.returns or special, function.name
