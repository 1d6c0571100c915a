"""Muon: momentum whose update is orthogonalised, for the hidden matrices and convolutions of a network.

After K. Jordan et al., "Muon: an optimizer for hidden layers" (2024); the update is scaled to AdamW's usual
size as in "Muon is scalable for LLM training" (arXiv 2502.16982), so that AdamW's learning rates carry over.
Weights of one shape are treated as one batch; a convolution counts as the matrix from its patches to its
outputs.
"""

from collections.abc import Iterable

import torch


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring singular values of [n, rows, columns] matrices close to 1: Newton-Schulz iteration in bf16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; for parameters of two dimensions or more."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            parameters = group["params"]
            gradient = torch.stack([p.grad for p in parameters])
            state = self.state[parameters[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            matrices = gradient.lerp(average, group["momentum"]).flatten(2)
            size = 0.2 * max(matrices.shape[1:]) ** 0.5
            update = orthogonalise(matrices).reshape(gradient.shape)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"] * size)
