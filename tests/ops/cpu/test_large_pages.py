"""Copies in large pages: the same numbers, apart from each other, and one for a tied table."""

from __future__ import annotations

import torch

from trtlab.model.names import EMBEDDING
from trtlab.model.weights import Dense, Embedding, ModelWeights
from trtlab.ops.cpu import large_pages
from trtlab.ops.cpu.large_pages import LINE, LargePages
from trtlab.ops.cpu.weights import LARGE, cpu_weights


def test_copies_hold_the_same_numbers_and_do_not_overlap(monkeypatch):
    monkeypatch.setattr(large_pages, "CHUNK", 1000)
    pages = LargePages()
    dice = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (40, 40), (1, 1), (7, 9), (11, 13)]  # the second is larger than a chunk
    sources = [torch.randn(shape, generator=dice) for shape in shapes]
    sources[3] = sources[3].t()  # not contiguous
    copies = [pages.copy(source) for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        assert torch.equal(copy, source)
        assert copy.is_contiguous()
        assert copy.data_ptr() % LINE == 0
        assert copy.data_ptr() != source.data_ptr()
    for number, copy in enumerate(copies):
        copy.fill_(number)
    assert all((copy == number).all() for number, copy in enumerate(copies))


def test_a_copy_may_have_another_dtype():
    x = torch.tensor([[1.0, -2.5], [0.125, 3.0]])
    copy = LargePages().copy(x, torch.bfloat16)
    assert copy.dtype == torch.bfloat16
    assert torch.equal(copy.float(), x)


def test_the_lookup_of_a_tied_model_reads_the_copy_of_the_head():
    table = torch.randn(LARGE // 64, 64).to(torch.bfloat16)
    weights = ModelWeights(1, 1, (), Embedding(EMBEDDING, table), None, Dense(EMBEDDING, table))
    result = cpu_weights(weights, loops=True)
    assert result.embedding.weight.data_ptr() == result.lm_head.source.weight.data_ptr() != table.data_ptr()
    assert torch.equal(result.embedding.weight, table)
    apart = ModelWeights(1, 1, (), Embedding(EMBEDDING, table), None, Dense("lm_head.weight", table.clone()))
    assert cpu_weights(apart, loops=True).embedding.weight.data_ptr() == table.data_ptr()
