"""What is trained: everything, small matrices beside frozen weights (LoRA, Hu et al. 2021), or all that `trainer.freeze` leaves.

An adapted linear layer gives x W^T + alpha / rank * dropout(x) A^T B^T, W frozen. W keeps its name, NAME.weight; the adapter is
NAME.lora_A.weight (rank, in) and NAME.lora_B.weight (out, rank), which are peft's names without its prefix. B starts at zero, so that
training begins at the base. In a model with experts only the attention can have adapters: router and experts are not linear layers here, and
peft takes the names of an MLP's layers to be those of the experts."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtuner_hydra.config.schema import Config, LoRAConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.experts import Experts
from xtuner_hydra.model.transformer import CausalLM

ALL = "all-linear"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, in place of `base`, whose weight and bias it takes over: x (T, in) -> (T, out)."""

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device)
        self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        # scaled while it is narrow, and added within the product
        narrow = self.lora_A(self.lora_dropout(x)) * self.scale
        return torch.addmm(super().forward(x), narrow, self.lora_B.weight.T)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in) fp32, whole on every rank. Collective if it is sharded."""
        return whole(self.lora_B.weight).float() @ whole(self.lora_A.weight).float() * self.scale


def blueprint(config: Config) -> CausalLM:
    """The model on the meta device, with the adapter that `config` asks for, and frozen parameters marked as such.

    Raises ConfigError for a target or a pattern that matches nothing, and if nothing is left to train."""
    with torch.device("meta"):
        model = CausalLM(config.model)
    set_trainable(model, config)
    return model


def set_trainable(model: nn.Module, config: Config) -> None:
    """Add the adapter and freeze, in place; on any device, before sharding."""
    if config.model.adapter == "lora":
        _add_lora(model, config.model.lora)
    _freeze(model, config.trainer.freeze)


def is_adapter(name: str) -> bool:
    """True for the names of an adapter's parameters."""
    return name.endswith((LORA_A, LORA_B))


def fits(layer: str, target: str) -> bool:
    """Whether a target means the layer of this full name: it is the name or the end of it, in whole words (as in peft)."""
    return layer == target or layer.endswith(f".{target}")


def target_names(config: LoRAConfig) -> list[str]:
    """`targets` as a list."""
    return config.targets if isinstance(config.targets, list) else [config.targets]


def adapted_names(model: nn.Module) -> list[str]:
    """Full names of the layers that have an adapter."""
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, full value) of every parameter, once, with the adapter added to its layers' weights in fp32. Collective."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        value = whole(parameter)
        yield name, value.float() + layer.delta() if isinstance(layer, LoRALinear) and parameter is layer.weight else value


def whole(parameter: Tensor) -> Tensor:
    """A parameter's full value, gathered if it is sharded (collective then)."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _add_lora(model: nn.Module, config: LoRAConfig) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = dict(model.named_modules())
    for name in {name: None for target in target_names(config) for name in _layers(modules, target)}:
        parent, _, child = name.rpartition(".")
        base = modules[name]
        assert isinstance(base, nn.Linear)
        setattr(modules[parent], child, LoRALinear(base, config))


def _layers(modules: dict[str, nn.Module], target: str) -> list[str]:
    """Names of the layers that a target means, or ConfigError."""
    experts = any(isinstance(module, Experts) for module in modules.values())
    # the head has its own class
    linear = [name for name, module in modules.items() if type(module) is nn.Linear and not (experts and ".mlp." in name)]
    words = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if target == ALL:
        if experts:
            raise _refusal(target, f"experts cannot have adapters here; name the layers that can: [{words}]")
        return linear
    found = [name for name in modules if fits(name, target)]
    if not found:
        raise _refusal(target, f"there is no such layer; there are {words}")
    if others := [name for name in found if name not in linear]:
        raise _refusal(target, f"{others[0]} cannot have an adapter; the layers that can are {words}")
    return found


def _refusal(target: str, why: str) -> ConfigError:
    return ConfigError("model.lora.targets", target, why)


def _freeze(model: nn.Module, patterns: list[str]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied head has both its names here
    for pattern in patterns:
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            raise ConfigError("trainer.freeze", pattern, f"matches no parameter; names look like {', '.join([*parameters][:3])}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("trainer.freeze", " ".join(patterns), "nothing is left to train; remove a pattern")
