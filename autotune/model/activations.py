"""What a pass needs beside weights and cache, and what the allocator or the heap holds beside everything in use.

Activations peak in the pass with the most tokens, which is the prefill: some copies of the hidden state, and the MLP's
intermediate vectors or the attention's masks and repeated heads, whichever is more. The target's prefill is over before
the draft's cache is made. On a GPU the allocator holds blocks that a cache was cut out of and that nothing fits any
more. All sizes are in bytes unless the name says otherwise.
"""

from __future__ import annotations

from ..config import MIB, Configuration, draft_head
from .kv_cache import cache_element_bytes, kv_by_layer
from .shape import ModelShape
from .weights import BNB_BLOCK, element_bytes

# Counted from what transformers' layers and the engine hold at once. With these all that is in use is predicted within
# 5 MiB on an H200 (benchmarks/LOG.md, "Predicting the footprint").
HIDDEN_COPIES = 4  # vectors a token: the embeddings, the layer's input, the residual and the normalized input
ROTARY = 2  # vectors of a head's size a token: cosines and sines
MASK_BYTES = 1  # a pair in PyTorch's boolean mask; the kernel adds a copy of it in the activations' type
SCORE_BYTES = 4  # a pair: eager softmax works in float32, between scores and probabilities in the activations' type
LOGIT_BYTES = 4  # a logit: they are cast to float32 for the choice of a token

# Bytes of keys and values that split_kv dequantizes or repeats at a time for a prompt, one KV head's at least: this
# much, or so many times the queries' size where that is more, since a chunk's MLP takes as much. Chosen: at 16k in
# chunks of 256 a layer takes 24 MiB where it took 128 (benchmarks/LOG.md, "Where the prompt's memory goes").
COPIED, COPIED_BY_QUERIES = 16 * MIB, 8
# Weights that quanto-int4 quantizes, or unpacks, at a time on a GPU: 32 MiB in bf16. Chosen; that fewer would leave
# `down_proj` too narrow for the GPU was argued, not measured (benchmarks/LOG.md, as above).
UNPACKED = 2**24
# An element: bnb-int8 makes a product in int32; on a CPU bitsandbytes scales it by float32 copies beside that, for
# which the sum of 16 was chosen.
INT8_PRODUCT_BYTES = {"cuda": 4, "cpu": 16}
MERGED = (
    "bf16",
    "fp32",
    "bnb-nf4",
    "bnb-fp4",
    "quanto-int4",
    "checkpoint",
)  # on a GPU, gate and up are one product of these
# Tokens from which on a whole matrix is expanded before the product. bitsandbytes' own 4-bit kernel mostly takes
# fewer than 8, and more on some GPUs (its backends/cuda/ops.py); quanto-int4 is expanded on a GPU, UNPACKED weights at
# a time (linear.MANY); int8 matrices always are, where they are not multiplied as they are stored.
DEQUANTIZED_FROM = {"bnb-nf4": 8, "bnb-fp4": 8, "nf4": 8, "quanto-int8": 1, "int8": 1, "int4": 1, "quanto-int4": 128}
MULTIPLIED_ON = {"int8": "cpu", "int4": "cuda"}  # an lm_head that is multiplied as it is stored there
# Half-precision copies of the matrix being quantized, which outweigh a prefill's workspace: chosen, not measured.
LOAD_COPIES = {"bnb-int8": 2}
# A weight, of UNPACKED at a time as quanto-int4 quantizes on a GPU (engine/linear.py): three float32 copies, the codes.
QUANTIZING_BYTES = 14
# Bytes of PyTorch's workspace for cuBLAS, one per process: on Hopper; PyTorch takes 8 MiB on older GPUs.
WORKSPACE = {"cuda": 32 * MIB, "cpu": 0}
# Bytes, the least that PyTorch's allocator takes for the pool of recorded steps, which use little of it: a small block
# of 2 MiB and a large one of 20 (benchmarks/LOG.md, "Where the prompt's memory goes").
RECORDED_POOL = 22 * MIB

