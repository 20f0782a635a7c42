"""The Triton kernels of the routed loss: fused_triton.py launches them.

All numbers between loads and stores are float32, or float64 where the states are. Logits of −∞ are
masked entries, and entries past the vocabulary are read as such. To add a divergence, see `TERMS`.
"""

import torch
import triton
import triton.language as tl

from ..schemas.labels import Route
from .losses import FLOOR

_FLOOR = tl.constexpr(FLOOR)
# The least m that has a logarithm in float32; Triton takes a smaller literal for float64.
_TINY = tl.constexpr(1e-37)
_LOW = tl.constexpr(-1e30)  # a maximum of nothing, finite so that no difference is NaN
_INF = tl.constexpr(float("inf"))
_VECTORS = (
    "bias", "teacher_bias", "token_ids", "heat", "rows", "lse", "entropy", "logprobs", "route",
    "teacher_lse", "lift", "kl_lift", "value", "exact", "clipped", "teacher_heat", "pulls",
)  # fmt: skip


@triton.jit
def _forward_kl(p, log_p, q, log_q, BETA: tl.constexpr):
    return q * (log_q - log_p), -q


@triton.jit
def _reverse_kl(p, log_p, q, log_q, BETA: tl.constexpr):
    terms = p * (log_p - log_q)
    return terms, p + terms


@triton.jit
def _jensen_shannon(p, log_p, q, log_q, BETA: tl.constexpr):
    m = BETA * q + (1 - BETA) * p
    log_m = tl.log(tl.where(m > _TINY, m, 1.0))
    slope = (1 - BETA) * p * (log_p - log_m)
    return BETA * q * (log_q - log_m) + slope, slope


# The kernels' form of each entry of losses.DIVERGENCES, on scalars, with config.jsd_beta.
TERMS = {Route.FKL: _forward_kl, Route.RKL: _reverse_kl, Route.JSD: _jensen_shannon}
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _shaped(
    row, bias, columns, heat,
    STRIDE: tl.constexpr, VOCAB: tl.constexpr, CAP: tl.constexpr, WIDE: tl.constexpr,
    HOLES: tl.constexpr,
):  # fmt: skip
    """Logits with bias, soft cap and temperature; −inf past the vocabulary, and at HOLES, raw
    logits of −inf that the soft cap would make finite."""
    # Up to the stride, which keeps the widest loads for a vocabulary of any size.
    z = tl.load(row + columns, mask=columns < STRIDE, other=0.0).to(WIDE)
    if HOLES:
        hole = z == -_INF
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < VOCAB, other=0.0).to(WIDE)
    if CAP is not None:  # tanh x = 2 σ(2x) − 1
        z = CAP * (2 * tl.sigmoid(z * (2 / CAP)) - 1)
    if HOLES:
        z = tl.where(hole, -_INF, z)
    return tl.where(columns < VOCAB, z * heat, -_INF)


@triton.jit
def _probabilities(z, lse):
    """p, and log p with FLOOR for −inf."""
    masked = z == -_INF
    log_p = tl.where(masked, _FLOOR, z - lse)
    return tl.where(masked, 0.0, tl.exp(log_p)), log_p


