"""Engines that share a sidecar: what one has computed another one finds, and says what it would have said without."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from specbackend import Engine
from specbackend.errors import ConfigError
from specbackend.radix.client import TIMEOUT_S
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from tests.conftest import DEMO_TARGET
from tests.radix.sidecars import PATIENT_S, killed, leaks, running, stats, stopped, wait_until
from tests.radix.test_tiers import MISSING, SERVER, Server
from tests.test_prefix_cache import ALGORITHMS, DRAFTED, GREEDY, PLAIN

BLOCK_TOKENS = 16
NO_TIER = {"enable_hierarchical_cache": False, "radix_cache_socket": None}
KINDS = {"plain": {}, **{name: {"speculative_algorithm": name, **params} for name, params in ALGORITHMS.items()}}


@pytest.fixture
def sidecar(tmp_path) -> Iterator:
    with running(tmp_path / "radix.sock", num_units=4000) as process:
        yield process


@pytest.fixture
def new_engine(tmp_path) -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(kind: str = "EAGLE3", **params) -> Engine:
        drafting = {"speculative_adaptive": False} if kind != "plain" else {}
        shared = {"enable_hierarchical_cache": True, "radix_cache_socket": str(tmp_path / "radix.sock")}
        engines.append(Engine(**{"model_path": str(DEMO_TARGET), **KINDS[kind], **drafting, **shared, **params}))
        if engines[-1]._tier:
            set_timeouts(engines[-1], PATIENT_S)
        return engines[-1]

    yield make
    for engine in engines:
        slots = engine.stats()
        assert slots.free_slots + slots.evictable_slots == slots.total_slots
        engine.shutdown()


def set_timeouts(engine: Engine, seconds: float) -> None:
    client = engine._tier._client
    client._reader._timeout_s = client._writer._timeout_s = seconds


def ask_engine(engine: Engine, input_ids: list[int], **params) -> dict:
    """One answer; what it leaves is in the sidecar then."""
    answer = engine.generate(input_ids=input_ids, sampling_params={**GREEDY, **params})
    for written, _ in engine._tier._unwritten:
        written.result()
    return answer


def said(answer: dict) -> tuple:
    return answer["output_ids"], answer["meta_info"]["spec_verify_ct"]


def on_host(answer: dict) -> int:
    details = answer["meta_info"]["cached_tokens_details"]
    assert sum(details.values()) == answer["meta_info"]["cached_tokens"]
    return details["host"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_engine_goes_on_where_the_first_was(kind, sidecar, new_engine, tmp_path, demo_prompts):
    """As well drafted as without a cache; the next turn too, which follows KV that came back."""
    prompt = demo_prompts[3]
    one, other, cold = new_engine(kind), new_engine(kind), new_engine(kind, **NO_TIER)
    first = ask_engine(one, prompt)
    text = [*prompt, *first["output_ids"], 77]
    second = ask_engine(other, text)
    ask_engine(other, [*text, 78, 79])
    expected = cold.generate(input_ids=[prompt, text], sampling_params=GREEDY)
    assert [said(first), said(second)] == [said(answer) for answer in expected]
    usable = len(prompt) + len(first["output_ids"]) - 2  # the last has no KV
    assert usable - 4 - BLOCK_TOKENS < on_host(second) <= usable
    assert on_host(second) % BLOCK_TOKENS == 0
    assert leaks(tmp_path / "radix.sock") == []


def test_an_engine_that_does_not_draft_shares_with_ngram_and_with_no_head(sidecar, new_engine, demo_prompts):
    prompt = demo_prompts[3]
    ask_engine(new_engine("plain"), prompt)
    assert on_host(ask_engine(new_engine("EAGLE3"), prompt)) == 0
    assert on_host(ask_engine(new_engine("EAGLE"), prompt)) == 0  # what EAGLE3 has stored is not for it
    assert on_host(ask_engine(new_engine("NGRAM"), prompt)) > 0


@pytest.mark.parametrize("params", [{"dtype": "float16"}, {"quantization": "int8wo"}], ids=str)
def test_kv_of_other_numbers_is_not_found(params, sidecar, new_engine, demo_prompts):
    ask_engine(new_engine(dtype="bfloat16"), demo_prompts[3])
    assert on_host(ask_engine(new_engine(**{"dtype": "bfloat16", **params}), demo_prompts[3])) == 0


def test_salts_keep_the_sidecar_apart(sidecar, new_engine, demo_prompts):
    ask_engine(new_engine(), demo_prompts[3], cache_salt="a")
    other = new_engine()
    cached = [on_host(ask_engine(other, demo_prompts[3], cache_salt=salt)) for salt in (None, "b", "a")]
    assert cached[:2] == [0, 0] and cached[2] > 0


@pytest.mark.parametrize("turns", [[PLAIN, DRAFTED, DRAFTED], [DRAFTED, PLAIN, DRAFTED]], ids=["plain", "drafted"])
def test_answers_without_drafts_cost_the_next_ones_nothing(turns, sidecar, new_engine, demo_prompts):
    """What such a request wrote lacks draft KV, and stays where it is known to."""
    engines, cold = [new_engine() for _ in turns], new_engine(**NO_TIER)
    text = demo_prompts[5]
    for engine, turn in zip(engines, turns, strict=True):
        answer = ask_engine(engine, text, **turn)
        cold.slots.release(cold.slots.allocate(cold.slots.num_available))
        assert said(answer) == said(cold.generate(input_ids=text, sampling_params={**GREEDY, **turn}))
        assert engine is engines[0] or on_host(answer) > 0
        text = [*text, *answer["output_ids"], 77]


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_more_texts_than_the_pool_holds(policy, sidecar, new_engine, demo_prompts, tmp_path):
    """A pool of one request, and twelve conversations at once that go on."""
    small = {"context_length": 256, "max_total_tokens": 300, "max_running_requests": 4}
    engine, cold = new_engine(hicache_write_policy=policy, **small), new_engine(**small, **NO_TIER)
    ask_engine(engine, demo_prompts[20])
    stored_at_its_end = stats(tmp_path / "radix.sock")["published_blocks"] > 0
    assert stored_at_its_end == (policy == "write_through")
    texts, host = [prompt[:120] for prompt in demo_prompts[:12]], 0
    for _ in range(3):
        answers = engine.generate(input_ids=texts, sampling_params=GREEDY)
        assert [answer["output_ids"] for answer in answers] == [
            answer["output_ids"] for answer in cold.generate(input_ids=texts, sampling_params=GREEDY)
        ]
        host += sum(map(on_host, answers))
        texts = [[*text, *answer["output_ids"], 77] for text, answer in zip(texts, answers, strict=True)]
    assert host > 12 * 100
    assert stats(tmp_path / "radix.sock")["leased_blocks"] == 0


def test_damaged_memory_is_computed_anew(sidecar, new_engine, demo_prompts):
    one, other, cold = new_engine(), new_engine(), new_engine(**NO_TIER)
    first = ask_engine(one, demo_prompts[3])
    client = one._tier._client
    lease = client.lookup(client.layout.token_keys(demo_prompts[3]))
    lease.arena.write(lease.units[1], np.zeros(client.layout.block_bytes, np.uint8))
    client.release(lease)
    again = ask_engine(other, demo_prompts[3])
    assert on_host(again) == BLOCK_TOKENS
    assert said(first) == said(again) == said(cold.generate(input_ids=demo_prompts[3], sampling_params=GREEDY))


@pytest.mark.parametrize("gone", [killed, stopped])
def test_a_sidecar_that_ends_in_the_midst_costs_its_blocks_only(gone, sidecar, new_engine, demo_prompts):
    prompts = [prompt[:100] for prompt in demo_prompts[:6]]
    one, other, cold = new_engine(), new_engine(), new_engine(**NO_TIER)
    for prompt in prompts:
        ask_engine(one, prompt)
    expected = [said(ask) for ask in cold.generate(input_ids=prompts, sampling_params=GREEDY)]
    answers = [ask_engine(other, prompt) for prompt in prompts[:3]]
    assert all(on_host(answer) > 0 for answer in answers)
    set_timeouts(other, TIMEOUT_S)
    with gone(sidecar):
        answers += [ask_engine(other, prompt) for prompt in prompts[3:]]
    assert [said(answer) for answer in answers] == expected
    assert not any(on_host(answer) for answer in answers[3:])


def test_without_a_socket_there_is_no_sidecar_to_ask():
    with pytest.raises(ConfigError, match=r"^radix_cache_socket: is required"):
        Engine(model_path=str(DEMO_TARGET), enable_hierarchical_cache=True)


def test_a_request_without_drafts_keeps_what_it_finds_in_the_pool(sidecar, new_engine, demo_prompts):
    """Though another engine has stored some of it with draft KV."""
    one, other, prompt = new_engine(), new_engine(), demo_prompts[3]
    text = [*prompt, *ask_engine(one, prompt, **PLAIN)["output_ids"]]
    ask_engine(other, text, **DRAFTED)
    assert ask_engine(one, [*text, 77], **PLAIN)["meta_info"]["cached_tokens_details"] == {
        "device": len(text) - 1,
        "host": 0,
    }


@pytest.mark.skipif(SERVER is None, reason=MISSING)
def test_a_prompt_that_waits_is_fetched_from_another_host(tmp_path, new_engine, demo_prompts):
    """Two sidecars play two hosts. The store between them dies later, which costs its blocks only."""
    store, cold, prompts = Server(tmp_path), new_engine(**NO_TIER), demo_prompts[3:5]
    hosts = [tmp_path / "one.sock", tmp_path / "other.sock"]
    url = f"valkey://127.0.0.1:{store.port}"
    with running(hosts[0], "--valkey", url, num_units=400), running(hosts[1], "--valkey", url, num_units=400):
        one, other = (new_engine(radix_cache_socket=str(host)) for host in hosts)
        expected = [ask_engine(one, prompt) for prompt in prompts]
        num_stored = stats(hosts[0])["published_blocks"]
        wait_until(lambda: store.num_keys() == num_stored)
        other.submit(Request("waits", prompts[0], SamplingParams.from_dict(GREEDY)))
        num_usable = (len(prompts[0]) - 1) // BLOCK_TOKENS
        wait_until(lambda: stats(hosts[1])["published_blocks"] == num_usable)
        updates = [update for _ in iter(lambda: other.has_work, False) for update in other.step()]
        assert updates[-1].host_cached_tokens == num_usable * BLOCK_TOKENS
        assert [token for update in updates for token in update.token_ids] == expected[0]["output_ids"]
        store.end()
        again = [ask_engine(engine, prompts[1]) for engine in (one, other)]
        assert [said(answer) for answer in again] == [said(expected[1])] * 2
        assert said(expected[1]) == said(cold.generate(input_ids=prompts[1], sampling_params=GREEDY))
