"""Small checkpoints that transformers makes on the spot, and the comparison of our decoder with transformers' on them."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.data.batch import IGNORE, PackedBatch, empty_batch
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.model.pretrained import load_pretrained
from xtuner_hydra.model.transformer import CausalLM

VOCAB, LENGTH = 97, 90
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,  # unlike hidden_size / num_attention_heads
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def theta(value):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


# an original context as short as this puts wavelengths of a small head into all three bands
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CASES = {  # model_type, then what differs from SHAPE
    "llama 2": ("llama", {**theta(1e4), "num_key_value_heads": 6}),
    "llama 3": ("llama", theta(5e5)),
    "llama 3.2": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e3}, "tie_word_embeddings": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3}, "attention_bias": True}),
    "smollm2": ("llama", {**theta(1e5), "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 13}),
    "mistral without a window": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"head_dim": None, "num_attention_heads": 4, "tie_word_embeddings": True, **theta(1e6)}),
    "qwen2 head_dim": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3 tied, biased": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe plain": ("qwen3_moe", {**EXPERTS, "num_experts_per_tok": 3, "num_key_value_heads": 1}),
    "qwen3_moe mixed": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3_moe mlp_only": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1], "num_experts_per_tok": 1}),
}


def make_checkpoint(directory, case, dtype=torch.float32, **more):
    """A checkpoint of `case`, with `more` keys in its config. Its weights are so large that a wrong theta, window, bias or choice of experts
    changes the logits."""
    family, changes = CASES[case]
    values = {name: value for name, value in (SHAPE | changes).items() if value is not None or name == "sliding_window"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values | more, eos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.to(dtype).save_pretrained(directory)
    return directory


def change_config(directory, **changes):
    """Set keys of a checkpoint's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ours(directory, **changes):
    """Our model with a directory's config (after `changes`) and weights."""
    model = CausalLM(ModelConfig(**read_hf_config(directory) | changes))
    load_pretrained(model, directory)
    return model


def theirs(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")


def pack(documents):
    """Arguments of CausalLM for documents in one pack."""
    lengths = [len(document) for document in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(documents), positions, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


def packed_batch(documents):
    """The same for the engine, with a label at every token but the last of each document."""
    if not documents:
        return empty_batch()
    ids, positions, cu_seqlens, longest = pack(documents)
    labels = torch.cat([F.pad(ids[1:], (0, 1), value=IGNORE) for ids in documents])
    rows = torch.nonzero(labels != IGNORE).flatten()
    return PackedBatch(ids, positions, cu_seqlens, longest, rows, labels[rows], len(ids))


def document(length, seed, vocab=VOCAB):
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))


def same_logits(directory, model):
    """Fails where fp32 logits of one document differ by more than 1e-4."""
    ids = document(LENGTH, 1)
    with torch.no_grad():
        expected = theirs(directory)(ids[None]).logits[0]
        assert expected.std() > 0.5, "logits too small to show a fault"
        torch.testing.assert_close(model(*pack([ids])), expected, rtol=0, atol=1e-4)


def reference_gradients(directory, documents, targets):
    """(logits, gradients by name, in the layout of memory) of documents one by one in transformers."""
    model = theirs(directory)
    logits = torch.cat([model(ids[None]).logits[0] for ids in documents])
    F.cross_entropy(logits, targets, reduction="sum").backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def tensors(directory):
    """Every tensor of a directory's safetensors, by name."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_files(before, after):
    """Fails unless both directories hold the same tensors, to the last bit."""
    before, after = tensors(before), tensors(after)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
