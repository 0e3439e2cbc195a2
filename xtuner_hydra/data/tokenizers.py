"""Tokenizers: a Conversation -> token ids and which of them are supervised.

Supervised is what the assistant must produce: its content, its tool calls and the token that ends its turn; never the header of the turn."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.data.formats import Conversation, Message
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.files import write_json

log = logging.getLogger("xtuner_hydra")

IM_START, IM_END, BOS, PAD = 256, 257, 258, 259
MARKERS = {"<|im_start|>": IM_START, "<|im_end|>": IM_END, "<|bos|>": BOS, "<|pad|>": PAD}
TEMPLATES = ("chatml", "xtuner")
_OWN = "xtuner_hydra"  # key of tokenizer_config.json by which a directory that we wrote is known


class Tokenizer(Protocol):
    """What the data pipeline and the export need of a tokenizer."""

    name: str
    fingerprint: str
    """Changes when ids or supervision would; part of the token cache's key."""
    vocab_size: int
    """Every id is below this."""
    bos_token_id: int | None
    eos_token_id: int
    stop_token_ids: tuple[int, ...]
    """Tokens at which generation ends: the end of an assistant's turn, and EOS."""

    def encode(self, conversation: Conversation) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """(ids, supervised), both of one length."""
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
    eos_token_id = IM_END
    stop_token_ids: tuple[int, ...] = (IM_END,)

    def __init__(self, template: str = "chatml") -> None:
        if template not in TEMPLATES:
            raise ConfigError("model.chat_template", template, f"the byte tokenizer has the templates {', '.join(TEMPLATES)}")
        self.template = template
        self.name = f"byte ({template}: UTF-8 bytes, {self.vocab_size} ids)"
        self.fingerprint = f"byte-{template}-1"

    def encode(self, conversation: Conversation) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """(ids, supervised) of a conversation, both of one length."""
        pieces = _Pieces()
        if self.template == "xtuner":
            _encode_xtuner(pieces, conversation)
        else:
            _encode_chatml(pieces, conversation)
        return pieces.arrays()

    def prompt(self, conversation: Conversation) -> NDArray[np.uint32]:
        """The ids that ask for an answer to `conversation`."""
        pieces = _Pieces()
        if self.template == "xtuner":
            _encode_xtuner(pieces, conversation)
            pieces.text("<|im_start|>assistant\n")
        else:
            _encode_chatml(pieces, conversation)
            pieces.marker(IM_START)
            pieces.text("assistant\n")
        return pieces.arrays()[0]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8, and ids that only an embedding with more rows has, become U+FFFD."""
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
    """The tokenizer of a model config. Raises ConfigError for one that cannot be had, or whose ids the embedding does not hold."""
    tokenizer = ByteTokenizer(_byte_template(model))
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError("model.vocab_size", model.vocab_size, f"the byte tokenizer has {tokenizer.vocab_size} ids")
    return tokenizer


def _byte_template(model: ModelConfig) -> str:
    """The byte tokenizer's template: said in the config, else noted in `pretrained` by an export of ours, else chatml."""
    if model.tokenizer not in (None, "byte"):
        raise ConfigError("model.tokenizer", model.tokenizer, "Hugging Face tokenizers are not supported yet; set model.tokenizer=byte")
    if model.tokenizer is None and model.pretrained is not None:
        own = _own_template(Path(model.pretrained))
        return model.chat_template or own or TEMPLATES[0]
    if model.tokenizer is None:
        raise ConfigError("model.tokenizer", None, "there is no model.pretrained to take a tokenizer from; set model.tokenizer=byte")
    return model.chat_template or TEMPLATES[0]


def _own_template(directory: Path) -> str | None:
    """The template that an export of ours names; None for a directory without a tokenizer (the byte tokenizer serves, as in XTuner)."""
    if not any(any(directory.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        log.warning(f"{directory} has no tokenizer; using the byte tokenizer (say model.tokenizer=byte to mean it)")
        return None
    config = directory / "tokenizer_config.json"
    own: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")).get(_OWN, {}) if config.is_file() else {}
    if own.get("tokenizer") != "byte":
        raise ConfigError(
            "model.tokenizer",
            None,
            f"the tokenizer in {directory} cannot be used yet (Hugging Face tokenizers come later); set model.tokenizer=byte",
        )
    return str(own["chat_template"])


class _Pieces:
    """Ids and supervision, piece by piece."""

    def __init__(self) -> None:
        self.ids: list[NDArray[np.uint32]] = []
        self.supervised: list[NDArray[np.bool_]] = []

    def text(self, text: str, supervised: bool = False) -> None:
        self._add(np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32), supervised)

    def marker(self, number: int, supervised: bool = False) -> None:
        self._add(np.array([number], dtype=np.uint32), supervised)

    def arrays(self) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        return np.concatenate(self.ids), np.concatenate(self.supervised)

    def _add(self, ids: NDArray[np.uint32], supervised: bool) -> None:
        self.ids.append(ids)
        self.supervised.append(np.full(len(ids), supervised))


def _encode_chatml(pieces: _Pieces, conversation: Conversation) -> None:
    for role, body, supervised in _turns(conversation):
        pieces.marker(IM_START)
        pieces.text(f"{role}\n")
        pieces.text(body, supervised)
        pieces.marker(IM_END, supervised)
        pieces.text("\n")


def _encode_xtuner(pieces: _Pieces, conversation: Conversation) -> None:
    pieces.marker(BOS)
    for role, body, supervised in _turns(conversation):
        pieces.text(f"<|im_start|>{role}\n")
        pieces.text(f"{body}<|im_end|>\n", supervised)


def _turns(conversation: Conversation) -> list[tuple[str, str, bool]]:
    """(role, text, supervised) a message; tools stand in the system turn, their results in a user turn, as Qwen's models have them."""
    turns = [(_role(message), _body(message), message.supervised) for message in conversation.messages]
    if conversation.tools:
        if turns[0][0] != "system":
            turns.insert(0, ("system", "", False))
        turns[0] = ("system", (turns[0][1] + "\n\n" + _tools(conversation.tools)).lstrip("\n"), turns[0][2])
    return turns


def _role(message: Message) -> str:
    return {"tool": "user", "developer": "system", "pretrain": "assistant"}.get(message.role, message.role)


def _body(message: Message) -> str:
    if message.role == "tool":
        return f"<tool_response>\n{message.content}\n</tool_response>"
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in message.tool_calls]
    return "\n".join(([message.content] if message.content or not calls else []) + calls)


def _tools(tools: list[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    head = f"Tools you may call, one JSON schema a line:\n<tools>\n{listed}\n</tools>\n"
    return head + 'To call one, write {"name", "arguments"} as JSON inside <tool_call></tool_call>.'


_JINJA = {
    "chatml": "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"  # a bare newline after a block would be trimmed
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # transformers would turn the markers into single ids; as plain bytes they exist in our own encoder only
    "xtuner": "<|bos|>{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
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
