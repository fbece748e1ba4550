"""A backend of vLLM's weight transfer: tensors are handed over as they are, by a trainer in the same process."""

from dataclasses import dataclass

from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "verl_handed"


@dataclass
class NothingToAgreeOn(WeightTransferInitInfo):
    """There is no connection to make."""


@dataclass
class Handed(WeightTransferUpdateInfo):
    """Some of the model's weights.

    Attributes:
        named_tensors: by the names that they have in a checkpoint; they may change again after `finish_weight_update`.
    """

    named_tensors: list[tuple[str, Tensor]]


class HandedWeights(WeightTransferEngine[NothingToAgreeOn, Handed]):
    """Loads each layer as vLLM loads a checkpoint, once all of its weights are there."""

    init_info_cls = NothingToAgreeOn
    update_info_cls = Handed

    def init_transfer_engine(self, init_info: NothingToAgreeOn) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Handed) -> None:
        self.model.load_weights(update_info.named_tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


WeightTransferEngineFactory.register_engine(BACKEND, HandedWeights)
