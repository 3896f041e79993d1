"""The faults that mutants.py puts in, and the tests that should notice each."""
from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    words: str
    old: str  # once in the file
    new: str
    tests: str  # pytest's arguments


FAULTS = []


def fault(file, tests, words, old, new):
    FAULTS.append(Fault(file, words, old, new, tests))


# -----------------------------------------------------------------------------
# cayley.py: the field, the labels, the levels

FIELD = "test_cayley.py -k 'alpha or traces or independent or coherence or design'"
ERRORS = "test_cayley.py tests/test_layer.py -k 'error or wrong or one_bit'"
LAYER = "test_cayley.py tests/test_layer.py -k 'dense_reference or small_chunks or gating"
LAYER += " or compiles or eight'"
LIBRARY = "tests/test_layer.py"
EDITS = "tests/test_layer.py tests/test_model.py -k 'edit or record or in_place'"
STATISTICS = "test_cayley.py tests/test_layer.py -k 'statistics or nothing_seen or constant"
STATISTICS += " or without_variance'"

fault("cayley.py", FIELD, "a polynomial of degree 10 that is not primitive",
      "10: 0x409,", "10: 0x407,")
fault("cayley.py", FIELD, "logarithms one too large",
      "log[exp] = np.arange(len(exp))", "log[exp] = np.arange(len(exp)) + 1")
fault("cayley.py", FIELD, "odd t: exponents 3 and 9",
      "(3, 5) if t % 2", "(3, 9) if t % 2")
fault("cayley.py", FIELD, "even t: the large set's exponent before the small one's",
      "(2 ** (t // 2) + 1, 2 ** (t // 2 + 1) + 1)", "(2 ** (t // 2 + 1) + 1, 2 ** (t // 2) + 1)")
fault("cayley.py", FIELD, "the trace lacks the last conjugate",
      "np.bitwise_xor.reduce(conjugates)", "np.bitwise_xor.reduce(conjugates[:-1])")
fault("cayley.py", FIELD, "label bits beyond t are 1 at coordinate 0",
      "np.where(x == 0, 0, trace", "np.where(x == 0, 1, trace")
fault("cayley.py", FIELD, "labels have the first bit least significant",
      "places = np.arange(n - 1, -1, -1)[:, None]", "places = np.arange(n)[:, None]")
fault("cayley.py", FIELD, "coherence looks at half of the spectrum",
      "spectrum[1:].abs()", "spectrum[1 : 2 ** (n - 1)].abs()")
fault("cayley.py", ERRORS, "labels of 0 bits are given",
      "if not 1 <= n <= len(bits):", "if not 0 <= n <= len(bits):")
fault("cayley.py", ERRORS, "delta may be smaller than a parent's children",
      "not 2 ** (n - parent_n) <= delta <= 2**n", "not 1 <= delta <= 2**n")
fault("cayley.py", ERRORS, "delta need not be a power of two",
      "delta.bit_count() != 1", "delta < 1")
fault("cayley.py", ERRORS, "k may be above what one block opens",
      "n_open = delta if gated else 2**n", "n_open = 2**n")
fault("cayley.py", ERRORS, "a level may have as many bits as its parent",
      "not parent_n < n <= n_bits", "not parent_n <= n <= n_bits")

# -----------------------------------------------------------------------------
# cayley.py: block scores, the gate, top-k, gradients

fault("cayley.py", LAYER, "a block's scores come out with tail and chirp bits swapped",
      ".permute(1, 2, 0, 3).reshape(N, S, 2**m)", ".permute(1, 2, 3, 0).reshape(N, S, 2**m)")
fault("cayley.py", LAYER, "a block's own parity is not divided out",
      "signed = x * _signs(blocks, head, fixed, x.dtype, x.device)",
      "signed = x.expand(-1, -1, S, -1)")
fault("cayley.py", LAYER, "two parents in one block open it twice",
      "repeats = blocks[:, 1:] == blocks[:, :-1]", "repeats = blocks[:, 1:] != blocks[:, 1:]")
fault("cayley.py", LAYER, "the gate goes by the parent's last bits",
      "blocks = (parents >> (parent_n - fixed)).sort(1).values",
      "blocks = (parents & (2**fixed - 1)).sort(1).values")
fault("cayley.py", LAYER, "top-k chooses groups by their mean",
      "best = groups.amax(1)", "best = groups.mean(1)")
fault("cayley.py", LAYER, "top-k numbers a group's members as neighbours",
      "return among // k * n_groups + best.gather(1, among % k)",
      "return among // k + 8 * best.gather(1, among % k)")
