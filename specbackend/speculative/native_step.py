"""Speculative decode steps on a CPU in one call, of requests that ask for nothing but a temperature and limits.

After a forward a CPU's caches hold weights alone. What stands between the forwards of a step is some hundred small
operators, each of which then takes several times as long as it should, in all a tenth of a step.
"""

from specbackend.attention.native import MOST_ROWS
from specbackend.batch import Accepted, DecodeBatch, traced_rows
from specbackend.kernels.cpu.network import Linear
from specbackend.kernels.cpu.tree_step import Batch, State, TreeStep, tree_step
from specbackend.models.linear import PanelLinear
from specbackend.models.native import NativeLlama, linear_pointers
from specbackend.runner import TargetRunner
from specbackend.sampling import has_processors
from specbackend.sampling.limits import limits_of
from specbackend.sampling.pick import signed
from specbackend.speculative.drafter import Drafter
from specbackend.speculative.head_drafter import HeadDrafter
from specbackend.speculative.native_growth import NativeGrower
from specbackend.speculative.tree_decoder import TreeDecoder


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

    def decode(self, batch: DecodeBatch) -> Accepted:
        requests = batch.requests
        if traced_rows(requests) or has_processors(requests) or any(r.params.logprobs is not None for r in requests):
            return super().decode(batch)
        trees = [request.tree for request in requests]
        self.runner.table.flush()
        native = Batch.of(
            rows=[request.row for request in requests],
            lengths=[request.num_computed for request in requests],
            roots=[request.output_ids[-1] for request in requests],
            topks=[tree.topk for tree in trees],
            num_steps=[tree.num_steps for tree in trees],
            num_nodes=[tree.num_nodes for tree in trees],
            longest_path=max(tree.longest_path for tree in trees),
            seeds=[signed(request.seed) for request in requests],
            temperatures=[request.params.temperature for request in requests],
            limits=[limits_of(request.params) for request in requests],
        )
        return Accepted(*tree_step(self._step, self._state, native, self.runner.dtype))
