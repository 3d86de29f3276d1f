"""Rows of logits (n_vocab) as log-probabilities, and how far two rows are apart."""

from __future__ import annotations

import numpy as np

from ..aliases import Floats


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of a row of logits."""
    return np.asarray(logits - np.float32(log_sum_exp(logits)), np.float32)


def kl_from_logits(log_p: Floats, log_q: Floats) -> float:
    """KL(p ‖ q) in nats from two rows of log-probabilities; never negative."""
    return max(0.0, float(np.dot(np.exp(log_p), log_p - log_q)))


def log_sum_exp(row: Floats) -> float:
    """log Σ exp of a row, without overflow."""
    top = float(row.max())
    return top + float(np.log(np.exp(row - np.float32(top)).sum(dtype=np.float64)))