fault("cayley.py", LAYER, "top-k makes groups of 8 of any number of scores",
      "if score.shape[1] < 64 * k or score.shape[1] % 8:", "if score.shape[1] < 64 * k:")
fault("cayley.py", LAYER, "features are selected by the absolute product",
      "torch.addcmul(block_offset, product, block_scale)",
      "torch.addcmul(block_offset, product.abs(), block_scale)")
fault("cayley.py", LAYER, "the bias has no part in the selection",
      "select(flat, scale, self.bias.detach() + shift, self.plan)",
      "select(flat, scale, shift, self.plan)")
fault("cayley.py", LAYER, "products of select are not normalised",
      "return torch.cat(ids), torch.cat(products) * d**-0.5",
      "return torch.cat(ids), torch.cat(products)")
fault("cayley.py", LAYER, "select's gradient is not normalised",
      "weights = (grad * 2 ** (-ctx.t / 2)).to(ctx.dtype)", "weights = grad.to(ctx.dtype)")
fault("cayley.py", LAYER, "combine's gradient reads strided gradients as if contiguous",
      "project(grad.contiguous(), ids, ctx.t, ctx.n)",
      "project(grad.transpose(0, 1).contiguous().view_as(grad), ids, ctx.t, ctx.n)")
fault("cayley.py", LAYER, "ids of upper levels are not shifted to the deepest",
      "level_ids << (ns[-1] - n) for", "level_ids for")
fault("cayley.py", LAYER, "rows made when needed take the chirp of the first bits",
      "last_bits = ids & (2 ** (n - t) - 1)", "last_bits = ids >> t")
fault("cayley.py", LAYER, "pieces of no tokens where one token fills a chunk",
      "step = max(1, _chunk_bytes(x.device) // token_bytes)",
      "step = _chunk_bytes(x.device) // token_bytes")
fault("cayley.py", LAYER, "the handed-on score lacks the mean",
      "values = values * scale[features] + shift[features]", "values = values * scale[features]")

# -----------------------------------------------------------------------------
# cayley.py: edits, the record, statistics, precision

fault("cayley.py", EDITS, "keep is not relative to what is active",
      "change = (keep - 1) * old + add", "change = keep * old + add")
fault("cayley.py", EDITS, "an edit drops the code of another feature",
      "old = values.masked_fill(ids != feature, 0).sum(-1, keepdim=True)",
      "old = values[..., :1]")
fault("cayley.py", EDITS, "the record has the codes before the edits",
      "self.record.append(Record(x, codes))", "self.record.append(Record(x, self.encode(x)))")
fault("cayley.py", STATISTICS, "evaluation counts as training",
      "if self.training and not _recomputing():", "if not _recomputing():")
fault("cayley.py", LIBRARY, "activation checkpointing counts twice",
      "if self.training and not _recomputing():", "if self.training:")
fault("cayley.py", STATISTICS, "statistics miss the last position",
      "first = (x.shape[-2] - 1) % stride", "first = 0")
fault("cayley.py", STATISTICS, "statistics skip rows of (N, d)",
      "stride = self.stats_stride if x.dim() > 2 else 1", "stride = self.stats_stride")
fault("cayley.py", STATISTICS, "the variance is the mean square",
      "(square - mean.square()).clamp_min(0)", "square")
fault("cayley.py", STATISTICS, "an update without a forward moves the statistics",
      "self.stats_momentum * ((self.pending_rows > 0) & finite)",
      "self.stats_momentum * finite")
fault("cayley.py", STATISTICS, "counts of one step are added again at the next",
      "for sums in pending:\n            sums.zero_()",
      "for sums in pending[:3]:\n            sums.zero_()")
fault("cayley.py", STATISTICS, "a constant feature is divided by its deviation",
      "scale = self.var.clamp_min(self.min_var).rsqrt()", "scale = self.var.rsqrt()")
fault("cayley.py", LIBRARY, "squares beyond float32 are taken for finite",
      "finite = self.pending_xx.isfinite().all() & self.pending_x.isfinite().all()",
      "finite = self.pending_x.isfinite().all()")
fault("cayley.py", LIBRARY, "sums that are not finite spoil the next step's as well",
      "momentum = self.stats_momentum * ((self.pending_rows > 0) & finite)",
      "momentum = self.stats_momentum * (self.pending_rows > 0)")
fault("cayley.py", LIBRARY, "a half-precision model has half-precision statistics",
      "buffer.itemsize < 4", "buffer.itemsize < 2")
fault("cayley.py", LIBRARY, "a forgotten update_stats is said at every forward",
      "if self.forwards == self.forgotten_after:", "if self.forwards >= self.forgotten_after:")
