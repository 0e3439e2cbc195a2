"""Tokenizers: a Conversation or a Text -> token ids and which of them are supervised.

Supervised is what the assistant must produce: its content, its tool calls and the token that ends its turn; never the header of the turn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.data.fold import MACROS, fold
from xtuner_hydra.data.formats import Conversation, Sample, Text
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.files import write_json

log = logging.getLogger("xtuner_hydra")

IM_START, IM_END, BOS, PAD = 256, 257, 258, 259
MARKERS = {"<|im_start|>": IM_START, "<|im_end|>": IM_END, "<|bos|>": BOS, "<|pad|>": PAD}
TEMPLATES = ("chatml", "xtuner")
Encoded = tuple[NDArray[np.uint32], NDArray[np.bool_]]
_OWN = "xtuner_hydra"  # key of tokenizer_config.json by which a directory that we wrote is known


class Tokenizer(Protocol):
    """What the data pipeline and the export need of a tokenizer."""

    name: str
    fingerprint: str
    """Changes when ids or supervision would; part of the token cache's key."""
    vocab_size: int
    """Every id is below this."""
    bos_token_id: int | None
    eos_token_id: int | None
    stop_token_ids: tuple[int, ...]
    """Tokens at which generation ends: the end of an assistant's turn, and EOS."""

    def encode(self, sample: Sample) -> Encoded:
        """(ids, supervised), both of one length. ValueError for a sample that cannot be learnt from."""
        ...

    def encode_batch(self, samples: list[Sample]) -> list[Encoded | ValueError]:
        """`encode` of each sample; what it would raise stands in the result."""
        ...

    def prompt(self, conversation: Conversation) -> NDArray[np.uint32]:
        """The ids that ask for an answer to `conversation`. ValueError where the template refuses it."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, markers included."""
        ...

    def save(self, directory: Path) -> None:
        """Write the files by which transformers' AutoTokenizer loads it."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are ids 0-255; ChatML's markers are single ids above.

    `chatml` (the default): `<|im_start|>ROLE\\nCONTENT<|im_end|>\\n` a message, markers as one id each, text always as bytes, so that no
    content can forge a marker. Tools and calls are written as Qwen writes them.
    `xtuner`: XTuner's verification recipe: one BOS, then everything as plain bytes, the markers too."""

    vocab_size = 260
    bos_token_id: int | None = BOS
    eos_token_id: int | None = IM_END
    stop_token_ids: tuple[int, ...] = (IM_END,)

    def __init__(self, template: str = "chatml") -> None:
        if template not in TEMPLATES:
            raise ConfigError("model.chat_template", template, f"the byte tokenizer has the templates {', '.join(TEMPLATES)}")
        self.template = template
        self.name = f"byte ({template}: UTF-8 bytes, {self.vocab_size} ids)"
        self.fingerprint = f"byte-{template}-1"

    def encode(self, sample: Sample) -> Encoded:
        """(ids, supervised) of a sample, both of one length."""
        pieces = _Pieces()
        if self.template == "xtuner":
            pieces.marker(BOS)
        if isinstance(sample, Text):
            for text, supervised in sample.pieces:
                pieces.text(text, supervised)
            pieces.marker(IM_END, sample.pieces[-1][1])
        elif self.template == "xtuner":
            _encode_xtuner(pieces, sample)
        else:
            _encode_chatml(pieces, sample)
        return pieces.arrays()

    def encode_batch(self, samples: list[Sample]) -> list[Encoded | ValueError]:
        """`encode` of each sample; what it would raise stands in the result."""
        return [or_error(self.encode, sample) for sample in samples]

    def prompt(self, conversation: Conversation) -> NDArray[np.uint32]:
        """The ids that ask for an answer to `conversation`."""
        pieces = _Pieces()
        if self.template == "xtuner":
            pieces.marker(BOS)
            _encode_xtuner(pieces, conversation)
            pieces.text("<|im_start|>assistant\n")
        else:
            _encode_chatml(pieces, conversation)
            pieces.marker(IM_START)
            pieces.text("assistant\n")
        return pieces.arrays()[0]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, and ids that only an embedding with more rows has, become U+FFFD."""
        names = {number: marker.encode() for marker, number in MARKERS.items()} | {byte: bytes([byte]) for byte in range(256)}
        return b"".join(names.get(number, b"\xff") for number in ids).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        """tokenizer.json (byte-level BPE without merges) and tokenizer_config.json, which transformers' AutoTokenizer loads to the same ids."""
        write_json(directory / "tokenizer.json", _tokenizer_json())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**9,
            "chat_template": _JINJA[self.template],
            _OWN: {"tokenizer": "byte", "chat_template": self.template},
        }
        write_json(directory / "tokenizer_config.json", config)


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model config. Raises ConfigError for one that cannot be had, or (bytes) whose ids the embedding does not hold.

    Which ids of a Hugging Face tokenizer occur is known when the data is read; prepare.py looks at them."""
    source = model.tokenizer or model.pretrained or "byte"
    if source == "byte":
        return _byte(model, None)
    directory = tokenizer_directory(source)
    if not any(any(directory.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        if model.tokenizer is not None:
            raise ConfigError("model.tokenizer", source, "there is no tokenizer in it (tokenizer.json)")
        log.warning(f"{directory} has no tokenizer; using the byte tokenizer (set model.tokenizer=byte to confirm this)")
        return _byte(model, None)
    if (own := _own_template(directory)) is not None:
        return _byte(model, own)
    from xtuner_hydra.data.hf_tokenizer import HFTokenizer

    return HFTokenizer(directory, source, model.chat_template, model.family)


def tokenizer_directory(source: str) -> Path:
    """`source` (model.tokenizer), a directory, or the copy of a Hub repository's tokenizer files. ConfigError where there is neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigError("model.tokenizer", source, "there is no such directory; give one with a tokenizer.json, a Hub id, or byte")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            "model.tokenizer",
            source,
            f"neither a directory here nor a tokenizer that the Hugging Face Hub gives ({reason}); give a directory, or set model.tokenizer=byte",
        ) from None


