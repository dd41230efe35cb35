"""Kernels of the counting model: everything is a flat array, everything is changed in place.

Vocabulary: a *context* is a hash of some recent bytes; a *slot* holds the sixteen bytes kept for one context and one
half byte (the last half byte seen with its run length, then fifteen bit histories, one per node of the half byte's
tree); a *bit history* is a small state that remembers how often, and what last, a bit was; a *gate* is a row of
weights chosen by a selector.
"""

# mypy: disable-error-code="assignment,operator"
# Numba types these functions by what they are called with; the casts to int64 keep its arithmetic signed.
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

N = 20  # contexts with bit histories
PER = 3  # gate inputs for each of them
D = 4  # contexts with direct probabilities
MATCH = N * PER + D * 2
NEURAL = MATCH + 4
BIAS = NEURAL + 2
INPUTS = (BIAS + 16) // 16 * 16
SETS = 7  # gate sets of the first layer
ROWS = np.array([0, 256, 512, 768, 1280, 2304, 2560, 2816], np.int64)  # first row of each set, then their number
APM_STEPS = 33
RUNS = 16
MATCHES = 2 * 32 * 8 * 2

# what the position keeps, by index
SEEN, AGE, C4, C8, WORD0, WORD1, WORD2, LINE, ABOVE, INDENT, FIRST = range(11)
POINTER, LENGTH = 11, 12  # of the long match; those of the short one are two further on
DOMAIN = 15
POSITION = 16

KINDS = 64  # of bytes, for the style of a text: the share of each kind among its recent bytes
STYLE_EVERY, STYLE_SPAN = 16, 512
NEW_STYLE = 0.55  # sum of absolute differences, 0 to 2

WRITE, GATE_STEPS = 0, 1

# unsigned: Numba leaves the overflow of signed products undefined
_A = np.uint64(0x2545F4914F6CDD1D)
_B = np.uint64(0x9B873593CC9E2D51)
_C = np.uint64(0xBC79AC492BA7B653)
_S = np.uint64(31)
_U = np.uint64(29)


class Tables(NamedTuple):
    """What is learned."""

    check: NDArray[np.uint16]
    slots: NDArray[np.uint8]
    history_p: NDArray[np.float32]
    history_n: NDArray[np.uint16]
    run_p: NDArray[np.float32]
    direct: NDArray[np.uint16]
    styles: NDArray[np.float32]
    styles_n: NDArray[np.int64]
    match_p: NDArray[np.float32]
    after1: NDArray[np.int64]
    after2: NDArray[np.int64]
    gate1: NDArray[np.float32]
    gate1_n: NDArray[np.int64]
    gate2: NDArray[np.float32]
    gate2_n: NDArray[np.int64]
    apm: NDArray[np.float32]


class Position(NamedTuple):
    """What moves with the text."""

    now: NDArray[np.int64]
    ring: NDArray[np.uint8]
    places: NDArray[np.int32]
    style: NDArray[np.float32]


class Scratch(NamedTuple):
    """Fixed tables and room for one bit's work; nothing here outlives a byte."""

    next_state: NDArray[np.uint8]
    weight: NDArray[np.uint8]
    stretch: NDArray[np.float32]
    hashes: NDArray[np.int64]
    slot: NDArray[np.int64]
    x: NDArray[np.float32]
    direct_hash: NDArray[np.int64]
    direct_at: NDArray[np.int64]
    row: NDArray[np.int64]
    p1: NDArray[np.float64]
    x2: NDArray[np.float32]
    tree: NDArray[np.float64]
    at: NDArray[np.int64]
    f: NDArray[np.float64]


@njit(cache=True)
def _hash(a, b):
    x = (np.uint64(a) ^ (np.uint64(b) * _A)) * _B
    x ^= x >> _S
    x *= _C
    return np.int64(x ^ (x >> _U))


@njit(cache=True)
def _squash(z):
    return 1.0 / (1.0 + math.exp(-z))


@njit(cache=True)
def _st(s, p):
    return s.stretch[int(p * 4095.999)]