@triton.jit(do_not_specialize=["first", "base"], do_not_specialize_on_alignment=_VECTORS)
def statistics(
    logits, bias, token_ids, heat, rows, lse, entropy, logprobs, first, base,
    STRIDE: tl.constexpr, VOCAB: tl.constexpr, CAP: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, entropy and log-probability of the token; one program per token.

    rows: each token's row of logits beyond `base`, negative for none; None for its own.
    """
    index = tl.program_id(0)
    token = first + index
    row = index.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + token)
        if row < 0:
            return
        row -= base
    logits += row * STRIDE
    warmth = tl.load(heat + token).to(WIDE)
    most = tl.full([BLOCK], _LOW, WIDE)
    total = tl.zeros([BLOCK], WIDE)  # Σ exp(z − most)
    moment = tl.zeros([BLOCK], WIDE)  # Σ exp(z − most) (z − most)
    for start in range(0, VOCAB, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _shaped(logits, bias, columns, warmth, STRIDE, VOCAB, CAP, WIDE, HOLES)
        gap = tl.where(z == -_INF, _LOW, z - most)
        e = tl.exp(-tl.abs(gap))  # one exponential an entry, of whichever is less
        higher = gap > 0
        moment = tl.where(higher, e * (moment - gap * total), moment + e * gap)
        total = tl.where(higher, e * total + 1, total + e)
        most = tl.where(higher, z, most)
    greatest = tl.max(most, 0)
    gap = most - greatest
    e = tl.exp(gap)
    moment, total = tl.sum(e * (moment + gap * total), 0), tl.sum(e * total, 0)
    log_total = tl.log(total)
    tl.store(lse + token, greatest + log_total)
    tl.store(entropy + token, log_total - moment / total)
    chosen = tl.load(token_ids + token) + tl.arange(0, 1)
    z = _shaped(logits, bias, chosen, warmth, STRIDE, VOCAB, CAP, WIDE, False)
    _, log_p = _probabilities(z, greatest + log_total)
    tl.store(logprobs + token + tl.arange(0, 1), log_p)


@triton.jit(do_not_specialize=["first", "base", "ROUTE"], do_not_specialize_on_alignment=_VECTORS)
def gradient(
    logits, bias, slopes, teacher, teacher_bias, token_ids, heat, teacher_heat, rows, route, lse,
    teacher_lse, logprobs, lift, kl_lift, value, exact, clipped, pulls, first, base, ROUTE,
    STAGE: tl.constexpr, TERM: tl.constexpr, CLIP: tl.constexpr, BOUND: tl.constexpr,
    BETA: tl.constexpr, STRIDE: tl.constexpr, NARROW: tl.constexpr, VOCAB: tl.constexpr,
    CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d raw logits of the tokens of one route, and their divergence.

    lift: the loss's slope in log p(y); kl_lift: the divergence's weight; with respect to logits
    after the temperature. slopes: the logits' own memory; NARROW: in a narrower type, each row at
    the start of its logits' row. STAGE "divergence" stores the divergence and the sum of its slopes
    in `pulls`, and "slopes" takes it from there: so kl_lift may depend on the divergence. "both"
    does both. Without a TERM, `pulls` adds to the lift that every entry loses its share p of.
    """
    index = tl.program_id(0)
    token = first + index
    if route is not None and tl.load(route + token) != ROUTE:
        return
    row = index.to(tl.int64)
    logits += row * STRIDE
    slopes += row * (2 * STRIDE if NARROW else STRIDE)
    warmth, log_z = tl.load(heat + token).to(WIDE), tl.load(lse + token)
    own_lift = tl.load(lift + token).to(WIDE)
    if tl.load(logprobs + token) == _FLOOR:  # a constant
        own_lift *= 0.0
    chosen = tl.load(token_ids + token)
    pull = own_lift
    if TERM is None and pulls is not None:
        pull += tl.load(pulls + token).to(WIDE)
    if TERM is not None:
        teacher += (tl.load(rows + token) - base) * STRIDE
        log_zq = tl.load(teacher_lse + token)
        teacher_warmth = tl.load(teacher_heat + token).to(WIDE)
        weight = tl.load(kl_lift + token).to(WIDE)
        if STAGE == "slopes":
            whole, pulled = tl.load(exact + token), tl.load(pulls + token)
        else:
            sums = tl.zeros([BLOCK], WIDE)
            bounded = tl.zeros([BLOCK], WIDE)
            slopes_of_all = tl.zeros([BLOCK], WIDE)
            binds = tl.zeros([BLOCK], tl.int32)
            for start in range(0, VOCAB, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                term, slope, _ = _divergence(
                    logits, bias, teacher, teacher_bias, columns, warmth, teacher_warmth, log_z,
                    log_zq, TERM, BETA, STRIDE, VOCAB, CAP, TEACHER_CAP, WIDE,
                )  # fmt: skip
                kept, limited = _clip(term, CLIP, BOUND)
                sums += term
                bounded += limited
                slopes_of_all += tl.where(kept, slope, 0.0)
                binds |= tl.where(kept, 0, 1)
            whole = tl.sum(sums, 0)
            pulled = tl.sum(slopes_of_all, 0)
            limited, bound = tl.sum(bounded, 0), tl.max(binds, 0)
            if CLIP == "token":
                limited, bound = _at_most(whole, BOUND), (whole > BOUND).to(tl.int32)
            tl.store(exact + token, whole)
            tl.store(value + token, limited)
            tl.store(clipped + token, bound.to(WIDE))
        if STAGE == "divergence":
            tl.store(pulls + token, pulled)
        if CLIP == "token":
            weight = tl.where(whole > BOUND, 0.0, weight)
        pull += weight * pulled
    if STAGE == "divergence":
        return
    for start in range(0, VOCAB, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        if TERM is not None:
            term, slope, z = _divergence(  # pyright: ignore
                logits, bias, teacher, teacher_bias, columns, warmth, teacher_warmth, log_z,
                log_zq, TERM, BETA, STRIDE, VOCAB, CAP, TEACHER_CAP, WIDE,
            )  # fmt: skip
            kept, _ = _clip(term, CLIP, BOUND)
            p, _ = _probabilities(z, log_z)
            change = tl.where(kept, weight * slope, 0.0) - pull * p
        else:
            z = _shaped(logits, bias, columns, warmth, STRIDE, VOCAB, CAP, WIDE, False)
            p, _ = _probabilities(z, log_z)
            change = -pull * p
        change = (change + tl.where(columns == chosen, own_lift, 0.0)) * warmth
        if CAP is not None:
            share = z / (warmth * CAP)
            change *= 1 - share * share
        if NARROW:  # a row's start is overwritten while other threads may still read it
            tl.debug_barrier()
        tl.store(slopes + columns, change.to(slopes.dtype.element_ty), mask=columns < STRIDE)


@triton.jit
def _divergence(
    logits, bias, teacher, teacher_bias, columns, warmth, teacher_warmth, log_z, log_zq,
    TERM: tl.constexpr, BETA: tl.constexpr, STRIDE: tl.constexpr, VOCAB: tl.constexpr,
    CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A step's divergence terms and slopes (losses.DIVERGENCES), and the student's logits."""
    z = _shaped(logits, bias, columns, warmth, STRIDE, VOCAB, CAP, WIDE, False)
    p, log_p = _probabilities(z, log_z)
    zq = _shaped(
        teacher, teacher_bias, columns, teacher_warmth, STRIDE, VOCAB, TEACHER_CAP, WIDE, False
    )
    q, log_q = _probabilities(zq, log_zq)
    term, slope = TERM(p, log_p, q, log_q, BETA)
    return term, tl.where(z == -_INF, 0.0, slope), z


@triton.jit
def _clip(term, CLIP: tl.constexpr, BOUND: tl.constexpr):
    """Whether the clip of entries leaves each term, and the clipped terms; see losses.clip_kl."""
    if CLIP == "entry_above":
        kept, limited = term <= BOUND, _at_most(term, BOUND)
    elif CLIP == "entry_symmetric":
        kept, limited = tl.abs(term) <= BOUND, -_at_most(-_at_most(term, BOUND), BOUND)
    else:
        kept, limited = term == term, term
    return kept, limited


@triton.jit
def _at_most(value, BOUND: tl.constexpr):
    return tl.minimum(value, value * 0 + BOUND)  # the bound in the value's type