# What allocator and heap hold: chosen to suit records of benchmarks/plan_error.py, of an H200 those in
# plan-error-h200/first.txt, of a CPU 200 that are not kept (benchmarks/LOG.md, "Predicting the footprint").
HEAP_KEPT = {"cuda": 0, "cpu": 32 * MIB}  # bytes of freed activations at most: twice M_TRIM_THRESHOLD
# Bytes, on a CPU, of oneDNN's kernels for a draft's shapes and every count of verified tokens, where matrices are, or
# become, bf16.
DRAFT_KERNELS = 30 * MIB
# On a GPU every layer's cache is cut out of free blocks, whose rests the next large vectors do not fit: share of the
# prefill's activations, and as much again of it as a preallocated cache holds of the bytes of one in full precision.
CUT_BLOCKS, CUT_BY_SLOTS = 0.10, 0.20
# What grows from chunk to chunk, a cache that is concatenated as well as the vectors of attention, leaves its outgrown
# blocks with the allocator: share of its last size. Chosen before these records, and kept beside them.
GROWTH_SLACK = {"cuda": 0.30, "cpu": 0.05}
QUANTIZED_GROWTH_SLACK = 0.5  # on a CPU, of it in full precision: expanded for each pass, and quantized again beside


def peak_bytes(
    target: ModelShape,
    draft: ModelShape | None,
    c: Configuration,
    context: int,
    tokens: int,
    prefill: int,
    kv: int,
    draft_kv: int,
    kind: str,
) -> int:
    """The transient peak beside both caches: loading, before which there are none, a prefill or decode.

    The draft's cache is made after the target's prefill, unless recorded steps keep it from the request before; and
    a recorded step has a pool of its own beside all other passes. Steps of several depths share it, but each keeps its
    logits.
    """
    load = LOAD_COPIES.get(c.weights, 0) * target.largest_linear * 2
    if (c.weights, kind) == ("quanto-int4", "cuda"):
        load = QUANTIZING_BYTES * min(UNPACKED, target.largest_linear)
    load -= kv + draft_kv
    reads = c.attention != "split_kv"  # which takes the cache as it is stored, but for prompts, which sdpa feeds
    decode = _pass_bytes(target, c, c.depth + 1, tokens, reads, c.depth + 1, kind)
    drafts = 0
    if draft is not None and c.has_draft_model:
        drafts = prefill_bytes(
            draft, c.replace(weights=c.draft_weights, lm_head=draft_head(c.draft_weights, kind)), context, tokens, kind
        )
    if c.launch == "eager":
        return max(load, prefill - draft_kv, drafts, decode) + WORKSPACE[kind]
    kept = sum(depth + 1 for depth in c.depths[:-1]) * target.vocab_size * element_bytes(target, c.weights)
    return max(load, prefill, drafts) + decode + kept + WORKSPACE[kind]


def slack_bytes(
    target: ModelShape,
    c: Configuration,
    context: int,
    tokens: int,
    prefill: int,
    activations: int,
    kv: int,
    draft_kv: int,
    kind: str,
) -> int:
    """What the allocator or the heap holds beside everything that is in use."""
    grows = c.cache in ("dynamic", "sliding", "offloaded")
    if kind == "cuda":
        whole = not c.prefill_chunk or c.prefill_chunk >= context
        slots = 0.0 if grows else cache_element_bytes(target, c.cache, c.weights) / element_bytes(target, c.weights)
        cut = (CUT_BLOCKS + CUT_BY_SLOTS * slots) * prefill
        expanded = _expanded_bytes(target, c.weights, min(c.prefill_chunk or context, context), kind)
        vector = min(c.prefill_chunk or context, context) * target.intermediate_size * element_bytes(target, c.weights)
        if vector > expanded:  # else the intermediate vectors lie where the matrix was
            cut += expanded * (1 if _merged(target, c.weights, kind) else 2)
        outgrown = 0 if whole else prefill + (kv + draft_kv if grows else 0)
        cut += RECORDED_POOL if c.launch != "eager" else 0
        return round(cut + GROWTH_SLACK[kind] * outgrown)
    slack = min(HEAP_KEPT[kind], activations)
    slack += DRAFT_KERNELS if c.has_draft_model and c.weights in ("bf16", "fp32", "quanto-int4") else 0
    if grows:
        return slack + round(GROWTH_SLACK[kind] * (kv + draft_kv))
    if c.cache == "static":
        return slack
    full = sum(kv_by_layer(target, c.replace(cache="dynamic"), tokens, c.weights))
    return slack + round(QUANTIZED_GROWTH_SLACK * full + GROWTH_SLACK[kind] * draft_kv)


