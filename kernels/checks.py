"""What the ops ask of their tensors; every refusal names the tensor, what it is, and what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.errors import InputError
from haste_compile.kernels.layout import COUNTER_COLUMNS, CTL_COLUMNS, Ctl


def check_heads(tensors: dict[str, Tensor]) -> None:
    """q, k (and v) of self-attention: [B, H, N, D] alike, with a layout and dtype that the kernels take."""
    q = tensors["q"]
    for name, x in tensors.items():
        if x.dim() != 4 or x.shape != q.shape or 0 in x.shape:
            wanted = "[B, H, N, D] without an empty axis, the same for q, k and v"
            raise bad_input(name, f"shape {tuple(x.shape)}", wanted, "Only self-attention is supported.")
        if x.dtype != q.dtype or x.device != q.device:
            wanted = f"{q.dtype} on {q.device}, like q"
            raise bad_input(name, f"{x.dtype} on {x.device}", wanted, "Give q, k and v one dtype and device.")
        if x.stride(3) != 1:
            wanted = "a last axis of stride 1"
            raise bad_input(
                name, f"strides {tuple(x.stride())}", wanted, "Call .contiguous() on the tensor first."
            )
    if q.shape[3] not in (64, 128):
        raise bad_input("q", f"head dim {q.shape[3]}", "64 or 128", "Leave this attention dense.")
    dtypes = (torch.bfloat16, torch.float16) if q.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if q.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes)) + f" on {q.device.type}"
        raise bad_input("q", str(q.dtype), wanted, "Run the model in a dtype that the kernels take.")


def check_gate(
    q: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    anchors: Tensor,
    counters: Tensor,
    slots: int,
    reuse: str,
    interval: int,
) -> None:
    """What temporal mask reuse reads and keeps, for any predictor."""
    batch, heads, _, dim = q.shape
    check_tensor("ctl", ctl, q, torch.int32, (CTL_COLUMNS,))
    check_tensor("anchors", anchors, q, torch.float32, (slots, batch, heads, 2, dim))
    check_tensor("counters", counters, q, torch.int64, (slots, batch, heads, COUNTER_COLUMNS))
    for name, thresholds in (("top_p", top_p), ("delta", delta)):
        if thresholds.dim() != 1 or thresholds.shape[0] < heads:
            wanted = f"one value for each of the {heads} heads"
            raise bad_input(
                name, f"shape {tuple(thresholds.shape)}", wanted, "Give a vector of at least H values."
            )
        check_tensor(name, thresholds, q, torch.float32, tuple(thresholds.shape))
    if reuse not in ("drift", "never", "freeze", "interval"):
        wanted = "'drift', 'never', 'freeze' or 'interval'"
        raise bad_input("reuse", repr(reuse), wanted, "Choose another rule.")
    if reuse == "interval" and interval < 1:
        raise bad_input(
            "interval", str(interval), "at least 1", "Say after how many calls a mask is rebuilt."
        )


def check_tensor(name: str, x: Tensor, q: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A state tensor: shape, dtype, the device of q, contiguous."""
    if tuple(x.shape) != shape:
        fix = "Allocate the state for this batch, head count and number of tokens."
        raise bad_input(name, f"shape {tuple(x.shape)}", f"{shape}", fix)
    if x.dtype != dtype or x.device != q.device:
        wanted = f"{dtype} on {q.device}"
        raise bad_input(name, f"{x.dtype} on {x.device}", wanted, "Allocate the state where the model runs.")
    if not x.is_contiguous():
        found = f"strides {tuple(x.stride())}"
        raise bad_input(name, found, "a contiguous tensor", "Call .contiguous() first.")


def read_slot(ctl: Tensor, mask: Tensor) -> int:
    """The slot of a call on the CPU, where it can be read."""
    slot = int(ctl[Ctl.SLOT])
    if not 0 <= slot < mask.shape[0]:
        wanted = f"a slot in [0, {mask.shape[0]})"
        raise bad_input("ctl", f"slot {slot}", wanted, "Allocate state for more slots.")
    return slot


def bad_input(where: str, found: str, wanted: str, fix: str) -> InputError:
    return InputError(found=found, wanted=wanted, where=f"{where} of a haste op", fix=fix)
