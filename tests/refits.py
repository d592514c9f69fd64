"""Softmax regressions really refitted with other weights on the examples, many at a time, to machine precision."""

from collections.abc import Callable

import torch
from torch import Tensor

PRECISION = 1e-13
STEPS = 400


class Softmax:
    """``J(theta) = (1/n) sum_i weights_i l_i(theta) + (l2/2) |W|^2``, intercepts not penalised.

    Two classes take one logit (a logistic regression), more take one a class.

    Args:
        X: [n, d].
        y: class numbers [n].
        l2: of the weights.
    """

    def __init__(self, X: Tensor, y: Tensor, l2: float) -> None:
        self.X = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
        self.classes = int(y.max()) + 1
        self.outputs = 1 if self.classes == 2 else self.classes
        self.y, self.l2 = y, l2
        penalised = torch.ones(self.outputs, self.X.shape[1], dtype=X.dtype) * l2
        penalised[:, -1] = 0
        self.penalty = penalised

    @property
    def n(self) -> int:
        return len(self.X)

    def probabilities(self, theta: Tensor) -> Tensor:
        """[..., n, outputs] for theta [..., outputs, d + 1]."""
        f = self.X @ theta.mT
        return f.sigmoid() if self.outputs == 1 else f.softmax(-1)

    def gradient(self, theta: Tensor, weights: Tensor) -> Tensor:
        """Of J, [k, outputs, d + 1] for weights [k, n]."""
        target = (
            self.y[:, None].to(self.X) if self.outputs == 1 else torch.eye(self.classes).to(self.X)[self.y]
        )
        deltas = weights[..., None] * (self.probabilities(theta) - target)
        return deltas.mT @ self.X / self.n + self.penalty * theta

    def hessian(self, theta: Tensor, weights: Tensor) -> Tensor:
        """Of J, [p, p], with p = outputs (d + 1)."""
        pi = self.probabilities(theta)
        if self.outputs == 1:
            root = (pi * (1 - pi)).sqrt()[:, :, None]  # [n, 1, 1]
        else:  # diag(pi) - pi pi^T = R R^T with R = diag(sqrt pi) (I - sqrt pi sqrt pi^T)
            u = pi.sqrt()
            root = u[:, :, None] * (torch.eye(self.classes).to(pi) - u[:, :, None] * u[:, None, :])
        H = torch.zeros(self.penalty.numel(), self.penalty.numel(), dtype=self.X.dtype)
        for c in range(root.shape[2]):
            S = (root[:, :, c, None] * self.X[:, None, :]).flatten(1) * weights.sqrt()[:, None]
            H += S.T @ S
        return H / self.n + self.penalty.flatten().diag()

    def fit(self) -> Tensor:
        """theta [outputs, d + 1] with equal weights."""
        return self._newton(torch.zeros_like(self.penalty), torch.ones(self.n, dtype=self.X.dtype))

    def refit(self, theta: Tensor, weights: Tensor, newton: bool = False) -> Tensor:
        """theta [k, outputs, d + 1] for weights [k, n], from the fit with equal weights, to a gradient of 1e-13.

        By Newton's method with the first fit's Hessian kept (many small changes at once), or with each one's own.
        """
        if newton:
            return torch.stack([self._newton(theta, w) for w in weights])
        fits = theta.expand(len(weights), *theta.shape).clone()
        solve = self._solver(theta, torch.ones(self.n, dtype=self.X.dtype))
        for _ in range(STEPS):
            g = self.gradient(fits, weights)
            if float(g.flatten(1).norm(dim=1).max()) < PRECISION:
                return fits
            fits -= solve(g.flatten(1)).reshape(fits.shape)
        raise AssertionError(f"refits did not converge: {float(self.gradient(fits, weights).norm()):.1e}")

    def _newton(self, theta: Tensor, weights: Tensor) -> Tensor:
        """Newton's method; a step that does not shrink the gradient or the objective is halved."""
        for _ in range(STEPS):
            g = self.gradient(theta, weights[None])[0]
            if float(g.norm()) < PRECISION:
                return theta
            step, t = self._solver(theta, weights)(g.flatten()[None]).reshape(g.shape), 1.0
            before, size = self.objective(theta, weights), float(g.norm())
            while t > 1e-6:
                moved = theta - t * step
                shrinks = float(self.gradient(moved, weights[None])[0].norm()) < size
                if shrinks or self.objective(moved, weights) < before:
                    break
                t /= 2
            theta = moved
        raise AssertionError(
            f"the fit did not converge: {float(self.gradient(theta, weights[None]).norm()):.1e}"
        )

    def objective(self, theta: Tensor, weights: Tensor) -> Tensor:
        return (weights * self.losses(theta)).mean() + (self.penalty * theta**2).sum() / 2

    def losses(self, theta: Tensor, X: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Cross-entropy of examples (the training set's), [..., examples]."""
        X = self.X if X is None else torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
        y = self.y if y is None else y
        f = X @ theta.mT
        if self.outputs == 1:
            return torch.nn.functional.softplus(f[..., 0] * (1 - 2 * y).to(f))
        return f.logsumexp(-1) - f.gather(-1, y[:, None].expand(*f.shape[:-1], 1))[..., 0]

    def _solver(self, theta: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        # Adding a constant to all intercepts of a softmax changes nothing: a tiny multiple of that direction's
        # projector makes the matrix regular without moving a solution.
        H = self.hessian(theta, weights)
        if self.outputs > 1:
            free = torch.zeros_like(self.penalty)
            free[:, -1] = 1
            H = H + torch.outer(free.flatten(), free.flatten())
        factor = torch.linalg.cholesky(H)
        return lambda rows: torch.cholesky_solve(rows.T, factor).T
