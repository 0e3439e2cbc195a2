"""Every family against transformers on small random checkpoints: the numbers, the files, and that a fault would be seen."""

import shutil

import pytest
import torch
from parity import CASES, LENGTH, LLAMA3, document, make_checkpoint, ours, pack, reference_gradients, same_files, same_logits, theirs
from safetensors.torch import load_file, save_file

from xtuner_hydra.build import build_engine
from xtuner_hydra.checkpoint.export import export
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, MoEConfig, ParallelismConfig, RopeScaling, TrainerConfig
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.parallel.runtime import runtime


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """case -> its directory, made once."""
    made = {}

    def directory(case, dtype=torch.float32):
        if (case, dtype) not in made:
            made[case, dtype] = make_checkpoint(tmp_path_factory.mktemp(case.replace(" ", "_")), case, dtype)
        return made[case, dtype]

    return directory


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(checkpoint, case):
    same_logits(checkpoint(case), ours(checkpoint(case)))


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_give_the_logits_and_gradients_of_separate_ones(checkpoint, case):
    documents = [document(length, length) for length in (LENGTH, 1, 40, 2)]
    targets = document(sum(map(len, documents)), 9)
    logits, gradients = reference_gradients(checkpoint(case), documents, targets)
    model = ours(checkpoint(case))
    torch.testing.assert_close(model(*pack(documents)), logits, rtol=0, atol=1e-4)
    model(*pack(documents), rows=torch.arange(len(targets)), targets=targets).backward()
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() < 1e-3 * gradients[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama 3.2", "mistral", "qwen2 window"])
def test_packed_documents_do_not_see_each_other(checkpoint, case, dtype):
    model = ours(checkpoint(case)).to(dtype)
    first, other, second, third = document(33, 1), document(33, 2), document(50, 3), document(9, 4)
    before, after = model(*pack([first, second, third])), model(*pack([other, second, third]))
    assert not torch.equal(before[:33], after[:33])
    assert torch.equal(before[33:], after[33:])  # not one bit may leak


def test_documents_share_experts_but_do_not_see_each_other(checkpoint):
    """An expert's product takes all its rows at once, so the last bit may move; nothing else may."""
    model = ours(checkpoint("qwen3_moe"))
    first, other, second = document(33, 1), document(33, 2), document(50, 3)
    before, after = model(*pack([first, second])), model(*pack([other, second]))
    torch.testing.assert_close(before[33:], after[33:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3_moe"])
def test_bf16_is_near_fp32(checkpoint, case):
    documents, targets = [document(40, 1), document(60, 2)], document(100, 3)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = ours(checkpoint(case)).to(dtype)
        losses.append(model(*pack(documents), rows=torch.arange(100), targets=targets))
        losses[-1].backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
FAULTS = {  # the case, and what is wrong in our config
    "theta": ("llama 3", {"rope_theta": 4.9e5}),
    "theta of a window": ("mistral", {"rope_theta": 1.02e4}),
    "no rope scaling": ("llama 3.2", {"rope_scaling": None}),
    "rope factor": ("llama 3.2", {"rope_scaling": RopeScaling(**LLAMA3 | {"factor": 4.1})}),
    "low_freq_factor": ("llama 3.2", {"rope_scaling": RopeScaling(**LLAMA3 | {"low_freq_factor": 1.05})}),
    "high_freq_factor": ("llama 3.2", {"rope_scaling": RopeScaling(**LLAMA3 | {"high_freq_factor": 4.1})}),
    "original context": ("llama 3.2", {"rope_scaling": RopeScaling(**LLAMA3 | {"original_max_position_embeddings": 65})}),
    "linear for llama3": ("llama 3.2", {"rope_scaling": RopeScaling("linear", 4.0)}),
    "linear factor": ("llama linear", {"rope_scaling": RopeScaling("linear", 3.05)}),
    "window one too narrow": ("mistral", {"sliding_window": 12}),
    "window one too wide": ("mistral", {"sliding_window": 14}),
    "no window": ("mistral", {"sliding_window": None}),
    "a window too many": ("mistral without a window", {"sliding_window": LENGTH - 1}),
    "window of qwen2": ("qwen2 window", {"sliding_window": 17}),
    "no bias in qwen2": ("qwen2", {"family": "llama", "qkv_bias": False, "strict": False}),
    "no bias in qwen3": ("qwen3 tied, biased", {"attention_bias": False, "strict": False}),
    "no norm of queries and keys": ("qwen3", {"family": "llama", "qk_norm": False, "strict": False}),
    "epsilon": ("qwen3", {"rms_norm_eps": 1.5e-5}),
    "tied, but not so": ("smollm2", {"tie_word_embeddings": False, "strict": False}),
    "not tied, but so": ("qwen3", {"tie_word_embeddings": True}),
    "top-k not normalised": ("qwen3_moe", {"moe": MoEConfig(**EXPERTS | {"norm_topk_prob": False})}),
    "top-k normalised": ("qwen3_moe plain", {"moe": MoEConfig(**EXPERTS | {"num_experts_per_tok": 3})}),
    "top-k": ("qwen3_moe", {"moe": MoEConfig(**EXPERTS | {"num_experts_per_tok": 3})}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_in_the_logits(checkpoint, fault):
    """Or the two tests above would prove nothing."""
    case, wrong = FAULTS[fault]
    right = ModelConfig(**read_hf_config(checkpoint(case)))
    assert any(getattr(right, name) != value for name, value in wrong.items())
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        same_logits(checkpoint(case), ours(checkpoint(case), **wrong))


@pytest.fixture(scope="module")
def one_rank():
    with runtime(Config(data=DataConfig(path="unused"), trainer=TrainerConfig(device="cpu"))) as place:
        yield place


def import_and_export(checkpoint, place, to):
    """The directory that a run which starts from `checkpoint` and takes no step exports."""
    config = Config(
        model=ModelConfig(**read_hf_config(checkpoint), pretrained=str(checkpoint)),
        data=DataConfig(path="unused"),
        parallelism=ParallelismConfig(param_dtype="float32"),
    )
    model = build_engine(config, place).model
    return export(to, 1, model, config.model, ByteTokenizer(), keep=1, shard_bytes=20_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_what_is_imported_is_exported_bit_for_bit_under_the_same_names(checkpoint, case, dtype, one_rank, tmp_path):
    before = checkpoint(case, dtype)
    after = import_and_export(before, one_rank, tmp_path)
    same_files(before, after)
    assert read_hf_config(after) == read_hf_config(before)


def test_each_tensor_keeps_its_own_dtype(checkpoint, one_rank, tmp_path):
    """A bf16 model may keep its norms in fp32, as DeepSpeed's and torchtune's checkpoints do."""
    before = tmp_path / "mixed"
    shutil.copytree(checkpoint("qwen3", torch.bfloat16), before)
    (file,) = before.glob("*.safetensors")
    tensors = load_file(file)
    mixed = {name: tensor.float() * 1.001 if "norm" in name else tensor for name, tensor in tensors.items()}
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32, torch.bfloat16}
    save_file(mixed, file, metadata={"format": "pt"})
    same_files(before, import_and_export(before, one_rank, tmp_path / "hf"))


@pytest.mark.parametrize("case", CASES)
def test_the_export_generates_what_the_original_does(checkpoint, case, one_rank, tmp_path):
    before = checkpoint(case)
    after = import_and_export(before, one_rank, tmp_path)
    prompt = document(30, 4)[None]
    tokens = [theirs(directory).generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=-1) for directory in (before, after)]
    assert tokens[0].shape == (1, 46)
    assert torch.equal(*tokens)
