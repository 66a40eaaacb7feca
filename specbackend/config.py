"""Server parameters under SGLang's names: one frozen dataclass, checked once, at load. No torch: the adapter
imports this file."""

from __future__ import annotations  # field types stay text, which is what `_parse` reads

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from specbackend.errors import ConfigError

PATHS = ("model_path", "speculative_draft_model_path", "speculative_token_map", "radix_cache_socket")
TREE = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")


@dataclass(frozen=True)
class Algorithm:
    """What a speculative_algorithm needs to be told, and SGLang's defaults for the rest."""

    default_tree: tuple[int, int, int] | None  # TREE; None: the trees come from the text, only their size is set
    draft_path: str  # required, optional or refused
    takes_token_map: bool = False  # only where the draft has the target's LM head


ALGORITHMS = {
    "EAGLE": Algorithm((5, 4, 8), "required", takes_token_map=True),
    "EAGLE3": Algorithm((5, 4, 8), "required"),
    "NEXTN": Algorithm((3, 1, 4), "optional", takes_token_map=True),  # the target's own MTP layer
    "STANDALONE": Algorithm((3, 1, 4), "required"),
    "NGRAM": Algorithm(None, "refused"),
}
ALIASES = {"MTP": "NEXTN"}
NGRAM_DEFAULTS = {
    "speculative_num_draft_tokens": 12,
    "speculative_ngram_min_match_window_size": 1,
    "speculative_ngram_max_match_window_size": 12,
}


