"""A backend for vLLM's weight transfer: a trainer in the same process passes its tensors directly."""

from dataclasses import dataclass

from torch import Tensor
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
    """Load each layer once all of its weights have arrived, in the same way as from a checkpoint."""

    init_info_cls = NoInitInfo
    update_info_cls = PassedTensors

    def init_transfer_engine(self, init_info: NoInitInfo) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: PassedTensors) -> None:
        self.model.load_weights(update_info.named_tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


WeightTransferEngineFactory.register_engine(BACKEND, PassedWeights)
