"""Frames: every message comes out as it went in, wherever the socket cuts the bytes."""

import socket

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbackend.request import Failure, FinishReason, TokenLogprob, Update
from specbackend.sampling_params import SamplingParams
from specbackend.serving.protocol import (
    LENGTH,
    CacheTree,
    Cancel,
    Channel,
    Facts,
    Failed,
    FlushCache,
    Hello,
    Leave,
    Ready,
    Rejected,
    Start,
    Step,
    Submit,
    decode,
    encode,
)
from specbackend.spec_trace import Round, StepTrace, TreeTrace

TREE = TreeTrace([-1, 0, 0], [4, 5, 6], [None, -0.5, -float("inf")], [None, -0.25, -1.0])
MESSAGES = [
    Start({"model_path": "/m", "speculative_num_steps": 5, "dtype": None, "mem_fraction_static": 0.5}),
    Submit("7", [1, 2, 3], SamplingParams(max_new_tokens=9, temperature=0.7, seed=(1 << 64) - 1, stop=("é", "\n"))),
    Submit(
        "8", [1], SamplingParams(logit_bias=((5, -1.5), (6, 2.0)), bad_words_ids=((1, 2), (3,)), top_p=0.9, top_k=3)
    ),
    Cancel("7"),
    FlushCache(),
    CacheTree(100),
    Leave(),
    Hello(4711),
    Ready(1024, 32000, [2], 8, 1.5),
    Failed("model_path: no such folder"),
    Rejected("7", None, "full"),
    Facts({"pid": 4711, "nodes": [{"id": 1, "parent": None}]}),
    Step([Update("7", [5, 6], FinishReason.STOP, 3, 2, 1, 1), Update("8", [])], {"num_running": 2}),
    Step(
        [
            Update(
                "9",
                [5],
                FinishReason.ABORT,
                logprobs=[TokenLogprob(5, -0.5, 2, [(6, -0.25), (5, -0.5)])],
                prompt_logprobs=[TokenLogprob(1, -3.0, 7)],
                failure=Failure("json_schema", "is too large"),
                spec_trace=[
                    StepTrace("plain", 3, 1 << 60, 0.5, [5], 5),
                    StepTrace("speculative", 1, 7, 3.5, [5, 6], 6, round=Round(TREE, [1], 1.0, 2.0, 0.5)),
                ],
            )
        ]
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message):
    assert decode(encode(message)[LENGTH.size :]) == message


@pytest.mark.parametrize("change", [lambda values: values.pop(), lambda values: values.append(0)], ids=["less", "more"])
def test_updates_of_another_version_are_not_read(change):
    kind, updates, stats = msgpack.unpackb(encode(Step([Update("7", [5]), Update("8", [6])]))[LENGTH.size :])
    change(updates[1])
    with pytest.raises(ValueError, match="another version"):
        decode(msgpack.packb([kind, updates, stats]))


@given(st.lists(st.integers(1, 200), min_size=1))
def test_messages_survive_any_cut_of_the_stream(sizes):
    stream = b"".join(map(encode, MESSAGES))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, received, start = Channel(ours), [], 0
        while start < len(stream):
            size = sizes[start % len(sizes)]
            theirs.sendall(stream[start : start + size])
            received += channel.receive()
            start += size
    assert received == MESSAGES


def test_the_end_of_the_other_side_is_an_error():
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(EOFError):
        Channel(ours).receive()
