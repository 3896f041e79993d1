"""
Muon for the matrices inside the blocks, AdamW for everything else: one optimizer with one step().

Muon replaces a matrix's momentum by (nearly) the closest orthogonal matrix, by a few Newton-Schulz
iterations: see https://kellerjordan.github.io/posts/muon/. It is for hidden 2D weights only, not
for embeddings, norms or biases.
"""
import torch
import torch.distributed as dist

# Odd quintics p(x) = a x + b x^3 + c x^5, one triple per step. Polar Express: arXiv 2505.16932, the
# optimal composition for five steps, with its safety factor for bf16. Classic: Keller Jordan's
# single triple.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
CLASSIC = [(3.4445, -4.7750, 2.0315)] * 5

# all_gather_into_tensor, by its name since PyTorch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def orthogonalize(G, coefficients=POLAR_EXPRESS, dtype=torch.bfloat16):
    """
    Singular values of matrices G (..., rows, cols) moved to about 1 -> same shape.

    By Newton-Schulz steps in dtype.
    """
    X = G.to(dtype)
    if G.shape[-2] > G.shape[-1]:
        X = X.mT
    # Polar Express' first step must not see a norm above 1
    safety = 1.02 if coefficients is POLAR_EXPRESS else 1.0
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * safety + 1e-7)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


class Muon(torch.optim.Optimizer):
    """
    momentum -> Nesterov -> orthogonalize -> p -= lr * sqrt(max(1, rows / cols)) * update.

    params: 2D parameters. splits: {parameter: s} for weights that are s matrices stacked along the
    rows (s = 3 for q, k, v in c_attn), each orthogonalized by itself. Matrices of one shape are one
    batch. In a process group each rank keeps the momentum of, and orthogonalizes, its share of
    every batch, and the updates are gathered; gradients must already be the same on all ranks. So
    state_dict() and load_state_dict() are collective: call them on every rank. The state holds one
    momentum per parameter and loads at any world size. Parameters without a gradient stay as they
    are.
    """

    def __init__(
        self, params, lr, momentum=0.95, weight_decay=0.0, coefficients=POLAR_EXPRESS, splits=None
    ):
        params = list(params)
        for p in params:
            if p.dim() != 2:
                raise ValueError(f"Muon takes 2D parameters, not one of shape {tuple(p.shape)}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.coefficients = coefficients
        # not bf16 elsewhere: a CPU without instructions for it takes 35 times as long
        self.dtype = torch.bfloat16 if params[0].is_cuda else torch.float32
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        splits = splits or {}
        self.batches = {}  # shape of a matrix -> [(parameter, its rows)]
        for p in params:
            n_rows = p.shape[0] // splits.get(p, 1)
            matrices = self.batches.setdefault((n_rows, p.shape[1]), [])
            for start in range(0, len(p), n_rows):
                matrices.append((p, slice(start, start + n_rows)))
        self.momentum = {}  # shape -> (this rank's share, rows, cols)
        for shape, matrices in self.batches.items():
            share = len(self._share(matrices))
            self.momentum[shape] = torch.zeros(share, *shape, device=params[0].device)

    def _share_size(self, matrices):
        return -(-len(matrices) // self.world_size)

    def _share(self, matrices):
        size = self._share_size(matrices)
        return matrices[self.rank * size:(self.rank + 1) * size]

    def _gather(self, share, matrices):
        """
        This rank's results (share, rows, cols) -> those of all matrices, the first len(matrices)
        rows, and the communication to wait for.
        """
        if self.world_size == 1:
            return share, None
        size = self._share_size(matrices)
        padded = share.new_zeros(size, *share.shape[1:])
        padded[:len(share)] = share
        result = share.new_empty(size * self.world_size, *share.shape[1:])
        return result, _all_gather(result, padded, async_op=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One update -> what closure returns, which computes loss and gradients anew, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        updates = []
        # gathering one batch overlaps with orthogonalizing the next
        for shape, matrices in self.batches.items():
            momentum = self.momentum[shape]
            share = self._share(matrices)
            update = momentum.to(self.dtype)
            if share:
                gradients = []
                for m, (p, rows) in zip(momentum, share):
                    gradients.append(m if p.grad is None else p.grad[rows])  # m moves m nowhere
                gradient = torch.stack(gradients).to(momentum.dtype)
                momentum.lerp_(gradient, 1 - group["momentum"])
                nesterov = gradient.lerp_(momentum, group["momentum"])
                update = orthogonalize(nesterov, self.coefficients, self.dtype)
            updates.append(self._gather(update.contiguous(), matrices))
        for (shape, matrices), (update, communication) in zip(self.batches.items(), updates):
            rows, cols = shape
            if communication is not None:
                communication.wait()
            scale = group["lr"] * max(1, rows / cols) ** 0.5
            decay = 1 - group["lr"] * group["weight_decay"]
            for (p, where), u in zip(matrices, update):
                if p.grad is not None:
                    p[where].mul_(decay).add_(u, alpha=-scale)
        return loss

    def state_dict(self):
        full = {p: torch.zeros_like(p) for p in self.param_groups[0]["params"]}
        for shape, matrices in self.batches.items():
            momentum, communication = self._gather(self.momentum[shape], matrices)
            if communication is not None:
                communication.wait()
            for (p, rows), m in zip(matrices, momentum):
                full[p][rows] = m
        return {"momentum": list(full.values())}

    def load_state_dict(self, state_dict):
        params = self.param_groups[0]["params"]
        stored = dict(zip(params, state_dict["momentum"], strict=True))
        for shape, matrices in self.batches.items():
            for mine, (p, rows) in zip(self.momentum[shape], self._share(matrices)):
                mine.copy_(stored[p][rows])


class MuonAdamW:
    """
    The optimizers of a GPT (model.py) behind one step(): Muon for the matrices of the blocks, fused
    AdamW for the rest.

    Set learning rates with set_lr(muon, adamw). state_dict() is collective, see Muon.
    """

    def __init__(
        self, model, muon_lr, adamw_lr, momentum=0.95, betas=(0.9, 0.95), weight_decay=0.0
    ):
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        muon_ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in muon_ids]
        splits = {block.attn.c_attn.weight: 3 for block in model.blocks}
        self.muon = Muon(matrices, muon_lr, momentum, weight_decay, splits=splits)
        self.adamw = torch.optim.AdamW(others, adamw_lr, betas, weight_decay=0.0, fused=True)

    def set_lr(self, muon_lr, adamw_lr):
        for optimizer, lr in ((self.muon, muon_lr), (self.adamw, adamw_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self):
        self.muon.step()
        self.adamw.step()

    def zero_grad(self):
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict):
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
