"""Server parameters: what is read, what is refused, and that every refusal names the parameter."""

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from specbackend.config import EngineConfig, check_tree
from specbackend.errors import ConfigError

BASE = {"model_path": "/models/target"}
EAGLE3 = {**BASE, "speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "/models/draft"}
NGRAM = {**BASE, "speculative_algorithm": "NGRAM"}
TREE_NAMES = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")


def tree(*shape: int) -> dict:
    return {**EAGLE3, **dict(zip(TREE_NAMES, shape, strict=True))}


def test_defaults_decode_plainly():
    config = EngineConfig.from_params(BASE)
    assert config.speculative_algorithm is None
    assert [getattr(config, name) for name in TREE_NAMES] == [None] * 3


def test_default_tree_is_sglangs():
    config = EngineConfig.from_params(EAGLE3)
    assert [getattr(config, name) for name in TREE_NAMES] == [5, 4, 8]


def test_strings_as_config_pbtxt_gives_them():
    config = EngineConfig.from_params(
        {
            **{name: str(value) for name, value in tree(3, 2, 7).items()},
            "max_running_requests": " 12 ",
            "mem_fraction_static": "0.25",
            "disable_radix_cache": "True",
            "chunked_prefill_size": "-1",
            "context_length": "none",
            "num_threads": "",
            "tp_size": "1",
            "enable_torch_compile": "false",
            "speculative_ngram_min_match_window_size": "None",
        }
    )
    assert [getattr(config, name) for name in TREE_NAMES] == [3, 2, 7]
    assert (config.max_running_requests, config.mem_fraction_static, config.chunked_prefill_size) == (12, 0.25, -1)
    assert config.disable_radix_cache is True
    assert config.context_length is None and config.num_threads is None


@pytest.mark.parametrize("text, value", [("1", True), ("0", False), ("false", False), ("TRUE", True)])
def test_bools(text, value):
    assert EngineConfig.from_params({**BASE, "disable_radix_cache": text}).disable_radix_cache is value


@pytest.mark.parametrize("base", [EAGLE3, NGRAM], ids=["eagle3", "ngram"])
def test_speculation_adapts_unless_told_otherwise_or_spread_over_ranks(base):
    assert EngineConfig.from_params(base).speculative_adaptive is True
    assert EngineConfig.from_params({**base, "speculative_adaptive": "false"}).speculative_adaptive is False
    spread = EngineConfig.from_params({**base, "tp_size": 2})
    assert spread.speculative_adaptive is False
    assert EngineConfig.from_params(spread.to_params()) == spread
    with pytest.raises(ConfigError, match=r"^speculative_adaptive: is served on one rank only, tp_size is 2"):
        EngineConfig.from_params({**base, "speculative_adaptive": True, "tp_size": 2})
    with pytest.raises(ConfigError, match=r"^speculative_adaptive: is set, but speculative_algorithm is not"):
        EngineConfig.from_params({**BASE, "speculative_adaptive": True})
    assert not EngineConfig.from_params({**BASE, "speculative_adaptive": False}).speculative_adaptive


@pytest.mark.parametrize("none", ["none", "None", "", None])
def test_no_algorithm_in_every_spelling(none):
    assert EngineConfig.from_params({**BASE, "speculative_algorithm": none}).speculative_algorithm is None


REFUSED = [
    ("model_path", ""),
    ("model_path", None),
    ("speculative_algorithm", "MEDUSA"),
    ("speculative_algorithm", "eagle3"),
    ("dtype", "int8"),
    ("quantization", "fp8"),
    ("schedule_policy", "random"),
    ("schedule_low_priority_values_first", True),  # there are no priorities here
    ("radix_eviction_policy", "priority"),
    ("radix_eviction_policy", "fifo"),
    ("priority_scheduling_preemption_threshold", -1),
    ("hicache_write_policy", "write_through_selective"),
    ("radix_cache_socket", "/run/radix.sock"),  # who would read it
    ("attention_backend", "fa3"),
    ("page_size", 16),
    ("max_running_requests", 0),
    ("max_running_requests", "many"),
    ("max_running_requests", "1.5"),
    ("max_running_requests", True),
    ("max_running_requests", None),
    ("max_queued_requests", 0),
    ("max_prefill_tokens", -1),
    ("stream_interval", 0),
    ("context_length", 0),
    ("max_total_tokens", 0),
    ("num_threads", -2),
    ("chunked_prefill_size", 0),
    ("chunked_prefill_size", -2),
    ("mem_fraction_static", 0),
    ("mem_fraction_static", 1),
    ("mem_fraction_static", "nan"),
    ("mem_fraction_static", "half"),
    ("watchdog_timeout", 0),
    ("watchdog_timeout", "nan"),
    ("shadow_fraction", 1.5),
    ("shadow_fraction", "nan"),
    ("shadow_fraction", 0.5),  # nothing is speculative here
    ("disable_radix_cache", "yes"),
    ("disable_radix_cache", None),
    ("random_seed", "x"),
    ("tp_size", 0),
    ("tp_size", "two"),
    ("enable_torch_compile", "yes"),
    ("torch_compile_max_bs", 0),
    ("cuda_graph_max_bs", -1),
]


@pytest.mark.parametrize("name, value", REFUSED, ids=[f"{name}={value}" for name, value in REFUSED])
def test_refusals_name_the_parameter(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        EngineConfig.from_params({**BASE, name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, "3") for name in TREE_NAMES),
        ("speculative_draft_model_path", "/models/draft"),
        ("speculative_draft_model_quantization", "int8wo"),
        ("speculative_token_map", "/models/freq.pt"),
        ("speculative_ngram_max_match_window_size", "3"),
    ],
)
def test_speculative_parameters_without_an_algorithm(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: .*speculative_algorithm is not"):
        EngineConfig.from_params({**BASE, name: value})


@pytest.mark.parametrize(
    "name, value",
    [("quantization", "int8wo"), ("enable_torch_compile", "true"), ("enable_hierarchical_cache", "true")],
)
def test_what_is_not_served_on_several_ranks(name, value):
    EngineConfig.from_params({**BASE, name: value})
    with pytest.raises(ConfigError, match=rf"^{name}: .*tp_size is 2"):
        EngineConfig.from_params({**BASE, name: value, "tp_size": 2})


def test_no_tier_below_a_cache_that_is_off():
    with pytest.raises(ConfigError, match=r"^enable_hierarchical_cache: .*disable_radix_cache"):
        EngineConfig.from_params({**BASE, "enable_hierarchical_cache": True, "disable_radix_cache": True})


def test_unknown_parameters_are_named_and_the_known_listed():
    with pytest.raises(ConfigError) as refusal:
        EngineConfig.from_params({**BASE, "speculative_topk": 4, "max_batch": 1, "dtype": "float32"})
    complaint, known = str(refusal.value).split("; known: ")
    assert complaint == "unknown parameter max_batch, speculative_topk"
    assert set(known.split(", ")) == {f.name for f in fields(EngineConfig)}


@pytest.mark.parametrize(
    "algorithm, shape",
    [("EAGLE", [5, 4, 8]), ("NEXTN", [3, 1, 4]), ("STANDALONE", [3, 1, 4]), ("NGRAM", [None, None, 12])],
)
def test_defaults_of_other_algorithms_are_sglangs(algorithm, shape):
    draft = {} if algorithm in ("NEXTN", "NGRAM") else {"speculative_draft_model_path": "/models/draft"}
    config = EngineConfig.from_params({**BASE, "speculative_algorithm": algorithm, **draft})
    assert [getattr(config, name) for name in TREE_NAMES] == shape
    window = [getattr(config, f"speculative_ngram_{end}_match_window_size") for end in ("min", "max")]
    assert window == ([1, 12] if algorithm == "NGRAM" else [None, None])


def test_mtp_is_nextn():
    assert EngineConfig.from_params({**BASE, "speculative_algorithm": "MTP"}).speculative_algorithm == "NEXTN"


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "STANDALONE"])
def test_algorithm_without_draft(algorithm):
    with pytest.raises(ConfigError, match=rf"^speculative_draft_model_path: {algorithm} needs"):
        EngineConfig.from_params({**BASE, "speculative_algorithm": algorithm})


