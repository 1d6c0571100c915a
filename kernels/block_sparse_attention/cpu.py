"""Block-sparse attention on the CPU: PyTorch's own flash kernel over just the kept keys.

Query blocks of all heads that keep the same number of keys form a bucket. A bucket's kept key blocks are
gathered, a cache-sized piece at a time, and attended as one batch: no padding, no masked work. Query blocks
that keep every key need no gathering. Reads the mask on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import block_tokens, unpack_bits

#: Bytes of gathered keys and values a piece: few enough to be in a cache still when they are read, enough for
#: every thread to have rows of its own. On two cores, six heads of 2,304 tokens at density 0.4, 1 MiB took
#: 0.87 to 1.01 of dense attention's time, 4 MiB 0.60 to 0.83, 16 MiB 0.67 to 0.90.
PIECE_BYTES = 1 << 22


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.attend`; a full mask gives ``F.scaled_dot_product_attention`` bit for bit.

    Args:
        q, k, v: [B, H, N, D].
        mask: int32 [B, H, Tq, W].
        block: tokens a block.
        scale: factor of q·k.

    Returns:
        out like q, lse fp32 [B, H, N] (fp64 for fp64 inputs).
    """
    batch, heads, tokens, _ = q.shape
    blocks = -(-tokens // block)
    kept = unpack_bits(mask, blocks)
    if bool(kept.all()):
        out, lse = _flash(q, k, v, scale)
        return torch.empty_like(q).copy_(out), lse

    rows = kept.flatten(0, 2)  # [B·H·Tq, Tk]
    queries = _blocks(q, block)
    out_rows = torch.empty_like(queries)
    lse_rows = queries.new_empty(queries.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))

    full = rows.all(-1)
    for head in full.view(-1, blocks).any(-1).nonzero().flatten().tolist():
        mine = head * blocks + full.view(-1, blocks)[head].nonzero().flatten()
        b, h = divmod(head, heads)
        out_part, lse_part = _flash(
            queries[mine].flatten(0, 1)[None, None], k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1], scale
        )
        out_rows[mine] = out_part.view(-1, *queries.shape[1:])
        lse_rows[mine] = lse_part.view(-1, block)

    if not bool(full.all()):
        keys, values = _blocks(k, block), _blocks(v, block)
        _attend_gathered(queries, keys, values, rows, full, tokens, scale, out_rows, lse_rows)
    out = torch.empty_like(q)
    out.copy_(out_rows.view(batch, heads, blocks * block, -1)[:, :, :tokens])
    return out, lse_rows.view(batch, heads, -1)[..., :tokens].contiguous()


def _attend_gathered(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    done: Tensor,
    tokens: int,
    scale: float,
    out_rows: Tensor,
    lse_rows: Tensor,
) -> None:
    """Attend every row that is not done; fills ``out_rows`` [R, block, D] and ``lse_rows`` [R, block].

    Args:
        queries, keys, values: [B·H·T, block, D], the last block of each head padded with zeros.
        rows: bool [R, Tk], R = B·H·Tq.
        done: bool [R].
    """
    block, dim = queries.shape[1:]
    blocks = rows.shape[1]
    counts = rows.sum(-1)
    kept_tokens = (rows * block_tokens(tokens, block, blocks, rows.device)).sum(-1)
    # Row-major order: the kept blocks of a row are neighbours, ascending, so padding can only come last.
    row_of, column = rows.nonzero(as_tuple=True)
    listed = row_of // blocks * blocks + column  # position in keys and values
    first = counts.cumsum(0) - counts
    flat_keys, flat_values = keys.flatten(1), values.flatten(1)
    block_bytes = 2 * flat_keys.shape[1] * keys.element_size()
    largest = max(PIECE_BYTES // block_bytes, blocks)  # key blocks of a piece; one row must fit
    gathered_keys = flat_keys.new_empty(largest, flat_keys.shape[1])
    gathered_values = torch.empty_like(gathered_keys)

    for length in kept_tokens[~done].unique().tolist():
        bucket = ((kept_tokens == length) & ~done).nonzero().flatten()
        count = -(-length // block)
        for piece in bucket.split(max(1, largest // count)):
            positions = listed[(first[piece, None] + torch.arange(count)).flatten()]
            size = positions.numel()
            torch.index_select(flat_keys, 0, positions, out=gathered_keys[:size])
            torch.index_select(flat_values, 0, positions, out=gathered_values[:size])
            out_part, lse_part = _flash(
                queries[piece].unsqueeze(1),
                gathered_keys[:size].view(-1, 1, count * block, dim)[:, :, :length],
                gathered_values[:size].view(-1, 1, count * block, dim)[:, :, :length],
                scale,
            )
            out_rows[piece] = out_part.squeeze(1)
            lse_rows[piece] = lse_part.squeeze(1)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] with any strides to contiguous [B·H·T, block, D], padded with zeros."""
    batch, heads, tokens, dim = x.shape
    blocks = -(-tokens // block)
    if tokens == blocks * block:
        return x.contiguous().view(-1, block, dim)
    padded = x.new_zeros(batch, heads, blocks * block, dim)
    padded[:, :, :tokens] = x
    return padded.view(-1, block, dim)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel behind ``F.scaled_dot_product_attention`` on the CPU, with its LSE [B, H, N]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