fault("cayley.py", LIBRARY, "statistics under autocast are sums in bfloat16",
      "with _autocast_off(x.device):\n            x = x[...",
      "with contextlib.nullcontext():\n            x = x[...")
fault("cayley.py", f"{LIBRARY} test_cayley.py -k autocast", "decode ignores autocast's dtype",
      "values = values.to(_autocast_dtype(values.device) or self.bias.dtype)",
      "values = values.to(self.bias.dtype)")
fault("cayley.py", "tests/test_reliability.py -k three_ranks",
      "the ranks' rows are not summed for the statistics",
      "for sums in pending:  # before", "for sums in pending[1:]:  # before")

# -----------------------------------------------------------------------------
# muon.py

MODEL = "tests/test_model.py -k 'muon or orthogonalize or split or optimizer or decay or rates'"
ON_RANKS = "tests/test_train.py::test_ranks_train_on_the_same_global_batches"
TWO_RANKS = f"{ON_RANKS}[2-settings0]"
THREE_RANKS = f"{ON_RANKS}[3-settings1]"
TWO_RANKS_TWICE = f"{ON_RANKS}[2-settings2]"  # two micro-batches a rank
RESUME = "tests/test_train.py::test_stopped_and_resumed_equals_uninterrupted[15]"
RESUME_RANKS = "tests/test_train.py -k world_size"

fault("muon.py", MODEL, "momentum keeps 5% and takes 95% of the gradient",
      'momentum.lerp_(gradient, 1 - group["momentum"])',
      'momentum.lerp_(gradient, group["momentum"])')
fault("muon.py", MODEL, "no Nesterov step",
      'nesterov = gradient.lerp_(momentum, group["momentum"])', "nesterov = momentum")
fault("muon.py", MODEL, "the scale is of the transposed shape",
      'group["lr"] * max(1, rows / cols)', 'group["lr"] * max(1, cols / rows)')
fault("muon.py", MODEL, "weight decay isn't times the learning rate",
      'decay = 1 - group["lr"] * group["weight_decay"]', 'decay = 1 - group["weight_decay"]')
fault("muon.py", MODEL, "stacked matrices are orthogonalized as one",
      "n_rows = p.shape[0] // splits.get(p, 1)", "n_rows = p.shape[0]")
fault("muon.py", MODEL, "a batch of matrices has one norm",
      "X.norm(dim=(-2, -1), keepdim=True)", "X.norm()")
fault("muon.py", MODEL, "the Newton-Schulz steps run in reverse order",
      "for a, b, c in coefficients:", "for a, b, c in reversed(coefficients):")
fault("muon.py", THREE_RANKS, "matrices beyond an equal share are nobody's",
      "return -(-len(matrices) // self.world_size)", "return len(matrices) // self.world_size")
fault("muon.py", THREE_RANKS, "a share that isn't full is gathered from the wrong end",
      "padded[:len(share)] = share", "padded[size - len(share):] = share")
fault("muon.py", RESUME_RANKS, "a checkpoint has the first rank's momentum alone",
      "momentum, communication = self._gather(self.momentum[shape], matrices)",
      "momentum, communication = self.momentum[shape], None")
fault("muon.py", "tests/test_model.py -k own_share",
      "every rank loads the first rank's share",
      "zip(self.momentum[shape], self._share(matrices))", "zip(self.momentum[shape], matrices)")
fault("muon.py", MODEL, "the embedding is Muon's",
      "matrices = [p for p in model.blocks.parameters() if p.dim() == 2]",
      "matrices = [p for p in model.parameters() if p.dim() == 2]")
fault("muon.py", MODEL, "AdamW gets Muon's learning rate",
      "((self.muon, muon_lr), (self.adamw, adamw_lr))",
      "((self.muon, muon_lr), (self.adamw, muon_lr))")
fault("muon.py", MODEL, "weight decay is AdamW's too",
      "betas, weight_decay=0.0, fused=True", "betas, weight_decay=weight_decay, fused=True")
fault("muon.py", RESUME,
      "AdamW's gradients add up over iterations",
      "self.adamw.zero_grad(set_to_none=True)", "pass")

# -----------------------------------------------------------------------------
# data.py

READING = "tests/test_data.py -k 'permute or window or reading or meta_json or vocabulary"
READING += " or fingerprint or relative or directories'"

fault("data.py", "tests/test_disk.py -k atomic", "a file that failed leaves its part",
      "os.remove(partial)", "pass")
fault("data.py", READING, "the permutation's range has n in it",
      "walking = i >= n", "walking = i > n")