ROUNDED = "speculative_draft_model_quantization"
DRAFT, MAP, WINDOW = "speculative_draft_model_path", "speculative_token_map", "speculative_ngram_min_match_window_size"
MISFITS = [
    ({"speculative_algorithm": "NGRAM", DRAFT: "/models/draft"}, DRAFT),
    ({"speculative_algorithm": "NGRAM", ROUNDED: "int8wo"}, ROUNDED),
    ({"speculative_algorithm": "NGRAM", "speculative_num_steps": 3}, "speculative_num_steps"),
    ({"speculative_algorithm": "NGRAM", "speculative_eagle_topk": 3}, "speculative_eagle_topk"),
    ({"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 1}, "speculative_num_draft_tokens"),
    ({"speculative_algorithm": "NGRAM", WINDOW: 0}, WINDOW),
    ({"speculative_algorithm": "NGRAM", WINDOW: 13}, "speculative_ngram_max_match_window_size"),
    ({"speculative_algorithm": "NEXTN", WINDOW: 1}, WINDOW),
    ({"speculative_algorithm": "NGRAM", MAP: "/maps/hot.pt"}, MAP),
    ({"speculative_algorithm": "EAGLE3", DRAFT: "/models/draft", MAP: "/maps/hot.pt"}, MAP),
    ({"speculative_algorithm": "STANDALONE", DRAFT: "/models/draft", MAP: "/maps/hot.pt"}, MAP),
]


@pytest.mark.parametrize("params, name", MISFITS, ids=str)
def test_what_an_algorithm_has_no_use_for(params, name):
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        EngineConfig.from_params({**BASE, **params})


@pytest.mark.parametrize("given", [TREE_NAMES[:1], TREE_NAMES[1:]], ids=["one", "two"])
def test_a_part_of_the_tree(given):
    with pytest.raises(ConfigError, match=f"got only {', '.join(given)}$"):
        EngineConfig.from_params({**EAGLE3, **dict.fromkeys(given, 4)})


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 1, 6), (1, 4, 5), (2, 3, 13), (5, 4, 2), (3, 8, 32)], ids=str)
def test_trees_that_can_be_filled(shape):
    check_tree(*shape)
    EngineConfig.from_params(tree(*shape))


