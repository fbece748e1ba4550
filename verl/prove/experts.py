"""Which modules of a model route tokens to experts."""

from transformers import PreTrainedModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
ROUTER_NAMES = ("gate", "router", "gate_proj_router", "classifier", "wg")


def expert_count(model: PreTrainedModel) -> int:
    """Return the number of experts of a layer that the config states; 0 without experts."""
    config = model.config.get_text_config()
    return max((int(value) for name in EXPERTS if isinstance(value := getattr(config, name, None), int)), default=0)


def routers(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules with one output for each expert, which are named as routers are."""
    experts = expert_count(model)
    if not experts:
        return []
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        last = name.rpartition(".")[2]
        is_one = weight is not None and weight.ndim == 2 and weight.shape[0] >= experts and weight.shape[0] <= 2 * experts
        if is_one and any(part in ROUTER_NAMES for part in name.split(".")) and last != "up_proj":
            found.append(name)
    return found
