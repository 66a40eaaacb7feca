"""The engine: schedule -> decode -> commit -> emit.

Where the scheduler is sure to choose the same requests again and the decoder can go on without the host, the next step
is begun before this one's results are read, so that the device never waits for the host. A request that ends with the
one step has then taken part in the other in vain. That does no harm: what it writes there lies behind the end of its
text, in slots that were its own when the step was begun, and whoever gets these slots or its row later does so behind
that step on the device's stream. It takes part in no third step.

In-process for offline use and tests, in a process of its own behind Triton; the same class.

With tp_size > 1 it is one of several that do the same in lockstep, each in its own process with a part of the layers.
The one that the user has leads: it tells the others (`followers`) every call that changes what comes next, and they
make it on their own engine. Nothing else need be told, as the same calls have the same effects: all that decides over a
request is a function of the logits, which are equal on all ranks to the bit, and of seeds. So scheduler, decoders,
drafts, grammars and caches know nothing of ranks.
"""

import logging
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from specbackend.attention.registry import attention_backend
from specbackend.batch import DecodeBatch, ExtendBatch
from specbackend.cache import tree_view
from specbackend.cache.host_tier import HostTier, kv_layout
from specbackend.cache.kv_pool import KVPool, RequestTable
from specbackend.cache.slots import SlotManager
from specbackend.cache.tree_view import TreeView
from specbackend.config import EngineConfig
from specbackend.cuda_graphs import Recorder, graph_batch_sizes, graph_recorder
from specbackend.engine_stats import PLAIN, PREFILL, SPECULATIVE, EngineStats, EngineStep, StepCounts, log_step
from specbackend.errors import ConfigError, InvalidRequest
from specbackend.followers import Followers, exit_after
from specbackend.grammar import GrammarCompiler
from specbackend.models.compiled import compile_steps
from specbackend.models.draft import DraftModel
from specbackend.models.llama import LlamaModel
from specbackend.models.model_config import ModelConfig
from specbackend.models.native import native_draft, native_target
from specbackend.models.quantization import quantize, quantize_draft
from specbackend.models.registry import load_draft
from specbackend.offline import OfflineAnswer, Question, read_questions
from specbackend.radix.client import RadixClient
from specbackend.ranks import ONE_RANK, Ranks, Seat, join_ranks
from specbackend.request import Request, RequestStatus, Update
from specbackend.runner import TargetRunner
from specbackend.sampling.custom import load_processors
from specbackend.sampling_params import Guide, SamplingParams, check_neutral
from specbackend.scheduler import Scheduler
from specbackend.shadow import ShadowRuns
from specbackend.speculative.adaptive_decoder import AdaptiveDecoder
from specbackend.speculative.decoder import Decoder, Step, part
from specbackend.speculative.drafter import CacheRule, Drafter
from specbackend.speculative.head_drafter import HeadDrafter
from specbackend.speculative.native_growth import NativeGrower
from specbackend.speculative.native_step import NativeTreeDecoder
from specbackend.speculative.ngram import NgramDrafter
from specbackend.speculative.plain import PlainDecoder
from specbackend.speculative.standalone import StandaloneDrafter
from specbackend.speculative.tree_decoder import TreeDecoder
from specbackend.speculative.tree_growth import TreeGrower, num_scratch_slots
from specbackend.speculative.tree_shapes import tree_of
from specbackend.step_graphs import RecordedDecoder
from specbackend.tokenizer import Tokenizer

DEFAULT_GRAPH_MAX_BS = 32
WRITE_HOOKS = {"write_through": "on_finish", "write_back": "on_evict"}  # of SlotManager


