"""Logits in, tokens out: vLLM 0.29's sampler (vllm/v1/sample/sampler.py) as a chain of small stages on MLX.

    logits (R, V) -> grammar -> [raw log-probabilities] -> allowed_token_ids -> bad_words -> min_tokens -> logit_bias
        -> custom processors -> repetition, frequency, presence penalties -> greedy rows: argmax
        -> temperature -> min_p -> [argmax-invariant custom processors] -> top_k -> top_p -> draw

A stage returns its argument untouched when no row needs it; what follows the greedy rows is in `routes`. It is
one lazy graph, evaluated once; only token ids reach the host. The exceptions, each evaluated on its own: custom
processors, reported log-probabilities, and rows whose kept set outgrew their shortlist. `queue` has none of them: it
evaluates nothing, and takes a row whose last token is still on the device.

No row can fail the batch. Where nothing is left to draw (a grammar and allowed_token_ids that exclude each other) the
answer is token 0, which is what vLLM's argmax over NaN gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.edits import add_bias, allow_only, bar_bad_words, hold_back_stops
from pomarium.worker.sampling.full_row import keep
from pomarium.worker.sampling.grammar import apply_grammar
from pomarium.worker.sampling.logprobs import LogprobsMode, Scored, gather, score, top_logprobs, wants_logprobs
from pomarium.worker.sampling.penalties import apply_penalties
from pomarium.worker.sampling.routes import draw_and_mask, draw_on_device, draw_tokens
from pomarium.worker.sampling.rows import LogitsProcessor, SamplingRow
from pomarium.worker.sampling.uniforms import random_bits, request_seed
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import Grammar, Logprobs


@dataclass(frozen=True)
class Sampled:
    """One token per row, and the log-probabilities if any row asked for them."""

    token_ids: list[int]
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Queued:
    """The same, lazily. token_ids: int32 (R,). scored: empty if no row asked."""

    token_ids: mx.array
    scored: list[Scored]


class Sampler:
    """Draws the next token of each row.

    Args:
        vocab_size: number of tokens; wider logits (padded output layers) are cut to it.
        engine_seed: with the request id it seeds requests that have no seed.
        logprobs_mode: vLLM's --logprobs-mode.
    """

    def __init__(self, vocab_size: int, engine_seed: int, logprobs_mode: LogprobsMode = "raw_logprobs") -> None:
        self.vocab_size = vocab_size
        self.engine_seed = engine_seed
        self.logprobs_mode = logprobs_mode

    def sample(
        self,
        logits: mx.array,
        rows: Sequence[SamplingRow],
        grammar: Grammar | None = None,
        processors: LogitsProcessor | None = None,
        invariant_processors: LogitsProcessor | None = None,
    ) -> Sampled:
        """Sample one token for each of the R rows of logits, any float dtype (R, V).

        Args:
            processors: custom logits processors, run before the penalties.
            invariant_processors: those that declare themselves argmax-invariant, run after min_p for random rows.
        """
        if not rows:
            return Sampled([], None)
        raw, edited = self._edit(logits, rows, grammar, processors, None)
        params = [row.params for row in rows]
        if invariant_processors and not all(p.greedy for p in params):
            edited, params = _after_temperature(edited, rows, invariant_processors)

        bits = self._random_bits(rows)
        token_ids = draw_tokens(edited, params, bits)
        asked = [i for i, p in enumerate(params) if wants_logprobs(p)]
        if not asked:
            return Sampled(token_ids, None)
        reported = raw
        if self._reports_processed:
            # Drawn once more, together with what is reported. By row: the token must not depend on who else asked.
            masked = []
            for i in asked:
                token_ids[i], row = draw_and_mask(np.asarray(edited)[i], params[i], bits[i])
                masked.append(row)
            reported = mx.array(raw)
            reported[mx.array(asked)] = mx.array(np.stack(masked))
        scored = score(reported, params, mx.array(token_ids, dtype=mx.int32), self.logprobs_mode)
        for part in scored:
            mx.eval(part.arrays)  # one by one, as row_groups wants them
        return Sampled(token_ids, gather(scored, token_ids))

    def on_device(self, params: SamplingParams) -> bool:
        """Whether a request is sampled without the host, which draws where processed log-probabilities are told."""
        return not (self._reports_processed and wants_logprobs(params))

    def queue(
        self,
        logits: mx.array,
        rows: Sequence[SamplingRow],
        grammar: Grammar | None = None,
        unread: mx.array | None = None,
    ) -> Queued:
        """Sample R > 0 rows that `on_device` admits. Arguments as `sample`.

        Args:
            unread: int32 (S,), the tokens of the step before, if they are still on the device (SamplingRow.token_ids).
        """
        raw, edited = self._edit(logits, rows, grammar, None, unread)
        params = [row.params for row in rows]
        token_ids = draw_on_device(edited, params, self._random_bits(rows))
        return Queued(token_ids, score(raw, params, token_ids, self.logprobs_mode))

    @property
    def _reports_processed(self) -> bool:
        return self.logprobs_mode.startswith("processed")

    def _edit(
        self,
        logits: mx.array,
        rows: Sequence[SamplingRow],
        grammar: Grammar | None,
        processors: LogitsProcessor | None,
        unread: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """float32 (R, V) behind the grammar, and behind the penalties."""
        raw = apply_grammar(logits[:, : self.vocab_size].astype(mx.float32), rows, grammar)
        structured = grammar.bitmask.keys() if grammar else ()
        edited = allow_only(raw, rows)
        edited = bar_bad_words(edited, rows, unread)
        edited = hold_back_stops(edited, rows, structured)
        edited = add_bias(edited, rows)
        if processors:
            edited = _on_host(edited, rows, processors)
        return raw, apply_penalties(edited, rows, unread)

    def prompt_logprobs(self, logits: mx.array, next_token_ids: Sequence[int], k: int) -> Logprobs:
        """Log-probabilities of a prompt's tokens: logits (N, V) at positions whose next tokens are given; k as
        num_prompt_logprobs. No processing applies to a prompt, so raw and processed modes agree, as in vLLM."""
        return top_logprobs(
            logits[:, : self.vocab_size].astype(mx.float32), list(next_token_ids), k, self.logprobs_mode
        )

    def _random_bits(self, rows: Sequence[SamplingRow]) -> np.ndarray:
        """uint64 (R,); 0 for rows that are not drawn."""
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        bits = np.zeros(len(rows), np.uint64)
        if drawn:
            bits[drawn] = random_bits([self._seed(rows[i]) for i in drawn], [rows[i].position for i in drawn])
        return bits

    def _seed(self, row: SamplingRow) -> int:
        return request_seed(self.engine_seed, row.request_id) if row.params.seed is None else row.params.seed


def _on_host(logits: mx.array, rows: Sequence[SamplingRow], processors: LogitsProcessor) -> mx.array:
    return mx.array(np.asarray(processors.apply(np.array(logits), rows), dtype=np.float32))


def _after_temperature(
    logits: mx.array, rows: Sequence[SamplingRow], processors: LogitsProcessor
) -> tuple[mx.array, list[SamplingParams]]:
    """Apply temperature, min_p and the processors to the random rows; return what of their parameters is left to do."""
    cooled = np.array(logits)
    for i, row in enumerate(rows):
        if not row.params.greedy:
            hot = cooled[i] / np.float32(row.params.temperature)
            cooled[i] = keep(hot, 0, 1.0, row.params.min_p).masked() if row.params.min_p > 0 else hot
    changed = np.array(processors.apply(cooled.copy(), rows), dtype=np.float32)
    greedy = [i for i, row in enumerate(rows) if row.params.greedy]
    changed[greedy] = cooled[greedy]
    left = [row.params if row.params.greedy else replace(row.params, temperature=1.0, min_p=0.0) for row in rows]
    return mx.array(changed), left
