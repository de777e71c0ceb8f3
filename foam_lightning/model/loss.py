"""The next-token loss, whole or in chunks, and its mean over the tokens of an optimizer step."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss, pad

IGNORED = -100
# Smaller chunks save little memory: logits of 256 tokens are small compared to a layer. More than
# 64 chunks only cost speed.
_MIN_CHUNK_TOKENS = 256
_MAX_CHUNKS = 64


def token_loss(
    hidden: Tensor,
    head: torch.nn.Linear,
    labels: Tensor,
    *,
    chunked: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of every next token, in nats and in float32.

    Args:
        hidden: Hidden states, (B, S, H).
        head: The output layer, H to V; without a bias.
        labels: Token ids, (B, S), not shifted: position s predicts `labels[:, s + 1]`. Labels of
            -100 are ignored.
        chunked: Process 1/64 of the tokens at a time, at least 256, so that the (B * S, V) logits
            never exist; see `_ChunkedLoss`.
        scale: By what a gradient scaler will multiply the loss, a scalar. Gradients that are formed
            in the forward pass are as large, so that float16 can express them.

    Returns:
        The sum over labelled tokens, a float32 scalar, and their number, an int64 scalar.
    """
    if chunked:
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # the last predicts nothing
        num_tokens = (targets != IGNORED).sum()
        total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), head.weight, targets, num_tokens, scale, torch.is_grad_enabled()
        )
        return total, num_tokens
    targets = labels[:, 1:].flatten()
    logits = head(hidden[:, :-1].flatten(0, 1)).float()
    total = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()


def min_rows_for_chunks(sequence_length: int) -> int:
    """Return the smallest number of rows whose tokens need more than one chunk.

    Args:
        sequence_length: Tokens in a row.
    """
    return _MIN_CHUNK_TOKENS // sequence_length + 1


class _ChunkedLoss(torch.autograd.Function):
    """Head and cross entropy in chunks of tokens, which form both gradients in the forward pass.

    Each chunk makes its logits, turns them into their own gradient, and adds its part to one
    gradient of the head in place: no logits outlive their chunk, and none are computed twice. Liger
    Kernel and cut-cross-entropy work in the same way. Here every step is an ordinary operator, so
    the memory account sees it; to it `torch.nn.functional.linear_cross_entropy` is opaque.

    The gradients are formed for the mean over labelled tokens, and `backward` scales them to what
    it is asked for: by 1 where the step is one micro-batch, by 1 / n where it is n of full rows.
    With bfloat16 weights that factor is rounded, unless it is a power of two, and the gradient of
    the head is rounded once a chunk: its relative error is 0.26 % for 4 chunks, 0.48 % for 16 and
    0.99 % for 64, against 0.18 % of the plain loss (docs/log.md). Autocast sums it in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        num_tokens: Tensor,
        scale: Tensor | None,
        grad_enabled: bool,
    ) -> Tensor:
        """Sum the negative log-likelihood, and form the gradients that backward will return.

        Args:
            ctx: Keeps the gradients.
            states: Hidden states, (N, H).
            weight: The head, (V, H).
            targets: The token that each position predicts, (N,), or -100.
            num_tokens: How many are not -100, a scalar.
            scale: That of a gradient scaler; None is 1.
            grad_enabled: Whether there may be a backward pass.
        """
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        head = weight.to(dtype or weight.dtype)
        needs_states, needs_head = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        grad_states = torch.empty_like(states) if needs_states else None
        grad_head = torch.zeros_like(weight) if needs_head else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        divisor = num_tokens.clamp(min=1) if scale is None else num_tokens.clamp(min=1) / scale
        scales = (targets != IGNORED).float() / divisor
        size = max(_MIN_CHUNK_TOKENS, -(-len(targets) // _MAX_CHUNKS))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), size):
                part = slice(start, start + size)
                rows, labels = states[part].to(head.dtype), targets[part]
                if needs_states or needs_head:
                    nll, grad = _nll_and_gradient(rows, head, labels, scales[part])
                    _add_gradients(grad, rows, head, grad_states, grad_head, part)
                    del grad  # before the next chunk makes its logits
                else:
                    nll = _nll(_log_probabilities(rows, head), labels)
                total += nll
        ctx.gradients = grad_states, grad_head
        ctx.divisor = divisor
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `states` and `weight`, once.

        Args:
            ctx: Has them for the mean over labelled tokens.
            grad_total: The gradient of the sum, a scalar.

        Raises:
            RuntimeError: They were returned before, or are to be differentiated themselves.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("the chunked loss has no second derivative; set chunked to False")
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss frees its gradients in backward; run it only once")
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_total * ctx.divisor
        grad_states, grad_head = (None if g is None else g.mul_(scale) for g in gradients)
        return grad_states, grad_head, None, None, None, None


def _log_probabilities(rows: Tensor, head: Tensor) -> Tensor:
    return log_softmax(linear(rows, head).float(), dim=1)


def _nll(log_p: Tensor, targets: Tensor) -> Tensor:
    return nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")


def _nll_and_gradient(
    rows: Tensor, head: Tensor, targets: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a chunk, and the gradient of its logits in the head's dtype.

    Args:
        rows: Hidden states, (N, H).
        head: (V, H).
        targets: (N,), or -100.
        scales: The weight of each token in the loss, (N,); 0 for those that are ignored.
    """
    log_p = _log_probabilities(rows, head)
    nll = _nll(log_p, targets)
    index = targets.clamp(min=0)[:, None]
    # p - 1 for the target; this way it is exact where p is nearly 1.
    of_target = torch.expm1(log_p.gather(1, index))
    grad = log_p.exp_().scatter_(1, index, of_target).mul_(scales[:, None])
    return nll, grad.to(head.dtype)


