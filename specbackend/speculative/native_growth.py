"""Growing trees with a head on a CPU in one call, of requests that ask for nothing but a temperature and limits."""

from specbackend.attention.base import AttentionBackend
from specbackend.attention.native import NativeAttention
from specbackend.batch import Sequences
from specbackend.kernels.cpu import pointer
from specbackend.kernels.cpu.growth import Growth, Requests, grow
from specbackend.models.draft import DraftModel
from specbackend.models.linear import PanelLinear
from specbackend.models.native import NativeHead, linear_pointers
from specbackend.sampling import SamplingBatch, pick
from specbackend.speculative.draft_tree import Candidates
from specbackend.speculative.tree_growth import DraftPrefix, TreeGrower
from specbackend.speculative.tree_shapes import TreeShapes


class NativeGrower(TreeGrower):
    """Grows the same trees as a TreeGrower."""

    def __init__(self, model: NativeHead, *others):
        super().__init__(model, *others)
        vocabulary = model.vocabulary
        self.growth = Growth(
            model.pointers,
            linear_pointers(vocabulary.lm_head),
            model.logits_norm and pointer(model.logits_norm.weight),
            pointer(vocabulary.target_id_W),
            pick.LOWEST_FORECAST_TEMPERATURE,
            self.topk,
            self.scratch_RW.shape[1],
        )

    @staticmethod
    def serves(model: DraftModel, attention: AttentionBackend) -> bool:
        is_native = isinstance(model, NativeHead) and isinstance(attention, NativeAttention)
        return is_native and isinstance(model.vocabulary.lm_head, PanelLinear)

    def grow(self, at: Sequences, prefix: DraftPrefix, sampling: SamplingBatch, shapes: TreeShapes) -> Candidates:
        if sampling.before_temperature:
            return super().grow(at, prefix, sampling, shapes)
        places = (prefix.slot_BL, prefix.length_B, self.scratch_RW[at.row_B], at.length_B)
        limits = sampling.limits.tensors if sampling.limits else ()
        requests = Requests.of(*places, shapes.topk_B, shapes.num_steps_B, *sampling.noise, limits, shapes.most_steps)
        return Candidates(*grow(self.growth, requests, prefix.hidden_BD, self.kv_pool.layer(0)))
