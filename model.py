"""
A GPT whose MLPs read the residual only through a sparse code: RMSNorm -> CayleySAE -> MLP.

nanoGPT's model otherwise: RMSNorm, causal attention, GELU MLP, no biases in linear layers, learned
absolute positions, tied embeddings. Without cayley_levels it is the dense twin.

Shapes: B sequences of T tokens, C = n_embd, V = vocab_size, H heads of D = C / H.
"""
import contextlib
import functools
import math
import platform
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F

from cayley import CayleySAE

# -----------------------------------------------------------------------------
# how much of an MLP's input its code explains


def covariances(x, y):
    """Sums over products of x and y about their means, (3,): xy, xx, yy; x, y (N, d)."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    x = x.to(wide) - x.to(wide).mean(0)
    y = y.to(wide) - y.to(wide).mean(0)
    return torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])


def explained(sums):
    """Share of x's variance that the best multiple of y explains: covariances (..., 3) -> (...)."""
    xy, xx, yy = sums.unbind(-1)
    return xy.square() / (xx * yy).clamp_min(1e-30)


# -----------------------------------------------------------------------------
# what a device can do

PEAK_FLOPS = {  # a second, in bf16, by data sheet; a part of the device's name, the special first
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "RTX 4090": 165e12,
}


def peak_flops(device):
    """Name of a torch.device, and its FLOPs a second, None if they aren't in the table."""
    name = platform.processor() or "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    matches = [flops for part, flops in PEAK_FLOPS.items() if part in name]
    return name, matches[0] if matches else None


# -----------------------------------------------------------------------------
# the model


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
            if field.type is int:
                value = getattr(self, field.name)
                if value < 1:
                    raise ValueError(f"{field.name}={value}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


class KVCache:
    """
    Keys and values of the tokens that a model has read, up to block_size of them.

    reset() forgets them.
    """

    def __init__(self, config, batch_size, device, dtype):
        D = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, D)
        # zeros: a DecodingStep multiplies what isn't read yet by 0
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Add k, v (B, H, T, D) of new tokens -> those of all tokens so far."""
        keys = self.kv[layer, 0]  # (B, H, block_size, D)
        values = self.kv[layer, 1]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end].to(k.dtype), values[:, :, :end].to(v.dtype)

    def reset(self):
        self.length = 0


STATIC_DEVICES = ("cuda",)  # where stream() reads single tokens by DecodingStep


@functools.cache
def capture_stream(device):
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class DecodingStep:
    """
    A GPT's reading of one token after those in a KVCache: on CUDA a graph, launched as a whole.

    So that a graph can replay it, it runs the same kernels on the same memory for every token:
    token and position lie on the device, and attention reads the whole cache behind a mask. What
    the CayleySAEs compute from statistics and biases alone is computed once. A graph is captured at
    the first call, and anew after a layer's edits, statistics or biases have changed.
    """

    def __init__(self, model, cache):
        self.model = model
        self.cache = cache
        self.modules = list(model.modules())
        self.saes = model.saes()
        device = cache.kv.device
        self.token = torch.zeros(cache.kv.shape[2], 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(cache.kv.shape[4], device=device)
        self.graph = None
        self.state = None  # of the layers, for which graph and constants were made
        self.constants = []  # of every layer
        self.logits = None  # (B, 1, V), which the graph writes

    def append(self, layer, k, v):
        """Add k, v (B, H, 1, D) at the position -> all of the cache, (B, H, block_size, D)."""
        keys, values = self.cache.kv[layer]
        keys.index_copy_(2, self.position, k.to(keys.dtype))
        values.index_copy_(2, self.position, v.to(values.dtype))
        return keys.to(k.dtype), values.to(v.dtype)

    def run(self):
        """Logits (B, 1, V)."""
        mask = torch.where(self.places <= self.position, 0.0, -math.inf)  # (block_size,)
        mask = mask.to(self.cache.kv.dtype)
        for sae, constants in zip(self.saes, self.constants):
            sae.constants = constants
        try:
            return self.model.head(self.model.read(self.token, self.position, self, mask))
        finally:
            for sae in self.saes:
                sae.constants = None

    def capture(self):
        """Record run() as self.graph, as PyTorch asks for: after a run on a side stream."""
        stream = capture_stream(self.token.device)
        main = torch.cuda.current_stream(self.token.device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            self.run()
        main.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.logits = self.run()

    def stands_for_forward(self):
        """False where Python must run: for hooks, recording(), and casts that autocast may keep."""
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules)
        records = any(sae.record is not None for sae in self.saes)
        return not (hooks or records or torch.is_autocast_enabled("cuda"))

    def __call__(self, token):
        """token (B, 1) -> logits (B, 1, V) after it; the next call may write over them."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        state = []
        for sae in self.saes:
            # an operation in place counts a tensor's version up
            versions = [tensor._version for tensor in (sae.bias, sae.mean, sae.var)]
            state.append((list(sae.edits), versions))
        if state != self.state:
            self.constants = [sae.terms() for sae in self.saes]
            if token.is_cuda:
                self.capture()
            self.state = state
        if not token.is_cuda:
            return self.run()
        self.graph.replay()
        return self.logits


