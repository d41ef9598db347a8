"""Muon (Jordan et al. 2024): orthogonalized momentum for weight matrices, AdamW for everything else.

torch.optim.Muon takes two-dimensional parameters only and multiplies in bfloat16, a hundred times slower on processors
without bfloat16 units. This one treats convolutions as matrices and multiplies in float32.
"""

from __future__ import annotations

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MIN_SIZE = 16  # rows and columns of the smallest matrix that is orthogonalized


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter maps activations to activations, which embedding tables do not."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) >= MIN_SIZE and "embed" not in name


def orthogonalized(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Moves all singular values to between 0.7 and 1.2 (quintic Newton-Schulz iteration).

    The factors are polynomials of the first Gram matrix, so they commute. For a matrix much wider than high, such as a
    convolution's, their product is computed first and multiplies the matrix once, at the end.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    wide = x.shape[1] >= 3 * x.shape[0]
    gram, factor = x @ x.T, None
    for step in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        if wide:
            factor = polynomial if factor is None else polynomial @ factor
        else:
            x = polynomial @ x
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial if wide else x @ x.T
    x = factor @ x if wide else x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon with updates of AdamW's size (Liu et al. 2025), so that matrices and the rest share a learning rate.

    Args:
        named: parameters by name.
        lr, weight_decay: of all parameters; vectors are not decayed.
        momentum: of the matrices.
        betas: AdamW's, of the other parameters.
    """

    def __init__(
        self, named: dict[str, torch.Tensor], lr: float, weight_decay: float, momentum=0.95, betas=(0.9, 0.98)
    ):
        matrices = [p for name, p in named.items() if is_matrix(name, p)]
        others = [p for name, p in named.items() if not is_matrix(name, p)]
        groups = [
            {"params": matrices, "orthogonal": True, "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim > 1], "orthogonal": False, "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "orthogonal": False, "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["orthogonal"]:
                for parameter in parameters:
                    self._orthogonal(parameter, group)
            else:
                self._adam(parameters, group)

    def _orthogonal(self, parameter, group) -> None:
        gradient = parameter.grad.float()
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        mean = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalized(gradient.lerp(mean, group["momentum"]).flatten(1))  # Nesterov's
        scale = 0.2 * max(update.shape) ** 0.5  # the RMS of AdamW's updates is about 0.2
        parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _adam(self, parameters, group) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            gradient, state = parameter.grad.float(), self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["step"] += 1
            mean = state["mean"].lerp_(gradient, 1 - first)
            square = state["square"].lerp_(gradient.square(), 1 - second)
            step = float(state["step"])
            root = (square / (1 - second**step)).sqrt_().add_(1e-8)
            parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - first**step))
