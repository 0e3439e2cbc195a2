"""Hugging Face tokenizers: any that transformers' AutoTokenizer loads with a fast implementation, which knows the place of each token in the text.

A text is tokenised in one go, and a token is supervised when all of it lies in a supervised stretch. Where a token would run across the beginning or
the end of a stretch, or the tokens before it are not those of the prompt alone, the text is cut there and its pieces are tokenised apart: the
model meets in training the very tokens that it will be asked with."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.data.chat_templates import ChatTemplate, Rendered
from xtuner_hydra.data.formats import Conversation, Message, Sample, Text
from xtuner_hydra.data.template_choice import choose
from xtuner_hydra.data.tokenizers import Encoded, or_error
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.files import write_text

_KEY = "model.tokenizer"
_VERSION = 3
"""Raise it when the same tokenizer and template would give other ids or labels."""
_MORE_TEMPLATES = "additional_chat_templates/"
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
    f"{_MORE_TEMPLATES}*.jinja",
)
"""What a tokenizer is kept in. tekken.json apart: transformers reads that with a package of its own."""
_NO_TEMPLATE = "the tokenizer has no chat template; give one with model.chat_template=PATH, a .jinja file"


class HFTokenizer:
    """The tokenizer in `directory`. `chosen`: model.chat_template; family: of the model, which has a say in what transformers makes of the files.
    Raises ConfigError for one that cannot be loaded or used."""

    def __init__(self, directory: Path, source: str, chosen: str | None = None, family: str | None = None) -> None:
        loaded = _load(directory, source, family)
        backend = loaded.backend_tokenizer
        self._before, self._after = _around(backend)
        self._backend = _bare(backend)
        self._known: dict[str, list[int]] = {}
        added = backend.get_added_tokens_decoder()
        texts = tuple(token.content for token in added.values())
        self.bos_token_id: int | None = loaded.bos_token_id
        self.eos_token_id: int | None = loaded.eos_token_id
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._special = sorted(texts, key=len, reverse=True)
        self._added = np.zeros(self.vocab_size, dtype=np.bool_)  # by id
        self._added[list(added)] = True
        own = _own_template(loaded, texts)
        self.template = choose(own, chosen, _special(loaded), texts)
        self.fingerprint = self._fingerprint()
        ends = self._ends_of_turn()
        self.stop_token_ids = tuple(dict.fromkeys([*(ends or []), *([] if self.eos_token_id is None else [self.eos_token_id])]))
        self.name = f"{source} ({len(loaded)} ids; chat template: {_described(self.template, ends)})"
        self._files = {str(path.relative_to(directory)): path.read_bytes() for pattern in _FILES for path in directory.glob(pattern)}
        self._kept_template = self.template.template if self.template and chosen and _is_users(own, self.template) else None

    def __getstate__(self) -> dict[str, Any]:
        """Processes that tokenise get no files."""
        return self.__dict__ | {"_files": {}, "_known": {}}

    def encode(self, sample: Sample) -> Encoded:
        """(ids, supervised) of a sample, both of one length. ValueError for one that cannot be learnt from."""
        (result,) = self.encode_batch([sample])
        if isinstance(result, Exception):
            raise result
        return result

    def encode_batch(self, samples: list[Sample]) -> list[Encoded | ValueError]:
        """`encode` of each sample; what it would raise stands in the result."""
        rendered = [or_error(self._rendered, sample) for sample in samples]
        usable = [one for one in rendered if isinstance(one, Rendered)]
        # without the tokens' places the library takes a fifth less time
        encode = self._backend.encode_batch_fast if all(map(_learnt_whole, usable)) else self._backend.encode_batch
        encodings = iter(encode([one.text for one in usable], add_special_tokens=False))
        return [
            one if isinstance(one, ValueError) else or_error(self._finished, sample, one, next(encodings))
            for sample, one in zip(samples, rendered, strict=True)
        ]

    def prompt(self, conversation: Conversation) -> NDArray[np.uint32]:
        """The ids that ask for an answer to `conversation`. ValueError where the template refuses it."""
        if self.template is None:
            raise ValueError(_NO_TEMPLATE)
        return np.array(self._ids(self.template.render(conversation, ask=True)), dtype=np.uint32)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def save(self, directory: Path) -> None:
        """Write the files that were loaded, byte for byte. A template for training only stays out; one of the user's goes with them."""
        for name, content in self._files.items():
            if self._kept_template is not None and name.startswith(_MORE_TEMPLATES):
                continue  # transformers would take one of them for conversations with tools
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        if self._kept_template is not None:
            write_text(directory / "chat_template.jinja", self._kept_template)

    def _rendered(self, sample: Sample) -> Rendered:
        rendered = _plain(sample) if isinstance(sample, Text) else self._chat(sample)
        rendered.text.encode("utf-8")  # half a surrogate pair is refused here, not in the middle of a batch
        return rendered

    def _chat(self, conversation: Conversation) -> Rendered:
        if self.template is None:
            raise ValueError(_NO_TEMPLATE)
        return self.template.spans(conversation)

    def _finished(self, sample: Sample, rendered: Rendered, encoding: Any) -> Encoded:
        ids, supervised = self._labelled(rendered, encoding)
        return self._document(sample, ids, supervised) if isinstance(sample, Text) else (ids, supervised)

    def _labelled(self, rendered: Rendered, encoding: Any) -> Encoded:
        ids = np.array(array("I", encoding.ids), dtype=np.uint32)  # several times faster than from the list itself
        if _learnt_whole(rendered):
            return ids, np.ones(len(ids), dtype=np.bool_)
        spans = [(_token_at(encoding, start), _token_at(encoding, stop)) for start, stop in rendered.spans]
        # (token, character) of where each span begins and ends
        edges = [edge for tokens, characters in zip(spans, rendered.spans, strict=True) for edge in zip(tokens, characters, strict=True)]
        crossed = any(_crosses(encoding, token, character) for token, character in edges)
        if crossed or not self._asks_alike(rendered, ids, encoding, [first for first, _ in spans]):
            return self._in_pieces(rendered)
        supervised = np.zeros(len(ids), dtype=np.bool_)
        for first, end in spans:
            supervised[first:end] = True
        return ids, supervised

    def _asks_alike(self, rendered: Rendered, ids: NDArray[np.uint32], encoding: Any, firsts: list[int]) -> bool:
        """Whether the tokens before each span, back to the last special one, are those of that text alone. firsts: each span's first token."""
        special = np.flatnonzero(self._added[ids])
        for first, (start, _) in zip(firsts, rendered.spans, strict=True):
            place = int(np.searchsorted(special, first)) - 1
            begin = int(special[place]) if place >= 0 else 0
            text = rendered.text[encoding.token_to_chars(begin)[0] if place >= 0 else 0 : start]
            if begin < first and ids[begin:first].tolist() != self._ids(text):
                return False
        return True

    def _in_pieces(self, rendered: Rendered) -> Encoded:
        """Tokenise between the edges of the spans."""
        edges = sorted({0, len(rendered.text), *(edge for span in rendered.spans for edge in span)})
        inside = [any(start <= left < stop for start, stop in rendered.spans) for left in edges[:-1]]
        ids = [self._piece(rendered.text, left, right) for left, right in pairwise(edges)]
        supervised = [np.full(len(piece), flag) for piece, flag in zip(ids, inside, strict=True)]
        return np.concatenate([np.array(piece, dtype=np.uint32) for piece in ids]), np.concatenate(supervised)

    def _piece(self, whole: str, left: int, right: int) -> list[int]:
        """The ids of whole[left:right]. Some tokenizers add a space before any text, which must not come into the middle of one."""
        text = whole[left:right]
        if left == 0:
            return self._ids(text)
        if (token := next((one for one in self._special if whole.endswith(one, 0, left)), None)) is not None:
            return self._ids(token + text)[1:]  # after a special token it does as it would in one go
        spaces = len(text) - len(text.lstrip(" "))
        if self._spaces(ids := self._ids(text)) <= spaces:
            return ids
        if spaces and self._spaces(ids := self._ids(text[1:])) == spaces:  # it adds the very space that the text begins with
            return ids
        raise ValueError(
            "a token runs across the beginning of an answer, and this tokenizer, which adds a space before any text, cannot be cut there"
        )

    def _spaces(self, ids: list[int]) -> int:
        """Spaces at the beginning, as tokenizers in the manner of SentencePiece (▁) and of byte-level BPE (Ġ) write them."""
        text = "".join(str(self._backend.id_to_token(number)) for number in ids[:8])
        return len(text) - len(text.lstrip("▁Ġ"))

    def _ids(self, text: str) -> list[int]:
        """The ids of a text; those of short ones, such as the header of a turn, are remembered."""
        if text in self._known:
            return self._known[text]
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if len(text) < 100 and len(self._known) < 1000:
            self._known[text] = ids
        return ids

    def _document(self, sample: Text, ids: NDArray[np.uint32], supervised: NDArray[np.bool_]) -> Encoded:
        """A text with the tokenizer's own special tokens around it and an EOS at the end."""
        if self.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token to end a text with; name one in its tokenizer_config.json (eos_token)")
        after = self._after if self._after[-1:] == [self.eos_token_id] else [*self._after, self.eos_token_id]
        flags = [np.zeros(len(self._before), dtype=np.bool_), supervised, np.full(len(after), sample.pieces[-1][1])]
        return np.concatenate([np.array(self._before, np.uint32), ids, np.array(after, np.uint32)]), np.concatenate(flags)

    def _ends_of_turn(self) -> list[int] | None:
        """The token by which an answer ends, if it is a special one and learnt; None where a chat of one turn cannot show it."""
        chat = Conversation([Message("user", "a", supervised=False), Message("assistant", "b", supervised=True)])
        encoded = or_error(self.encode, chat)
        if isinstance(encoded, ValueError):
            return None
        return [number for number in encoded[0][encoded[1]].tolist()[-1:] if self._added[number]]

    def _fingerprint(self) -> str:
        """Of all that decides ids and labels."""
        template = self.template
        parts = [_VERSION, self._backend.to_str(), self._before, self._after, self.eos_token_id]
        parts += [template.template, template.with_tools, template.special, template.added] if template else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _load(directory: Path, source: str, family: str | None) -> Any:
    """transformers' fast tokenizer of a directory, as it will be beside an export's config.json; never code from there."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        beside = AutoConfig.for_model(family) if family else None  # for qwen2, another class than tokenizer_config.json names
        loaded = AutoTokenizer.from_pretrained(directory, config=beside, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(_KEY, source, f"transformers cannot load the tokenizer ({type(error).__name__}: {_first_line(error)})") from None
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(
            _KEY,
            source,
            f"{type(loaded).__name__} has no fast implementation (tokenizer.json), and only those tell where in a text a token stands",
        )
    return loaded


def _bare(backend: Any) -> Any:
    """A copy that adds no special tokens and cuts nothing off. Without its post-processor, which may take spaces out of the tokens' places."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(backend.to_str())
    bare.post_processor = None
    bare.no_truncation()
    bare.no_padding()
    return bare


