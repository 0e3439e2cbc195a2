"""Weights from safetensors into a model, lazily: of each tensor a rank reads the part that it keeps, one part in memory at a time.

Which tensors a parameter is made of, its family says (`families/`). Names, shapes and dtypes are compared with the files' headers before
anything is filled."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from xtuner_hydra.config.names import is_plain, split_override
from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.adapters import is_adapter
from xtuner_hydra.model.families import family_of, read_hf_config
from xtuner_hydra.model.families.family import KEY, HFConfig, read_json
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.transformer import CausalLM

log = logging.getLogger("xtuner_hydra")

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"  # old Llama checkpoints hold it; it follows from the config
_ROWS = 4096  # of embedding and head compared at a time
FEW = 5
"""Names of a kind in an error."""
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file that is fingerprinted

Region = list[tuple[int, int]]
"""(start, stop) in every dimension of a parameter."""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, as its header has it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Slot:
    """Where in the model a stored tensor belongs."""

    parameter: str
    region: Region
    shape: tuple[int, ...]


@dataclass
class _Faults:
    """What does not fit, as words for a message, and the parameters that are left without a value in part or in full."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unfilled: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def text(self, most: int) -> str:
        """The first `most` of each kind."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "other shape": self.misshapen}
        return "; ".join(f"{kind}: {some_of(names, most)}" for kind, names in kinds.items() if names)


def check_pretrained(config: ModelConfig) -> None:
    """Read the headers in `config.pretrained`: ConfigError where its files, names, shapes or dtypes do not fit, before anything is built."""
    family_of(config)
    if config.pretrained is None:
        return
    directory = Path(config.pretrained)
    if "auto_map" in HFConfig.read(directory).values:
        log.warning(f"{directory}: config.json names code of its own (auto_map), which is never run; the decoder here is used")
    with torch.device("meta"):
        model = CausalLM(config)
    stored = _headers(directory)
    _refuse_faults(_faults(model, directory, stored, _slots(model, stored)), model, directory)
    if config.tie_word_embeddings and {_EMBEDDING, _HEAD} <= stored.keys():
        _refuse_untied(directory, stored)


def refuse_other_settings(config: ModelConfig, overrides: Sequence[str]) -> None:
    """ConfigError where `config` computes otherwise than the model that config.json in `config.pretrained` describes, in what the tensors do not
    show: weights would load, and give other numbers than they were trained to give.

    What one of `overrides` (`model.rope_theta=1e6`) sets is meant so: a warning tells of it, and of everything with `config.strict` off. A
    config.json that cannot be read is not an error."""
    if config.pretrained is None:
        return
    try:
        theirs = read_hf_config(config.pretrained)
    except ConfigError as error:
        log.warning(f"the model's settings are not compared with those of the weights: {error}")
        return
    keys = [key for key, _ in map(split_override, overrides)]
    by_hand = []
    for key, ours, its in _differences(config, theirs):
        if not config.strict or any(typed == key or typed.startswith(f"{key}.") for typed in keys):
            by_hand.append(f"{key}={ours} (config.json: {its})")
        else:
            remedy = f"model=hf takes such settings from there; set {key}={ours} on the command line to override it"
            raise ConfigError(key, ours, f"the weights in {config.pretrained} were trained with {its} (its config.json); {remedy}")
    if by_hand:
        log.warning(f"{config.pretrained}: its weights were trained with other settings than {', '.join(by_hand)}")


def _differences(config: ModelConfig, theirs: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value of `config`, value of config.json) of every setting that changes numbers and no tensor's shape."""
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window"):
        if getattr(config, name) != theirs[name]:
            yield f"model.{name}", getattr(config, name), theirs[name]
    if config.moe is not None and theirs["moe"] is not None:
        for name in ("num_experts_per_tok", "norm_topk_prob"):
            if getattr(config.moe, name) != getattr(theirs["moe"], name):
                yield f"model.moe.{name}", getattr(config.moe, name), getattr(theirs["moe"], name)


