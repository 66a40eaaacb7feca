import torch
from demo_training.mimo import write_as_qwen2
from transformers import Qwen2ForCausalLM

from tests.conftest import DEMO_TARGET


def test_the_demo_target_as_qwen2_is_the_same_function(tmp_path, hf_target, demo_prompts):
    write_as_qwen2(DEMO_TARGET, tmp_path)
    qwen2 = Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    tokens_BT = torch.tensor(demo_prompts[:1])
    assert torch.equal(qwen2(tokens_BT).logits, hf_target(tokens_BT).logits)
    biases = [tensor for name, tensor in qwen2.state_dict().items() if name.endswith("bias")]
    assert len(biases) == 3 * 16
    assert not any(bias.any() for bias in biases)
    assert (tmp_path / "tokenizer.json").exists()
