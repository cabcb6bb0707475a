"""Attention over raw keys and values against a plain float64 evaluation."""

import itertools

import pytest
import torch
from kvarn.integrations.transformers import dense

OPTIONS = list(itertools.product([None, 1, 7], [None, 2.0], [False, True]))


def plain(q, k, v, seen, scale, softcap, sink_logits):
    """Output [tokens, heads, head_dim] and LSE [tokens, heads] in float64, one query and head at a time."""
    q, k, v = q.double(), k.double(), v.double()
    heads, tokens, head_dim = q.shape
    out, lse = torch.zeros(tokens, heads, head_dim).double(), torch.zeros(tokens, heads).double()
    for head, token in itertools.product(range(heads), range(tokens)):
        at = head * k.shape[0] // heads
        scores = k[at] @ q[head, token] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores[seen[token]].exp()
        total = weights.sum() + (0.0 if sink_logits is None else sink_logits[head].double().exp())
        out[token, head] = weights @ v[at][seen[token]] / total
        lse[token, head] = total.log()
    return out, lse


def tensors(tokens, keys=None):
    generator = torch.Generator().manual_seed(7)
    keys = tokens if keys is None else keys
    q = torch.randn(6, tokens, 16, generator=generator)
    k, v = (torch.randn(2, keys, 16, generator=generator) for _ in range(2))
    return q, k, v, torch.randn(6, generator=generator)


def seen_by(queries, keys, window):
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    return (j <= i) & (i - j < (window or keys + 1))


@pytest.mark.parametrize(("window", "softcap", "sinks"), OPTIONS)
@pytest.mark.parametrize("scores", [1 << 22, 6 * 23 * 4])
def test_chunk(monkeypatch, window, softcap, sinks, scores):
    monkeypatch.setattr(dense, "_SCORES", scores)
    q, k, v, sink_logits = tensors(23)
    options = {"scale": 0.3, "softcap": softcap, "sink_logits": sink_logits if sinks else None}
    blocks = dense.chunk_attention(q, k, v, dense.Scoring(window=window, **options))
    out, lse = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    expected, expected_lse = plain(q, k, v, seen_by(23, 23, window), **options)
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(lse, expected_lse.float())
    whole = dense.causal_attention(q[None], k[None], v[None], dense.Scoring(window=window, **options))
    torch.testing.assert_close(whole[0], expected.float())


@pytest.mark.parametrize(("window", "softcap", "sinks"), OPTIONS)
@pytest.mark.parametrize("scores", [1 << 22, 6 * 40 * 4])
def test_masked(monkeypatch, window, softcap, sinks, scores):
    monkeypatch.setattr(dense, "_SCORES", scores)
    q, k, v, sink_logits = tensors(23, 40)
    seen = seen_by(23, 40, window)
    seen[:, 5:20] = False
    seen[3] = False
    options = {"scale": 0.3, "softcap": softcap, "sink_logits": sink_logits if sinks else None}
    expected, _ = plain(q, k, v, seen, **options)
    # A query that sees nothing has no output; the plain evaluation divides by nothing.
    expected[~seen.any(1)] = 0
    out = dense.masked_attention(q[None], k[None], v[None], seen[None, None], dense.Scoring(**options))
    torch.testing.assert_close(out[0], expected.float())
    added = torch.zeros(23, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
    some = seen.any(1)
    out = dense.masked_attention(q[None], k[None], v[None], added[None, None], dense.Scoring(**options))
    torch.testing.assert_close(out[0][some], expected.float()[some])


@pytest.mark.parametrize("blocks", [[23], [5, 17, 1]])
def test_the_past_is_added_in_place(blocks):
    q, k, v, _ = tensors(23, 40)
    seen, options = seen_by(23, 40, 15), {"scale": 0.3, "softcap": None, "sink_logits": None}
    past, own = seen.clone(), seen.clone()
    past[:, 17:] = False
    own[:, :17] = False
    expected, _ = plain(q, k, v, seen, **options)
    past_out, past_lse = plain(q, k, v, past, **options)
    # Late queries see nothing of the past: -inf, and whatever output.
    assert past_lse.isinf().any()
    out, lse = plain(q, k, v, own, **options)
    # The row's tokens lie between those of others.
    rows = torch.full((30, 6, 16), 7.0), torch.full((30, 6), 7.0)
    rows[0][4:27], rows[1][4:27] = past_out.nan_to_num(), past_lse
    own = zip(out.float().split(blocks), lse.float().split(blocks), strict=True)
    assert dense.add_past(own, *rows, first=4) == 27
    torch.testing.assert_close(rows[0][4:27], expected.float())
    assert (rows[0][:4] == 7).all()
    assert (rows[0][27:] == 7).all()
