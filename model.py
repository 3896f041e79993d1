"""
A GPT whose MLPs read the residual only through a sparse code: RMSNorm -> CayleySAE -> MLP in every block.

nanoGPT's model otherwise: RMSNorm, causal attention, GELU MLP, no biases in linear layers, learned absolute
positions, tied embeddings. Without cayley_levels it is the dense twin.

Shapes: B sequences of T tokens, C = n_embd, V = vocab_size, H heads of D = C / H.
"""
import math
import zipfile
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F

from cayley import CayleySAE


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 1024
    cayley_levels: str = "10,16,0;15,32,256"  # n,k,delta per level; "" for a dense MLP input
    per_parent_budget: bool = True
    score_standardize: bool = True
    forward_standardized: bool = True

    def __post_init__(self):
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


class KVCache:
    """Keys and values of the tokens that a model has read, for up to block_size of them; reset() forgets them."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv, self.length = torch.empty(shape, device=device, dtype=dtype), 0

    def append(self, layer, k, v):
        """Add k, v (B, H, T, D) of new tokens -> those of all tokens so far."""
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end].to(k.dtype), self.kv[layer, 1, :, :, :end].to(k.dtype)

    def reset(self):
        self.length = 0


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cache=None, layer=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mask = None
        if 1 < T < k.shape[2]:  # new tokens after cached ones
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == k.shape[2])
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.sae = nn.Identity()
        if config.cayley_levels:
            self.sae = CayleySAE(config.n_embd, config.cayley_levels, config.per_parent_budget,
                                 config.score_standardize, config.forward_standardized)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=None):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.sae(self.ln_2(x)))


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # https://paperswithcode.com/method/weight-tying
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2: the residual stream is a sum of 2 * n_layer projections
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def saes(self):
        """The CayleySAE of every block, in order; none in the dense twin."""
        return [block.sae for block in self.blocks if isinstance(block.sae, CayleySAE)]

    def get_num_params(self):
        """Number of parameters without positions and SAE biases, as the reference counts them."""
        uncounted = self.wpe.weight.numel() + sum(sae.bias.numel() for sae in self.saes())
        return sum(p.numel() for p in self.parameters()) - uncounted

    def forward(self, idx, targets=None, cache=None):
        """
        idx (B, T) token ids; targets (B, T), -1 where there is none; cache: a KVCache holding the tokens before idx.

        Returns logits and loss: with targets the logits (B, T, V) and the mean cross-entropy in nats per token,
        without them the logits of the last position (B, 1, V) and None. Raises ValueError beyond block_size.
        """
        start = cache.length if cache is not None else 0
        T = idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit in block_size={self.config.block_size}")
        x = self.wte(idx) + self.wpe(torch.arange(start, start + T, device=idx.device))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self.lm_head(self.ln_f(x[:, -1:])), None
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def run_with_codes(self, idx, n_logits=None):
        """
        idx (B, T) -> logits (B, T, V), or of the last n_logits positions, and per layer the codes that its MLP read, a
        list of Codes per level. Raises ValueError for the dense twin.
        """
        if not self.saes():
            raise ValueError("the dense twin has no codes: cayley_levels is ''")
        codes = []
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))  # (B, T, C)
        for block in self.blocks:
            x = x + block.attn(block.ln_1(x))
            codes.append(block.sae.edit(block.sae.encode(block.ln_2(x)), block.sae.edits))
            x = x + block.mlp(block.sae.decode(codes[-1]))
        return self.lm_head(self.ln_f(x[:, -n_logits:] if n_logits else x)), codes

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, n_tokens=None, generator=None):
        """
        Yield max_new_tokens sampled tokens (B, 1), one after the other, that continue idx (B, T).

        temperature 0 takes the most likely token. n_tokens: ids from here on are padding of the vocabulary and are
        never sampled. A context that outgrows block_size moves on by half a block, so that learned positions stay
        valid and a cache (use_cache) is refilled once per half block; the text does not depend on the cache.
        """
        block, was_training = self.config.block_size, self.training
        cache = KVCache(self.config, len(idx), idx.device, self.wte.weight.dtype) if use_cache else None
        start = 0  # of the window that the model reads
        self.eval()
        try:
            for _ in range(max_new_tokens):
                while idx.shape[1] - start > block:
                    start += (block + 1) // 2
                    if cache is not None:
                        cache.reset()
                logits, _ = self(idx[:, start + (cache.length if cache is not None else 0):], cache=cache)
                logits = logits[:, -1, :n_tokens].float()  # (B, V)
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                if temperature == 0:
                    token = logits.argmax(-1, keepdim=True)
                else:
                    token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                idx = torch.cat([idx, token], 1)
                yield token
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, **sampling):
        """idx (B, T) continued by max_new_tokens -> (B, T + max_new_tokens); see stream for the keywords."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **sampling)], 1)


def covariances(x, y):
    """Sums of <x, y>, <x, x>, <y, y> about the means, (3,): x, y (N, d)."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])


def explained(sums):
    """Fraction of x's variance about its mean that the best multiple of y explains: covariances (..., 3) -> (...)."""
    xy, xx, yy = sums.unbind(-1)
    return xy.square() / (xx * yy).clamp_min(1e-30)


@torch.no_grad()
def code_statistics(model, idx):
    """Per layer the covariances of the MLP's input and its code, and each level's mean active features: (layers, 3 + levels)."""
    rows = []

    def measure(sae, inputs):
        codes = sae.encode(inputs[0])
        active = [(c.values != 0).sum() / c.values[..., 0].numel() for c in codes]
        rows.append(torch.cat([covariances(inputs[0].flatten(0, 1), sae.decode(codes).flatten(0, 1)), torch.stack(active)]))
    hooks = [sae.register_forward_pre_hook(measure) for sae in model.saes()]
    was_training = model.training
    model.eval()(idx)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return torch.stack(rows)


def first_nonfinite(model, idx, targets):
    """Name of the first module whose output, else of the last parameter whose gradient, is not finite; None if all are."""
    found = []

    def check(name):
        return lambda module, inputs, output: found.append(name) if isinstance(output, torch.Tensor) and not (
            output.isfinite().all()) else None
    hooks = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    model.zero_grad()
    model(idx, targets)[1].backward()
    for hook in hooks:
        hook.remove()
    found += [f"the gradient of {name}" for name, p in reversed(list(model.named_parameters())) if not p.grad.isfinite().all()]
    return found[0] if found else None


def load_checkpoint(path, device="cpu"):
    """
    A checkpoint of train.py as a dict of tensors and plain values.

    Raises ValueError, in one line that names the file, if it is missing, damaged, or holds anything but data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load reads past wrong checksums
                raise ValueError("a checksum is wrong: the file was altered")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        missing = {"model", "model_args", "config"} - checkpoint.keys()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # whatever a damaged zip or a refused pickle raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason[:200]})") from None
    if missing:
        raise ValueError(f"{path}: not a checkpoint of train.py, it lacks {', '.join(sorted(missing))}")
    return checkpoint


def pick_device(device):
    """The torch.device that a script's setting names; "auto" is CUDA where there is one. Raises ValueError naming a bad one."""
    if device.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: must be 'auto', 'cpu' or 'cuda'")
    target = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but this PyTorch sees no CUDA device: use --device=cpu")
    return target


def load_model(path, device="cpu"):
    """A checkpoint's model, in evaluation mode on device, and its resolved training configuration (a dict)."""
    checkpoint = load_checkpoint(path)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), checkpoint["config"]
