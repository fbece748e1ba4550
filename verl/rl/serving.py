"""All that a rollout process does: it loads the engine, and serves the training processes until they are done."""

from contextlib import suppress
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from verl import signals
from verl.config.ppo import PPOConfig, longest_sample
from verl.data.render import Renderer
from verl.dist import has_compiler
from verl.errors import AbandonedError
from verl.rl.bridge import Bridge
from verl.rl.partial_server import PartialServer
from verl.rl.remote_rollout import rollout_options
from verl.rl.rollout_server import Server, or_raise_everywhere
from verl.rollout import Rollout, load_rollout


def serve_rollout(config: PPOConfig, bridge: Bridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the rollout and serve it.

    Raises:
        UserError: the model cannot be loaded, or another process raised an error.
    """
    path, stop_ids = config.model.partial_pretrain, Renderer(tokenizer).stop_ids
    compiles = torch.cuda.is_available() and has_compiler()  # it decodes as long as the run lasts
    options = replace(rollout_options(config), compile=compiles)
    with signals.held(), suppress(AbandonedError):  # after a signal, training processes need this one to end together
        rollout: Rollout = or_raise_everywhere(bridge, lambda: load_rollout(config.rollout.name, path, tokenizer, stop_ids, options))
        server: Server | PartialServer = Server(bridge, rollout)
        if config.rollout.partial:
            server = PartialServer(bridge, rollout, longest_sample(config))
        bridge.exchange((rollout.stop_ids, rollout.positions, rollout.describe()))
        while (messages := server.next())[bridge.sender] is not None:
            server.handle(messages)
        rollout.close()