fault("data.py", READING, "every epoch has the same order",
      "(seed, int(epoch))", "(seed, 0)")
fault("data.py", READING, "a shard's last window has no target for its last token",
      'counts.append((shard["tokens"] - 1) // block_size)',
      'counts.append(shard["tokens"] // block_size)')
fault("data.py", READING, "the first window of a shard is looked up in the one before",
      'side="right"', 'side="left"')
fault("data.py", READING, "the first id beyond the vocabulary is read",
      'row.max() >= self.meta["vocab_size"]', 'row.max() > self.meta["vocab_size"]')
fault("data.py", READING, "a shard of another size is opened",
      "if size != expected:", "if size is None:")
fault("data.py", READING, "a preparation that isn't whole is read",
      'if not meta["complete"]:', 'if "complete" not in meta:')
fault("data.py", READING, "block_size is not in the fingerprint",
      "[str(self.block_size), *self.checksums]", "self.checksums")
fault("data.py", "tests/test_runs.py -k two_tokenizers",
      "directories of two tokenizers are read as one",
      'if meta["tokenizer"] != self.meta["tokenizer"]:', 'if meta["dtype"] != self.meta["dtype"]:')
fault("data.py", READING, "data that moved here are not found",
      "found.append(elsewhere if os.path.isdir(elsewhere) else directory)",
      "found.append(elsewhere)")
fault("data.py", "tests/test_runs.py -k second_run", "two runs may lock one directory",
      "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB")

# -----------------------------------------------------------------------------
# train.py: the schedule

SCHEDULE = "tests/test_model.py -k schedule"
PARITY = "tests/test_runs.py -k parity_warms"

fault("train.py", SCHEDULE, "warmup is one iteration ahead",
      "return lr * it / warmup_iters", "return lr * (it + 1) / warmup_iters")
fault("train.py", SCHEDULE, "a schedule without a decay divides by its length at its end",
      "if it <= decay_start:", "if it < decay_start:")
fault("train.py", SCHEDULE, "cosine goes up",
      "share = (1 + math.cos(math.pi * progress)) / 2",
      "share = (1 - math.cos(math.pi * progress)) / 2")
fault("train.py", PARITY, "parity's warmdown lasts to max_iters",
      "decay_end = parity_start + parity_iters", "decay_end = max_iters")
fault("train.py", PARITY, "parity doesn't end after its warmdown",
      "return min(max_iters, parity_start + parity_iters)", "return max_iters")
fault("train.py", PARITY, "parity waits for the target itself",
      "in_band = val_loss <= target_val_loss + parity_band",
      "in_band = val_loss <= target_val_loss")
fault("train.py", PARITY, "a resumed run forgets where parity's warmdown began",
      "for field in fields(state):", "for field in fields(state)[:-1]:")

# -----------------------------------------------------------------------------
# train.py: resume

AGAIN = "tests/test_train.py -k never_overwritten"
FILES = "tests/test_train.py -k leaves_its"
REFUSED = "tests/test_runs.py -k 'refuses or in_other_micro'"
ROWS = "tests/test_runs.py -k every_row_once"

fault("train.py", RESUME, "a resumed run reads the data from their start",
      "batches = micro_batches(run, state.windows_read)", "batches = micro_batches(run, 0)")
fault("train.py", RESUME, "a resumed run has a new optimizer",
      'run.optimizer.load_state_dict(checkpoint["optimizer"])', "pass")
fault("train.py", "tests/test_runs.py -k random_numbers",
      "a resumed run doesn't restore the random state",
      'torch.set_rng_state(checkpoint["rng"]["cpu"])', "pass")
fault("train.py", AGAIN, "an evaluation before a stop is made again on resume",
      "if (it % eval_interval == 0 or finished) and state.evaluated != it:",
      "if it % eval_interval == 0 or finished:")
fault("train.py", AGAIN, "the last evaluation's row is dropped on resume",
      'if it < state.iter or it == state.evaluated and row["val_loss"]:', "if it < state.iter:")
fault("train.py", ROWS, "rows of later iterations than the checkpoint's are kept",
      'if it < state.iter or it == state.evaluated and row["val_loss"]:', "if it >= 0:")
fault("train.py", ROWS, "a row that was written waits to be written again",
      "append(self.path, text.getvalue().encode())\n            self.waiting = []",
      "append(self.path, text.getvalue().encode())")
fault("train.py", REFUSED, "another seed is taken on resume",
      'if before["seed"] != seed:', 'if before["seed"] < 0:')
fault("train.py", REFUSED, "other micro-batches of the same windows are refused on resume",
      "if per_iter != batch_size * gradient_accumulation_steps:",
      'if before["batch_size"] != batch_size:')
