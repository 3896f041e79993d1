"""
The GPT as a transformers model.

export.py --export_format=hf writes this file, behind cayley.py and model.py, into the one modeling
file of a folder that AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) loads.
"""
import contextlib
import math
from dataclasses import fields

import torch
import torch.nn as nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from cayley import CayleySAE
from model import GPT, Block, GPTConfig

EVERY_ROW = slice(None)
# transformers calls it "cache" from 5.24 on, and "past_key_values" before
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class CayleyGPTConfig(PretrainedConfig):
    """GPTConfig's fields, with transformers' names for them beside."""

    model_type = "cayley_gpt"
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, **settings):
        for field in fields(GPTConfig):
            setattr(self, field.name, settings.pop(field.name, field.default))
        self.use_cache = settings.pop("use_cache", True)
        super().__init__(**{"tie_word_embeddings": True, **settings})


# -----------------------------------------------------------------------------
# rows of different padding

def left_paddings(attention_mask, n_tokens):
    """
    attention_mask (B, n_tokens), 1 at tokens -> the number of positions before each row's first.

    Padding on the right is none: attention is causal. Raises ValueError for another shape, or a row
    with padding between its tokens.
    """
    if attention_mask.dim() != 2 or attention_mask.shape[1] != n_tokens:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask of shape {shape}: must be (B, {n_tokens}), with the "
                         "tokens in the cache")
    mask = attention_mask.bool()
    begins = mask[:, 1:] & ~mask[:, :-1]
    if (mask[:, 0] + begins.sum(1) > 1).any():
        raise ValueError("attention_mask: there is padding between a row's tokens; pad on the left")
    return mask.int().argmax(1).tolist()


def rows_by_padding(paddings):
    """Paddings of every row -> pairs of a padding and its rows, or EVERY_ROW."""
    groups = []
    for padding in sorted(set(paddings)):
        rows = [row for row, its_padding in enumerate(paddings) if its_padding == padding]
        groups.append((padding, EVERY_ROW if len(rows) == len(paddings) else rows))
    return groups


def padded(tensor, T, value):
    """(..., t, D) -> (..., T, D), value before the last t positions."""
    if tensor.shape[-2] == T:
        return tensor
    return nn.functional.pad(tensor, (0, 0, T - tensor.shape[-2], 0), value=value)


def joined(parts, B):
    """One tensor (B, ...) of pairs of rows and their tensor (rows, ...)."""
    rows, tensor = parts[0]
    if rows == EVERY_ROW:
        return tensor
    whole = tensor.new_empty(B, *tensor.shape[1:])
    for rows, tensor in parts:
        whole[rows] = tensor
    return whole


def check_others(others, start, T, paddings, attention_mask):
    """
    Raise ValueError for an argument of forward that would change what the GPT does.

    others: by name; positions must be those of T tokens behind start in the cache.
    """
    for name, value in others.items():
        if name == "num_items_in_batch" or value is None:
            continue
        if name == "output_attentions" and not value:
            continue
        if name not in ("position_ids", "cache_position"):
            raise ValueError(f"{name}: this model doesn't take it")
        positions = torch.arange(start, start + T, device=value.device)
        seen = torch.ones_like(positions, dtype=torch.bool)
        if name == "position_ids":
            positions = positions - torch.tensor(paddings, device=value.device)[:, None]
            if attention_mask is not None:
                seen = attention_mask[:, -T:].bool()
        if value.shape[-1] != T or ((value != positions) & seen).any():
            raise ValueError(f"{name}: this model takes no others than those of the tokens' order")


# -----------------------------------------------------------------------------
# caches

def cached_length(cache):
    return int(cache.get_seq_length()) if cache is not None else 0


