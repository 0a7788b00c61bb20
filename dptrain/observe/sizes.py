"""The sizes and weights of one replica's micro-batches since the last optimizer step; no gradient lives here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class MicroBatchSizes:
    """What a replica knows of its own micro-batches of one step, on the host.

    The gradient of micro-batch m of replica r enters the combined gradient as v_rm·g_rm/world_size, where g_rm
    is the mean over its b_rm samples. Only ratios of the v matter for the noise scale; their sum over all
    replicas, divided by the world size, is the factor by which the combined gradient differs from a mean.

    Attributes:
        num_samples: b of each micro-batch.
        weights: v of each micro-batch.
    """

    num_samples: list[float] = field(default_factory=list)
    weights: list[float | None] = field(default_factory=list)

    def add(self, *, num_samples: float, weight: float | None) -> None:
        """Note one micro-batch; a weight of None is an equal share of the replica's step, known at its end."""
        self.num_samples.append(num_samples)
        self.weights.append(weight)

    def drop_last(self) -> None:
        """Forget the latest micro-batch: it had no backward pass."""
        self.num_samples.pop()
        self.weights.pop()

    def resolved_weights(self) -> list[float]:
        """Return v of each micro-batch, now that their number is known."""
        share = 1 / max(len(self.weights), 1)
        return [share if weight is None else weight for weight in self.weights]

    def sums(self, *, accumulated: bool) -> tuple[float, ...]:
        """Return (Σ v/b, Σ v²/b, Σ v, number of small batches, 1 for this replica, Σ b).

        Args:
            accumulated: the replica's gradient is seen once, after accumulation: then it is one small batch,
                whose weight is Σ v and whose noise is Σ v²/b over (Σ v)².
        """
        weights = self.resolved_weights()
        pairs = list(zip(self.num_samples, weights, strict=True))
        total = sum(weights)
        square = sum(v * v / b for b, v in pairs)
        if accumulated:
            return square / total if total else 0.0, square, total, float(total > 0), 1.0, sum(self.num_samples)
        return sum(v / b for b, v in pairs), square, total, float(len(pairs)), 1.0, sum(self.num_samples)
