"""The formulas of csrc/math/sam_math.h, for Triton, with the same names; what a struct holds there comes first here.

Arguments are blocks of float32 or float64. A product that feeds an addition is written as fma, and kernels are launched
with fusion off, so they round exactly where the C++ kernels do.
"""

import triton
import triton.language as tl

_FIRST_FACTOR = tl.constexpr(0x85EBCA6B)
_SECOND_FACTOR = tl.constexpr(0xC2B2AE35)
_GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)  # tl.sqrt is approximate in float32


@triton.jit
def divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)  # / is approximate in float32


@triton.jit
def maximum(a, b):
    """The larger one; NaN if either is, as torch.maximum."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def sign(x):
    """1 or -1; x itself where it is 0 or NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x)).to(x.dtype)


@triton.jit
def asam_scale(eta, magnitude):
    """T of ASAM (Kwon et al. 2021, arXiv 2102.11600, section 4): T = |w| + eta."""
    return magnitude + eta


@triton.jit
def squared_norm(g, sum):
    """One term of ||g||^2 (SAM, Foret et al. 2021, eq. 2), added to sum."""
    return tl.fma(g, g, sum)


@triton.jit
def asam_squared_norm(g, t, sum):
    """One term of ||T g||^2 (ASAM)."""
    tg = t * g
    return tl.fma(tg, tg, sum)


@triton.jit
def perturb(scale, w, g):
    """w + e with e = rho g / ||g||; scale is rho / (||g|| + eps)."""
    return tl.fma(scale, g, w)


@triton.jit
def asam_perturb(scale, w, g, t):
    """w + e with e = rho T^2 g / ||T g|| (ASAM)."""
    return tl.fma(scale * (t * t), g, w)


@triton.jit
def mix(gamma, one_minus_gamma, g1, g2):
    """G-RST (Zhao et al. 2022, arXiv 2203.09962): (1 - gamma) g1 + gamma g2."""
    return tl.fma(gamma, g2, one_minus_gamma * g1)


@triton.jit
def split(w):
    """float32 weights as bfloat16 and an int16, exactly: their bits are those of the first, with zeros below, plus the
    second. The first is w rounded to nearest, ties away from zero. A NaN is quiet, and has no remainder."""
    bits = tl.where(w == w, w.to(tl.uint32, bitcast=True), tl.full([], 0x7FC00000, tl.uint32))
    upper = ((bits + 0x8000) >> 16).to(tl.uint16)
    return upper.to(tl.bfloat16, bitcast=True), bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def join(b, r):
    """The float32 weights that split has split; b alone where that, written by somebody else, is 0 or infinite and r
    leads out of all numbers."""
    upper = b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    magnitude = (upper & 0x7FFFFFFF).to(tl.int32)  # clamped, which holds no conditions in registers
    most = tl.maximum(magnitude, 0x7F800000)
    found = tl.minimum(tl.maximum(magnitude + r.to(tl.int32), 0), most).to(tl.uint32)
    return (found | (upper & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def mixed(x):
    """The finalizer of MurmurHash3 (public domain): full avalanche. x is uint32."""
    x ^= x >> 16
    x *= _FIRST_FACTOR
    x ^= x >> 13
    x *= _SECOND_FACTOR
    return x ^ (x >> 16)


@triton.jit
def folded(h, x):
    """x is int64."""
    h = mixed(h ^ x.to(tl.uint32)) + _GOLDEN
    return mixed(h ^ (x >> 32).to(tl.uint32)) + _GOLDEN


@triton.jit
def shard_position(element, offset, run, stride):
    """Where an element of a shard is in the whole tensor: in runs of consecutive elements, a stride apart."""
    return offset + element // run * stride + element % run


@triton.jit
def random_key(seed, step, tensor):
    """The random bits are a pure function of (seed, step), the tensor's index and the element's."""
    zero = tl.full([], 0, tl.uint32)
    return folded(folded(folded(zero, seed), step), tensor)


@triton.jit
def key_in_block(key, block):
    """block is the element's index divided by 2^32."""
    return folded(key, block)


@triton.jit
def random_pair(key, index):
    """For elements 2 index (the low 16 bits) and 2 index + 1 (the high ones). index is uint32."""
    return mixed((index * _GOLDEN) ^ key)


@triton.jit
def random_bits(key, element):
    """16 bits. element, uint32, counts within its block of 2^32."""
    return (random_pair(key, element >> 1) >> ((element & 1) << 4)) & 0xFFFF


@triton.jit
def to_bfloat16(x, random):
    """x in float32, stochastically rounded to a number that bfloat16 holds exactly; random has 16 bits."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def to_float16(x, random):
    """Below 2^-14 a float16 has the fixed quantum 2^-24: there x is rounded as 2^-14 + |x|, which has that quantum."""
    magnitude = tl.abs(x)
    shift = tl.where(magnitude < 0.00006103515625, 0.00006103515625, 0.0)
    bits = ((magnitude + shift).to(tl.uint32, bitcast=True) + (random & 0x1FFF)) & 0xFFFFE000
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    rounded = (bits.to(tl.float32, bitcast=True) - shift).to(tl.uint32, bitcast=True) | sign
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
