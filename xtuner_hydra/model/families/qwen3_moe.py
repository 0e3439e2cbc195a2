"""Qwen3 with a mixture of experts. In the files each expert has its own tensors; in memory a layer's experts are two (model/experts.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from xtuner_hydra.config.schema import ModelConfig, MoEConfig
from xtuner_hydra.model.families.family import Family, HFConfig, Piece, biased, whole, window_size


def _read_moe(config: HFConfig) -> MoEConfig:
    layers = config.get("mlp_only_layers", [])
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise config.error(f"mlp_only_layers={layers!r} is not a list of layers")
    experts = "num_local_experts" if config.get("num_local_experts") else "num_experts"  # the new and the old spelling
    return MoEConfig(
        num_experts=config.size(experts),
        num_experts_per_tok=config.size("num_experts_per_tok"),
        moe_intermediate_size=config.size("moe_intermediate_size"),
        norm_topk_prob=config.switch("norm_topk_prob"),
        router_aux_loss_coef=0.0 if config.get("router_aux_loss_coef") == 0 else config.number("router_aux_loss_coef", 0.001),
        decoder_sparse_step=config.size("decoder_sparse_step", 1),
        mlp_only_layers=layers,
    )


def _window(config: HFConfig) -> int | None:
    """Unlike the dense Qwen3, all layers have it or none."""
    return window_size(config) if config.switch("use_sliding_window") else None


def _write(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    return {
        **asdict(model.moe),
        "output_router_logits": False,
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
    }


def _pieces(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """experts.gate_up_proj (experts, 2 x inner, hidden) holds every expert's gate projection, then its up projection; experts.down_proj the rest."""
    prefix, dot, tail = name.rpartition(".experts.")
    if not dot:
        yield from whole(name, shape)
        return
    for expert in range(shape[0]):
        if tail == "down_proj":
            yield f"{prefix}.experts.{expert}.down_proj.weight", (expert,)
        else:
            inner = shape[1] // 2
            yield f"{prefix}.experts.{expert}.gate_proj.weight", (expert, slice(0, inner))
            yield f"{prefix}.experts.{expert}.up_proj.weight", (expert, slice(inner, 2 * inner))


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    key_value_heads=4,
    fixed={"qk_norm": True},
    open={"attention_bias": biased, "sliding_window": _window, "moe": _read_moe},
    write_switches=_write,
    pieces=_pieces,
)