def _add_gradients(
    grad: Tensor,
    rows: Tensor,
    head: Tensor,
    grad_states: Tensor | None,
    grad_head: Tensor | None,
    part: slice,
) -> None:
    """Add what a chunk contributes to the gradients that are needed.

    Args:
        grad: The gradient of its logits, (N, V).
        rows: Its hidden states, (N, H).
        head: (V, H).
        grad_states: Gets the gradient of this part of the hidden states.
        grad_head: The gradient of the head so far.
        part: The tokens of the chunk.
    """
    if grad_states is not None:
        grad_states[part] = grad @ head
    if grad_head is None:
        return
    if grad_head.dtype == grad.dtype:
        grad_head.addmm_(grad.T, rows)
    else:
        grad_head += grad.T @ rows


class StepMean:
    """Average the loss over all labelled tokens of an optimizer step, whatever its micro-batches.

    A mean of micro-batch means would weigh tokens of short micro-batches more, so that a memory
    budget, which decides micro-batch sizes, would change what is learned. The number of labelled
    tokens is known only at the end of the step. Until then each micro-batch is divided by its
    number of positions, equal on every rank; before clipping, gradients are rescaled by positions /
    labelled tokens. For full rows that factor is exactly 1.
    """

    def __init__(self) -> None:
        self._nats: Tensor | int = 0
        self._num_tokens: Tensor | int = 0
        self._positions = 1

    def backward_loss(
        self, total: Tensor, num_tokens: Tensor, labels: Tensor, trainer: Trainer
    ) -> Tensor:
        """Return the loss to backpropagate for a micro-batch.

        Args:
            total: The sum over its labelled tokens, a scalar.
            num_tokens: Their number, an int64 scalar; may be 0.
            labels: (B, S), the same shape in every micro-batch.
            trainer: Averages gradients over micro-batches and ranks.
        """
        self._nats = self._nats + total.detach()
        self._num_tokens = self._num_tokens + num_tokens
        if _is_single_micro_batch(trainer):
            return total / num_tokens.clamp(min=1)
        self._positions = max(1, labels[:, 1:].numel())
        return total / self._positions

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the loss of the step so far on this rank: nats, and the number of tokens."""
        return torch.as_tensor(self._nats), torch.as_tensor(self._num_tokens)

    def end_step(self, trainer: Trainer) -> Tensor | None:
        """Return the factor that rescales gradients to the mean over labelled tokens.

        Args:
            trainer: Sums over ranks.

        Returns:
            The factor of gradients that are averages over micro-batches and ranks, a scalar; None
            where they are this mean already.
        """
        local = torch.as_tensor(self._num_tokens)
        self._nats = self._num_tokens = 0
        if _is_single_micro_batch(trainer):
            return None
        num_tokens = trainer.strategy.reduce(local, reduce_op="sum")
        assert isinstance(num_tokens, Tensor)
        positions = self._positions * trainer.accumulate_grad_batches * trainer.world_size
        return positions / num_tokens.clamp(min=1)


def _is_single_micro_batch(trainer: Trainer) -> bool:
    """Return whether one micro-batch is the whole step, so that its mean is known at once."""
    return trainer.accumulate_grad_batches == trainer.world_size == 1
