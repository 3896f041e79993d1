"""
A checkpoint with GPT-2's tokenizer and untrained weights, to compare scores on: untrained.pt.

    PYTHONPATH=. python records/interop/lm_eval/untrained.py
"""
import torch

from model import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=128, cayley_levels="7,8,0;11,16,64"))
for p in model.parameters():
    p.data.mul_(3)  # so that its probabilities differ
config = {"tokenizer": "gpt2", "tokenizer_vocab_size": 50257, "block_size": 1024, "data_dir": "",
          "batch_size": 1, "gradient_accumulation_steps": 1, "max_iters": 0}
torch.save({"model": model.state_dict(), "model_args": vars(model.config), "config": config},
           "untrained.pt")