class Engine:
    """Serves one target checkpoint, with a draft or without.

    Keyword arguments are the server parameters of EngineConfig. Raises ConfigError for a parameter or checkpoint it
    cannot serve, RankError if another rank has ended. Not thread-safe: one thread owns it.
    """

    def __init__(self, *, seat: Seat | None = None, **params):
        """seat: of a rank that follows; users have none, and lead."""
        config = EngineConfig.from_params(params)
        torch.set_num_threads(_num_threads(config))
        self.config = config
        self.device = _device(config, rank=seat.rank if seat else 0)
        target_path = Path(config.model_path)
        self.model_config = ModelConfig.read(target_path).part(target_path, config.tp_size)
        self.dtype = _dtype(config, self.model_config)
        self.context_length = _context_length(config, self.model_config)
        self._seeds = random.Random(config.random_seed)
        self._counts = StepCounts(config)
        self._tokenizer: Tokenizer | None = None
        self._processors = load_processors(config.logits_processors) if config.logits_processors else ()
        self._compiler: GrammarCompiler | None = None
        self._followers: Followers | None = None
        self._tier: HostTier | None = None
        self._ahead: Step | None = None  # begun before the last one's results were known
        if config.tp_size == 1:
            self._load(target_path, ONE_RANK)
        elif seat:
            self._load(target_path, self._join(seat))
        else:
            self._lead(target_path)

    def _join(self, seat: Seat) -> Ranks:
        return join_ranks(seat, self.config.tp_size, self.device, self.config.watchdog_timeout)

    def _lead(self, target_path: Path) -> None:
        """Start the other ranks and load, together with them."""
        if dist.is_initialized():
            raise ConfigError("tp_size: this process is in a torch.distributed group already, which may not be shared")
        params = {**self.config.to_params(), "num_threads": torch.get_num_threads()}
        self._followers = Followers(self.config.tp_size, params)
        with self._followers.lockstep():
            self._followers.wait_for_start()
            self._load(target_path, self._join(self._followers.leaders_seat))

    @torch.inference_mode()
    def _load(self, target_path: Path, ranks: Ranks) -> None:
        config, context = self.config, self.context_length
        num_nodes = config.speculative_num_draft_tokens or 1
        # a tree may reach past the last token that counts, and drafting deeper than the tree that is kept of it
        num_positions = context + max(num_nodes, (config.speculative_num_steps or 0) + 1)
        model = LlamaModel(target_path, self.model_config, self.dtype, self.device, num_positions, ranks)
        if config.quantization:
            quantize(model, config.quantization)
        draft = load_draft(config, model, self.dtype, self.device, num_positions)
        if draft is not None:
            model.captured_layers = draft.captured_layers
            if config.speculative_draft_model_quantization:
                quantize_draft(draft, config.speculative_draft_model_quantization)
        if config.enable_torch_compile:
            _compile_steps(config, model, draft, self.device)
        else:
            model, draft = native_target(model), draft and native_draft(draft)
        num_slots = _num_slots(config, model, draft, context, num_nodes)
        table = RequestTable(config.max_running_requests, context + num_nodes, self.device)
        head_dims = {each.config.head_dim for each in (model, draft) if each}
        attention = attention_backend(config.attention_backend, self.device, self.dtype, head_dims)
        runner = TargetRunner(model, _kv_pool(model, num_slots + 1, self.dtype, self.device), table, attention)
        drafter, cache_rule = None, CacheRule()
        if config.speculative_algorithm:
            drafter = _drafter(config, model, draft, table, attention, num_slots)
            cache_rule = drafter.cache_rule
        self.plain: Decoder = PlainDecoder(runner, drafter if config.speculative_adaptive else None)
        self.decoder = _tree_decoder(runner, drafter, num_nodes) if drafter else self.plain
        if attention.is_on_device and (record := graph_recorder(self.device)):
            self._record(runner, drafter, record)
        if config.speculative_adaptive:
            tree = tree_of(SamplingParams(), config)
            self.decoder = AdaptiveDecoder(self.decoder, self.plain, runner, drafter, tree)
        if config.enable_hierarchical_cache:
            pools = [runner.kv_pool] + ([drafter.grower.kv_pool] if cache_rule.has_draft_kv else [])
            self._tier = _host_tier(config, pools, cache_rule)
        self.slots = SlotManager(
            num_slots,
            cache_rule.successor_keys,
            not config.disable_radix_cache,
            config.radix_eviction_policy,
            **({WRITE_HOOKS[config.hicache_write_policy]: self._tier.keep} if self._tier else {}),
        )
        self.scheduler = Scheduler(
            config,
            self.slots,
            table,
            self.decoder.num_nodes,
            context,
            frozenset(self.model_config.eos_token_ids),
            cache_rule,
            partial(self._tier.bring, self.slots) if self._tier else None,
        )
        self.shadows = ShadowRuns(config.shadow_fraction, self.scheduler)
        ranks.least(0, self.device)  # wait for the last

    def _record(self, runner: TargetRunner, drafter: Drafter | None, record: Recorder) -> None:
        """Decode steps as graphs. Whole ones first: for these, forwards must not be recordings themselves."""
        batch_sizes, tree = _graph_batch_sizes(self.config), tree_of(SamplingParams(), self.config)
        if not batch_sizes:
            return
        plain, decoder = self.plain, self.decoder
        self.plain = self.decoder = RecordedDecoder(plain, None, batch_sizes, record)
        if drafter is None:
            runner.record_forwards(record, batch_sizes, {1})
            return
        self.decoder = RecordedDecoder(decoder, tree, batch_sizes, record) if drafter.is_on_device else decoder
        runner.record_forwards(record, batch_sizes, {1, tree.num_nodes})
        drafter.record_forwards(record, batch_sizes, runner.table.slots.shape[1], tree)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.shadows.has_work

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.config.model_path)
        return self._tokenizer

    @property
    def follower_pids(self) -> list[int]:
        """The processes of the other ranks."""
        return self._followers.pids if self._followers else []

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, naming the field, or QueueFull."""
        self._tell("submit", request)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        self._check(request)
        params = request.params
        request.tree = tree_of(params, self.config)
        request.processors = self._processors
        request.seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        end_ids = {*self.model_config.eos_token_ids, *params.stop_token_ids}
        request.end_ids = tuple(token for token in end_ids if token < self.model_config.vocab_size)
        if params.guide:
            request.grammar = self._grammars(params.guide).start(*params.guide)
        self.scheduler.add(request)
        if self._tier:
            self._tier.prefetch(self.slots, request.text_array(), params.cache_salt)

    def cancel(self, request_id: str) -> None:
        """Drop a request; no update of it follows. Unknown ids are ignored."""
        self._tell("cancel", request_id)
        self._drop(request_id)

    @torch.inference_mode()
    def _drop(self, request_id: str) -> None:
        request = self.scheduler.cancel(request_id)
        if request and request.params.stop:  # this is how a stop string ends an answer
            self.shadows.offer(request)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One scheduling decision and one forward of what it chose; [] when there is nothing to do."""
        if self._followers is None:
            return self._step()
        with self._followers.lockstep(), exit_after(2 * self.config.watchdog_timeout):
            self._followers.tell("step")
            return self._followers.compare(self._step())

    def _step(self) -> list[Update]:
        start = time.perf_counter()
        self.shadows.start(self._queue)
        step = self._begun_ahead() or self._begin()
        if step is None:
            return []
        batch, undrafted_ct = step.batch, step.batch.requests[0].undrafted_ct
        self._ahead = self._begin_next(step)
        accepted = step.read()
        updates = self.shadows.take(batch.requests, self.scheduler.commit(batch, accepted))
        self.shadows.step_aside()
        is_drafted = batch.requests[0].undrafted_ct == undrafted_ct  # batches are drafted as a whole
        self._count(batch, updates, is_drafted, time.perf_counter() - start)
        return updates

    def _begun_ahead(self) -> Step | None:
        """The step in hand, for those of its requests that have not ended since."""
        step, self._ahead = self._ahead, None
        if step is None:
            return None
        rows = [row for row, each in enumerate(step.batch.requests) if each.status is RequestStatus.RUNNING]
        return step if len(rows) == len(step.batch.requests) else part(step, rows)

    def _begin(self) -> Step | None:
        batch = self.scheduler.schedule()
        if batch is None:
            return None
        if isinstance(batch, ExtendBatch):
            accepted = self.decoder.extend(batch)  # draft KV too, even for plain requests: the cache is for everybody
            return Step(batch, lambda: accepted)
        return self._decoder_of(batch).begin(batch)

    def _begin_next(self, step: Step) -> Step | None:
        if not step.goes_on or not self.scheduler.goes_on(step.batch):
            return None
        return self._decoder_of(step.batch).begin_next(step)

    def _decoder_of(self, batch: DecodeBatch) -> Decoder:
        return self.decoder if batch.requests[0].tree is not None else self.plain

    def stats(self) -> EngineStats:
        scheduler, slots, shadows = self.scheduler, self.slots, self.shadows
        num_running = len(scheduler.running) + len(scheduler.prefilling) - shadows.num_running
        return EngineStats(
            num_running=num_running,
            num_prefilling=min(len(scheduler.prefilling), num_running),
            num_waiting=len(scheduler.waiting) - shadows.num_waiting,
            max_running_requests=self.config.max_running_requests,
            free_slots=slots.num_free,
            evictable_slots=slots.tree.num_evictable,
            total_slots=slots.num_slots,
            **self._counts.numbers(),
            shadow_requests=shadows.totals.requests,
            shadow_different_requests=shadows.totals.different_requests,
            shadow_tokens=shadows.totals.tokens,
        )

    def flush_cache(self) -> int:
        """Drop the prefixes that no request uses; returns how many tokens that were."""
        self._tell("flush_cache")
        return self.slots.flush()

    def cache_view(self, limit: int) -> TreeView:
        """The prefix cache's tree with its `limit` largest nodes, for people."""
        return tree_view.view(self.slots.tree, limit)

    def generate(
        self,
        prompt=None,
        sampling_params=None,
        input_ids=None,
        return_logprob=False,
        top_logprobs_num=0,
        logprob_start_len=-1,
        return_text_in_logprobs=False,
        stream=False,
        **others,
    ):
        """Generate like SGLang's offline Engine.

        prompt: str or list of str; or input_ids: list of int or list of lists. sampling_params, return_logprob and
        the two below it: one for all prompts, or a list. Returns one dict, or if there are several prompts or answers
        a list of dicts {"text", "output_ids", "meta_info"}, the answers to one prompt side by side; with stream=True
        an iterator over such dicts, each holding all of one answer so far ("index" in meta_info tells which). SGLang's
        other arguments are refused, unless they change nothing.
        """
        for name, value in others.items():
            check_neutral(name, value)
        single = isinstance(prompt, str) or (input_ids is not None and (not input_ids or isinstance(input_ids[0], int)))
        prompts = [self.tokenizer.encode(text) for text in _listed(prompt, single)] if input_ids is None else None
        prompts = prompts if prompts is not None else _listed(input_ids, single)
        questions = read_questions(
            self.tokenizer,
            prompts,
            sampling_params,
            return_logprob=return_logprob,
            top_logprobs_num=top_logprobs_num,
            logprob_start_len=logprob_start_len,
        )
        growing = self._generate(questions, return_text_in_logprobs)
        if stream:
            return (answer.to_dict() for answer in growing)
        whole = {answer.index: answer for answer in growing}
        answers = [whole[index].to_dict() for index in sorted(whole)]
        return answers[0] if single and len(answers) == 1 else answers

    def shutdown(self) -> None:
        """Drop all requests and end the processes of other ranks. The tensors go with the object.

        What the sidecar was given arrives first.
        """
        self.drop_requests()
        if self._tier:
            self._tier.close()
        if self._followers:
            self._followers.stop()

    @torch.inference_mode()
    def drop_requests(self) -> None:
        """Cancel all, shadows too."""
        self._tell("drop_requests")
        for queue in (self.scheduler.waiting, self.scheduler.prefilling, self.scheduler.running):
            for request in list(queue):
                self._drop(request.request_id)
        self.shadows.drop()

    def _generate(self, questions: list[Question], with_texts: bool) -> Iterator[OfflineAnswer]:
        """Each answer whenever it has grown."""
        if self.has_work:
            raise RuntimeError("generate: the engine is busy; finish or close the stream that is open")
        answers: dict[str, OfflineAnswer] = {}
        try:
            for question in questions:
                for number in range(question.params.n):
                    answer = OfflineAnswer(len(answers), question, self.tokenizer, with_texts)
                    request_id = f"generate-{answer.index}"
                    answers[request_id] = answer
                    with question.in_callers_words():
                        self.submit(Request(request_id, question.input_ids, question.params.of_answer(number)))
            while self.has_work:
                for update in self.step():
                    answer = answers[update.request_id]
                    with answer.question.in_callers_words():
                        answer.take(update)
                    if answer.stopped and not update.finished:
                        self.cancel(update.request_id)
                    yield answer
        finally:  # a prompt was refused, or the caller has left the stream
            self.drop_requests()

    def _tell(self, method: str, *arguments) -> None:
        if self._followers:
            self._followers.tell(method, *arguments)

    def _check(self, request: Request) -> None:
        ids, vocab = request.input_ids, self.model_config.vocab_size
        if not ids:
            raise InvalidRequest("input_ids", "the prompt is empty")
        if len(ids) >= self.context_length:
            raise InvalidRequest("input_ids", f"{len(ids)} tokens leave no room in a context of {self.context_length}")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise InvalidRequest("input_ids", f"{token!r} is not an id of the vocabulary of {vocab}")
        if request.params.n != 1:
            raise InvalidRequest("n", "a request to the engine has one answer; `of_answer` gives each its own")
        request.params.check_vocabulary(vocab, self.model_config.eos_token_ids)
        if request.params.priority and not self.config.enable_priority_scheduling:
            raise InvalidRequest("priority", "is not served by this server (enable_priority_scheduling)")
        if request.params.custom_params is not None and not self._processors:
            raise InvalidRequest("custom_params", "this server has no logits processors of its own (logits_processors)")

    def _grammars(self, guide: Guide) -> GrammarCompiler:
        """Made for the first request that has a guide: with a large vocabulary it takes seconds."""
        if self._compiler is None:
            config = self.model_config
            try:
                self._compiler = GrammarCompiler(self.tokenizer, config.vocab_size, config.eos_token_ids)
            except ValueError as error:  # ConfigError too
                raise InvalidRequest(guide.kind, f"cannot be served with this checkpoint: {error}") from error
        return self._compiler

    def _count(self, batch: ExtendBatch | DecodeBatch, updates: list[Update], is_drafted: bool, seconds: float) -> None:
        """Take note of a step and, if it is time, write a line about it."""
        chunk_lens, kind = [], SPECULATIVE if batch.requests[0].tree and is_drafted else PLAIN
        if isinstance(batch, ExtendBatch):
            chunk_lens, kind = batch.chunk_lens, PREFILL
        step = EngineStep(kind, seconds, batch.requests, chunk_lens, updates, self.scheduler.num_retracted)
        self._counts.note(step)
        if self._counts.is_line_due(step):
            log_step(step, self.stats(), speculates=self.config.tree is not None)


