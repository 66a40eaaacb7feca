"""Speculative decode steps on a CPU in one call, of requests that ask for nothing but a temperature.

After a forward a CPU's caches hold weights alone. What stands between the forwards of a step is some hundred small
operators, each of which then takes several times as long as it should, in all a tenth of a step.
"""

from specbackend.attention.native import MOST_ROWS
from specbackend.batch import Accepted, Sequences
from specbackend.kernels.cpu.network import Linear
from specbackend.kernels.cpu.tree_step import Batch, State, TreeStep, tree_step
from specbackend.models.linear import PanelLinear
from specbackend.models.native import NativeLlama, linear_pointers
from specbackend.runner import TargetRunner
from specbackend.sampling import SamplingBatch
from specbackend.speculative.drafter import Drafter
from specbackend.speculative.head_drafter import HeadDrafter
from specbackend.speculative.native_growth import NativeGrower
from specbackend.speculative.tracer import NOBODY, Observer
from specbackend.speculative.tree_decoder import TreeDecoder
from specbackend.speculative.tree_shapes import TreeShapes


class NativeTreeDecoder(TreeDecoder):
    """The same steps as a TreeDecoder's, to the bit."""

    def __init__(self, runner: TargetRunner, drafter: HeadDrafter, num_nodes: int):
        super().__init__(runner, drafter, num_nodes)
        grower, target = drafter.grower, runner.model
        fusion = drafter.head.fusion
        self._step = TreeStep(
            grower.growth,
            target.pointers,
            linear_pointers(target.lm_head),
            Linear() if fusion is None else linear_pointers(fusion),
        )
        kv = runner.kv_pool.kv_LS2GD, grower.kv_pool.layer(0)
        self._state = State.of(runner.table.slots, *kv, drafter.hidden_RD, grower.scratch_RW)

    @staticmethod
    def serves(runner: TargetRunner, drafter: Drafter, num_nodes: int) -> bool:
        if not (isinstance(runner.model, NativeLlama) and isinstance(drafter, HeadDrafter)):
            return False
        is_native = isinstance(drafter.grower, NativeGrower) and isinstance(runner.model.lm_head, PanelLinear)
        return is_native and drafter.head.fuses_natively and num_nodes <= MOST_ROWS[runner.dtype]

    def step(self, at: Sequences, sampling: SamplingBatch, shapes: TreeShapes, observer: Observer = NOBODY) -> Accepted:
        if observer is not NOBODY or sampling.logprob_rows or sampling.has_processors:
            return super().step(at, sampling, shapes, observer)
        places = (at.row_B, at.length_B, at.root_B, at.prefix_slot_BL)
        sizes = (shapes.topk_B, shapes.num_steps_B, shapes.num_nodes_B)
        batch = Batch.of(*places, *sizes, *sampling.noise, shapes.most_steps, shapes.most_nodes, shapes.longest_path)
        return Accepted(*tree_step(self._step, self._state, batch, self.runner.dtype))