def attend_one(q, k, v, mask):
    """
    scaled_dot_product_attention of one query: q (B, H, 1, D), k, v (B, H, S, D), mask (S,), added.

    On CUDA its kernels read the keys of a head one after the other; these read them all at once.
    """
    scores = torch.add(mask, q @ k.mT, alpha=q.shape[-1] ** -0.5)  # (B, H, 1, S)
    return scores.softmax(-1) @ v


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cache=None, layer=None, mask=None):
        """
        x (B, T, C) -> (B, T, C).

        mask: None, causal; (T, keys), True for keys to attend to; or a DecodingStep's, of one token
        (keys,), which is added to the scores.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if mask is not None and mask.dim() == 1:
            y = attend_one(q, k, v, mask)
        else:
            is_causal = bool(T > 1) and mask is None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
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
            self.sae = CayleySAE(
                config.n_embd,
                config.cayley_levels,
                config.per_parent_budget,
                config.score_standardize,
                config.forward_standardized,
            )
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, layer, mask)
        return x + self.mlp(self.sae(self.ln_2(x)))


def sample_token(logits, temperature, top_k, generator):
    """Tokens (B, 1) drawn by logits (B, V): of the top_k largest, at temperature 0 the largest."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


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
            if p.dim() == 2:
                std = 0.02
                if "c_proj" in name:  # GPT-2: the residual stream is a sum of 2 * n_layer of these
                    std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)

    def saes(self):
        """The CayleySAE of every block, in order; none in the dense twin."""
        return [block.sae for block in self.blocks if isinstance(block.sae, CayleySAE)]

    def get_num_params(self):
        """Number of parameters without positions and SAE biases, as the published models count."""
        uncounted = ("wpe.weight", "sae.bias")
        sizes = [p.numel() for name, p in self.named_parameters() if not name.endswith(uncounted)]
        return sum(sizes)

    def flops_per_token(self):
        """
        Of the dense twin's forward and backward, the convention of MFU.

        6 a parameter without positions and SAE biases, and 12 n_layer d T of attention.
        """
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def read(self, idx, positions, cache=None, mask=None):
        """Tokens (B, T) at positions (T,) -> the residual stream behind the blocks, (B, T, C)."""
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer, mask)
        return x

    def head(self, x):
        """The residual stream (B, T, C) -> logits (B, T, V)."""
        return self.lm_head(self.ln_f(x))

    def forward(self, idx, targets=None, cache=None, n_logits=1):
        """
        idx (B, T) token ids; targets (B, T), -1 where there is none; cache: a KVCache holding the
        tokens before idx.

        Returns logits and loss: with targets the logits (B, T, V), without a gradient, and the mean
        cross-entropy in nats per token; without them the logits of the last n_logits positions (0:
        of all) and None. Raises ValueError beyond block_size.
        """
        start = cache.length if cache is not None else 0
        T = idx.shape[1]
        if start + T > self.config.block_size:
            block_size = self.config.block_size
            raise ValueError(f"{start + T} tokens do not fit in block_size={block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        mask = None  # causal
        if start > 0 and T > 1:  # after cached tokens is_causal would align the wrong corner
            mask = torch.ones(T, start + T, dtype=torch.bool, device=idx.device).tril(start)
        x = self.read(idx, positions, cache, mask)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self.head(x[:, -n_logits:]), None
        logits = self.head(x)  # (B, T, V)
        flat = logits.flatten(0, 1).float()  # CUDA's autocast would take the softmax in bf16
        loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1)
        # with a gradient, torch.compile's backward would add zeros of their size to the loss's
        return logits.detach(), loss

    @torch.no_grad()
    def explained(self, idx):
        """
        idx (B, T) -> share of the variance of each MLP's input that its code explains, (n_layer,).

        By the model in evaluation mode; see the function explained.
        """
        was_training = self.training
        self.eval()
        with self.recording() as records:
            self(idx)
        self.train(was_training)
        shares = []
        for sae, (record,) in zip(self.saes(), records):
            code = sae.decode(record.codes)  # (B, T, C)
            shares.append(explained(covariances(record.x.flatten(0, 1), code.flatten(0, 1))))
        return torch.stack(shares)

    def first_nonfinite(self, idx, targets):
        """
        Name of the first module whose output, else of the last parameter whose gradient, isn't
        finite.

        None if all are finite. The gradients are those of this batch afterwards.
        """
        found = []

        def checking(name):
            def check(module, inputs, output):
                if isinstance(output, torch.Tensor) and not output.isfinite().all():
                    found.append(name)
            return check

        hooks = []
        for name, module in self.named_modules():
            if name:
                hooks.append(module.register_forward_hook(checking(name)))
        self.zero_grad()
        self(idx, targets)[1].backward()
        for hook in hooks:
            hook.remove()
        for name, p in reversed(list(self.named_parameters())):
            if not p.grad.isfinite().all():
                found.append(f"the gradient of {name}")
        return found[0] if found else None

    @contextlib.contextmanager
    def recording(self):
        """
        Yields a list with, for each layer, the list of Records of the forwards inside the block.

        with model.recording() as records: model(idx)    # then records[layer][-1].codes
        """
        records = [[] for _ in self.saes()]
        before = [sae.record for sae in self.saes()]
        for sae, layer_records in zip(self.saes(), records):
            sae.record = layer_records
        try:
            yield records
        finally:
            for sae, record in zip(self.saes(), before):
                sae.record = record

    def run_with_codes(self, idx, n_logits=0):
        """
        idx (B, T) -> logits (B, T, V), or of the last n_logits positions, and per layer the codes
        that its MLP read, a list of Codes per level. Raises ValueError for the dense twin.
        """
        if not self.saes():
            raise ValueError("the dense twin has no codes: cayley_levels is ''")
        with self.recording() as records:
            logits, _ = self(idx, n_logits=n_logits)
        return logits, [layer_records[-1].codes for layer_records in records]

    @torch.no_grad()
    def stream(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        use_cache=True,
        n_tokens=None,
        generator=None,
    ):
        """
        Yield max_new_tokens sampled tokens (B, 1), one after the other, that continue idx (B, T).

        temperature 0 takes the most likely token. n_tokens: ids from here on are padding of the
        vocabulary and are never sampled. A context that outgrows block_size moves on by half a
        block, so that learned positions stay valid and a cache (use_cache) is refilled once per
        half block. The text does not depend on the cache, nor on the graphs that CUDA replays with
        it (DecodingStep). Edits may change from one token to the next; then a cache keeps the keys
        and values of tokens read before.
        """
        block_size = self.config.block_size
        cache = None
        step = None
        if use_cache:
            cache = KVCache(self.config, len(idx), idx.device, self.wte.weight.dtype)
        if use_cache and idx.device.type in STATIC_DEVICES:
            step = DecodingStep(self, cache)
        start = 0  # of the window that the model reads
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                while idx.shape[1] - start > block_size:
                    start += (block_size + 1) // 2
                    if cache is not None:
                        cache.reset()
                read = cache.length if cache is not None else 0
                if step is not None and read > 0 and step.stands_for_forward():
                    logits = step(idx[:, -1:])
                else:
                    logits, _ = self(idx[:, start + read:], cache=cache)
                token = sample_token(logits[:, -1, :n_tokens], temperature, top_k, generator)
                idx = torch.cat([idx, token], 1)
                yield token
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, **sampling):
        """idx (B, T) continued by max_new_tokens -> (B, T + max_new_tokens); keywords: stream's."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **sampling)], 1)
