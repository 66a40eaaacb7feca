"""The demo target as a Qwen2, which is what MiMo's MTP layer goes into."""

import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def write_as_qwen2(llama_folder: Path, folder: Path) -> None:
    """The same function under Qwen2's names: what a Llama lacks is the bias of q, k and v, which is zero here."""
    llama = LlamaForCausalLM.from_pretrained(llama_folder)
    fields = json.loads((llama_folder / "config.json").read_text())
    for name in ("architectures", "model_type", "attention_bias", "mlp_bias", "pretraining_tp"):
        del fields[name]
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**fields))
    with torch.no_grad():
        for parameter in qwen2.parameters():
            parameter.zero_()
    qwen2.load_state_dict(llama.state_dict(), strict=False)
    qwen2.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(llama_folder / name, folder)