def prefill_bytes(shape: ModelShape, c: Configuration, context: int, tokens: int, kind: str) -> int:
    chunk = min(c.prefill_chunk or context, context)
    keys = tokens if c.cache == "static" and chunk < context else context
    return _pass_bytes(shape, c, chunk, keys, chunk < context, 1, kind)


def _pass_bytes(
    shape: ModelShape, c: Configuration, queries: int, keys: int, past: bool, logits: int, kind: str
) -> int:
    """The peak of one forward pass of `queries` tokens over `keys` cached tokens."""
    element = element_bytes(shape, c.weights)
    hidden = queries * (HIDDEN_COPIES * shape.hidden_size + ROTARY * shape.head_dim) * element
    head = logits * shape.vocab_size * (element + LOGIT_BYTES)
    if c.lm_head in DEQUANTIZED_FROM and MULTIPLIED_ON.get(c.lm_head) != kind:
        head += (logits >= DEQUANTIZED_FROM[c.lm_head]) * shape.lm_head_elements * element
    mlp = _mlp_bytes(shape, c.weights, queries, element, kind)
    return hidden + max(head, mlp, _attention_bytes(shape, c, queries, keys, past, kind))


def _mlp_bytes(shape: ModelShape, weights: str, queries: int, element: int, kind: str) -> int:
    """Intermediate vectors; or those of a product (gate and up may be one) with what it needs besides."""
    vector = queries * shape.intermediate_size * element
    merged = _merged(shape, weights, kind)
    copies = 4 if merged else shape.mlp_copies
    workspace = _expanded_bytes(shape, weights, queries, kind)
    if weights == "bnb-int8":
        workspace = queries * (shape.intermediate_size * INT8_PRODUCT_BYTES[kind] + shape.hidden_size) + vector
    return max(copies * vector, (2 if merged else copies - 1) * vector + workspace)


def _merged(shape: ModelShape, weights: str, kind: str) -> bool:
    return kind == "cuda" and weights in MERGED and shape.gate_and_up > 0


def _expanded_bytes(shape: ModelShape, weights: str, queries: int, kind: str) -> int:
    """The largest matrix in full precision, where a product of so many tokens begins with that."""
    if queries < DEQUANTIZED_FROM.get(weights, queries + 1) or (weights == "quanto-int8" and kind == "cpu"):
        return 0  # a CPU multiplies int8
    if weights == "quanto-int4":
        return UNPACKED * element_bytes(shape, weights) if kind == "cuda" else 0
    elements = shape.gate_and_up if _merged(shape, weights, kind) else shape.largest_linear
    scales = 2 * 4 * elements // BNB_BLOCK if weights in ("bnb-nf4", "bnb-fp4") else 0  # float32, and once more
    return elements * element_bytes(shape, weights) + scales


def _attention_bytes(shape: ModelShape, c: Configuration, queries: int, keys: int, past: bool, kind: str) -> int:
    """Masks, heads repeated for kernels without grouped queries, eager scores, and the cache as it is read."""
    element, grouped = element_bytes(shape, c.weights), shape.heads != shape.kv_heads
    layer = 2 * shape.kv_heads * shape.head_dim * keys * element
    repeated = 2 * shape.heads * shape.head_dim * keys * element if grouped else 0
    pairs = queries * keys
    sliding = any(block.window and keys > block.window for block in shape.layers)
    quantized = past and c.cache.startswith("quantized")
    flash = kind == "cuda" and element == 2
    if c.attention == "split_kv":  # a few KV heads at a time; the codes' bytes are apart before they are dequantized
        masked = queries > 1 and (sliding or (past and not flash))
        copied = (layer if quantized else 0) + (repeated if masked else 0)
        most = max(COPIED, COPIED_BY_QUERIES * queries * shape.heads * shape.head_dim * element)
        copied = min(copied, max(most, copied // shape.kv_heads))
        return masked * pairs * (MASK_BYTES + element) + copied * (3 if quantized else 2) // 2
    unfused = c.attention == "sdpa" and kind == "cuda" and element == 4 and grouped  # flash has no float32
    needed = 0
    if c.attention == "eager" or (unfused and queries > 1):
        needed = shape.heads * pairs * (2 * element + SCORE_BYTES) + pairs * element + repeated
    elif c.attention == "sdpa" and queries > 1 and (past or sliding):
        needed = pairs * (MASK_BYTES + element) + repeated
    if quantized:
        return needed + layer  # expanded for the pass
    return max(needed, layer // 2 if past and c.cache != "static" else 0)  # new keys beside the old, then the values
