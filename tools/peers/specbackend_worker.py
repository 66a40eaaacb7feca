"""This project's engine as a peer. Settings are its parameters."""

from importlib.metadata import version

from peers.worker import Answers, Contestant, Peer, Prompts, serve
from specbackend import Engine


def load(settings: dict) -> Contestant:
    engine = Engine(**settings)

    def generate(prompts: Prompts, max_new_tokens: int) -> Answers:
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        output_ids = [answer["output_ids"] for answer in answers]
        steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in answers)
        first_tokens = len(prompts)  # no step's: prompts yield them
        return Answers(output_ids, steps, sum(map(len, output_ids)) - first_tokens)

    return generate


if __name__ == "__main__":
    serve(Peer(version("specbackend"), load))