@dataclass(frozen=True)
class TreeShape:
    """A draft tree's size; TREE names its fields in requests and server parameters."""

    num_steps: int  # depth of the deepest node; the root has 0
    topk: int  # branches per node
    num_nodes: int  # verified per step, root included

    @property
    def longest_path(self) -> int:
        """Nodes, root included."""
        return min(self.num_steps + 1, self.num_nodes)


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine must know before it loads. `from_params` is the way in; fields are what users may set."""

    model_path: str
    speculative_algorithm: str | None = None  # a key of ALGORITHMS, or MTP; None decodes plainly
    speculative_draft_model_path: str | None = None
    speculative_draft_model_quantization: str | None = (
        None  # int8wo or fp8wo: all weights of the draft, rounded at load
    )
    speculative_token_map: str | None = None  # FR-Spec's freq_*.pt
    speculative_num_steps: int | None = None
    speculative_eagle_topk: int | None = None
    speculative_num_draft_tokens: int | None = None  # nodes of the tree verified per step, root included
    speculative_ngram_min_match_window_size: int | None = None  # tokens that must match before NGRAM proposes
    speculative_ngram_max_match_window_size: int | None = None  # longer matches are no better
    speculative_adaptive: bool | None = None  # steps without a tree where trees do not pay; None: with one rank
    dtype: str = "auto"  # auto: as the checkpoint says; else float32, bfloat16, float16
    quantization: str | None = None  # int8wo or fp8wo: weights of the target's layers, rounded at load
    device: str = "auto"  # auto: cuda if there is one, else cpu
    context_length: int | None = None  # None: the checkpoint's max_position_embeddings
    max_running_requests: int = 48
    max_queued_requests: int = 1024
    max_total_tokens: int | None = None  # slots in the KV pool; None: from mem_fraction_static
    mem_fraction_static: float = 0.5  # of free memory, for the KV pool
    chunked_prefill_size: int = 2048  # prompt tokens per request and step; -1 switches chunking off
    max_prefill_tokens: int = 16384  # prompt tokens per step over all requests, padding included
    schedule_policy: str = "fcfs"  # fcfs, or lpm: longest cached prefix first
    enable_priority_scheduling: bool = False  # serve requests' `priority`; before schedule_policy it decides
    schedule_low_priority_values_first: bool = False
    priority_scheduling_preemption_threshold: int = 10  # whoever is more urgent by more takes a place
    page_size: int = 1
    disable_radix_cache: bool = False
    radix_eviction_policy: str = "lru"  # lru, lfu, or priority: of the requests that used a prefix
    enable_hierarchical_cache: bool = False  # keep prefixes in the radix sidecar, too, and look for them there
    hicache_write_policy: str = "write_through"  # when a request ends; or write_back: when its prefix is evicted
    radix_cache_socket: str | None = None  # the sidecar's; None: of the one that tritonserver's radix_cache starts
    attention_backend: str = "auto"  # torch, native, triton or flashinfer; auto: triton on a GPU, else native
    cuda_graph_max_bs: int | None = None  # largest batch whose decode step is a CUDA graph; None: 32
    disable_cuda_graph: bool = False
    enable_torch_compile: bool = False  # of decode steps
    torch_compile_max_bs: int = 32  # largest batch whose decode step is compiled
    stream_interval: int = 1  # decode steps between two responses of one request
    decode_log_interval: int = 40  # decode steps between two lines in the log; 0: none, and none about prompts
    log_level: str = "info"  # of the engine: debug, info, warning or error
    tp_size: int = 1  # processes that share the layers; on GPUs each has one
    random_seed: int = 0
    logits_processors: str | None = None  # the server's own: module:function, separated by commas; see sampling.custom
    num_threads: int | None = None  # CPU threads of each rank; None: torch's default, less one beside tritonserver
    watchdog_timeout: float = 300.0  # seconds one step may take before the engine is restarted
    shadow_fraction: float = 0.0  # of speculative answers, decoded again without speculation and compared

    def __post_init__(self) -> None:
        self._default("speculative_algorithm", ALIASES.get(self.speculative_algorithm, self.speculative_algorithm))
        self._check_choices()
        self._check_ranges()
        self._check_priorities()
        self._check_hierarchical_cache()
        for name in ("quantization", "speculative_draft_model_quantization", "enable_torch_compile"):
            if self.tp_size > 1 and getattr(self, name):
                raise ConfigError(f"{name}: is served on one rank only, tp_size is {self.tp_size}")
        if self.speculative_algorithm is None:
            self._refuse_speculative("speculative_", "speculative_algorithm is not")
            if self.shadow_fraction:
                raise ConfigError("shadow_fraction: is set, but speculative_algorithm is not")
            return
        self._check_draft()
        if self.speculative_algorithm == "NGRAM":
            self._resolve_ngram()
        else:
            self._refuse_speculative("speculative_ngram_", f"{self.speculative_algorithm} does not look for n-grams")
            self._resolve_tree()
            check_tree(*(getattr(self, name) for name in TREE))
        self._resolve_adaptive()

    @classmethod
    def from_params(cls, params: Mapping[str, object]) -> EngineConfig:
        """Build from keyword arguments or config.pbtxt strings; unknown and contradictory ones raise ConfigError."""
        types = {f.name: f.type for f in fields(cls)}
        if unknown := sorted(set(params) - set(types)):
            raise ConfigError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(sorted(types))}")
        if not params.get("model_path"):
            raise ConfigError("model_path: is required")
        return cls(**{name: _parse(name, value, types[name]) for name, value in params.items()})

    @property
    def tree(self) -> TreeShape | None:
        """None: no speculation."""
        if self.speculative_algorithm is None:
            return None
        num_nodes = self.speculative_num_draft_tokens
        return TreeShape(self.speculative_num_steps or num_nodes - 1, self.speculative_eagle_topk or 1, num_nodes)

    def to_params(self) -> dict[str, object]:
        """The inverse of `from_params`: plain values that survive JSON and msgpack."""
        return asdict(self)

    def resolve_paths(self, base: Path) -> EngineConfig:
        """Read relative checkpoint paths as relative to `base`, the folder that holds the model repository."""
        absolute = {name: str(base / getattr(self, name)) for name in PATHS if getattr(self, name)}
        return EngineConfig(**{**self.to_params(), **absolute})

    def _check_choices(self) -> None:
        _one_of("speculative_algorithm", self.speculative_algorithm, (None, *ALGORITHMS, *ALIASES))
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        for name in ("quantization", "speculative_draft_model_quantization"):
            _one_of(name, getattr(self, name), (None, "int8wo", "fp8wo"))
        _one_of("schedule_policy", self.schedule_policy, ("fcfs", "lpm"))
        _one_of("radix_eviction_policy", self.radix_eviction_policy, ("lru", "lfu", "priority"))
        _one_of("hicache_write_policy", self.hicache_write_policy, ("write_through", "write_back"))
        _one_of("attention_backend", self.attention_backend, ("auto", "torch", "native", "triton", "flashinfer"))
        _one_of("page_size", self.page_size, (1,))
        _one_of("log_level", self.log_level, ("debug", "info", "warning", "error"))

    def _check_ranges(self) -> None:
        for name in ("max_running_requests", "max_queued_requests", "max_prefill_tokens", "stream_interval", "tp_size"):
            _at_least(name, getattr(self, name), 1)
        _at_least("torch_compile_max_bs", self.torch_compile_max_bs, 1)
        _at_least("decode_log_interval", self.decode_log_interval, 0)
        _at_least("priority_scheduling_preemption_threshold", self.priority_scheduling_preemption_threshold, 0)
        for name in ("context_length", "max_total_tokens", "num_threads"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.cuda_graph_max_bs is not None:
            _at_least("cuda_graph_max_bs", self.cuda_graph_max_bs, 0)
        if self.chunked_prefill_size != -1:
            _at_least("chunked_prefill_size", self.chunked_prefill_size, 1)
        if not 0 < self.mem_fraction_static < 1:
            raise ConfigError(f"mem_fraction_static: must lie between 0 and 1, got {self.mem_fraction_static}")
        if not 0 <= self.shadow_fraction <= 1:  # false for nan too
            raise ConfigError(f"shadow_fraction: must lie between 0 and 1, got {self.shadow_fraction}")
        if not self.watchdog_timeout > 0:  # false for nan too
            raise ConfigError(f"watchdog_timeout: must be positive, got {self.watchdog_timeout}")

    def _check_priorities(self) -> None:
        if self.enable_priority_scheduling:
            return
        if self.schedule_low_priority_values_first:
            raise ConfigError("schedule_low_priority_values_first: is set, but enable_priority_scheduling is not")
        if self.radix_eviction_policy == "priority":
            raise ConfigError("radix_eviction_policy: is priority, but enable_priority_scheduling is not set")

    def _check_hierarchical_cache(self) -> None:
        if not self.enable_hierarchical_cache:
            if self.radix_cache_socket is not None:
                raise ConfigError("radix_cache_socket: is set, but enable_hierarchical_cache is not")
        elif self.disable_radix_cache:
            raise ConfigError("enable_hierarchical_cache: is set, but so is disable_radix_cache")
        elif self.tp_size > 1:
            raise ConfigError(f"enable_hierarchical_cache: is served on one rank only, tp_size is {self.tp_size}")

    def _refuse_speculative(self, prefix: str, reason: str) -> None:
        for f in fields(self):
            if f.name.startswith(prefix) and getattr(self, f.name) not in (None, False):
                raise ConfigError(f"{f.name}: is set, but {reason}")

    def _check_draft(self) -> None:
        name, algorithm = self.speculative_algorithm, ALGORITHMS[self.speculative_algorithm]
        if algorithm.draft_path == "required" and self.speculative_draft_model_path is None:
            raise ConfigError(f"speculative_draft_model_path: {name} needs a draft checkpoint")
        if algorithm.draft_path == "refused":
            self._refuse_speculative("speculative_draft_model_", f"{name} drafts without a model")
        if not algorithm.takes_token_map:
            served = ", ".join(key for key, each in ALGORITHMS.items() if each.takes_token_map)
            self._refuse_speculative("speculative_token_map", f"{name} has no use for it; {served} have")

    def _resolve_tree(self) -> None:
        given = [name for name in TREE if getattr(self, name) is not None]
        if not given:
            for name, value in zip(TREE, ALGORITHMS[self.speculative_algorithm].default_tree, strict=True):
                self._default(name, value)
        elif len(given) < 3:
            raise ConfigError(f"set all of {', '.join(TREE)} or none; got only {', '.join(given)}")

    def _resolve_ngram(self) -> None:
        for name in ("speculative_num_steps", "speculative_eagle_topk"):
            self._refuse_speculative(name, "NGRAM takes its trees from the text")
        for name, value in NGRAM_DEFAULTS.items():
            if getattr(self, name) is None:
                self._default(name, value)
        shortest, longest = (getattr(self, f"speculative_ngram_{end}_match_window_size") for end in ("min", "max"))
        _at_least("speculative_num_draft_tokens", self.speculative_num_draft_tokens, 2)
        _at_least("speculative_ngram_min_match_window_size", shortest, 1)
        _at_least("speculative_ngram_max_match_window_size", longest, shortest)

    def _resolve_adaptive(self) -> None:
        """Each rank would go by times of its own, but all must decide alike."""
        if self.speculative_adaptive is None:
            self._default("speculative_adaptive", self.tp_size == 1)
        if self.speculative_adaptive and self.tp_size > 1:
            raise ConfigError(f"speculative_adaptive: is served on one rank only, tp_size is {self.tp_size}")

    def _default(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # still inside construction of a frozen dataclass


def check_tree(num_steps: int, topk: int, num_draft_tokens: int) -> None:
    """Refuse tree shapes that the draft loop could not fill. Raises ConfigError with the numbers."""
    _at_least("speculative_num_steps", num_steps, 1)
    _at_least("speculative_eagle_topk", topk, 1)
    _at_least("speculative_num_draft_tokens", num_draft_tokens, 2)
    if topk == 1 and num_draft_tokens != num_steps + 1:
        raise ConfigError(
            f"speculative_num_draft_tokens: a chain (speculative_eagle_topk 1) of {num_steps} steps has "
            f"{num_steps + 1} nodes, got {num_draft_tokens}"
        )
    candidates = topk + (num_steps - 1) * topk * topk
    if num_draft_tokens - 1 > candidates:
        raise ConfigError(
            f"speculative_num_draft_tokens: {num_steps} steps of topk {topk} draft {candidates} candidates, "
            f"too few for {num_draft_tokens - 1} nodes below the root"
        )


def _parse(name: str, value: object, type_name: str) -> object:
    """Read one value, which config.pbtxt gives as a string, as the type of its field."""
    if "None" in type_name and str(value).lower() in ("", "none"):
        return None
    kind = type_name.split(" |")[0]
    text = str(value).strip()
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return {"int": int, "float": float, "str": str, "NoneType": str}[kind](text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name}: {value!r} is not a valid {kind}") from None


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name}: must be at least {low}, got {value}")