def serving_engine(**params) -> Engine:
    """An Engine beside a tritonserver on the same machine: unless told otherwise, it leaves one core to that.

    Its log goes to stderr, which is the server's log.
    """
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("specbackend").setLevel(EngineConfig.from_params(params).log_level.upper())
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    return Engine(**params)


def _listed(value, single: bool) -> list:
    return [value] if single else list(value or [])


def _num_threads(config: EngineConfig) -> int:
    """Of this rank. All are on one machine."""
    return config.num_threads or max(1, torch.get_num_threads() // config.tp_size)


def _device(config: EngineConfig, rank: int) -> torch.device:
    """Ranks on GPUs have one each, from the configured one on."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {config.device!r} is not a device of torch") from error
    if device.type == "cpu" or config.tp_size == 1:
        return device
    first, count = device.index or 0, torch.cuda.device_count()
    if first + config.tp_size > count:
        raise ConfigError(f"tp_size: {config.tp_size} ranks from {device.type}:{first} on need more than {count} GPUs")
    torch.cuda.set_device(first + rank)
    return torch.device("cuda", first + rank)


def _dtype(config: EngineConfig, model_config: ModelConfig) -> torch.dtype:
    name = model_config.torch_dtype if config.dtype == "auto" else config.dtype
    return getattr(torch, name)


def _context_length(config: EngineConfig, model_config: ModelConfig) -> int:
    longest = min(model_config.max_position_embeddings, model_config.sliding_window or sys.maxsize)
    if config.context_length is None:
        return longest
    if config.context_length > longest:
        raise ConfigError(f"context_length: {config.context_length} is more than the model's {longest}")
    return config.context_length


def _num_slots(config: EngineConfig, model: LlamaModel, draft: DraftModel | None, context: int, num_nodes: int) -> int:
    """Size of the KV pool: as asked for, or what fits into mem_fraction_static, but no more than can be used.

    All ranks have as many.
    """
    smallest = context + num_nodes  # one request of full length always runs
    if config.max_total_tokens is not None:
        if config.max_total_tokens < smallest:
            raise ConfigError(
                f"max_total_tokens: {config.max_total_tokens} cannot hold one request of context_length {context} "
                f"and its tree of {num_nodes}"
            )
        return config.max_total_tokens
    dtype, device = model.lm_head.dtype, model.lm_head.device
    per_slot = sum(_bytes_per_slot(each, dtype) for each in (model, draft) if each)
    sharing = config.tp_size if device.type == "cpu" else 1
    fits = model.ranks.least(int(config.mem_fraction_static * _free_memory(device)) // (sharing * per_slot), device)
    if fits < smallest:
        raise ConfigError(
            f"mem_fraction_static: {config.mem_fraction_static} leaves {fits} slots, {smallest} are needed"
        )
    return min(fits, config.max_running_requests * smallest)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        used = int((limit.parent / "memory.current").read_text())
        available = min(available, int(text) - used)
    return available


def _kv_pool(model: LlamaModel | DraftModel, num_slots: int, dtype: torch.dtype, device) -> KVPool:
    config = model.config
    return KVPool(model.num_kv_layers, num_slots, config.num_key_value_heads, config.head_dim, dtype, device)


def _bytes_per_slot(model: LlamaModel | DraftModel, dtype: torch.dtype) -> int:
    config = model.config
    return KVPool.bytes_per_slot(model.num_kv_layers, config.num_key_value_heads, config.head_dim, dtype)


def _host_tier(config: EngineConfig, pools: list[KVPool], cache_rule: CacheRule) -> HostTier:
    if config.radix_cache_socket is None:
        raise ConfigError("radix_cache_socket: is required by enable_hierarchical_cache, but behind a tritonserver")
    layout = kv_layout(config, pools, cache_rule.successor_keys)
    return HostTier(RadixClient(Path(config.radix_cache_socket), layout), pools)


def _compile_steps(config: EngineConfig, model: LlamaModel, draft: DraftModel | None, device) -> None:
    tree, most = config.tree, config.torch_compile_max_bs
    compile_steps(model, most * (tree.num_nodes if tree else 1), device)
    if draft is not None:
        compile_steps(draft, most * max(tree.num_steps + 1, tree.topk), device)


def _graph_batch_sizes(config: EngineConfig) -> list[int]:
    """Of the decode steps to record, if the device can."""
    most = DEFAULT_GRAPH_MAX_BS if config.cuda_graph_max_bs is None else config.cuda_graph_max_bs
    most = 0 if config.disable_cuda_graph else min(most, config.max_running_requests)
    return graph_batch_sizes(most) if most else []


def _tree_decoder(runner: TargetRunner, drafter: Drafter, num_nodes: int) -> TreeDecoder:
    kind = NativeTreeDecoder if NativeTreeDecoder.serves(runner, drafter, num_nodes) else TreeDecoder
    return kind(runner, drafter, num_nodes)


def _drafter(
    config: EngineConfig, target: LlamaModel, draft: DraftModel | None, table: RequestTable, attention, num_slots: int
) -> Drafter:
    if draft is None:
        return NgramDrafter(
            config.speculative_ngram_min_match_window_size,
            config.speculative_ngram_max_match_window_size,
            table.slots.device,
        )
    steps, topk, rows = config.speculative_num_steps, config.speculative_eagle_topk, len(table.slots)
    lm_head, num_tokens = draft.vocabulary.lm_head, len(draft.vocabulary.target_id_W)
    if topk > num_tokens:
        raise ConfigError(f"speculative_eagle_topk: {topk} is more than the draft's vocabulary of {num_tokens}")
    first_scratch = num_slots + 1  # slot numbers are shared with the target, scratch slots are the draft's own
    num_draft_slots = first_scratch + rows * num_scratch_slots(steps, topk)
    pool = _kv_pool(draft, num_draft_slots, lm_head.dtype, lm_head.device)
    kind = NativeGrower if NativeGrower.serves(draft, attention) else TreeGrower
    grower = kind(draft, pool, attention, rows, first_scratch, steps, topk)
    if config.speculative_algorithm == "STANDALONE":
        return StandaloneDrafter(grower, table)
    return HeadDrafter(draft, grower, target.feature_size)
