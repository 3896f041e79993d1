"""
The GPT as a transformers model.

export.py --export_format=hf writes this file, behind cayley.py and model.py, into the one modeling
file of a folder that AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) loads.
"""
from dataclasses import fields

import torch
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from cayley import CayleySAE
from model import GPT, GPTConfig


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
        super().__init__(**settings)


class CachedRows:
    """
    Rows of a transformers Cache, without the padding on their left, as the GPT reads a KVCache.

    new: per layer the keys and values (rows, H, T, D) of what the GPT has read through it.
    """

    def __init__(self, cache, rows, padding):
        self.cache = cache
        self.rows = rows
        self.padding = padding
        self.end = cached_length(cache)
        self.length = max(0, self.end - padding)
        self.new = []

    def append(self, layer, k, v):
        """k, v (rows, H, T, D) of new tokens -> those of all tokens so far."""
        self.new.append((k, v))
        if self.end <= self.padding:
            return k, v
        past = self.cache.layers[layer]
        tokens = slice(self.padding, self.end)
        keys = torch.cat([past.keys[self.rows, :, tokens], k], 2)
        values = torch.cat([past.values[self.rows, :, tokens], v], 2)
        return keys, values


def cached_length(cache):
    return cache.get_seq_length() if cache is not None else 0


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


def joined(parts, B, T):
    """
    One tensor (B, H, T, D) of parts (rows, skip, tensor (rows, H, T - skip, D)); 0 at the skipped.
    """
    rows, skip, tensor = parts[0]
    if rows == slice(None) and skip == 0:
        return tensor
    whole = tensor.new_zeros(B, tensor.shape[1], T, tensor.shape[3])
    for rows, skip, tensor in parts:
        whole[rows, :, skip:] = tensor
    return whole


class CayleyGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """
    The GPT of model.py as self.gpt, in transformers' terms.

    saes, run_with_codes and recording are the GPT's. Train it with update_stats() of every layer of
    saes() after each optimizer step.
    """

    config_class = CayleyGPTConfig
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.wte.weight"}
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        settings = {field.name: getattr(config, field.name) for field in fields(GPTConfig)}
        self.gpt = GPT(GPTConfig(**settings))
        self.post_init()
        # the layers' statistics stay wide; set here because transformers 4 checks it for modules
        self._keep_in_fp32_modules_strict = {"mean", "var"}

    def _init_weights(self, module):
        """The GPT has initialised itself; transformers 5 leaves buffers unset that aren't saved."""
        if isinstance(module, CayleySAE):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module.state_dict():
                    buffer.zero_()

    def get_input_embeddings(self):
        return self.gpt.wte

    def get_output_embeddings(self):
        return self.gpt.lm_head

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
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """
        input_ids, labels (B, T), labels -100 where there is none -> loss and logits (B, T, V).

        logits_to_keep: of the last positions only; 0: of all. Rows with different padding on their
        left are read one after the other, each as if it were alone. Raises ValueError for inputs
        that the GPT doesn't know.
        """
        for name in ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name}: this model doesn't take it")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if labels is not None:
            logits_to_keep = 0

        n_tokens = cached_length(past_key_values) + input_ids.shape[1]
        paddings = [0] * len(input_ids)
        if attention_mask is not None:
            paddings = left_paddings(attention_mask, n_tokens)
        logits = self._logits(input_ids, paddings, past_key_values, logits_to_keep)
        loss = None
        if labels is not None:
            items = {"num_items_in_batch": kwargs.get("num_items_in_batch")}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _logits(self, idx, paddings, cache, n_logits):
        """
        Logits (B, n_logits or T, V) of idx (B, T), added to a Cache or None.

        paddings: of each row, see left_paddings. Where there is padding logits are 0.
        """
        B, T = idx.shape
        start = cached_length(cache)
        n_logits = min(n_logits, T) or T
        groups = []
        for padding in sorted(set(paddings)):
            rows = [row for row in range(B) if paddings[row] == padding]
            if len(rows) == B:
                rows = slice(None)  # no copies
            skip = max(0, padding - start)  # of these T positions
            group = CachedRows(cache, rows, padding)
            some, _ = self.gpt(idx[rows, skip:], cache=group, n_logits=min(n_logits, T - skip))
            groups.append((rows, skip, some, group.new))
        if cache is not None:
            for layer in range(self.config.n_layer):
                keys = [(rows, skip, new[layer][0]) for rows, skip, _, new in groups]
                values = [(rows, skip, new[layer][1]) for rows, skip, _, new in groups]
                cache.update(joined(keys, B, T), joined(values, B, T), layer)
        parts = []
        for rows, _, some, _ in groups:
            parts.append((rows, n_logits - some.shape[1], some.unsqueeze(1)))  # as with one head
        return joined(parts, B, n_logits).squeeze(1)