BAD_TREES = [
    ((0, 4, 8), "speculative_num_steps"),
    ((5, 0, 8), "speculative_eagle_topk"),
    ((5, 4, 1), "speculative_num_draft_tokens"),
    ((5, 1, 5), "speculative_num_draft_tokens"),  # a chain is exact
    ((5, 1, 7), "speculative_num_draft_tokens"),
    ((1, 4, 6), "speculative_num_draft_tokens"),  # 4 candidates for 5 places
    ((2, 3, 14), "speculative_num_draft_tokens"),  # 3 + 9 for 13
]


@pytest.mark.parametrize("shape, name", BAD_TREES, ids=str)
def test_trees_that_cannot(shape, name):
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        EngineConfig.from_params(tree(*shape))


@pytest.mark.parametrize("params", [BASE, EAGLE3, tree(3, 2, 7), NGRAM], ids=["plain", "default-tree", "tree", "ngram"])
def test_to_params_round_trip_survives_json(params):
    config = EngineConfig.from_params({**params, "dtype": "bfloat16", "watchdog_timeout": "1.5"})
    assert EngineConfig.from_params(json.loads(json.dumps(config.to_params()))) == config


def test_resolve_paths():
    relative = {**EAGLE3, "speculative_algorithm": "EAGLE", "model_path": "weights/target", MAP: "weights/freq.pt"}
    config = EngineConfig.from_params(relative).resolve_paths(Path("/repository"))
    assert config.model_path == "/repository/weights/target"
    assert config.speculative_token_map == "/repository/weights/freq.pt"
    assert config.speculative_draft_model_path == "/models/draft"
    assert EngineConfig.from_params(BASE).resolve_paths(Path("/repository")).speculative_draft_model_path is None


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        EngineConfig.from_params(BASE).dtype = "float16"
