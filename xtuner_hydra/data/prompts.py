"""Questions to a model: messages -> the ids that ask for an answer, or a ValueError that says why the model cannot be asked that."""

from __future__ import annotations

from xtuner_hydra.config.schema import Config, ModelConfig
from xtuner_hydra.data.formats import Conversation, Message
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.errors import ConfigError


def prompt_ids(messages: list[Message], tokenizer: Tokenizer, model: ModelConfig, room: int = 1) -> list[int]:
    """The ids that ask for an answer to `messages`, to which at least `room` tokens can be added."""
    ids: list[int] = tokenizer.prompt(Conversation(messages)).tolist()
    if len(ids) + room > model.max_position_embeddings:
        raise ValueError(
            f"{len(ids)} tokens, and {room} for the answer, are more than the {model.max_position_embeddings} that the model reads at most"
        )
    if (largest := max(ids)) >= model.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the model's embedding has {model.vocab_size} rows; they do not belong together"
        )
    return ids


def sample_prompts(config: Config, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of trainer.sample_prompts. Raises ConfigError for one that cannot be answered with trainer.sample_tokens tokens."""
    trainer = config.trainer
    ids = []
    for prompt in trainer.sample_prompts:
        try:
            ids.append(prompt_ids([Message("user", prompt, False)], tokenizer, config.model, trainer.sample_tokens))
        except ValueError as error:
            raise ConfigError("trainer.sample_prompts", list(trainer.sample_prompts), f"{prompt!r}: {error}") from None
    return ids
