"""One file an optimizer.

An optimizer is a module with

    build(groups, settings, *, lr, copies) -> Optimizer     see verl.engine.optim
    state_bytes() -> float                                  memory of its state for one weight, for the plan of a run

`groups` are those of torch.optim: "params" and "weight_decay" of each. `settings` is the module's `Settings`, a dataclass of its own keys,
if it has one (see verl.config.own_keys). `copies` are working copies of some parameters in another dtype; an optimizer may leave them
alone. A module with `rounds_bfloat16 = True` can update weights in bfloat16.

Reading the keys of an optimizer imports its module, so the built-in ones import torch where they build.
"""
