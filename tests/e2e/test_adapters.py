"""LoRA through the real command line: trained, resumed bit for bit, small on disk, loaded by peft and by transformers."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import CommandLine, read_rows
from parity import document, make_checkpoint, pack, tensors
from safetensors.torch import load_file, save_file

from xtuner_hydra.__main__ import main
from xtuner_hydra.trained import find

EXACT = ("train/step", "train/loss", "train/grad_norm", "train/lr", "train/total_tokens", "eval/loss")
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 10,
}


def job(base):
    """Values of debug=fast would win over config.json's."""
    return [
        *("debug=fast", "tracking.tensorboard=false", "tracking.wandb.enabled=false", "parallelism.param_dtype=float32"),
        *("model=hf", f"model.pretrained={base}", "model.tokenizer=byte", *(f"model.{name}={value}" for name, value in SHAPE.items())),
        *("model.adapter=lora", "model.lora.rank=4", "model.lora.dropout=0.1", "optimizer.lr=1e-3"),
        *("trainer.total_steps=4", "trainer.eval_interval=2", "checkpoint.interval=2", "checkpoint.keep=9"),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(command line, overrides) of a run of four steps, `whole`, with checkpoints after 2 and 4 and its adapter exported."""
    cli = CommandLine(tmp_path_factory.mktemp("adapters"))
    base = make_checkpoint(cli.directory / "base", "smollm2", torch.bfloat16, vocab_size=300)
    overrides = job(base)
    done = cli(*overrides, "hydra.run.dir=whole")
    assert done.code == 0, done.text
    return cli, overrides


def values(run):
    return [[row.get(name) for name in EXACT] for row in read_rows(run)]


def files(directory):
    """Bytes of what stands in a directory."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def test_the_log_says_what_is_trained(whole):
    text = (whole[0].directory / "whole" / "logs" / "rank0.log").read_text()
    layer = sum(4 * sum(shape) for shape in [(48, 60), (48, 10), (48, 10), (60, 48), (48, 72), (48, 72), (72, 48)])
    total = sum(tensor.numel() for tensor in tensors(whole[0].directory / "base").values()) + 3 * layer
    assert f"parameters: {total / 1e6:.2f} M, trainable: {3 * layer / 1e6:.2f} M" in text
    trainable = re.search(r"trainable: (model.*)", text)[1].split(", ")
    assert len(trainable) == 14
    assert all(re.fullmatch(r"model\.layers\.\[0-2\]\.\w+\.\w+_proj\.lora_[AB]\.weight", name) for name in trainable)


def test_a_resumed_run_repeats_the_whole_one(whole):
    """With dropout: the random generators are part of a checkpoint."""
    cli, overrides = whole
    shutil.copytree(cli.directory / "whole", cli.directory / "cut", symlinks=True)
    shutil.rmtree(cli.directory / "cut" / "checkpoints" / "step-4")
    (cli.directory / "cut" / "status.json").unlink()
    done = cli(*overrides, "hydra.run.dir=cut", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert "step 2/4" in done.out
    assert values(cli.directory / "cut") == values(cli.directory / "whole")
    before, after = (load_file(cli.directory / run / "hf" / "latest" / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_checkpoints_hold_the_adapter_alone(whole):
    adapter = load_file(whole[0].directory / "whole" / "hf" / "latest" / "adapter_model.safetensors")
    size = sum(tensor.nbytes for tensor in adapter.values())
    path = whole[0].directory / "whole" / "checkpoints" / "step-4"
    data = sum(file.stat().st_size for file in path.glob("rank-*.safetensors"))
    assert 3 * size <= data < 3 * size + 4 * 300 * len(adapter)  # weights and two moments; each tensor has a line in the header, steps too
    names = set(json.loads((path / "tensors.json").read_text()))
    assert len([name for name in names if name.startswith("model.")]) == len(adapter)
    assert all("lora_" in name for name in names if name.startswith("model."))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.lora.rank=8", "another model.lora"),
        ("model.lora.targets=[q_proj]", "another model.lora"),
        ("model.adapter=null", "different settings (model.adapter: lora -> None"),
        ("trainer.freeze=[*lora_A*]", "another trainer.freeze"),
        ("model.pretrained=other", "different settings (model.pretrained: "),
    ],
)
def test_another_adapter_or_base_is_refused(whole, other_base, change, words, monkeypatch, capsys):
    cli, overrides = whole
    monkeypatch.chdir(cli.directory)
    monkeypatch.setenv("XDG_CACHE_HOME", cli.environment["XDG_CACHE_HOME"])
    assert main(["plan", *overrides, change, "hydra.run.dir=changed", "checkpoint.resume=whole"]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def other_base(whole):
    """`other`: as the base, but for a few weights."""
    directory = shutil.copytree(whole[0].directory / "base", whole[0].directory / "other")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-1000] + bytes(1000))


def test_what_it_costs_is_said_before(whole, monkeypatch, capsys):
    """Memory for what is trained and what is not; disk for the adapter alone, or for everything."""
    cli, overrides = whole
    monkeypatch.chdir(cli.directory)
    monkeypatch.setenv("XDG_CACHE_HOME", cli.environment["XDG_CACHE_HOME"])
    adapter = 3 * sum(4 * sum(shape) for shape in [(48, 60), (48, 10), (48, 10), (60, 48), (48, 72), (48, 72), (72, 48)])
    base = sum(tensor.numel() for tensor in tensors(cli.directory / "base").values())
    for merge, exported in (("null", 4 * adapter), ("true", 2 * base)):  # the base is bfloat16
        assert main(["plan", *overrides, f"checkpoint.hf_merge={merge}"]) == 0
        text = capsys.readouterr().out
        assert f"{(base + adapter) / 1e6:.2f} M parameters, {adapter / 1e6:.2f} M of them trained" in text
        memory, checkpoint, export = (float(re.search(pattern, text)[1]) * 2**30 for pattern in COSTS)
        assert memory == pytest.approx(16 * adapter + 2 * base, rel=0.01)
        assert (checkpoint, export) == pytest.approx((12 * adapter, exported), rel=0.01)


COSTS = (r"memory +(\S+) GB a rank", r"checkpoints? of (\S+) GB", r"exports? of (\S+) GB")


def test_peft_and_transformers_load_the_export(whole):
    """By its own config: base and adapter; the tokenizer is there; merged by us or by peft, the model is the same."""
    cli, overrides = whole
    export = cli.directory / "whole" / "hf" / "latest"
    assert not (export / "config.json").exists()
    assert transformers.AutoTokenizer.from_pretrained(export)("a")["input_ids"] == [97]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    done = cli(*overrides, "checkpoint.hf_merge=true", "checkpoint.resume=whole/checkpoints/step-2", "hydra.run.dir=merged")
    assert done.code == 0, done.text
    directory = cli.directory / "merged" / "hf" / "latest"
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    ours = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.arange(60, 90)[None]
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(cli.directory / "base", dtype=torch.float32)(ids).logits
    assert (found - expected).abs().mean() < 0.05 * expected.std()  # rounded to the base's dtype
    assert (expected - base).abs().mean() > 1e-3  # it was trained


def test_chat_and_evaluate_read_an_adapter_that_stands_alone(whole):
    """With the base from where its config says: what the run itself says, by its directory, by the export's and in a run without checkpoints."""
    cli = whole[0]
    last = read_rows(cli.directory / "whole")[-1]["eval/loss"]
    bare = cli.directory / "bare"
    shutil.copytree(cli.directory / "whole", bare, symlinks=True)
    shutil.rmtree(bare / "checkpoints")
    said = []
    for model in ("whole", "whole/hf/latest", "bare"):
        # a directory that is no run gets its settings from conf/
        data = ["data=openai_sft", "data.pack_max_length=256", "parallelism.param_dtype=float32"] if "hf" in model else []
        done = cli("evaluate", model, "--json", *data)
        assert done.code == 0, done.text
        assert json.loads(done.out)["eval/loss"] == last
        done = cli("chat", model, "-p", "Hello", "--max-new-tokens", 12)
        assert done.code == 0, done.text
        said.append(done.out)
    assert said[0] == said[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": "/no/where"}, "its base, base_model_name_or_path=/no/where, does not exist"),
        ({"base_model_name_or_path": None}, "there is no base_model_name_or_path"),
        ({"peft_type": "IA3"}, "peft_type is IA3; only LORA is supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa is not supported"),
        ({"target_modules": ".*q_proj"}, "a pattern"),
        ({"r": "many"}, "cannot be read"),
        ({"r": 8}, "other shape: base_model.model.model.layers.0."),
        ({"target_modules": ["q_proj"]}, "unexpected: base_model.model.model.layers.0.mlp."),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(whole, tmp_path, changes, words, capsys):
    export = shutil.copytree(whole[0].directory / "whole" / "hf" / "latest", tmp_path / "export")
    config = json.loads((export / "adapter_config.json").read_text())
    (export / "adapter_config.json").write_text(json.dumps(config | changes))
    assert main(["chat", str(export), "-p", "x", "--max-new-tokens", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_an_adapter_that_peft_made_is_read(whole, tmp_path):
    """Its logits in a model of ours are those of peft."""
    base = whole[0].directory / "base"
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    theirs.save_pretrained(tmp_path)
    trained = find(str(tmp_path))
    assert (trained.model.lora.rank, trained.model.tokenizer) == (3, None)
    ids = document(40, 1, 300)
    with torch.no_grad():
        found, expected = trained.load().float()(*pack([ids])), theirs(ids[None]).logits[0]
        without = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids[None]).logits[0]
    assert (found - expected).abs().mean() < 0.05 * (without - expected).abs().mean()  # computed in the dtype that is fast here


def test_an_adapter_on_random_weights_is_exported_merged_or_refused(cli):
    quick = ["debug=fast", "model.adapter=lora", "tracking=none", "checkpoint.interval=null", "data.eval_path=null"]
    done = cli(*quick, "hydra.run.dir=run")
    assert done.code == 0, done.text
    names = tensors(cli.directory / "run" / "hf" / "latest")
    assert not [name for name in names if "lora" in name]
    done = cli(*quick, "checkpoint.hf_merge=false", "hydra.run.dir=other")
    assert (done.code, "starts from random weights" in done.err) == (2, True)
    done = cli(*quick, "model.lora.targets=[nothing]", "trainer.freeze=[*norm*]", "hydra.run.dir=other")
    assert (done.code, "model.lora.targets=nothing: there is no such layer" in done.err) == (2, True)
    done = cli(*quick, "trainer.freeze=[*.norms.*]", "hydra.run.dir=other")
    assert (done.code, "matches no parameter; names look like" in done.err) == (2, True)
    assert not (cli.directory / "other").exists()


def test_frozen_layers_resume_exactly_without_a_pretrained_base(cli):
    """What is frozen is made again from the seed."""
    quick = [
        "debug=fast",
        "trainer.freeze=[*embed_tokens*,*.layers.0.*]",
        "tracking=none",
        "trainer.total_steps=4",
        "checkpoint.interval=2",
    ]
    assert cli(*quick, "hydra.run.dir=whole").code == 0
    done = cli(*quick, "hydra.run.dir=rest", "checkpoint.resume=whole/checkpoints/step-2")
    assert done.code == 0, done.text
    assert values(cli.directory / "rest") == values(cli.directory / "whole")[2:]
    whole, rest = (tensors(cli.directory / run / "hf" / "latest") for run in ("whole", "rest"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in rest.items())
    assert files(cli.directory / "rest" / "checkpoints" / "step-4") < 12 * 110_000


def test_a_base_that_has_changed_is_refused(whole, tmp_path, capsys):
    """A checkpoint holds the adapter alone."""
    run = shutil.copytree(whole[0].directory / "whole", tmp_path / "run", symlinks=True)
    base = shutil.copytree(whole[0].directory / "base", tmp_path / "base")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(whole[0].directory / "base"), str(base)))
    verbs = [["evaluate", str(run)], ["chat", str(run), "-p", "x", "--max-new-tokens", "1"], ["export", str(run), "--merge", "--to"]]
    for changed in (False, True):
        if changed:
            weights = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
            save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        for verb in (*verbs[:2], [*verbs[2], str(tmp_path / f"to-{changed}")]):
            assert main(verb) == (2 if changed else 0), capsys.readouterr()
            assert ("have changed since" in capsys.readouterr().err) == changed