_HUB_FILES = [
    "config.json",
    "tokenizer*",
    "*vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.jinja",
    "chat_template.json",
]


def _byte(model: ModelConfig, template: str | None) -> ByteTokenizer:
    """The byte tokenizer with the template that the config says, else `template`, else chatml."""
    tokenizer = ByteTokenizer(model.chat_template or template or TEMPLATES[0])
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError("model.vocab_size", model.vocab_size, f"the byte tokenizer has {tokenizer.vocab_size} ids")
    return tokenizer


def _own_template(directory: Path) -> str | None:
    """The template that an export of ours names; None for a stranger's tokenizer."""
    config = directory / "tokenizer_config.json"
    try:
        own: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")).get(_OWN, {}) if config.is_file() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError("model.tokenizer", directory, f"tokenizer_config.json cannot be read ({error})") from None
    return str(own["chat_template"]) if own.get("tokenizer") == "byte" else None


class TooDeep(ValueError):
    """Tools or calls that are nested more deeply than Python follows them."""


def or_error(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` gives, or the ValueError that it raises; TooDeep for a RecursionError."""
    try:
        return function(*args)
    except ValueError as error:
        return error
    except RecursionError as error:
        return TooDeep(str(error))


class _Pieces:
    """Ids and supervision, piece by piece: bytes in one buffer, made into arrays once (a few numpy calls a piece cost more than all the rest)."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.markers: list[tuple[int, int]] = []  # (place, id)
        self.supervised: list[slice] = []

    def text(self, text: str, supervised: bool = False) -> None:
        self._add(text.encode("utf-8"), supervised)

    def marker(self, number: int, supervised: bool = False) -> None:
        self.markers.append((len(self.content), number))
        self._add(b"\0", supervised)

    def arrays(self) -> Encoded:
        ids = np.frombuffer(self.content, dtype=np.uint8).astype(np.uint32)
        for place, number in self.markers:
            ids[place] = number
        supervised = np.zeros(len(ids), dtype=np.bool_)
        for stretch in self.supervised:
            supervised[stretch] = True
        return ids, supervised

    def _add(self, content: bytes, supervised: bool) -> None:
        start = len(self.content)
        self.content += content
        if supervised:
            self.supervised.append(slice(start, len(self.content)))


def _encode_chatml(pieces: _Pieces, conversation: Conversation) -> None:
    for role, body, supervised in _turns(conversation):
        pieces.marker(IM_START)
        pieces.text(f"{role}\n")
        pieces.text(body, supervised)
        pieces.marker(IM_END, supervised)
        pieces.text("\n")


def _encode_xtuner(pieces: _Pieces, conversation: Conversation) -> None:
    for role, body, supervised in _turns(conversation):
        pieces.text(f"<|im_start|>{role}\n")
        pieces.text(f"{body}<|im_end|>\n", supervised)


def _turns(conversation: Conversation) -> list[tuple[str, str, bool]]:
    """(role, text, supervised) a message; tools, calls and thinking stand in the text."""
    messages = fold(conversation, tools=True, thinking=True).messages
    return [(_ROLES.get(message.role, message.role), message.content, message.supervised) for message in messages]


_ROLES = {"developer": "system", "pretrain": "assistant"}

_TURN = r"""
{%- macro turn(message, first) -%}
    {%- set said = body(message) -%}
    {{- said -}}
    {%- if first and opens and tools -%}{{- ('\n\n' if said else '') + listed(tools) -}}{%- endif -%}
{%- endmacro -%}
{%- if tools and not opens -%}
    {{- '<|im_start|>system\n' + listed(tools) + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = roles.get(message.role, message.role) -%}
    {{- '<|im_start|>' + role + '\n' -}}
    {%- if role == 'assistant' -%}
        {%- generation -%}{{- turn(message, loop.first) + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- turn(message, loop.first) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_JINJA = {
    "chatml": MACROS + _TURN,
    # transformers would turn the markers into single ids; as plain bytes they exist in our own encoder only
    "xtuner": "{{- '<|bos|>' -}}" + MACROS + _TURN,
}


def _tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE in the tokenizers library's format: 256 symbols, no merges, the markers as added tokens."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    added = [
        {"id": number, "content": marker, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for marker, number in MARKERS.items()
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {**bpe, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": []},
    }


def _byte_symbols() -> list[str]:
    """GPT-2's printable character for each byte, which the ByteLevel pre-tokenizer maps to (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    symbols |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]