@njit(cache=True)
def _contexts(t, q, s):
    """Hashes of all contexts at this byte boundary, and the selectors that hold for the whole byte."""
    now = q.now
    c4 = now[C4]
    c8 = now[C8]
    c1 = c4 & 0xFF
    c2 = (c4 >> 8) & 0xFF
    above = np.int64(q.ring[now[ABOVE] & (q.ring.size - 1)]) if now[ABOVE] >= 0 else 0
    column = min(now[SEEN] - now[LINE], 255)
    a1 = t.after1[c1]
    a2 = t.after2[c4 & 0xFFFF]
    h = s.hashes
    h[0] = c1
    h[1] = c4 & 0xFFFF
    h[2] = c4 & 0xFFFFFF
    h[3] = c4
    h[4] = c4 | (c8 & 0xFF) << 32
    h[5] = c4 | (c8 & 0xFFFF) << 32
    h[6] = c4 ^ (c8 << 32)
    h[7] = _hash(now[WORD0], c1)
    h[8] = _hash(now[WORD0], now[WORD1] + 3)
    h[9] = _hash(now[WORD0], now[WORD2] + 7)
    h[10] = c4 & 0xFFFF00
    h[11] = c4 & 0xFFFFFF00
    h[12] = _hash(c1, a1 & 0xFFFF)
    h[13] = _hash(c4 & 0xFFFF, a2 & 0xFFFF)
    h[14] = _hash(c1, above * 256 + column)
    h[15] = _hash(now[WORD0], now[FIRST] * 256 + now[INDENT])
    h[16] = c4 & 0xFF00FF
    h[17] = _hash(c4 & 0xFFFF, now[WORD1])
    h[18] = _hash(c1, a2 & 0xFFFFFF)
    h[19] = _hash(now[WORD1], now[WORD2] * 3 + c1)
    for i in range(N):
        h[i] = _hash(h[i], i + 1)
    d = s.direct_hash
    d[0] = _hash(c1, 101)
    d[1] = _hash(c4 & 0xFFFF, 102)
    d[2] = _hash(c4 & 0xFFFFFF, 103)
    d[3] = _hash(now[WORD0], 104)

    length = now[LENGTH]
    bucket = 0
    if length > 0:
        bucket = min(length, 15) if length < 16 else min(12 + length // 4, 31)
    s.at[8] = bucket
    k = now[LENGTH + 2]
    s.at[9] = min(k, 15)
    kind = 0
    for i in range(3):
        c = (c4 >> (8 * i)) & 0xFF
        kind = kind * 4 + (0 if 97 <= c <= 122 else 1 if c == 32 or c == 10 else 2 if 65 <= c <= 90 or c > 127 else 3)
    s.at[10] = kind
    s.at[11] = c1
    s.at[12] = c2


@njit(cache=True)
def _find(t, s, nibble_context, insert):
    """The slot of each context for the half byte to come; a new context takes the least used of three places."""
    found = 0
    for i in range(N):
        h = _hash(s.hashes[i], nibble_context)
        at = ((h & 0xFFFFFFFF) * t.check.size) >> 32
        check = np.uint16((h >> 44) & 0xFFFF)
        best = -1
        low = 1000
        low_at = at
        for probe in range(4):
            j = at ^ probe
            if t.check[j] == check:
                best = j
                break
            used = np.int64(s.weight[t.slots[j * 16 + 1]])
            if used < low:
                low = used
                low_at = j
        if best >= 0:
            s.slot[i] = best * 16
            if 2 <= i <= 6 and t.slots[best * 16 + 1] != 0:
                found += 1
        elif insert:
            t.check[low_at] = check
            for j in range(16):
                t.slots[low_at * 16 + j] = 0
            s.slot[i] = low_at * 16
        else:
            s.slot[i] = t.check.size * 16
    s.at[13] = found
    for j in range(D):
        s.direct_at[j] = j * (t.direct.size // D) + (
            _hash(s.direct_hash[j], nibble_context) & (t.direct.size // D - 16)
        )


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _dot(weights, row, x):
    total = np.float32(0)
    for j in range(INPUTS):
        total += weights[row, j] * x[j]
    return total


@njit(cache=True, fastmath={"contract"})
def _nudge(weights, row, x, step):
    step = np.float32(step)
    for j in range(INPUTS):
        weights[row, j] += step * x[j]


@njit(cache=True)
def _predict(t, q, s, c0, bit, neural):
    """Probability that the next bit is one; `c0` is a one followed by the bits of this byte so far."""
    x = s.x
    domain = q.now[DOMAIN]
    maps, runs, matches = domain * N * 256, domain * N * RUNS * 4, domain * MATCHES
    nb = bit & 3
    node = c0 if bit < 4 else (c0 & ((1 << nb) - 1)) | (1 << nb)
    for i in range(N):
        base = s.slot[i]
        state = t.slots[base + node]
        j = i * PER
        if state == 0:
            x[j] = 0
            x[j + 1] = 0
        else:
            p = t.history_p[maps + i * 256 + state]
            x[j] = _st(s, p)
            x[j + 1] = (p - 0.5) * 3.0
        run = np.int64(t.slots[base])
        x[j + 2] = 0
        if run >= 16 and ((run & 15) | 16) >> (4 - nb) == node:
            z = _st(s, t.run_p[runs + (i * RUNS + (run >> 4)) * 4 + nb])
            x[j + 2] = z if (run >> (3 - nb)) & 1 else -z
    for j in range(D):
        v = np.int64(t.direct[s.direct_at[j] + node])
        p = ((v >> 4) + 0.5) / 4096
        n = v & 15
        x[N * PER + 2 * j] = _st(s, p) if n else 0
        x[N * PER + 2 * j + 1] = (p - 0.5) * 3.0

    now = q.now
    s.at[0] = -1
    s.at[1] = -1
    for k in range(2):
        x[MATCH + 2 * k] = 0
        x[MATCH + 2 * k + 1] = 0
        length = now[LENGTH + 2 * k]
        if length > 0:
            expected = np.int64(q.ring[now[POINTER + 2 * k] & (q.ring.size - 1)]) | 256
            if expected >> (8 - bit) == c0:
                y = (expected >> (7 - bit)) & 1
                at = matches + ((k * 32 + s.at[8 + k]) * 8 + bit) * 2 + y
                s.at[k] = at
                p = t.match_p[at]
                x[MATCH + 2 * k] = _st(s, p)
                x[MATCH + 2 * k + 1] = (p - 0.5) * 3.0
    confident = 0
    x[NEURAL] = 0
    x[NEURAL + 1] = 0
    if neural:
        p = s.tree[2 * c0 + 1] / s.tree[c0]
        p = min(max(p, 0.00025), 0.99975)
        z = math.log(p / (1 - p))
        x[NEURAL] = z
        x[NEURAL + 1] = (p - 0.5) * 3.0
        confident = 1 + min(int((z + 8.5) * 14 / 17), 14)
    x[BIAS] = 0.4

    live = s.at[8] if s.at[0] >= 0 else 0
    row = s.row
    row[0] = c0
    row[1] = ROWS[1] + s.at[11]
    row[2] = ROWS[2] + s.at[12]
    row[3] = ROWS[3] + live * 16 + (s.at[9] if s.at[1] >= 0 else 0)
    row[4] = ROWS[4] + s.at[10] * 16 + nb * 2 + (bit >> 2) * 8 + (1 if live else 0)
    row[5] = ROWS[5] + s.at[13] * 16 + bit * 2 + (1 if live else 0)
    row[6] = ROWS[6] + confident * 16 + bit
    for k in range(SETS):
        row[k] += domain * ROWS[SETS]
        z = min(max(float(_dot(t.gate1, row[k], x)), -11.0), 11.0)
        s.p1[k] = _squash(z)
        s.x2[k] = z
    at2 = domain * 256 + c0
    s.at[2] = at2
    z = 0.0
    for k in range(SETS):
        z += t.gate2[at2, k] * s.x2[k]
    z = min(max(z, -11.5), 11.5)
    p = _squash(z)
    s.f[0] = p

    place = (min(max(z, -7.999), 7.999) + 8.0) * 2.0
    low = int(place)
    share = place - low
    half = t.apm.size // APM_STEPS // 2
    a = ((s.at[11] * 256 + c0 + domain * 40503) & (half - 1)) * APM_STEPS + low
    b = (half + (_hash(now[C4] & 0xFFFF | domain << 16, c0) & (half - 1))) * APM_STEPS + low
    near = 1 if share >= 0.5 else 0
    s.at[3] = a + near
    s.at[4] = b + near
    pa = t.apm[a] * (1 - share) + t.apm[a + 1] * share
    pb = t.apm[b] * (1 - share) + t.apm[b + 1] * share
    p = 0.5 * p + 0.25 * pa + 0.25 * pb
    return min(max(p, 1.0 / 65536), 1 - 1.0 / 65536)


@njit(cache=True)
def _learn(t, q, s, c0, bit, y):
    """Count the bit that came."""
    maps, runs = q.now[DOMAIN] * N * 256, q.now[DOMAIN] * N * RUNS * 4
    nb = bit & 3
    node = c0 if bit < 4 else (c0 & ((1 << nb) - 1)) | (1 << nb)
    for k in range(SETS):
        r = s.row[k]
        t.gate1_n[r] += 1
        rate = 0.0025 + 0.02 / (1.0 + t.gate1_n[r] * 0.02)
        _nudge(t.gate1, r, s.x, (y - s.p1[k]) * rate)
    r = s.at[2]
    t.gate2_n[r] += 1
    step = (y - s.f[0]) * (0.002 + 0.01 / (1.0 + t.gate2_n[r] * 0.02))
    for k in range(SETS):
        t.gate2[r, k] += step * s.x2[k]
    t.apm[s.at[3]] += (y - t.apm[s.at[3]]) * 0.02
    t.apm[s.at[4]] += (y - t.apm[s.at[4]]) * 0.02

    for i in range(N):
        base = s.slot[i]
        state = np.int64(t.slots[base + node])
        if state:
            j = maps + i * 256 + state
            n = t.history_n[j]
            t.history_p[j] += (y - t.history_p[j]) / (n + 1.5)
            if n < 1023:
                t.history_n[j] = n + 1
        t.slots[base + node] = s.next_state[2 * state + y]
        run = np.int64(t.slots[base])
        if run >= 16 and ((run & 15) | 16) >> (4 - nb) == node:
            j = runs + (i * RUNS + (run >> 4)) * 4 + nb
            right = 1.0 if (run >> (3 - nb)) & 1 == y else 0.0
            t.run_p[j] += (right - t.run_p[j]) * 0.01
    for j in range(D):
        at = s.direct_at[j] + node
        v = np.int64(t.direct[at])
        n = v & 15
        p = v >> 4
        p += int((y * 4095 - p) * (1.0 / (n + 1.5) if n < 15 else 0.015))
        t.direct[at] = np.uint16((p << 4) | min(n + 1, 15))
    for k in range(2):
        at = s.at[k]
        if at >= 0:
            t.match_p[at] += (y - t.match_p[at]) * 0.01


@njit(cache=True)
def _count_nibble(t, s, nibble):
    for i in range(N):
        base = s.slot[i]
        run = np.int64(t.slots[base])
        if run >= 16 and run & 15 == nibble:
            if run < 240:
                t.slots[base] = np.uint8(run + 16)
        else:
            t.slots[base] = np.uint8(16 | nibble)


@njit(cache=True)
def _advance(q, byte):
    """Move the position one byte on."""
    now = q.now
    mask = q.ring.size - 1
    for k in range(2):
        pointer = POINTER + 2 * k
        length = LENGTH + 2 * k
        if now[length] > 0:
            if np.int64(q.ring[now[pointer] & mask]) == byte:
                now[length] = min(now[length] + 1, 400)
                now[pointer] += 1
            else:
                now[length] = 0
    q.ring[now[SEEN] & mask] = byte
    now[SEEN] += 1
    now[AGE] += 1
    now[C8] = (now[C8] << 8 | now[C4] >> 24) & 0xFFFFFFFF
    now[C4] = (now[C4] << 8 | byte) & 0xFFFFFFFF
    letter = byte | 32 if 65 <= byte <= 90 else byte
    if 97 <= letter <= 122 or byte >= 128 or 48 <= byte <= 57 or byte == 95:
        now[WORD0] = _hash(now[WORD0], letter)
    elif now[WORD0]:
        now[WORD2] = now[WORD1]
        now[WORD1] = now[WORD0]
        now[WORD0] = 0
    if byte == 10:
        now[ABOVE] = now[LINE]
        now[LINE] = now[SEEN]
        now[INDENT] = 0
        now[FIRST] = 0
    else:
        if now[ABOVE] >= 0 and q.ring[now[ABOVE] & mask] != 10:
            now[ABOVE] += 1
        if now[FIRST] == 0:
            if byte == 32:
                now[INDENT] += 1
            else:
                now[FIRST] = byte
    half = q.places.size // 2
    for k in range(2):
        least = 7 if k == 0 else 4
        if now[AGE] < least:
            continue
        if k == 0:
            h = _hash(now[C4], now[C8] & 0xFFFFFF)
        else:
            h = _hash(now[C4], 5)
        at = k * half + (h & (half - 1))
        if now[LENGTH + 2 * k] == 0:
            candidate = np.int64(q.places[at])
            n = 0
            limit = min(now[AGE], 32)
            while n < limit and q.ring[(candidate - 1 - n) & mask] == q.ring[(now[SEEN] - 1 - n) & mask]:
                n += 1
            if n >= least:
                now[LENGTH + 2 * k] = n
                now[POINTER + 2 * k] = candidate
        q.places[at] = np.int32(now[SEEN] & mask)


@njit(cache=True)
def _copy_part(table, to, source, size):
    table[to * size : (to + 1) * size] = table[source * size : (source + 1) * size]


@njit(cache=True)
def _copy_counts(counts, to, source, size, share):
    # what is copied is a first guess: a smaller count lets it move quickly again
    for j in range(size):
        counts[to * size + j] = counts[source * size + j] // share


@njit(cache=True)
def _place_in_domain(t, q, byte, learn):
    """Choose the gates by the style of the recent bytes, so that what one domain taught them waits for its return.

    Styles are found as they come: one unlike all that are known opens a domain, whose gates begin as a copy of the
    last one's (leader clustering).
    """
    now = q.now
    fade = np.float32(1 - 1 / STYLE_SPAN)
    for j in range(KINDS):
        q.style[j] *= fade
    q.style[byte >> 2] += np.float32(1)
    if now[AGE] % STYLE_EVERY:
        return
    mass = np.float32(0)
    for j in range(KINDS):
        mass += q.style[j]
    known = t.styles_n[0]
    best, least = now[DOMAIN], 3.0
    for d in range(known):
        far = 0.0
        for j in range(KINDS):
            far += abs(q.style[j] / mass - t.styles[d, j])
        if d != now[DOMAIN]:
            far += 0.05  # stay where it is a close call
        if far < least:
            best, least = d, far
    if learn and now[AGE] >= STYLE_SPAN and least > NEW_STYLE and known < t.styles.shape[0]:
        best = known
        t.styles_n[0] += 1
        t.styles[best] = q.style / mass
        if known > 0:
            last = now[DOMAIN]
            _copy_part(t.gate1, best, last, ROWS[SETS])
            _copy_part(t.gate2, best, last, 256)
            _copy_part(t.history_p, best, last, N * 256)
            _copy_part(t.run_p, best, last, N * RUNS * 4)
            _copy_part(t.match_p, best, last, MATCHES)
            _copy_counts(t.gate1_n, best, last, ROWS[SETS], 4)
            _copy_counts(t.gate2_n, best, last, 256, 4)
            _copy_counts(t.history_n, best, last, N * 256, 8)
    now[DOMAIN] = best
    if learn and known > 0:
        for j in range(KINDS):
            t.styles[best, j] += np.float32(0.01) * (q.style[j] / mass - t.styles[best, j])


@njit(cache=True)
def _plant(s, logprobs):
    """Partial sums of a byte distribution over the tree of its bits."""
    for b in range(256):
        s.tree[256 + b] = math.exp(min(max(logprobs[b], -60.0), 60.0)) + 1e-12
    for n in range(255, 0, -1):
        s.tree[n] = s.tree[2 * n] + s.tree[2 * n + 1]


@njit(cache=True, nogil=True)
def observe(t, q, s, data, logprobs, neural, learn, cost):
    """Predict each byte, note its cost in bits, then (if `learn`) count it."""
    for i in range(data.size):
        byte = np.int64(data[i])
        _contexts(t, q, s)
        if neural:
            _plant(s, logprobs[i])
        total = 0.0
        c0 = 1
        for bit in range(8):
            if bit == 0:
                _find(t, s, 0, learn)
            elif bit == 4:
                if learn:
                    _count_nibble(t, s, byte >> 4)
                _find(t, s, c0, learn)
            p = _predict(t, q, s, c0, bit, neural)
            y = (byte >> (7 - bit)) & 1
            total -= math.log2(p if y else 1 - p)
            if learn:
                _learn(t, q, s, c0, bit, y)
            c0 = 2 * c0 + y
        cost[i] = total
        if learn:
            _count_nibble(t, s, byte & 15)
            c4 = q.now[C4]
            t.after1[c4 & 0xFF] = (t.after1[c4 & 0xFF] << 8 | byte) & 0xFFFFFFFF
            t.after2[c4 & 0xFFFF] = (t.after2[c4 & 0xFFFF] << 8 | byte) & 0xFFFFFFFF
        _advance(q, byte)
        _place_in_domain(t, q, byte, learn)


@njit(cache=True)
def distribution(t, q, s, logprobs, neural, out):
    """Probability of each of the 256 bytes that may come next; changes nothing but the scratch."""
    node = np.ones(512)
    _contexts(t, q, s)
    if neural:
        _plant(s, logprobs)
    for bit in range(8):
        for c0 in range(1 << bit, 2 << bit):
            if bit == 0:
                _find(t, s, 0, False)
            elif bit >= 4 and c0 & ((1 << (bit - 4)) - 1) == 0:
                _find(t, s, c0 >> (bit - 4), False)
            p = _predict(t, q, s, c0, bit, neural)
            node[2 * c0 + 1] = node[c0] * p
            node[2 * c0] = node[c0] * (1 - p)
    for b in range(256):
        out[b] = node[256 + b]
