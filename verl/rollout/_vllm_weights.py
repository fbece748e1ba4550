"""A backend for vLLM's weight transfer: a trainer in the same process passes its tensors directly. For vLLM 0.26 to 0.33."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "verl_passed"


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Empty, because there is no connection to set up."""


@dataclass
class PassedTensors(WeightTransferUpdateInfo):
    """Some of the model's weights.

    Attributes:
        named_tensors: tensors with their names in the checkpoint; they must not change until `finish_weight_update`.
    """

    named_tensors: list[tuple[str, Tensor]]


class PassedWeights(WeightTransferEngine[NoInitInfo, PassedTensors]):
    """Load each layer once all of its weights have arrived, in the same way as from a checkpoint.

    Layers ask for vLLM's settings while they load. From 0.27 on, the worker that calls these methods sets them too.
    """

    init_info_cls = NoInitInfo
    update_info_cls = PassedTensors

    def init_transfer_engine(self, init_info: NoInitInfo) -> None: ...

    def start_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: PassedTensors) -> None:
        with set_current_vllm_config(self.vllm_config):
            self.model.load_weights(update_info.named_tensors)

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model, self.model_config)

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> NoReturn:
        """Abstract in 0.26 and 0.27, and without a caller here: the trainer passes its tensors to `LLM.update_weights`."""
        raise NotImplementedError

    def shutdown(self) -> None: ...


WeightTransferEngineFactory.register_engine(BACKEND, PassedWeights)
