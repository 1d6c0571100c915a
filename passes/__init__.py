"""The graph passes: dense self-attention in, adaptive block-sparse attention out.

    out = scaled_dot_product_attention(q, k, v)

becomes, for every self-attention site,

    refresh_mask_(q, k, top_p, delta, ctl, mask!, anchors!, counters!)
    out, lse = block_sparse_attention(q, k, v, mask, ctl)

in seven steps:

| pass                   | does                                                       | edits the graph |
|------------------------|------------------------------------------------------------|-----------------|
| find_attention_sites   | lists the attention nodes, tells self from cross           | no              |
| check_eligibility      | decides which are rewritten, with a reason for each skip   | no              |
| permute_tokens         | brings the tokens in another order, where one is asked for | yes             |
| rewrite_self_attention | inserts the two ops, naming the state they need            | yes             |
| bind_state             | supplies that state: inputs (live) or buffers (exported)   | yes             |
| remove_dead_nodes      | erases the dense attention that was replaced               | yes             |
| verify_graph           | holds the result against its written specification         | no              |

The same passes serve Dynamo graphs and torch.export graphs; what differs lies in ``haste_compile._torch``.
With HASTE_DUMP set to a folder, the graph before and after each pass is written there.
"""

from __future__ import annotations

from torch import fx

from haste_compile.passes.base import BufferBinding, PassContext, PlaceholderBinding, StateInput
from haste_compile.passes.bind_state import bind_state
from haste_compile.passes.check_eligibility import check_eligibility
from haste_compile.passes.dump import GraphDump
from haste_compile.passes.find_attention_sites import find_attention_sites
from haste_compile.passes.permute_tokens import permute_tokens
from haste_compile.passes.remove_dead_nodes import remove_dead_nodes
from haste_compile.passes.rewrite_self_attention import rewrite_self_attention
from haste_compile.passes.verify_graph import verify_graph

PASSES = (
    find_attention_sites,
    check_eligibility,
    permute_tokens,
    rewrite_self_attention,
    bind_state,
    remove_dead_nodes,
    verify_graph,
)

__all__ = [
    "PASSES",
    "BufferBinding",
    "PassContext",
    "PlaceholderBinding",
    "StateInput",
    "bind_state",
    "check_eligibility",
    "find_attention_sites",
    "permute_tokens",
    "remove_dead_nodes",
    "rewrite_self_attention",
    "run_passes",
    "verify_graph",
]


def run_passes(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Run every pass on ``gm``, in place, and leave what they learnt in ``ctx``.

    Raises:
        NoAttentionSitesError: the graph has no attention that a pass can see.
        UnsupportedSiteError: with ``strict=True``, a self-attention site cannot be rewritten.
        TokenOrderError: with ``strict=True``, the tokens cannot be put in the order asked for.
        OptionError: ``dense_layers`` names a site that the graph does not have.
        GraphContractError: the result breaks the specification in ``verify_graph``.
        OutputPathError: the HASTE_DUMP folder cannot be written.
    """
    dump = GraphDump.from_environment()
    dump.write("00_input", gm)
    for number, run in enumerate(PASSES, 1):
        dump.write(f"{number:02}_{run.__name__}.before", gm)
        run(gm, ctx)
        dump.write(f"{number:02}_{run.__name__}.after", gm)
    gm.recompile()
