"""Bytes of weights as a knob's word stores them: a matrix costs its elements, a quantized one its scales as well."""

from __future__ import annotations

from .folder import PlanError
from .shape import LayerShape, Linear, ModelShape
from .stored import QUANTO_GROUP

# As bitsandbytes.functional.quantize_4bit stores a matrix by default, with compress_statistics.
BNB_BLOCK = 64  # weights that share one absmax
BNB_NESTED_BLOCK = 256  # absmax values that share one second-level scale (double quantization)
BNB_TABLES = 4 * (16 + 256 + 1)  # bytes of float32 code books of both levels and the offset, once per matrix


def element_bytes(shape: ModelShape, weights: str) -> int:
    """Bytes of an unquantized element: norms, activations and full-precision cache."""
    return {"fp32": 4, "checkpoint": shape.element_bytes}.get(weights, 2)


def matrix_bytes(word: str, linear: Linear, element: int) -> int:
    """A matrix as `word` stores it, with its scales."""
    elements = linear.out * linear.inp
    match word:
        case "bnb-nf4" | "bnb-fp4" | "nf4":
            blocks = -(-elements // BNB_BLOCK)
            return -(-elements // 2) + blocks + 4 * -(-blocks // BNB_NESTED_BLOCK) + BNB_TABLES
        case "bnb-int8":
            return elements + 4 * linear.out
        case "quanto-int8" | "int8":
            return elements + element * linear.out
        case "quanto-int4" | "int4":
            return -(-elements // 2) + 2 * element * elements // quanto_group(linear.inp)
        case "checkpoint":
            return linear.stored
    return element * elements


def quanto_group(inp: int) -> int:
    """Elements that share a scale and a shift in quanto's qint4: the whole row where no group divides it."""
    return next((g for g in range(QUANTO_GROUP, 31, -32) if inp > QUANTO_GROUP and inp % g == 0), inp)


def block_bytes(block: LayerShape, word: str, element: int) -> int:
    other = block.other_stored if word == "checkpoint" else block.other * element
    return other + sum(matrix_bytes(word, linear, element) for linear in block.linears)


def model_bytes(shape: ModelShape, weights: str, lm_head: str, embeddings: str) -> tuple[int, int, int, int]:
    """Linears with norms, lm_head and embeddings on the device; embeddings on the host.

    A tied lm_head that is stored as the embedding is counts once, as lm_head.
    """
    known = shape.sizes.get((weights, lm_head, embeddings))
    if known is None:
        known = shape.sizes[weights, lm_head, embeddings] = _counted_bytes(shape, weights, lm_head, embeddings)
    return known


def _counted_bytes(shape: ModelShape, weights: str, lm_head: str, embeddings: str) -> tuple[int, int, int, int]:
    if weights == "checkpoint" and shape.prequantized and not shape.exact:
        raise PlanError(f"a quantized {shape.model_type} checkpoint needs its safetensors to be sized; download them")
    element = element_bytes(shape, weights)
    blocks = sum(block_bytes(block, weights, element) for block in (*shape.layers, shape.rest))
    embedding = shape.embedding_elements * element
    rows = Linear("lm_head", shape.lm_head_elements // shape.hidden_size, shape.hidden_size, 0)
    head = matrix_bytes(lm_head, rows, 4 if lm_head == "fp32" else element)
    if embeddings == "host":
        return blocks, head, 0, embedding
    shared = shape.tied and head == rows.out * rows.inp * element
    return blocks, head, embedding - head if shared else embedding, 0