def load_pretrained(model: CausalLM, directory: Path | str, *, seed: int = 0) -> None:
    """Fill every parameter (plain or DTensor) from the directory's safetensors.

    Raises ConfigError before anything is filled where names, shapes or dtypes do not fit. With `model.config.strict` off, what is missing or
    of another shape gets its initial value from `seed`, and a warning lists it. So do, without one, the parameters of an adapter."""
    directory = Path(directory)
    stored = _headers(directory)
    slots = _slots(model, stored)
    faults = _faults(model, directory, stored, slots)
    _refuse_faults(faults, model, directory)
    if faults:
        everything = faults.text(len(stored) + len(slots))
        log.warning(
            f"{directory} does not fit the model config ({everything}); model.strict=false: what it lacks starts from random values"
        )
    parameters = dict(model.named_parameters())
    initialise(model, seed, only=faults.unfilled | set(filter(is_adapter, parameters)))
    kept = {name: _local(parameter) for name, parameter in parameters.items()}
    fitting = sorted(
        (name for name in slots if name in stored and stored[name].shape == slots[name].shape), key=lambda name: stored[name].file
    )
    for file, names in groupby(fitting, key=lambda name: stored[name].file):
        with _open(file) as tensors:
            for name in names:
                _copy(kept[slots[name].parameter], slots[name].region, tensors.get_slice(name))


def keep_frozen_as_stored(model: CausalLM, directory: Path | str) -> None:
    """Give every frozen parameter the dtype that its tensors have in the files, in place of fp32: no bit is lost, and a bfloat16
    base takes 2 bytes a weight, not 4. `model` on the meta device, before sharding."""
    stored = _headers(Path(directory))
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, slot in _slots(model, stored).items():
        fits = name in stored and stored[name].shape == slot.shape
        # what starts from random values is fp32
        dtypes.setdefault(slot.parameter, set()).add(getattr(torch, _DTYPES[stored[name].dtype]) if fits else torch.float32)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and len(found := dtypes.get(name, set())) == 1:
            parameter.data = parameter.data.to(found.pop())