def _around(backend: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    whole, inner = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    place = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    return whole[:place], whole[place + len(inner) :]


def _own_template(loaded: Any, added: tuple[str, ...]) -> ChatTemplate | None:
    if not loaded.chat_template:
        return None
    try:
        plain = loaded.get_chat_template()
        with_tools = loaded.get_chat_template(tools=[{}])
    except ValueError:  # several templates, none of them the default
        return None
    return ChatTemplate("its own", plain, _special(loaded), added, with_tools if with_tools != plain else None)


def _special(loaded: Any) -> dict[str, str]:
    return {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}


def _is_users(own: ChatTemplate | None, used: ChatTemplate) -> bool:
    """Whether a chosen template must go with the export: the tokenizer has none of its own, or the user brought another."""
    return own is None or "(ours" not in used.name


def _described(template: ChatTemplate | None, ends: list[int] | None) -> str:
    if template is None:
        return "none"
    told = f", which has no place for {' and '.join(template.lacks)}: they are written into the text" if template.lacks else ""
    if header := template.learnt_header:
        told += f", which does not end a prompt with {header!r}: it is learnt as a part of every answer"
    return template.name + told + (", of which no token that ends a turn is learnt" if ends == [] else "")


def _learnt_whole(rendered: Rendered) -> bool:
    """Whether every token is supervised, wherever it stands."""
    return rendered.spans == [(0, len(rendered.text))]


def _token_at(encoding: Any, place: int) -> int:
    """The first token that begins at character `place` or after it. Asking for a few tokens' places costs much less than a list of all."""
    return bisect_left(range(len(encoding)), place, key=lambda token: encoding.token_to_chars(token)[0])


def _crosses(encoding: Any, token: int, place: int) -> bool:
    """Whether the token before `token`, the first at `place` or after it, runs across that place."""
    return token > 0 and encoding.token_to_chars(token - 1)[1] > place


def _plain(sample: Text) -> Rendered:
    text, spans = "", []
    for piece, supervised in sample.pieces:
        if supervised:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, [span for span in spans if span[0] < span[1]])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