fault("train.py", REFUSED, "other shards of as many windows are taken on resume",
      'elif checkpoint.get("data", train_windows.fingerprint) != train_windows.fingerprint:',
      "elif False:")
fault("train.py", "tests/test_errors.py -k existing_run", "another model is taken on resume",
      "if config.get(key) != value:", "if key not in config:")
fault("train.py", AGAIN, "a finished run is overwritten",
      'elif os.path.exists(out_path("last.pt")):', "elif False:")

# -----------------------------------------------------------------------------
# train.py: batches, ranks, evaluation, the step

fault("train.py", TWO_RANKS, "every rank reads the same micro-batches",
      "itertools.count(windows_read + ranks.rank * batch_size,", "itertools.count(windows_read,")
fault("train.py", TWO_RANKS, "every rank validates the same share",
      "range(ranks.rank * batch_size, n_windows, ranks.world_size * batch_size)",
      "range(0, n_windows, ranks.world_size * batch_size)")
fault("train.py", "tests/test_runs.py -k mean_over_all",
      "validation's last micro-batch is always full",
      "count = min(batch_size, n_windows - first)", "count = batch_size")
fault("train.py", TWO_RANKS, "the loss is a sum over micro-batches",
      "loss = run.model(x, y)[1] / accumulation", "loss = run.model(x, y)[1]")
fault("train.py", TWO_RANKS_TWICE, "gradients are averaged over ranks at the first micro-batch",
      "= micro_step == accumulation - 1", "= micro_step == 0")
fault("train.py", RESUME, "gradients add up over iterations",
      "run.optimizer.zero_grad()\n", "pass\n")
fault("train.py", FILES, "statistics of the codes are never updated",
      "sae.update_stats()  # after", "pass  # after")
fault("train.py", FILES, "dead features are those since the start of the run",
      "sae.active_counts.zero_()", "pass")
fault("train.py", "tests/test_runs.py -k own_iteration", "a gradient may be infinite",
      "if not math.isfinite(loss_mean + grad_norm):", "if not math.isfinite(loss_mean):")
fault("train.py", "tests/test_runs.py -k own_iteration", "the check comes after the weights' step",
      "        if not math.isfinite(loss_mean + grad_norm):\n"
      "            report_nonfinite(run, state, loss_mean, grad_norm)\n\n"
      "        run.optimizer.step()\n",
      "        run.optimizer.step()\n"
      "        if not math.isfinite(loss_mean + grad_norm):\n"
      "            report_nonfinite(run, state, loss_mean, grad_norm)\n\n")

# -----------------------------------------------------------------------------
# train.py: checkpoints, the log, signals

DISK = "tests/test_disk.py -k 'for_a_while or room_made or limit_of'"
TWO_FILES = "tests/test_runs.py -k 'two_checkpoints or best_val_loss'"

fault("train.py", TWO_FILES, "ckpt.pt is the same file as last.pt",
      'with open(file.name, "rb") as source, atomic(out_path("ckpt.pt"), "wb") as copy:\n'
      "                shutil.copyfileobj(source, copy, 2**24)",
      'os.link(file.name, out_path("ckpt.link"))\n'
      '            os.replace(out_path("ckpt.link"), out_path("ckpt.pt"))')
fault("train.py", TWO_FILES, "ckpt.pt is copied before last.pt is on the disk",
      "file.flush()\n", "pass\n")
fault("train.py", TWO_FILES, "ckpt.pt is the newest checkpoint",
      "best = val_loss < state.best_val_loss", "best = True")
fault("train.py", DISK, "the last checkpoint is tried once",
      "if time.monotonic() >= deadline:", "if True:")
fault("train.py", DISK, "a last checkpoint that failed is no error",
      "save(run, state, best=best, last=state.iter >= state.end)", "save(run, state, best=best)")
fault("train.py", "tests/test_disk.py -k whole_or_not", "half a row stays on a full disk",
      "file.truncate(size)", "pass")
fault("train.py", "tests/test_runs.py -k 'long_evaluation and 1'",
      "a signal is not looked at in an evaluation",
      "if run.stop.asked:\n            sums[2] += 1", "if False:\n            sums[2] += 1")
fault("train.py", "tests/test_runs.py -k second_signal", "a second signal changes nothing",
      "if self.asked:\n            os._exit", "if False:\n            os._exit")
fault("train.py", "tests/test_runs.py -k ends_final_evals",
      "a signal in the final evaluation changes nothing",
      "run.stop.interrupt_from_now_on()", "pass")