def fingerprint(directory: Path | str) -> str:
    """A hash of the weights in a directory: of each file's size and header, and of samples spread over it, so that it takes no time."""
    digest = hashlib.sha256()
    for file in _weight_files(Path(directory)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
            for number in range(1, _SAMPLES + 1):
                stream.seek(max(0, size * number // _SAMPLES - _SAMPLE_BYTES))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def pretrained_dtype(directory: Path | str) -> str:
    """`float32`, `bfloat16` or `float16`: the dtype of the weights in the directory's safetensors (the embedding's)."""
    stored = _headers(Path(directory))
    if _EMBEDDING not in stored:
        raise ConfigError(KEY, directory, f"its safetensors hold no {_EMBEDDING}; is this a language model that save_pretrained wrote?")
    return _DTYPES[stored[_EMBEDDING].dtype]


def stored_dtypes(directory: Path | str) -> dict[str, torch.dtype]:
    """The dtype of every tensor in the directory's safetensors, by its name there: a bf16 model may keep norms or routers in fp32."""
    return {name: getattr(torch, _DTYPES[tensor.dtype]) for name, tensor in _headers(Path(directory)).items() if tensor.dtype in _DTYPES}


def _slots(model: CausalLM, stored: Mapping[str, _Stored]) -> dict[str, _Slot]:
    """Every tensor that the model wants, by its name in the files. A parameter that is in the files under its own name is one tensor
    there (transformers' layout in memory, which a directory may have too)."""
    family = family_of(model.config)
    slots = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        shape = tuple(parameter.shape)
        for piece, index in [(name, ())] if name in stored else family.pieces(name, shape):
            parts = [one if isinstance(one, slice) else slice(one, one + 1) for one in index]
            region = [(part.start, part.stop) for part in parts] + [(0, size) for size in shape[len(index) :]]
            sizes = tuple(
                stop - start for number, (start, stop) in enumerate(region) if number >= len(index) or isinstance(index[number], slice)
            )
            slots[piece] = _Slot(name, region, sizes)
    return slots


def _faults(model: CausalLM, directory: Path, stored: Mapping[str, _Stored], slots: Mapping[str, _Slot]) -> _Faults:
    if odd := sorted({tensor.dtype for name, tensor in stored.items() if name in slots} - _DTYPES.keys()):
        raise ConfigError(KEY, directory, f"its weights are {', '.join(odd)}; only {', '.join(_DTYPES.values())} can be trained")
    tolerated = {_HEAD} if model.config.tie_word_embeddings else set()  # some files hold the embedding a second time
    faults = _Faults(
        missing=sorted(slots.keys() - stored.keys()),
        unexpected=sorted(name for name in stored.keys() - slots.keys() - tolerated if not name.endswith(_COMPUTED)),
    )
    for name in sorted(slots.keys() & stored.keys()):
        if stored[name].shape != slots[name].shape:
            faults.misshapen.append(f"{name} is {stored[name].shape}, not {slots[name].shape}")
            faults.unfilled.add(slots[name].parameter)
    faults.unfilled |= {slots[name].parameter for name in faults.missing}
    return faults


def _refuse_faults(faults: _Faults, model: CausalLM, directory: Path) -> None:
    if not faults or not model.config.strict:
        return
    remedy = (
        "model=hf takes every shape that nothing else sets (an override, debug=fast) from the directory's config.json; "
        "model.strict=false starts what is missing from random values"
    )
    if faults.missing == [_HEAD]:
        remedy = "set model.tie_word_embeddings=true if the embedding is meant to be the head too"
    raise ConfigError(KEY, directory, f"its weights do not fit the model config ({faults.text(FEW)}); {remedy}")


def _refuse_untied(directory: Path, stored: Mapping[str, _Stored]) -> None:
    """A tied head that stands in the files must be the embedding, or one of the two would be thrown away."""
    with ExitStack() as stack:
        embedding, head = (stack.enter_context(_open(stored[name].file)).get_slice(name) for name in (_EMBEDDING, _HEAD))
        rows = stored[_EMBEDDING].shape[0]
        same = stored[_HEAD].shape == stored[_EMBEDDING].shape and all(
            torch.equal(embedding[start : start + _ROWS], head[start : start + _ROWS]) for start in range(0, rows, _ROWS)
        )
    if not same:
        raise ConfigError(
            KEY,
            directory,
            "the embedding is to be the head too, but its files hold another lm_head.weight; set model.tie_word_embeddings=false",
        )


def _local(parameter: Tensor) -> tuple[Tensor, Region]:
    """The part of a parameter that this rank keeps, and where in the whole it stands."""
    whole = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return parameter.detach(), whole
    return parameter.to_local().detach(), [_kept(parameter, dim, size) for dim, (_, size) in enumerate(whole)]


def _kept(parameter: DTensor, dim: int, size: int) -> tuple[int, int]:
    """(start, stop) of what this rank keeps of one dimension: numbers sharded as the dimension is, so that DTensor's own rule decides."""
    placements = [Shard(0) if placement.is_shard(dim) else Replicate() for placement in parameter.placements]
    mesh = parameter.device_mesh
    numbers = distribute_tensor(torch.arange(size, device=mesh.device_type), mesh, placements, src_data_rank=None).to_local()
    if not len(numbers):
        return 0, 0
    start, stop = int(numbers[0]), int(numbers[-1]) + 1
    assert stop - start == len(numbers), "a part with gaps has no (start, stop)"
    return start, stop


@torch.no_grad()
def _copy(kept: tuple[Tensor, Region], region: Region, stored: Any) -> None:
    """Read what a stored tensor (of `region` in the whole parameter) and the part that is kept have in common, and nothing else."""
    local, mine = kept
    common = [(max(start, first), min(stop, last)) for (start, stop), (first, last) in zip(region, mine, strict=True)]
    if any(start >= stop for start, stop in common):
        return
    target = local[tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(common, mine, strict=True))]
    # an expert's tensor lacks the leading dimension, which is 1 long in its region
    skipped = len(region) - len(stored.get_shape())
    source = tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(common, region, strict=True))[skipped:]
    target.copy_(stored[source].view(target.shape))


def _headers(directory: Path) -> dict[str, _Stored]:
    """Every tensor of the directory's safetensors, by name."""
    stored: dict[str, _Stored] = {}
    for file in _weight_files(directory):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_slice(name)
                stored[name] = _Stored(file, tuple(tensor.get_shape()), tensor.get_dtype())
    return stored


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files as transformers finds them: one with all weights, or those of an index, which may be left over beside that one."""
    if not (directory / _SINGLE).is_file() and (directory / _INDEX).is_file():
        names = read_json(directory, _INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ConfigError(KEY, directory, f"{_INDEX} has no weight_map, from names of tensors to names of files")
        if strange := [name for name in names.values() if not isinstance(name, str) or not is_plain(name)]:
            raise ConfigError(KEY, directory, f"{_INDEX} names {strange[0]!r}; weights are files in the directory itself")
        files = [directory / name for name in sorted(set(names.values()))]
    else:
        files = [directory / _SINGLE]
    if missing := [file.name for file in files if not file.is_file()]:
        if pickled := sorted({path.suffix for path in directory.glob("*")} & _PICKLED):
            raise ConfigError(
                KEY,
                directory,
                f"its weights are pickled ({pickled[0]}), which can run code and are not read; convert them with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
            )
        raise ConfigError(KEY, directory, f"it lacks {some_of(missing, FEW)}; is the download complete?")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(KEY, file.parent, f"{file.name} cannot be read ({error}); is the download complete?") from None


def some_of(names: list[str], most: int = FEW) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
