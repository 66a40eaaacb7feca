"""The two faces of the engine: what TensorRT-LLM's clients and the vLLM backend's send, get, and take for granted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from specbackend.errors import InvalidRequest
from specbackend.serving.schemas import (
    LLM_INPUTS,
    LLM_OUTPUTS,
    LLM_PARAMETERS,
    VLLM_INPUTS,
    VLLM_OUTPUTS,
    VLLM_PARAMETERS,
    Input,
    Output,
)

PROMPT_IN_STREAM = "When streaming, `exclude_input_in_output` = False is not allowed."  # the vLLM backend's own words


@dataclass(frozen=True)
class Face:
    """One model's tensors and parameters, and the habits behind them."""

    inputs: tuple[Input, ...]
    parameters: tuple[Input, ...]
    outputs: tuple[Output, ...]
    has_batch_dimension: bool  # of all tensors: [1, n] instead of [n]
    side_by_side: bool  # in a stream each response has a place for each answer; else it is about one of them
    complete: Callable[[Mapping[str, Any]], dict[str, Any]]  # sampling parameters, with those the client does not send
    echoes: Callable[[bool | None, bool], bool]  # exclude_input_in_output, stream: does the prompt precede the answer?

    @cached_property
    def tensor(self) -> dict[str, Input]:
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def parameter(self) -> dict[str, Input]:
        """All tensors are parameters, too; where there is a parameter of the same name, it is its own."""
        return {**self.tensor, **{spec.name: spec for spec in self.parameters}}

    @cached_property
    def output(self) -> dict[str, Output]:
        return {spec.name: spec for spec in self.outputs}

    @cached_property
    def layout(self) -> dict[str, tuple[str, int]]:
        """Each output's dtype and number of dimensions."""
        return {
            spec.name: (spec.dtype, len(spec.dims) + (self.has_batch_dimension and spec.has_batch_dimension))
            for spec in self.outputs
        }


def complete_tensorrt_llm(params: Mapping[str, Any]) -> dict[str, Any]:
    """0 is all tokens for top_k and top_p, and without a temperature these two decide whether to sample."""
    top_k, top_p = params.get("top_k"), params.get("top_p")
    given = dict(params)
    if top_k == 0:
        given["top_k"] = -1
    if top_p == 0:
        given["top_p"] = 1.0
    if top_k == 1:
        return {**given, "temperature": 0.0}
    chooses = top_k not in (None, -1, 0) or top_p not in (None, 0, 1) or bool(params.get("min_p"))
    return {"temperature": 1.0 if chooses else 0.0, **given}


def complete_vllm(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"temperature": 1.0, "max_new_tokens": 16, **params}


def echo_if_asked(exclude: bool | None, stream: bool) -> bool:
    return exclude is False


def echo_unless_streaming(exclude: bool | None, stream: bool) -> bool:
    if stream and exclude is False:
        raise InvalidRequest("exclude_input_in_output", PROMPT_IN_STREAM)
    return not stream and not exclude


LLM = Face(
    LLM_INPUTS,
    LLM_PARAMETERS,
    LLM_OUTPUTS,
    has_batch_dimension=True,
    side_by_side=False,
    complete=complete_tensorrt_llm,
    echoes=echo_if_asked,
)
VLLM = Face(
    VLLM_INPUTS,
    VLLM_PARAMETERS,
    VLLM_OUTPUTS,
    has_batch_dimension=False,
    side_by_side=True,
    complete=complete_vllm,
    echoes=echo_unless_streaming,
)
