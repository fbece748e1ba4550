"""One file per optimizer.

An optimizer is a module with

    build(groups, settings, *, lr, copies) -> Optimizer     see verl.engine.optim
    state_bytes() -> float                                  memory of the optimizer state per weight, for the plan of a run

`groups` are parameter groups of torch.optim, each with "params" and "weight_decay". `settings` is an instance of the module's optional
dataclass `Settings` (see verl.config.plugin_settings). `copies` are working copies of some parameters in another dtype; an optimizer may
ignore them. A module with `rounds_bfloat16 = True` can update weights in bfloat16.

Reading the keys of an optimizer imports its module, so the built-in modules import torch only in `build`.
"""