class CachedRows:
    """
    Rows of a transformers Cache, without the padding on their left, as the GPT reads a KVCache.

    It adds T positions to the cache at once if it has every row. Those of some rows wait in new,
    per layer a pair of keys and values (rows, H, T, D), for add_together.
    """

    def __init__(self, cache, padding, rows, T):
        self.cache = cache
        self.padding = padding
        self.rows = rows
        self.start = cached_length(cache)
        self.end = self.start + T
        self.length = max(0, self.start - padding)
        self.new = []

    def append(self, layer, k, v):
        """k, v (rows, H, t, D) of new tokens -> those of all tokens so far."""
        # 1 and not 0: a static cache of transformers 4 counts the keys that are not 0
        k_padded = padded(k, self.end - self.start, 1)
        v_padded = padded(v, self.end - self.start, 1)
        if self.rows == EVERY_ROW:
            keys, values = self.add(layer, k_padded, v_padded)
            return keys[:, :, self.padding:self.end], values[:, :, self.padding:self.end]
        self.new.append((k_padded, v_padded))
        if self.length == 0:
            return k, v
        past = self.cache.layers[layer]
        if type(past) not in (DynamicLayer, StaticLayer) or self.cache.offloading:
            raise ValueError(f"{type(self.cache).__name__} of {type(past).__name__}s: rows of "
                             "different padding need a DynamicCache or StaticCache, not offloaded")
        tokens = slice(self.padding, self.start)
        keys = torch.cat([past.keys[self.rows, :, tokens], k], 2)
        values = torch.cat([past.values[self.rows, :, tokens], v], 2)
        return keys, values

    def add(self, layer, k, v):
        """Keys and values (B, H, T, D) of every row -> what the cache then has."""
        positions = torch.arange(self.start, self.end, device=k.device)
        return self.cache.update(k, v, layer, {"cache_position": positions})  # for transformers 4


def add_together(groups, B):
    """Add to the cache what the CachedRows of all groups of B rows have waiting."""
    for layer in range(len(groups[0].new)):
        keys = joined([(group.rows, group.new[layer][0]) for group in groups], B)
        values = joined([(group.rows, group.new[layer][1]) for group in groups], B)
        groups[0].add(layer, keys, values)


# -----------------------------------------------------------------------------
# the model

class CheckpointedBlock(GradientCheckpointingLayer, Block):
    """A Block that keeps nothing but x for the backward, once gradient checkpointing is enabled."""


class CayleyGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """
    The GPT of model.py as self.gpt, in transformers' terms.

    saes, run_with_codes and recording are the GPT's. Train it with update_stats() of every layer of
    saes() after each optimizer step.
    """

    config_class = CayleyGPTConfig
    base_model_prefix = "gpt"
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.wte.weight"}
    _no_split_modules = ["CheckpointedBlock"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        settings = {field.name: getattr(config, field.name) for field in fields(GPTConfig)}
        self.gpt = GPT(GPTConfig(**settings))
        for block in self.gpt.blocks:
            block.__class__ = CheckpointedBlock
        # two parameters, since transformers ties them itself, after loading
        self.gpt.lm_head.weight = nn.Parameter(self.gpt.wte.weight.detach().clone())
        self.post_init()
        # the statistics' dtype in loading; set here because transformers 4 checks it for modules
        self._keep_in_fp32_modules_strict = {"mean", "var"}

    def _init_weights(self, module):
        """What a new GPT has in a module's own parameters and buffers that no file gave."""
        name = next((name for name, each in self.named_modules() if each is module), "")
        std = 0.02 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 0.02
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if getattr(tensor, "_is_hf_initialized", False):  # transformers 4 doesn't look itself
                continue
            if name == "bias" or isinstance(module, CayleySAE) and name != "var":
                nn.init.zeros_(tensor)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(tensor, std=std)
            else:  # var, and the norms' weights
                nn.init.ones_(tensor)

    def get_input_embeddings(self):
        return self.gpt.wte

    def set_input_embeddings(self, value):
        self.gpt.wte = value

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.gpt.lm_head = new_embeddings

    def resize_token_embeddings(self, *arguments, **keywords):
        """PreTrainedModel's; afterwards generate() suppresses no token, since any may be new."""
        embeddings = super().resize_token_embeddings(*arguments, **keywords)
        self.gpt.config.vocab_size = self.config.vocab_size
        self.generation_config.suppress_tokens = None
        return embeddings

    def create_masks_for_generate(self, attention_mask=None, **others):
        """generate() would make masks (B, 1, T, keys) for a static cache: forward takes (B, T)."""
        return attention_mask

    def saes(self):
        """The CayleySAE of every block: see their edits, encode, decode, atoms and record."""
        return self.gpt.saes()

    def run_with_codes(self, input_ids, n_logits=0):
        """GPT.run_with_codes: logits, and per layer a list of Codes, one a level."""
        return self.gpt.run_with_codes(input_ids, n_logits)

    def recording(self):
        """GPT.recording: a context in which every layer records its input and its codes."""
        return self.gpt.recording()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        cache=None,
        **others,
    ):
        """
        input_ids, labels (B, T), labels -100 where there is none -> loss and logits (B, T, V).

        inputs_embeds (B, T, C) stands for input_ids, and past_key_values is cache's older name.
        logits_to_keep: of the last positions only, or of a tensor of positions; 0: of all.
        hidden_states: what each block reads and what lm_head reads, (B, T, C) each. Rows with
        different padding on their left are read one after the other, each as if it were alone.
        Raises ValueError for what the GPT doesn't know.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: give one of the two")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are one argument: give one of the two")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None and self._is_checkpointing():
            raise ValueError("use_cache: gradient checkpointing would read the tokens twice")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        if labels is not None:
            logits_to_keep = 0
        if input_ids is None:  # their number counts, _reading has the embeddings
            input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=int, device=inputs_embeds.device)

        B, T = input_ids.shape
        start = cached_length(cache)
        paddings = [0] * B
        if attention_mask is not None:
            paddings = left_paddings(attention_mask, start + T)
        others.setdefault("output_attentions", self.config.output_attentions)
        check_others(others, start, T, paddings, attention_mask)

        n_logits = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits, *states = self._read(
            input_ids, inputs_embeds, paddings, cache, n_logits, output_hidden_states
        )
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            items = {"num_items_in_batch": others.get("num_items_in_batch")}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **items)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=tuple(states) or None, **{CACHE: cache}
        )
        return output if return_dict else output.to_tuple()

    def _is_checkpointing(self):
        """Whether a backward would repeat the blocks' forwards."""
        enabled = any(block.gradient_checkpointing for block in self.gpt.blocks)
        return enabled and self.training and torch.is_grad_enabled()

    def _read(self, ids, embeds, paddings, cache, n_logits, with_states):
        """
        Logits (B, n_logits or T, V) of ids (B, T), added to a Cache or None, and hidden states.

        embeds: (B, T, C) or None; paddings: of each row, see left_paddings. Where there is padding
        logits and hidden states are 0.
        """
        B, T = ids.shape
        n_logits = min(n_logits, T) or T
        caches, parts = [], []
        for padding, rows in rows_by_padding(paddings):
            skip = max(0, padding - cached_length(cache))  # of these T positions
            rows_cache = CachedRows(cache, padding, rows, T) if cache is not None else None
            some_embeds = embeds[rows, skip:] if embeds is not None else None
            with self._reading(some_embeds, with_states) as blocks:
                logits, _ = self.gpt(
                    ids[rows, skip:], cache=rows_cache, n_logits=min(n_logits, T - skip)
                )
            tensors = [padded(logits, n_logits, 0)]
            if with_states:
                states = [x for x, _ in blocks] + [self.gpt.ln_f(blocks[-1][1])]
                tensors += [padded(state, T, 0) for state in states]
            parts.append((rows, tensors))
            caches.append(rows_cache)
        if cache is not None:
            add_together(caches, B)
        together = []
        for i in range(len(tensors)):
            together.append(joined([(rows, tensors[i]) for rows, tensors in parts], B))
        return together

    @contextlib.contextmanager
    def _reading(self, embeds, with_states):
        """
        A context for a forward of the GPT: it reads embeds (B, T, C) unless they are None.

        Yields a list that gets, with with_states, each block's input and output.
        """
        blocks, hooks = [], []
        if embeds is not None:
            hooks.append(self.gpt.wte.register_forward_hook(lambda module, args, output: embeds))
        for block in self.gpt.blocks if with_states else []:
            hooks.append(block.register_forward_hook(
                lambda module, args, output: blocks.append((args[0], output))
            ))
        try:
            yield blocks
        finally:
            for hook in hooks:
                hook.remove()
